"""Two parts of bench_cuda.py: ways to sample, and decode steps with chained kernels, each beside what it replaces."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from llmrs.backends.torch.graphs import Recorder
from llmrs.backends.torch.kernels.bounds import draw_bounded
from llmrs.backends.torch.kernels.edges import find_edges
from llmrs.backends.torch.kernels.launch import chaining
from llmrs.backends.torch.kernels.sampling import draw
from llmrs.backends.torch.tickets import Outbox
from llmrs.core.batch import Batch

Timed = Callable[[Callable[[], object]], float]
GPU, VOCABULARY = "cuda:0", 151_936
WAYS = {"as before": (False, False, False), "chained": (True, False, False), "by bounds": (True, True, False),
        "all": (True, True, True)}  # chained kernels, sampling by bounds, tokens copied aside  # fmt: skip


def recorded(run: Callable[[], Any]) -> Callable[[], None]:
    """The same as a CUDA graph, so that the host's time for launches does not count."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def random_logits(rows: int, kind: str) -> torch.Tensor:
    """bf16 (rows, V): as a random model's, or ten of them far above the rest, as a real one's are."""
    x = torch.randn(rows, VOCABULARY, device=GPU) * (0.7 if kind == "flat" else 2.5)
    if kind == "peaked":
        x.scatter_add_(1, torch.randint(VOCABULARY, (rows, 10), device=GPU), 12 + 3 * torch.randn(rows, 10, device=GPU))
    return x.bfloat16()


def drawn(way: Callable[..., torch.Tensor], logits: list[torch.Tensor], rest: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Tokens (n, rows) of n times logits, one after the other."""
    return torch.stack([way(x, *rest) for x in logits])


def sampling(timed: Timed, found: dict[str, Any]) -> None:
    """Device time of drawing, us and TB/s, and whether both ways draw the same; then other cuts of the new one."""
    for rows in (1, 8, 64, 256):
        slots, last = (
            torch.arange(rows, dtype=torch.int32, device=GPU),
            torch.zeros(rows, dtype=torch.int64, device=GPU),
        )
        keys = torch.randint(-(2**31), 2**31, (rows,), device=GPU).int()
        for kind, warmth in (("flat", 0.6), ("peaked", 0.6), ("flat", 0.0)):
            logits = [random_logits(rows, kind) for _ in range(max(2, 32 // rows))]  # of 256 rows more than L2 holds
            rest = (torch.full((rows,), warmth, device=GPU), keys, slots, last)
            expected = drawn(draw, logits, rest)
            for name, way in ways(rows, warmth).items():
                with chaining(True):
                    seconds = timed(recorded(partial(drawn, way, logits, rest))) / len(logits)
                    same = torch.equal(drawn(way, logits, rest), expected)
                rate = logits[0].nbytes / seconds / 1e12
                found[f"sampling {rows} {kind} {warmth} {name}"] = [seconds, rate, same]
                print(f"{rows:4} {kind:6} T={warmth}: {name:14} {seconds * 1e6:6.1f} us, {rate:.2f} TB/s"
                      f"{'' if same else '  OTHER TOKENS'}", flush=True)  # fmt: skip
        cut_ones(keys, slots, last)


def ways(rows: int, warmth: float) -> dict[str, Callable[..., torch.Tensor]]:
    """Both ways to draw, and the new one with other cuts where they matter most."""
    shapes = ((512, 16), (2048, 16), (1024, 8), (1024, 32)) if rows == 256 and warmth else ()
    other = {f"new {c} x {p}": partial(draw_bounded, chunk=c, programs=132 * p) for c, p in shapes}
    return {"old": draw, "new": draw_bounded, **other}


def cut_ones(keys: torch.Tensor, slots: torch.Tensor, last: torch.Tensor) -> None:
    """Whether both ways draw the same of what top-k and top-p leave."""
    rows = len(keys)
    logits, temperature = random_logits(rows, "peaked"), torch.full((rows,), 0.6, device=GPU)
    top_k, top_p = torch.full((rows,), 20, dtype=torch.int32, device=GPU), torch.full((rows,), 0.95, device=GPU)
    edges = find_edges(logits, temperature, top_k, top_p, torch.zeros_like(top_p))
    old, new = (way(logits, temperature, keys, slots, last, edges) for way in (draw, draw_bounded))
    print(f"top-k and top-p: {'the same tokens' if torch.equal(old, new) else 'OTHER TOKENS'}", flush=True)


@contextmanager
def way_of(backend: Any, chain: bool, bounded: bool, aside: bool) -> Iterator[None]:
    """The backend with these switches and graphs of its own; and as it was."""
    k, outbox = backend.kernels, backend.outbox
    before = k.chain, k.bounded, k.aside, k.recorded, k.recorder
    k.chain, k.bounded, k.aside, k.recorded, k.recorder = chain, bounded, aside, {}, Recorder(torch.device(GPU))
    k.step = None
    backend.outbox = Outbox(torch.device(GPU), len(backend.slots.last_token), 3) if aside else None
    try:
        yield
    finally:
        torch.cuda.synchronize()
        k.chain, k.bounded, k.aside, k.recorded, k.recorder = before
        k.step, backend.outbox = None, outbox


def pdl(backend: Any, decode_batch: Callable[[int, int], Batch], timed: Timed, found: dict[str, Any]) -> None:
    """Device time of decode steps each way, twice in turn; the tokens of steps that follow each other are the same."""
    for count, context in ((1, 384), (8, 384), (256, 512)):
        batch, expected = decode_batch(count, context), None
        batch = Batch(**{**vars(batch), "tokens": -1 - batch.slots})  # each step goes on from the one before
        for name, switches in (*WAYS.items(), *WAYS.items()):
            with way_of(backend, *switches):
                tokens = answers(backend, batch)
                expected = tokens if expected is None else expected
                forward = timed(lambda b=batch: backend.forward(b))
                logits = backend.forward(batch)
                sample = timed(torch.inference_mode()(lambda b=batch, x=logits: backend.kernels.sample(x, b, None)))
                step = timed(in_turn(backend, batch))
            same = bool((tokens == expected).all())
            found.setdefault(f"pdl {count}x{context} {name}", []).append([forward, sample, step, same])
            print(f"{count:4} x {context}, {name:9}: forward {forward * 1e6:6.0f} us, sample {sample * 1e6:5.0f}, step "
                  f"{step * 1e6:6.0f}{'' if same else '  OTHER TOKENS'}", flush=True)  # fmt: skip


def answers(backend: Any, batch: Batch, steps: int = 24) -> np.ndarray:
    """int32 (steps, S) from a state that is always the same."""
    backend.slots.last_token.zero_()
    run = in_turn(backend, batch)
    return np.stack([t for t in (run() for _ in range(steps + 1)) if t is not None])


def in_turn(backend: Any, batch: Batch) -> Callable[[], np.ndarray | None]:
    """Launches a step, and reads the one before, as the engine does."""
    alive: deque[Any] = deque()

    def run() -> np.ndarray | None:
        alive.append(backend.launch(batch))
        return alive.popleft().tokens() if len(alive) > 1 else None

    return run
