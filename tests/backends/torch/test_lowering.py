"""How a graph's function is changed before it is lowered, and what the programs of one model share."""

import dataclasses

import numpy as np
import pytest

from llmrs.backends.base import load_backend
from llmrs.backends.fusion import FUSED_ADD_RMS_NORM, fuse
from llmrs.backends.linearize import hoist_logits_gather, inline
from llmrs.backends.testing import MODELS, RandomModel, prefill_batch, prompts
from llmrs.core.ir import Function, Graph, T, Type, check
from llmrs.models.arch.builder import Builder
from llmrs.models.arch.layers import matrix, vector

X = Type("act", (T, 8))


class Hoisted(load_backend("torch")):
    """Plain torch with the gather hoisted, as the kernels have it."""

    def load_weights(self, weights, progress):
        self.graph = Graph(self.graph.name, {}, hoist_logits_gather(inline(self.graph)))
        super().load_weights(weights, progress)


@pytest.mark.parametrize("name", MODELS)
def test_only_logits_rows_go_through_the_end_of_the_last_layer(name: str):
    batch = prefill_batch(prompts(9, 1, 17))
    batch = dataclasses.replace(batch, logits_indices=np.array([3, 8, 9, 26], np.int32))
    logits = []
    for kind in (load_backend("torch"), Hoisted):
        backend = RandomModel.of(name).on(kind("cpu", "f32", "f32"))
        backend.allocate(64, 4, 8, 64)
        logits.append(backend.to_host(backend.forward(batch)).copy())
    check(backend.graph)
    ops = [call.op for call in backend.programs.full.calls]
    attend = len(ops) - ops[::-1].index("attend") - 1
    assert ops[attend + 1 : attend + 3] == [
        "gather_logits_rows",
        "gather_logits_rows",
    ]  # attention's result, and what it is added to
    assert ops.count("gather_logits_rows") == 2
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)


def end_of_a_model(b: Builder, x, y) -> Function:
    n = b("rms_norm", b("add", x, y, to="x"), vector("norm", 8), eps=1e-6, to="n")
    return b.done(b("lm_head", b("gather_logits_rows", n, to="last"), matrix("head", 5, 8), to="logits"))


def test_fused_sums_are_tokenwise_too():
    b = Builder("main", x=X, q=Type("act", (T, 2, 4)), kv=Type("kv", (1, 4)))
    x, q, kv = b.inputs
    y = b("linear", b("attend", q, kv, scale=1.0, to="y"), matrix("o", 8, 8), shard="columns", to="o")
    x = b("add", x, y, to="x")
    y = b("linear", b("rms_norm", x, vector("n", 8), eps=1e-6, to="n"), matrix("d", 8, 8), shard="columns", to="d")
    function = hoist_logits_gather(fuse(end_of_a_model(b, x, y), [FUSED_ADD_RMS_NORM]))
    check(Graph("hoisted", {}, function))
    assert [e.op for e in function.equations] == [
        "attend",
        "gather_logits_rows",
        "gather_logits_rows",
        "linear",
        "fused_add_rms_norm",
        "linear",
        "fused_add_rms_norm",
        "lm_head",
    ]


def test_rows_that_are_read_elsewhere_stay():
    b = Builder("main", x=X, y=X)
    hoisted = hoist_logits_gather(end_of_a_model(b, *b.inputs))
    check(Graph("hoisted", {}, hoisted))
    assert [e.op for e in hoisted.equations] == [
        "gather_logits_rows",
        "gather_logits_rows",
        "add",
        "rms_norm",
        "lm_head",
    ]
    assert hoisted.equations[-1].inputs[0] == hoisted.equations[-2].outs[0]
    b = Builder("main", x=X, y=X)
    plain = end_of_a_model(b, *b.inputs)
    shown = dataclasses.replace(plain, outs=(*plain.outs, plain.equations[0].outs[0]))
    assert hoist_logits_gather(shown) is shown
    after_attend = dataclasses.replace(plain, equations=plain.equations[2:], inputs=plain.equations[1].outs)
    assert hoist_logits_gather(after_attend) is after_attend


def test_weights_are_bound_once_for_all_programs():
    pytest.importorskip("triton")
    interpreted = pytest.importorskip("llmrs.backends.torch.kernels.launch").interpreted
    if not interpreted():
        pytest.skip("needs Triton's interpreter")
    backend, loaded = load_backend("torch")("cpu", "f32", "f32"), []
    backend.use_kernels("triton", graphs=False)
    model = RandomModel.of("qwen3", num_hidden_layers=2)
    backend.load(model.graph, model.weights, loaded.append)
    tensors = {s.tensor for w in model.graph.weights() for s in w.segments}
    assert sum(loaded) == sum(model.weights[name].nbytes for name in tensors)
    full, one, few = ([c for c in p.calls if c.weights] for p in backend.programs)
    linears = [c.weights[0] for c in full if c.op in ("linear", "merged_linear", "lm_head")]
    assert [c.weights[0].matrix for c in few if c.op == "fused_linear"] == linears
    assert [c.weights[0].matrix for c in one if c.op == "fused_linear"] == linears[:-1]
