"""The MLX backend vs. mlx-lm, alternating in one process: python tests/bench/bench_mlx_lm.py host | decode

host:   CPU time to build the graph of a decode step, on a tiny model
decode: decode throughput in tokens/s, on a small model of Qwen3's shape

Prints a line per batch size, then JSON. mlx-lm (pip install --no-deps mlx-lm) is optional.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.base import pick_device
from llmrs.backends.mlx.backend import MlxBackend
from llmrs.backends.mlx.kernels.launch import Kernels
from llmrs.backends.mlx.lowering import as_array
from llmrs.backends.mlx.sampling import apply_logits_processors
from llmrs.core.sampling import SamplingArrays
from llmrs.models.arch.families import family
from llmrs.models.files.weights import stored_name
from llmrs.random_model import RandomModel, core_on, request, sampling_batch

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 28,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
SMALL = {
    **TINY,
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
STEPS_PER_ROUND = 6  # graphs built before one evaluation
CONTEXT = 64  # tokens of each sequence before the measured steps


def ours(model: RandomModel, dtype: str, device: str, compiles: bool = False) -> MlxBackend:
    backend = MlxBackend(pick_device(MlxBackend, device), dtype, dtype)
    backend.use_compile |= compiles
    model.on(backend)
    return backend


def theirs(model: RandomModel, shape: dict[str, Any], dtype: str) -> Any:
    """The mlx-lm model with the same weights."""
    from mlx_lm.models.qwen3 import Model, ModelArgs

    args = ModelArgs(model_type="qwen3", rms_norm_eps=1e-6, max_position_embeddings=4096, rope_theta=10000.0, **shape)
    lm, names = Model(args), family("Qwen3ForCausalLM").names
    kind = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}[dtype]
    lm.load_weights([(stored_name(n, names), as_array(t).astype(kind)) for n, t in model.weights.items()])
    mx.eval(lm.parameters())
    return lm


def build_ours(backend: MlxBackend, batch: int) -> Callable[[int], Any]:
    """A function that builds step n: (CPU seconds, tokens)."""
    blocks = 16
    backend.allocate(batch * blocks, backend.block_size, batch, blocks * backend.block_size)
    tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    first = sampling_batch(SamplingArrays.zeros(batch))
    first = replace(first, input_ids=-1 - first.req_slots, block_tables=tables)

    def build(n: int) -> Any:
        lengths = np.full(batch, CONTEXT + n + 1, np.int32)
        step = replace(first, positions=lengths - 1, seq_lens=lengths)
        begin = time.thread_time()
        logits = backend._build(step)
        assert backend.slots is not None
        tokens = backend.sampler(apply_logits_processors(logits, step, backend.slots, None), step.sampling)
        backend.slots.append(step, tokens)
        return time.thread_time() - begin, tokens

    return build


def build_theirs(lm: Any, batch: int) -> Callable[[int], Any]:
    from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

    cache = make_prompt_cache(lm) if batch == 1 else [BatchKVCache([0] * batch) for _ in lm.layers]
    tokens = mx.zeros(batch, mx.uint32)
    mx.eval(lm(mx.zeros((batch, CONTEXT), mx.uint32), cache=cache))

    def build(n: int) -> Any:
        nonlocal tokens
        begin = time.thread_time()
        logits = lm(tokens[:, None], cache=cache)[:, -1, :]
        tokens = mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)
        return time.thread_time() - begin, tokens

    return build


def host(batch: int, dtype: str, device: str, rounds: int) -> dict[str, float]:
    """Median seconds to build a step's graph, without the first of each round, which runs on cold caches."""
    model = RandomModel.of("qwen3", **TINY)
    builders = {
        "llmrs": build_ours(ours(model, dtype, device), batch),
        "llmrs compiled": build_ours(ours(model, dtype, device, compiles=True), batch),
    }
    if find_spec("mlx_lm"):
        builders["mlx-lm"] = build_theirs(theirs(model, TINY, dtype), batch)
    times: dict[str, list[float]] = {name: [] for name in builders}
    for n in range(0, STEPS_PER_ROUND * rounds, STEPS_PER_ROUND):
        for name, build in builders.items():
            seconds, tokens = zip(*(build(n + i) for i in range(STEPS_PER_ROUND)), strict=True)
            mx.eval(tokens[-1])
            times[name] += seconds[1:]
    return {name: statistics.median(values) for name, values in times.items()}


