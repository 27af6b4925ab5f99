"""How tokens get to the host: a buffer is used again only when it has been read, and nothing else writes to it."""

import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.testing import RandomModel, core_on, prompts, request, run
from llmrs.backends.torch.async_output import OutputCopier, TorchOutput

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ROWS, STEPS = 5, 3


def send(copier: OutputCopier, *tokens: int, logprobs=None):
    return copier.send(torch.tensor(tokens, device=DEVICE), logprobs)


def test_the_buffers_are_used_again():
    copier = OutputCopier(DEVICE, ROWS, STEPS)
    buffers, alive = {id(b) for b in copier.free}, []
    for step in range(20):
        copier.wait_for_copy()
        alive.append((send(copier, step, step + 1, step + 2), step))
        if len(alive) == STEPS:
            output, began = alive.pop(0)
            assert output.tokens().tolist() == [began, began + 1, began + 2]
    assert {id(t.buffer) for t, _ in alive} | {id(b) for b in copier.free} == buffers


def test_a_buffer_is_nobody_elses_before_it_is_read():
    """In any order; and what was read stays what it was when the buffer goes to another step."""
    copier = OutputCopier(DEVICE, ROWS, STEPS)
    outputs = [send(copier, n) for n in range(STEPS + 2)]  # more than there are buffers
    assert len({id(t.buffer) for t in outputs}) == STEPS + 2
    found = [outputs[n].tokens() for n in (3, 0, 4, 2, 1)]
    again = [send(copier, 90 + n, 7) for n in range(STEPS + 2)]
    assert [int(f[0]) for f in found] == [3, 0, 4, 2, 1]
    assert [t.tokens().tolist() for t in again] == [[90 + n, 7] for n in range(STEPS + 2)]
    assert [t.tokens().tolist() for t in outputs] == [[n] for n in range(STEPS + 2)]  # a second time
    assert len({id(b) for b in copier.free}) == len(copier.free), "each was given back once"


def test_outputs_that_are_never_read_take_their_buffers_along():
    copier = OutputCopier(DEVICE, ROWS, STEPS)
    for n in range(3 * STEPS):
        send(copier, n)
    kept = send(copier, 5)
    send(copier, 6)
    assert kept.tokens().tolist() == [5]


def test_more_rows_than_there_is_room_for():
    copier = OutputCopier(DEVICE, 2, 1)
    assert send(copier, 1, 2, 3, 4).tokens().tolist() == [1, 2, 3, 4]
    assert send(copier, 5).tokens().tolist() == [5]


def test_log_probabilities_come_along():
    logprobs = (torch.tensor([-0.5, -1.0]), torch.tensor([[3], [4]]), torch.tensor([[-0.5], [-0.25]]))
    logprobs = tuple(t.to(DEVICE) for t in logprobs)
    for output in (
        send(OutputCopier(DEVICE, ROWS, STEPS), 1, 2, logprobs=logprobs),
        TorchOutput(torch.tensor([1, 2]).to(DEVICE), logprobs),
    ):
        assert output.tokens().dtype == np.int32
        found = output.logprobs()
        assert found.chosen.tolist() == [-0.5, -1.0]
        assert (found.top_ids.dtype, found.top_ids.tolist()) == (np.int32, [[3], [4]])
        assert found.top.tolist() == [[-0.5], [-0.25]]
    assert send(OutputCopier(DEVICE, ROWS, STEPS), 1).logprobs() is None


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_the_same_with_an_outbox(graphs: bool):
    """The tokens of a step lie where those of the next will, and the engine reads them a step later."""
    pytest.importorskip("triton")
    found = []
    for aside in (False, True):
        backend = load_backend("torch")(str(DEVICE), "f32", "f32")
        backend.use_kernels("triton", graphs=graphs)
        backend.runner.copy_output, backend.max_in_flight = aside, 1 + aside
        backend = RandomModel.of("qwen3", num_hidden_layers=1).on(backend)
        core = core_on(backend)
        assert (backend.output_copier is not None) == aside
        asked = [request(p, n, max_tokens=6 - n, temperature=0.7) for n, p in enumerate(prompts(3, 5))]
        found.append(run(core, asked))
        assert not backend.output_copier or len(backend.output_copier.free) == 3
    assert found[0] == found[1]
