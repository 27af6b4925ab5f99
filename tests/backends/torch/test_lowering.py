"""What is changed in a list of calls after a graph has been lowered."""

import dataclasses

import numpy as np
import pytest

from llmrs.backends.base import load_backend
from llmrs.backends.testing import MODELS, RandomModel, prefill_batch, prompts
from llmrs.backends.torch.lowering import Call, Program, last_early


@pytest.mark.parametrize("name", MODELS)
def test_only_wanted_rows_go_through_the_end_of_the_last_layer(name: str):
    backend = RandomModel.of(name).on(load_backend("torch")("cpu", "f32", "f32"))
    backend.allocate(64, 4, 8, 64)
    batch = prefill_batch(prompts(9, 1, 17))
    batch = dataclasses.replace(batch, rows=np.array([3, 8, 9, 26], np.int32))
    expected = backend.to_host(backend.forward(batch)).copy()
    backend.program = last_early(backend.program)
    ops = [call.op for call in backend.program.calls]
    attend = len(ops) - ops[::-1].index("attend") - 1
    assert ops[attend + 1 : attend + 3] == [
        "gather_logits_rows",
        "gather_logits_rows",
    ]  # attention's result, and what it is added to
    assert ops.count("gather_logits_rows") == 2
    np.testing.assert_allclose(backend.to_host(backend.forward(batch)), expected, atol=1e-4)


def calls(*ops: tuple[str, list[int], list[int]]) -> list[Call]:
    return [Call(op, len, inputs, outs) for op, inputs, outs in ops]


def test_fused_sums_are_row_by_row_too():
    layer = calls(
        ("attend", [0], [1]), ("linear", [1], [2]), ("fused_add_rms_norm", [0, 2], [3, 4]), ("linear", [4], [5])
    )
    end = calls(("add", [3, 5], [6]), ("rms_norm", [6], [7]), ("gather_logits_rows", [7], [8]), ("lm_head", [8], [9]))
    found = last_early(Program([*layer, *end], 10, [9])).calls
    assert [c.op for c in found[:5]] == [
        "attend",
        "gather_logits_rows",
        "gather_logits_rows",
        "linear",
        "fused_add_rms_norm",
    ]
    assert [c.op for c in found[5:]] == ["linear", "add", "rms_norm", "lm_head"]


def test_rows_that_somebody_reads_stay():
    after_norm = calls(("add", [0, 1], [2]), ("gather_logits_rows", [2], [3]), ("lm_head", [3], [4]))
    assert last_early(Program(after_norm, 5, [4])).calls[-1].inputs == [2]
    for program in (
        Program(after_norm, 5, [4, 2]),
        Program(calls(("attend", [0, 1], [2]), ("gather_logits_rows", [2], [3]), ("lm_head", [3], [4])), 5, [4]),
    ):
        assert last_early(program) is program
