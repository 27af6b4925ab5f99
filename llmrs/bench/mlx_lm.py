"""The MLX backend against mlx-lm, in turns in one process: python -m llmrs.bench.mlx_lm host | decode

host:   CPU time to build the graph of a decode step, on a model so small that arithmetic vanishes
decode: tokens per second from the first answer's token to the last, on a small model of Qwen3's shape

Prints a line for each batch size, then all of it as JSON. mlx-lm (pip install --no-deps mlx-lm) may be missing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
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
from llmrs.backends.mlx.sampling import adjusted
from llmrs.core.sampling import SamplingArrays
from llmrs.models.arch.families import family
from llmrs.models.files.weights import hf_name
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
IN_A_ROW = 6  # steps that are built before they are computed
CONTEXT = 64  # tokens that each sequence has before the measured steps


def ours(model: RandomModel, dtype: str, device: str, compiles: bool = False) -> MlxBackend:
    backend = MlxBackend(pick_device(MlxBackend, device), dtype, dtype)
    backend.compiles |= compiles
    model.on(backend)
    return backend


def theirs(model: RandomModel, shape: dict[str, Any], dtype: str) -> Any:
    """mlx-lm's model with the same weights."""
    from mlx_lm.models.qwen3 import Model, ModelArgs

    args = ModelArgs(model_type="qwen3", rms_norm_eps=1e-6, max_position_embeddings=4096, rope_theta=10000.0, **shape)
    lm, names = Model(args), family("Qwen3ForCausalLM").names
    kind = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}[dtype]
    lm.load_weights([(hf_name(n, names), as_array(t).astype(kind)) for n, t in model.weights.items()])
    mx.eval(lm.parameters())
    return lm


def build_ours(backend: MlxBackend, batch: int) -> Callable[[int], Any]:
    """Builds step n of a batch."""
    blocks = 16
    backend.allocate(batch * blocks, backend.block_size, batch, blocks * backend.block_size)
    tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    fields = vars(sampling_batch(SamplingArrays.zeros(batch)))

    def build(n: int) -> Any:
        lengths = np.full(batch, CONTEXT + n + 1, np.int32)
        step = type(sampling_batch(SamplingArrays.zeros(1)))(
            **{
                **fields,
                "input_ids": -1 - fields["req_slots"],
                "positions": lengths - 1,
                "seq_lens": lengths,
                "block_tables": tables,
            }
        )
        begin = time.thread_time()
        logits = backend._build(step)
        assert backend.slots is not None
        tokens = backend.draw(adjusted(logits, step, backend.slots, None), step.sampling)
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
    """Median seconds to build a step's graph. Several are built in a row: after a computation caches are cold."""
    model = RandomModel.of("qwen3", **TINY)
    builders = {
        "llmrs": build_ours(ours(model, dtype, device), batch),
        "llmrs compiled": build_ours(ours(model, dtype, device, compiles=True), batch),
    }
    if find_spec("mlx_lm"):
        builders["mlx-lm"] = build_theirs(theirs(model, TINY, dtype), batch)
    times: dict[str, list[float]] = {name: [] for name in builders}
    for n in range(0, IN_A_ROW * rounds, IN_A_ROW):
        for name, build in builders.items():
            seconds, tokens = zip(*(build(n + i) for i in range(IN_A_ROW)), strict=True)
            mx.eval(tokens[-1])
            times[name] += seconds[1:]
    return {name: statistics.median(found) for name, found in times.items()}


def per_layer() -> dict[str, int]:
    """What a layer of a decode step is made of on Metal: launches of our kernels, and MLX's own primitives beside them.

    Counted in the graphs of two and of three layers. Arrays of zeros stand in for what kernels give; what kernels take
    is looked at like a result.
    """
    found = []
    for layers in (2, 3):
        taken: list[list[mx.array]] = []

        def make(name: str, **_: Any) -> Callable[..., list[mx.array]]:
            def launch(inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
                taken.append([x for x in inputs if isinstance(x, mx.array)])  # noqa: B023  # of this round
                outputs = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
                mx.eval(outputs)  # so that they are no part of the graph
                return outputs

            return launch

        backend = MlxBackend("cpu", "bf16", "bf16")
        backend.use_metal(Kernels(make))
        RandomModel.of("qwen3", **{**TINY, "num_hidden_layers": layers}).on(backend)
        _, tokens = build_ours(backend, 1)(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            seen = [tokens, *(x for kv in backend.kv for x in (kv.keys, kv.values)), *(x for xs in taken for x in xs)]
            mx.export_to_dot(str(path), *seen)
            primitives = path.read_text().count("shape=rectangle")
        found.append((len(taken), primitives))
        backend.close()
    (kernels, primitives), (more_kernels, more_primitives) = found
    return {"Metal kernels": more_kernels - kernels, "other primitives of MLX": more_primitives - primitives}


def rate_ours(backend: MlxBackend, batch: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens per second after the first step, and the answers."""
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
        answer, begin = [], 0.0
        for n, (token, _) in enumerate(generate_step(mx.array(prompts[0]), lm, max_tokens=tokens)):
            begin = begin if n else time.perf_counter()
            answer.append(int(token))
        return (tokens - 1) / (time.perf_counter() - begin), [answer]
    generator = BatchGenerator(lm, max_tokens=tokens, completion_batch_size=batch, prefill_batch_size=batch)
    uids = generator.insert(prompts)
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    begin = before = 0.0
    while not all(len(a) == tokens for a in answers.values()):
        for found in generator.next_generated():
            answers[found.uid].append(found.token)
        if not begin and all(answers.values()):
            begin, before = time.perf_counter(), sum(map(len, answers.values()))
    generator.close()
    return (tokens * batch - before) / (time.perf_counter() - begin), [answers[uid] for uid in uids]


def decode(batch: int, dtype: str, device: str, rounds: int, tokens: int = 96) -> dict[str, float]:
    """The median rate of each; in float32 both must give the same tokens."""
    model = RandomModel.of("qwen3", **SMALL)
    runs: dict[str, Callable[[], tuple[float, list[list[int]]]]] = {}
    backend = ours(model, dtype, device)
    runs["llmrs"] = lambda: rate_ours(backend, batch, tokens)
    if find_spec("mlx_lm"):
        lm = theirs(model, SMALL, dtype)
        runs["mlx-lm"] = lambda: rate_theirs(lm, batch, tokens)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            rate, answers[name] = run()
            rates[name].append(rate)
    same = all(a == answers["llmrs"] for a in answers.values())
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
            found = host(batch, args.dtype, args.device, args.rounds or 15)
            shown = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in found.items())
        else:
            found = decode(batch, args.dtype, args.device, args.rounds or 5)
            shown = ", ".join(
                f"{n} {rate:.1f} tokens/s" if n != "same tokens" else f"{n}: {rate}" for n, rate in found.items()
            )
        print(f"batch {batch}: {shown}")
        results.append({"what": args.what, "batch": batch, "dtype": args.dtype, **found})
    print(json.dumps({"mlx": version("mlx"), "device": str(mx.default_device()), "results": results}))


if __name__ == "__main__":
    main()
