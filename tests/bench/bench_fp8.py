"""Parts of bench_cuda.py for a KV cache in fp8: correctness, and speed vs. one in bf16."""

from functools import partial
from typing import Any

import numpy as np
import torch
from bench_gemm import captured

from llmrs.backends.base import load_backend
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, default_config, paged_attention
from llmrs.backends.torch.kv_fp8 import QuantizedKV
from llmrs.bench import serving, sweep
from llmrs.bench.workloads import WORKLOADS
from llmrs.random_model import BLOCK, RandomModel, prefill_batch, prompts

SHAPES = ((1, 384), (32, 512), (256, 512), (256, 1000))  # sequences, context


def fp8(bench: Any) -> None:
    """All of it, in one run. `bench` is the benchmark's module."""
    correctness(bench)
    attend(bench)
    device = bench.device()
    for kv in ("bf16", "fp8"):
        engine = bench.engine(kv)
        print(f"KV cache in {kv}: {engine.memory_plan.kv_bytes_per_token:,} bytes a token")
        bench.tell("grid", [cell for n, context in SHAPES for cell in sweep.sweep(engine, device, [n], [context])])
        bench.tell("workloads", list(serving.measure(engine, device, [WORKLOADS["seed"]])))


def correctness(bench: Any, names: tuple[str, ...] = ("qwen3", "llama")) -> None:
    """Float32: the reference's tokens. Logits near the reference's with the same kind of cache."""
    for name in names:
        reference = RandomModel.of(name).on(load_backend("reference")("cpu", "f32", "fp8"))
        expected = bench.answers(reference)
        for graphs in (False, True):
            same = bench.answers(bench.made("f32", graphs=graphs, name=name, kv="fp8")) == expected
            print(f"{name} f32 fp8 graphs={graphs}: {'the reference tokens' if same else 'OTHER TOKENS'}", flush=True)
            bench.FOUND.setdefault("correct", {})[f"{name} fp8 {graphs}"] = same
        wanted = logits(reference)
        for dtype, most in (("f32", 0.01), ("bf16", 0.15)):
            found = logits(bench.made(dtype, graphs=False, name=name, kv="fp8"))
            error = np.linalg.norm(wanted - found) / np.linalg.norm(wanted)
            print(f"{name} {dtype} fp8: logits differ by {error:.6f} of their norm ({most} is allowed)", flush=True)
            bench.FOUND["correct"][f"{name} fp8 {dtype}"] = bool(error < most)


def logits(backend: Any) -> np.ndarray:
    backend.allocate(64, BLOCK, 4, 256)
    return backend.to_host(backend.forward(prefill_batch(prompts(30, 7))))


def attend(bench: Any) -> None:
    """Decode attention of 256 sequences: both dtypes with the default config, fp8 with others too."""
    others = ((64, 4, 3), (64, 2, 4), (32, 2, 4), (64, 2, 2), (64, 1, 3))
    for context in (512, 1000):
        for kv, more in (("bf16", ()), ("fp8", others)):
            default = default_config(2, 128, torch.bfloat16, prefill=False, fp8=kv == "fp8")
            decode_attention(bench, context, kv, [default, *(AttnConfig(1, *c) for c in more)])


def decode_attention(bench: Any, context: int, kv: str, configs: list[AttnConfig]) -> None:
    q = torch.randn(256, 16, 128, device=bench.GPU, dtype=torch.bfloat16)
    out = torch.empty(256, 2048, device=bench.GPU, dtype=torch.bfloat16)
    width = -(-context // 64)
    block_tables = torch.randperm(256 * width, device=bench.GPU).int()
    tiles = torch.tensor([[width * s, s, 1, context - 1] for s in range(256)], dtype=torch.int32, device=bench.GPU)
    pools: list[Any] = []
    for _ in range(3):  # more than the L2 cache holds
        p = torch.randn(256 * width, 2, 8, 64, 128, device=bench.GPU, dtype=torch.bfloat16)
        scales = torch.rand(p.shape[:-1], device=bench.GPU)
        pools.append(QuantizedKV(p.to(torch.float8_e4m3fn), scales) if kv == "fp8" else p)

    def launch(config: AttnConfig) -> None:
        for p in pools:
            k, v = (side.transpose(1, 2) for side in p.unbind(1))
            paged_attention(q, k, v, block_tables, tiles, out, scale=0.09, window=0, config=config)

    read = 256 * context * 2 * 8 * (128 * 2 if kv == "bf16" else 128 + 4)
    for c in configs:
        seconds = bench.timed(captured(partial(launch, c))[0]) / len(pools)
        bench.FOUND[f"attention {kv} {context} {c.block_n} {c.num_warps} {c.num_stages}"] = seconds
        print(f"256 x {context:4} {kv:4} {c}: {seconds * 1e6:6.1f} us, {read / seconds / 1e12:.2f} TB/s", flush=True)
