"""How tokens get to the host: a buffer is used again only when it has been read, and nothing else writes to it."""

import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.testing import RandomModel, core_on, prompts, request, run
from llmrs.backends.torch.async_output import Outbox, TorchTicket

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ROWS, STEPS = 5, 3


def send(outbox: Outbox, *tokens: int, likely=None):
    return outbox.send(torch.tensor(tokens, device=DEVICE), likely)


def test_the_buffers_are_used_again():
    outbox = Outbox(DEVICE, ROWS, STEPS)
    buffers, alive = {id(b) for b in outbox.free}, []
    for step in range(20):
        outbox.hold()
        alive.append((send(outbox, step, step + 1, step + 2), step))
        if len(alive) == STEPS:
            ticket, began = alive.pop(0)
            assert ticket.tokens().tolist() == [began, began + 1, began + 2]
    assert {id(t.buffer) for t, _ in alive} | {id(b) for b in outbox.free} == buffers


def test_a_buffer_is_nobody_elses_before_it_is_read():
    """In any order; and what was read stays what it was when the buffer goes to another step."""
    outbox = Outbox(DEVICE, ROWS, STEPS)
    tickets = [send(outbox, n) for n in range(STEPS + 2)]  # more than there are buffers
    assert len({id(t.buffer) for t in tickets}) == STEPS + 2
    found = [tickets[n].tokens() for n in (3, 0, 4, 2, 1)]
    again = [send(outbox, 90 + n, 7) for n in range(STEPS + 2)]
    assert [int(f[0]) for f in found] == [3, 0, 4, 2, 1]
    assert [t.tokens().tolist() for t in again] == [[90 + n, 7] for n in range(STEPS + 2)]
    assert [t.tokens().tolist() for t in tickets] == [[n] for n in range(STEPS + 2)]  # a second time
    assert len({id(b) for b in outbox.free}) == len(outbox.free), "each was given back once"


def test_tickets_that_are_never_read_take_their_buffers_along():
    outbox = Outbox(DEVICE, ROWS, STEPS)
    for n in range(3 * STEPS):
        send(outbox, n)
    kept = send(outbox, 5)
    send(outbox, 6)
    assert kept.tokens().tolist() == [5]


def test_more_rows_than_there_is_room_for():
    outbox = Outbox(DEVICE, 2, 1)
    assert send(outbox, 1, 2, 3, 4).tokens().tolist() == [1, 2, 3, 4]
    assert send(outbox, 5).tokens().tolist() == [5]


def test_log_probabilities_come_along():
    likely = (torch.tensor([-0.5, -1.0]), torch.tensor([[3], [4]]), torch.tensor([[-0.5], [-0.25]]))
    likely = tuple(t.to(DEVICE) for t in likely)
    for ticket in (
        send(Outbox(DEVICE, ROWS, STEPS), 1, 2, likely=likely),
        TorchTicket(torch.tensor([1, 2]).to(DEVICE), likely),
    ):
        assert ticket.tokens().dtype == np.int32
        found = ticket.logprobs()
        assert found.chosen.tolist() == [-0.5, -1.0]
        assert (found.top_ids.dtype, found.top_ids.tolist()) == (np.int32, [[3], [4]])
        assert found.top.tolist() == [[-0.5], [-0.25]]
    assert send(Outbox(DEVICE, ROWS, STEPS), 1).logprobs() is None


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_the_same_with_an_outbox(graphs: bool):
    """The tokens of a step lie where those of the next will, and the engine reads them a step later."""
    pytest.importorskip("triton")
    found = []
    for aside in (False, True):
        backend = load_backend("torch")(str(DEVICE), "f32", "f32")
        backend.use_kernels("triton", graphs=graphs)
        backend.kernels.aside, backend.max_in_flight = aside, 1 + aside
        backend = RandomModel.of("qwen3", num_hidden_layers=1).on(backend)
        core = core_on(backend)
        assert (backend.outbox is not None) == aside
        asked = [request(p, n, max_tokens=6 - n, temperature=0.7) for n, p in enumerate(prompts(3, 5))]
        found.append(run(core, asked))
        assert not backend.outbox or len(backend.outbox.free) == 3
    assert found[0] == found[1]