def per_layer() -> dict[str, int]:
    """Kernel launches and other MLX primitives per layer of a decode step on Metal.

    The difference between graphs of three and two layers, with fake kernels that return evaluated zeros, and whose
    inputs count as results.
    """
    counts = []
    for layers in (2, 3):
        launches: list[list[mx.array]] = []

        def make(name: str, **_: Any) -> Callable[..., list[mx.array]]:
            def launch(inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
                launches.append([x for x in inputs if isinstance(x, mx.array)])  # noqa: B023
                outputs = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
                mx.eval(outputs)
                return outputs

            return launch

        backend = MlxBackend("cpu", "bf16", "bf16")
        backend.use_metal(Kernels(make))
        RandomModel.of("qwen3", **{**TINY, "num_hidden_layers": layers}).on(backend)
        _, tokens = build_ours(backend, 1)(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            pools = [x for kv in backend.kv for x in (kv.keys, kv.values)]
            mx.export_to_dot(str(path), tokens, *pools, *(x for inputs in launches for x in inputs))
            primitives = path.read_text().count("shape=rectangle")
        counts.append((len(launches), primitives))
        backend.close()
    kernels, primitives = np.subtract(counts[1], counts[0]).tolist()
    return {"Metal kernels": kernels, "MLX primitives": primitives}


def rate_ours(backend: MlxBackend, batch: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Decode tokens/s after the first token of every request, and the outputs."""
    core = core_on(backend, 32 * batch, 16, max_num_seqs=batch, max_num_batched_tokens=2048, prefix_cache=False)
    requests = [request([(7 * n + i) % 100 for i in range(CONTEXT)], max_tokens=tokens) for n in range(batch)]
    for r in requests:
        core.submit(r)
    while not all(r.output for r in requests):
        core.step()
    begin, before = time.perf_counter(), sum(len(r.output) for r in requests)
    while not core.idle:
        core.step()
    count = sum(len(r.output) for r in requests) - before
    return count / (time.perf_counter() - begin), [r.output for r in requests]


def rate_theirs(lm: Any, batch: int, tokens: int) -> tuple[float, list[list[int]]]:
    from mlx_lm.generate import BatchGenerator, generate_step

    prompts = [[(7 * n + i) % 100 for i in range(CONTEXT)] for n in range(batch)]
    if batch == 1:
        output, begin = [], 0.0
        for n, (token, _) in enumerate(generate_step(mx.array(prompts[0]), lm, max_tokens=tokens)):
            begin = begin if n else time.perf_counter()
            output.append(int(token))
        return (tokens - 1) / (time.perf_counter() - begin), [output]
    generator = BatchGenerator(lm, max_tokens=tokens, completion_batch_size=batch, prefill_batch_size=batch)
    uids = generator.insert(prompts)
    outputs: dict[int, list[int]] = {uid: [] for uid in uids}
    begin = before = 0.0
    while not all(len(o) == tokens for o in outputs.values()):
        for response in generator.next_generated():
            outputs[response.uid].append(response.token)
        if not begin and all(outputs.values()):
            begin, before = time.perf_counter(), sum(map(len, outputs.values()))
    generator.close()
    return (tokens * batch - before) / (time.perf_counter() - begin), [outputs[uid] for uid in uids]


def decode(batch: int, dtype: str, device: str, rounds: int, tokens: int = 96) -> dict[str, float]:
    """Median tokens/s; in float32 both must generate the same tokens."""
    model = RandomModel.of("qwen3", **SMALL)
    runs: dict[str, Callable[[], tuple[float, list[list[int]]]]] = {}
    backend = ours(model, dtype, device)
    runs["llmrs"] = lambda: rate_ours(backend, batch, tokens)
    if find_spec("mlx_lm"):
        lm = theirs(model, SMALL, dtype)
        runs["mlx-lm"] = lambda: rate_theirs(lm, batch, tokens)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            rate, outputs[name] = run()
            rates[name].append(rate)
    same = all(o == outputs["llmrs"] for o in outputs.values())
    return {**{n: statistics.median(r) for n, r in rates.items()}, "same tokens": same}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["host", "decode"])
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=0)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for batch in args.batch or ([1, 32] if args.what == "host" else [1, 8]):
        if args.what == "host":
            values = host(batch, args.dtype, args.device, args.rounds or 15)
            line = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in values.items())
        else:
            values = decode(batch, args.dtype, args.device, args.rounds or 5)
            line = ", ".join(f"{n} {v:.1f} tokens/s" if n != "same tokens" else f"{n}: {v}" for n, v in values.items())
        print(f"batch {batch}: {line}")
        results.append({"what": args.what, "batch": batch, "dtype": args.dtype, **values})
    counts = per_layer() if args.what == "host" else {}
    if counts:
        print("per layer: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    device = str(mx.default_device())
    print(json.dumps({"mlx": version("mlx"), "device": device, "results": results, "per_layer": counts}))


if __name__ == "__main__":
    main()
