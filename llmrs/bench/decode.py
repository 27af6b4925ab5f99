"""How fast a model runs here, beside what the device allows: `llmrs bench`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmrs.bench.roofline import Device, Rated, Work
from llmrs.core.options import SamplingParams
from llmrs.engine import Engine


@dataclass(frozen=True)
class Measured(Rated):
    """One line of the table. `floor` is the least time that the device's ceilings allow."""

    what: str
    tokens: int
    seconds: float
    floor: float


def measure(
    engine: Engine, device: Device, batches: Sequence[int], prompt: int, new: int, longest: int = 512
) -> Iterator[Measured]:
    """Decode at each batch size, then a prompt of `longest` tokens, or of as many as there is room for, against the
    ceilings of `device`; after one run to warm up."""
    work = Work.of(engine.model.graph, engine.fit.kv_dtype)
    _decode(engine, 1, prompt, 4)
    for batch in batches:
        seconds = _decode(engine, batch, prompt, new)
        floor = sum(work.decode(device, engine.fit.dtype, batch, prompt + n) for n in range(1, new))
        yield Measured(f"decode, batch {batch}", batch * (new - 1), seconds, floor)
    longest = min(longest, engine.fit.length - 1)
    seconds = min(_prefill(engine, longest, seed) for seed in range(3))
    yield Measured(f"prefill of {longest}", longest, seconds, work.prefill(device, engine.fit.dtype, longest))


def _prompts(engine: Engine, count: int, length: int, seed: int) -> list[list[int]]:
    size = (count, length)
    ids: list[list[int]] = np.random.default_rng(seed).integers(0, engine.model.config.vocab_size, size).tolist()
    return ids


def _decode(engine: Engine, batch: int, prompt: int, new: int) -> float:
    """Seconds from the last first token of the batch to its end."""
    params = SamplingParams(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0, max_tokens=new, ignore_eos=True)
    streams = [engine.generate_stream(params, p) for p in _prompts(engine, batch, prompt, batch)]
    for stream in streams:
        while not stream.token_count and not stream.finished:  # an error ends it too, and `result` raises it
            time.sleep(0.0002)
    begin, there = time.perf_counter(), sum(s.token_count for s in streams)
    for stream in streams:
        stream.result()
    seconds = time.perf_counter() - begin
    return seconds * batch * (new - 1) / max(batch * new - there, 1)


def _prefill(engine: Engine, length: int, seed: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    (output,) = engine.generate_sync(params, _prompts(engine, 1, length, 1000 + seed))
    return output.prompt_time
