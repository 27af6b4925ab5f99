"""Two parts of bench_cuda.py: sampling by itself, and decode steps with PDL and without."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_gemm import captured

from llmrs.backends.torch.kernels.gumbel_argmax import sample_gumbel
from llmrs.core.batch import Batch

Timed = Callable[[Callable[[], object]], float]
GPU, VOCABULARY = "cuda:0", 151_936
WAYS = {"no PDL": False, "PDL": True}


def random_logits(rows: int, kind: str) -> torch.Tensor:
    """bf16 (rows, V): as a random model's, or ten of them far above the rest, as a real one's are."""
    x = torch.randn(rows, VOCABULARY, device=GPU) * (0.7 if kind == "flat" else 2.5)
    if kind == "peaked":
        x.scatter_add_(1, torch.randint(VOCABULARY, (rows, 10), device=GPU), 12 + 3 * torch.randn(rows, 10, device=GPU))
    return x.bfloat16()


def sampled(logits: list[torch.Tensor], rest: tuple[torch.Tensor, ...], **how: int) -> torch.Tensor:
    """Tokens (n, rows) of n logits, one after the other."""
    return torch.stack([sample_gumbel(x, *rest, **how, pdl=True) for x in logits])


def sampling(timed: Timed, report: dict[str, Any]) -> None:
    """Device time of sampling, us and TB/s, with other configs where they matter; all must give the same tokens."""
    for rows in (1, 8, 64, 256):
        last_tokens = torch.zeros(rows, dtype=torch.int64, device=GPU)
        req_slots = torch.arange(rows, dtype=torch.int32, device=GPU)
        rng_keys = torch.randint(-(2**31), 2**31, (rows,), device=GPU).int()
        for kind, temperature in (("flat", 0.6), ("peaked", 0.6), ("flat", 0.0)):
            logits = [random_logits(rows, kind) for _ in range(max(2, 32 // rows))]  # 256 rows exceed L2
            rest = (torch.full((rows,), temperature, device=GPU), rng_keys, req_slots, last_tokens)
            expected = sampled(logits, rest)
            for name, how in configs(rows, temperature).items():
                seconds = timed(captured(partial(sampled, logits, rest, **how))[0]) / len(logits)
                same = torch.equal(sampled(logits, rest, **how), expected)
                rate = logits[0].nbytes / seconds / 1e12
                report[f"sampling {rows} {kind} {temperature} {name}"] = [seconds, rate, same]
                print(f"{rows:4} {kind:6} T={temperature}: {name:14} {seconds * 1e6:6.1f} us, {rate:.2f} TB/s"
                      f"{'' if same else '  OTHER TOKENS'}", flush=True)  # fmt: skip


def configs(rows: int, temperature: float) -> dict[str, dict[str, int]]:
    """Arguments of `sample_gumbel` by name: chunks x CTAs per SM."""
    shapes = ((512, 16), (2048, 16), (1024, 8), (1024, 32)) if rows == 256 and temperature else ()
    return {"default": {}, **{f"{c} x {n}": {"chunk": c, "num_ctas": 132 * n} for c, n in shapes}}


@contextmanager
def pdl_set(backend: Any, use: bool) -> Iterator[None]:
    """The backend with PDL or without, and CUDA graphs of its own."""
    runner = backend.runner
    before = runner.use_pdl, runner.graphs
    runner.use_pdl, runner.graphs = use, runner.new_graph_cache()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        runner.use_pdl, runner.graphs = before


def pdl(backend: Any, decode_batch: Callable[[int, int], Batch], timed: Timed, report: dict[str, Any]) -> None:
    """Device time of decode steps with and without PDL, alternating twice; consecutive steps give the same tokens."""
    for count, context in ((1, 384), (8, 384), (256, 512)):
        batch, expected = decode_batch(count, context), None
        batch = Batch(**{**vars(batch), "input_ids": -1 - batch.req_slots})  # each step continues the one before
        for name, use in (*WAYS.items(), *WAYS.items()):
            with pdl_set(backend, use):
                tokens = answers(backend, batch)
                expected = tokens if expected is None else expected
                forward = timed(lambda b=batch: backend.forward(b))
                logits = backend.forward(batch)
                sample = timed(torch.inference_mode()(lambda b=batch, x=logits: backend.runner.sample(x, b, None)))
                step = timed(pipelined(backend, batch))
            same = bool((tokens == expected).all())
            report.setdefault(f"pdl {count}x{context} {name}", []).append([forward, sample, step, same])
            print(f"{count:4} x {context}, {name:9}: forward {forward * 1e6:6.0f} us, sample {sample * 1e6:5.0f}, step "
                  f"{step * 1e6:6.0f}{'' if same else '  OTHER TOKENS'}", flush=True)  # fmt: skip


def answers(backend: Any, batch: Batch, steps: int = 24) -> np.ndarray:
    """int32 (steps, S) from a state that is always the same."""
    backend.slots.last_token.zero_()
    run = pipelined(backend, batch)
    return np.stack([t for t in (run() for _ in range(steps + 1)) if t is not None])


def pipelined(backend: Any, batch: Batch) -> Callable[[], np.ndarray | None]:
    """Launches a step, and reads the one before, as the engine does."""
    alive: deque[Any] = deque()

    def run() -> np.ndarray | None:
        alive.append(backend.launch(batch))
        return alive.popleft().tokens() if len(alive) > 1 else None

    return run
