"""Two parts of bench_cuda.py: sampling by itself, and decode steps with chained kernels and without."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_gemm import recorded

from llmrs.backends.torch.cuda_graphs import GraphCapturer
from llmrs.backends.torch.kernels.gumbel_argmax import draw
from llmrs.backends.torch.kernels.launch import chaining
from llmrs.core.batch import Batch

Timed = Callable[[Callable[[], object]], float]
GPU, VOCABULARY = "cuda:0", 151_936
WAYS = {"apart": False, "chained": True}


def random_logits(rows: int, kind: str) -> torch.Tensor:
    """bf16 (rows, V): as a random model's, or ten of them far above the rest, as a real one's are."""
    x = torch.randn(rows, VOCABULARY, device=GPU) * (0.7 if kind == "flat" else 2.5)
    if kind == "peaked":
        x.scatter_add_(1, torch.randint(VOCABULARY, (rows, 10), device=GPU), 12 + 3 * torch.randn(rows, 10, device=GPU))
    return x.bfloat16()


def drawn(logits: list[torch.Tensor], rest: tuple[torch.Tensor, ...], **how: int) -> torch.Tensor:
    """Tokens (n, rows) of n times logits, one after the other."""
    return torch.stack([draw(x, *rest, **how) for x in logits])


def sampling(timed: Timed, found: dict[str, Any]) -> None:
    """Device time of drawing, us and TB/s, with other cuts where they matter most; all must draw the same."""
    for rows in (1, 8, 64, 256):
        last = torch.zeros(rows, dtype=torch.int64, device=GPU)
        slots = torch.arange(rows, dtype=torch.int32, device=GPU)
        keys = torch.randint(-(2**31), 2**31, (rows,), device=GPU).int()
        for kind, warmth in (("flat", 0.6), ("peaked", 0.6), ("flat", 0.0)):
            logits = [random_logits(rows, kind) for _ in range(max(2, 32 // rows))]  # of 256 rows more than L2 holds
            rest = (torch.full((rows,), warmth, device=GPU), keys, slots, last)
            expected = drawn(logits, rest)
            for name, how in cuts_of(rows, warmth).items():
                with chaining(True):
                    seconds = timed(recorded(partial(drawn, logits, rest, **how))[0]) / len(logits)
                    same = torch.equal(drawn(logits, rest, **how), expected)
                rate = logits[0].nbytes / seconds / 1e12
                found[f"sampling {rows} {kind} {warmth} {name}"] = [seconds, rate, same]
                print(f"{rows:4} {kind:6} T={warmth}: {name:14} {seconds * 1e6:6.1f} us, {rate:.2f} TB/s"
                      f"{'' if same else '  OTHER TOKENS'}", flush=True)  # fmt: skip


def cuts_of(rows: int, warmth: float) -> dict[str, dict[str, int]]:
    """By name, what `draw` is told."""
    shapes = ((512, 16), (2048, 16), (1024, 8), (1024, 32)) if rows == 256 and warmth else ()
    return {"as it is": {}, **{f"{c} x {p}": {"chunk": c, "programs": 132 * p} for c, p in shapes}}


@contextmanager
def way_of(backend: Any, chain: bool) -> Iterator[None]:
    """The backend with kernels chained or not, and graphs of its own; and as it was."""
    k = backend.runner
    before = k.chain, k.recorded, k.recorders
    k.chain, k.recorded, k.recorders = chain, {}, (GraphCapturer(torch.device(GPU)), GraphCapturer(torch.device(GPU)))
    k.step = None
    try:
        yield
    finally:
        torch.cuda.synchronize()
        k.chain, k.recorded, k.recorders = before
        k.step = None


def pdl(backend: Any, decode_batch: Callable[[int, int], Batch], timed: Timed, found: dict[str, Any]) -> None:
    """Device time of decode steps each way, twice in turn; the tokens of steps that follow each other are the same."""
    for count, context in ((1, 384), (8, 384), (256, 512)):
        batch, expected = decode_batch(count, context), None
        batch = Batch(**{**vars(batch), "input_ids": -1 - batch.req_slots})  # each step goes on from the one before
        for name, chain in (*WAYS.items(), *WAYS.items()):
            with way_of(backend, chain):
                tokens = answers(backend, batch)
                expected = tokens if expected is None else expected
                forward = timed(lambda b=batch: backend.forward(b))
                logits = backend.forward(batch)
                sample = timed(torch.inference_mode()(lambda b=batch, x=logits: backend.runner.sample(x, b, None)))
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
