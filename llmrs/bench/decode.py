"""`llmrs bench`: decode and prefill speed of a model against the device's roofline."""

from collections.abc import Iterator, Sequence

import numpy as np

from llmrs.bench.roofline import Device, Measurement, ModelCost
from llmrs.bench.workloads import RequestSpec, run
from llmrs.core.options import SamplingParams
from llmrs.engine import Engine


def measure(
    engine: Engine, device: Device, batch_sizes: Sequence[int], prompt_len: int, output_len: int, prefill_len: int = 512
) -> Iterator[Measurement]:
    """Decode at each batch size, then prefill of `prefill_len` tokens, or as many as fit; after one warm-up run."""
    plan = engine.memory_plan
    cost = ModelCost.of(engine.model.graph, plan.kv_dtype)
    _decode(engine, 1, prompt_len, 4)
    for batch in batch_sizes:
        seconds = _decode(engine, batch, prompt_len, output_len)
        steps = (cost.decode_time(device, plan.dtype, batch, prompt_len + n) for n in range(1, output_len))
        yield Measurement(f"decode, batch {batch}", batch * (output_len - 1), seconds, sum(steps))
    length = min(prefill_len, plan.max_model_len - 1)
    seconds = min(_prefill(engine, length, seed) for seed in range(3))
    yield Measurement(f"prefill of {length}", length, seconds, cost.prefill_time(device, plan.dtype, length))


def _prompts(engine: Engine, count: int, length: int, seed: int) -> list[list[int]]:
    ids = np.random.default_rng(seed).integers(0, engine.model.config.vocab_size, (count, length))
    return list(ids.tolist())


def _decode(engine: Engine, batch: int, prompt_len: int, output_len: int) -> float:
    """Seconds from the last first token of the batch to its end."""
    prompts = _prompts(engine, batch, prompt_len, batch)
    times = [r.token_times for r in run(engine, [RequestSpec(prompt, output_len) for prompt in prompts]).requests]
    begin, end = max(t[0] for t in times), max(t[-1] for t in times)
    decoded = sum(at > begin for t in times for at in t)
    return (end - begin) * batch * (output_len - 1) / max(decoded, 1)


def _prefill(engine: Engine, length: int, seed: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    (output,) = engine.generate_sync(params, _prompts(engine, 1, length, 1000 + seed))
    return output.prompt_time
