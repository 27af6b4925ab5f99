"""On an NVIDIA GPU: python tests/bench/bench_cuda.py FOLDER [PART ...]

Random weights in the shapes of the model that FOLDER is named after (qwen3-8b, llama-3.2-1b), else of Qwen3-0.6B; it is
written if it is not there. Prints what the device can do, then how near the engine comes: correctness, device time of
decode steps, the four workloads, arrivals, kernels against their rooflines, attention configs, the start of a process,
a grid of steps, which it also draws into $OUT. All but correctness and attention configs are those of `llmrs
bench`. A part that fails says so, and the others go on. The last line is JSON.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import bench_fp8
import bench_gemm
import bench_gemm_in_step
import bench_pdl
import bench_prefill
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import random_checkpoint
import torch

from llmrs import Engine, EngineConfig
from llmrs.backends.base import load_backend
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, paged_attention
from llmrs.bench import report, serving, startup, sweep
from llmrs.bench.profile import profile_step
from llmrs.bench.roofline import Device
from llmrs.bench.workloads import WORKLOADS
from llmrs.bench.workloads import run as run_workload
from llmrs.core.batch import Batch
from llmrs.random_model import (
    BLOCK,
    MODELS,
    RandomModel,
    core_on,
    prefill_batch,
    prompts,
    request,
    run,
)

FOUND: dict[str, Any] = {}
GPU = "cuda:0"
SHAPES = ((1, 384), (8, 384), (32, 512), (128, 512), (256, 256), (256, 512), (256, 1000))  # sequences, context


def timed(run: Callable[[], object], times: int = 10) -> float:
    """Seconds of device time for one run, the mean of `times` after two that do not count."""
    for _ in range(2):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def ceilings() -> None:
    """What the device can do."""
    x = torch.ones(2**30, device=GPU)  # 4 GB
    FOUND["read_tb"] = x.nbytes / timed(lambda: x.sum()) / 1e12
    FOUND["copy_tb"] = 2 * x.nbytes / 2 / timed(lambda: x[: 2**29].copy_(x[2**29 :])) / 1e12
    a = torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16)
    FOUND["bf16_tflops"] = 2 * 8192**3 / timed(lambda: a @ a) / 1e12
    print(", ".join(f"{k} {FOUND[k]:.2f}" for k in ("read_tb", "copy_tb", "bf16_tflops")))


def made(dtype: str, *, graphs: bool, name: str, kv: str | None = None) -> Any:
    backend = load_backend("torch")(GPU, dtype, kv or dtype)
    backend.use_kernels("triton", graphs=graphs)
    return RandomModel.of(name).on(backend)


def correctness(names: tuple[str, ...] = ("qwen3",)) -> None:
    """Float32: the reference's tokens with graphs and without. Bfloat16: logits near float32's."""
    for name in names:
        expected = answers(RandomModel.of(name).on(load_backend("reference")("cpu", "f32", "f32")))
        for graphs in (False, True):
            same = answers(made("f32", graphs=graphs, name=name)) == expected
            print(f"{name} f32 graphs={graphs}: {'the reference tokens' if same else 'OTHER TOKENS'}", flush=True)
            FOUND.setdefault("correct", {})[f"{name} {graphs}"] = same
        logits = []
        for dtype, graphs in (("f32", False), ("bf16", False), ("bf16", True)):
            backend = made(dtype, graphs=graphs, name=name)
            backend.allocate(64, BLOCK, 4, 256)
            logits.append(backend.to_host(backend.forward(prefill_batch(prompts(30, 7)))).copy())
        for graphs, found in zip((False, True), logits[1:], strict=True):
            error = np.linalg.norm(logits[0] - found) / np.linalg.norm(logits[0])
            print(
                f"{name} bf16 graphs={graphs}: logits differ by {error:.4f} of their norm (0.08 is allowed)", flush=True
            )
            FOUND["correct"][f"{name} bf16 {graphs}"] = bool(error < 0.08)


def more_correctness() -> None:
    """The other families; each has kernels to compile."""
    correctness(tuple(n for n in MODELS if n != "qwen3"))


def answers(backend: Any) -> list[list[int]]:
    asked = [
        request(p, n, temperature=t, max_tokens=12)
        for n, (p, t) in enumerate(zip(prompts(1, 9, 40), (0, 0, 0.8), strict=True))
    ]
    return run(core_on(backend, max_num_batched_tokens=24), asked)


ENGINE: list[Engine] = []


def loaded(**options: Any) -> Engine:
    config = EngineConfig(
        sys.argv[1], device=GPU, max_num_seqs=256, max_model_len=4224, max_num_batched_tokens=8192,
        prefix_cache=False, **options,
    )  # fmt: skip
    return Engine(config)


def engine(kv: str = "bf16") -> Engine:
    """The engine, loaded once for each type of the KV cache in turn."""
    if ENGINE and ENGINE[0].memory_plan.kv_dtype != kv:
        ENGINE.pop().close()
    if not ENGINE:
        begin = time.perf_counter()
        memory = min(60 * 10**9, int(torch.cuda.mem_get_info()[0] * 0.8))
        ENGINE.append(loaded(kv_cache_memory=memory, kv_cache_dtype=kv))
        print(f"loaded in {time.perf_counter() - begin:.1f} s")
        begin = time.perf_counter()
        on_its_thread(ENGINE[0], sweep.run_idle_work)
        print(f"captured the graphs of decode steps in {time.perf_counter() - begin:.1f} s", flush=True)
    return ENGINE[0]


def on_its_thread(of: Engine, run: Callable[[Any], Any]) -> Any:
    """What `run` gives for the engine's backend, which captures graphs on the engine's thread while no request runs."""
    return of._worker.run_on_device_thread(run)


@cache
def device() -> Device:
    """The measured peaks."""
    return Device.of(engine())


def tell(kind: str, records: list[Any]) -> None:
    """Prints what `llmrs bench` would, and keeps it for the JSON."""
    print("\n".join(report.TABLES[kind](records)), flush=True)
    FOUND.setdefault(kind, []).extend(map(report.record, records))


def steps() -> None:
    """Decode steps as the engine runs them, and device time of their two parts beside the host's time to launch one."""
    tell("grid", [point for n, context in SHAPES for point in sweep.sweep(engine(), device(), [n], [context])])
    on_its_thread(engine(), parts_of_steps)


def parts_of_steps(backend: Any) -> None:
    for count, context in SHAPES:
        batch = sweep.decode_batch(backend.block_size, count, context)
        forward = timed(lambda b=batch: backend.forward(b))
        logits = backend.forward(batch)
        sample = timed(lambda b=batch, x=logits: backend.sample(x, b))
        begin = time.perf_counter()
        for _ in range(20):
            ticket = backend.launch(batch)
        host = (time.perf_counter() - begin) / 20
        ticket.tokens()
        FOUND[f"step {count}x{context}"] = [forward, sample, host]
        print(
            f"{count:4} x {context:5}: forward {forward * 1e6:7.0f} us, sample {sample * 1e6:5.0f}, "
            f"host {host * 1e6:5.0f}", flush=True
        )  # fmt: skip


def workloads() -> None:
    tell("workloads", list(serving.measure(engine(), device(), [*WORKLOADS.values()])))


def arrivals() -> None:
    tell("arrivals", list(serving.open_loop(engine(), device(), WORKLOADS["mixed"], (0.5, 0.8))))


def grid() -> None:
    """Decode steps by batch and context; in an engine of its own, which needs all memory, so the other is closed."""
    device()
    while ENGINE:
        ENGINE.pop().close()
    config = EngineConfig(sys.argv[1], device=GPU, max_num_seqs=512, max_model_len=16384, prefix_cache=False)
    with Engine(config) as large:
        points = list(sweep.sweep(large, device(), (1, 4, 16, 64, 256, 512), (128, 1024, 4096, 16384)))
    tell("grid", points)
    Path(os.environ.get("OUT", "."), f"grid-{Path(sys.argv[1]).name}.svg").write_text(report.picture(points))


def start() -> None:
    """Fresh processes, up to the first token, from Python; `llmrs bench --start` times `llmrs run` too."""
    config = EngineConfig(sys.argv[1], device=GPU)
    found = [startup.time_phases(config) for _ in range(4)][1:]
    FOUND["start"] = found
    for parts in found:
        print("imports {:.2f} s, loading {:.2f} s, first token {:.2f} s".format(*parts), flush=True)


def profiles() -> None:
    tell("profiles", [profile_step(engine(), device(), *shape) for shape in ((256, 512), (32, 512), (1, 384))])


def attn_configs() -> None:
    """Attention by itself in the model's shapes with several configs: 256 sequences of 512; a prompt of 4,096."""
    shape = random_checkpoint.SHAPES[model_shape()]
    heads, kv_heads, head_dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    block_tables = torch.randperm(256 * 8, device=GPU).int()
    decode_tiles = torch.tensor([[8 * s, s, 1, 511] for s in range(256)], dtype=torch.int32, device=GPU)
    q = torch.randn(4096, heads, head_dim, device=GPU, dtype=torch.bfloat16)
    out = torch.empty(4096, heads * head_dim, device=GPU, dtype=torch.bfloat16)
    pools = [
        torch.randn(2048, 2, kv_heads, 64, head_dim, device=GPU, dtype=torch.bfloat16) for _ in range(4)
    ]  # beyond the L2 cache

    def launch(tiles: torch.Tensor, config: AttnConfig) -> None:
        for p in pools:
            k, v = p.transpose(2, 3).unbind(1)
            paged_attention(q, k, v, block_tables, tiles, out, scale=0.09, window=0, config=config)

    read = 256 * 512 * 2 * kv_heads * head_dim * 2 * len(pools)
    for how in ((64, 2, 3), (64, 4, 3), (32, 2, 3), (32, 2, 4), (64, 2, 2), (64, 1, 3), (64, 2, 4)):
        config = AttnConfig(1, *how)
        seconds = timed(bench_gemm.captured(partial(launch, decode_tiles, config))[0])
        print(f"decode, {config}: {read / seconds / 1e12:.2f} TB/s", flush=True)
    flops, group = 4 * 4096 * 4096 / 2 * heads * head_dim * len(pools), heads // kv_heads
    for block_m, *rest in ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (256, 64, 8, 2)):
        config = AttnConfig(block_m // group, *rest)
        starts = range(0, 4096, config.q_tokens)
        tiles = torch.tensor([[0, t, config.q_tokens, t] for t in starts], dtype=torch.int32, device=GPU)
        seconds = timed(partial(launch, tiles, config), 5)
        print(f"prefill, {config}: {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)


def model_shape() -> str:
    """The model whose shapes the folder has."""
    name = Path(sys.argv[1]).name
    return name if name in random_checkpoint.SHAPES else "qwen3-0.6b"


def sampling() -> None:
    """Sampling by itself."""
    bench_pdl.sampling(timed, FOUND)


def pdl() -> None:
    """Decode steps with PDL and without."""

    def run(backend: Any) -> None:
        bench_pdl.pdl(backend, partial(sweep.decode_batch, backend.block_size), timed, FOUND)

    on_its_thread(engine(), run)


def fp8() -> None:
    """A KV cache in fp8 vs. one in bf16: correctness, attention, decode steps, and the seed workload."""
    bench_fp8.fp8(sys.modules[__name__])


def wide() -> Engine:
    """For steps of up to 512 short sequences."""
    config = EngineConfig(
        sys.argv[1], device=GPU, max_num_seqs=512, max_model_len=1024, prefix_cache=False, kernels="triton",
        kv_cache_memory=min(40 * 10**9, int(torch.cuda.mem_get_info()[0] * 0.6)),
    )  # fmt: skip
    return Engine(config)


def gemms() -> None:
    """Linears with their neighbours in one kernel and apart, in decode steps and by themselves."""

    def batch(backend: Any, count: int, context: int) -> Batch:
        return sweep.decode_batch(backend.block_size, count, context)

    with wide() as own:
        on_its_thread(own, lambda backend: bench_gemm.whole_steps(timed, FOUND, backend, batch))
    bench_gemm.gemms(timed, FOUND, random_checkpoint.SHAPES[model_shape()])


def gemms_in_step() -> None:
    """Steps in which one kind of GEMM is ours, with several tiles."""

    def run(backend: Any) -> None:
        batch = partial(sweep.decode_batch, backend.block_size, context=256)
        bench_gemm_in_step.gemms_in_step(timed, FOUND, backend, batch)

    with wide() as own:
        on_its_thread(own, run)


def prefill() -> None:
    """The parts of bench_prefill.py."""

    def measured(engine: Engine) -> float:
        asked = WORKLOADS["prefill"].make_requests(engine.model.config.vocab_size)
        return sum(len(a.prompt) for a in asked) / run_workload(engine, asked).seconds

    FOUND["prefill"] = bench_prefill.kernels(timed)
    FOUND["prefill workload"] = bench_prefill.prefill(loaded, measured, timed)


PARTS = {
    f.__name__: f
    for f in (
        ceilings,
        correctness,
        steps,
        workloads,
        arrivals,
        profiles,
        attn_configs,
        prefill,
        sampling,
        pdl,
        fp8,
        gemms,
        gemms_in_step,
        more_correctness,
        start,
        grid,
    )
}


def main() -> None:
    folder = Path(sys.argv[1])
    if not (folder / "model.safetensors").exists():
        random_checkpoint.write(model_shape(), folder)
    import triton

    print(torch.cuda.get_device_name(0), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    for name in sys.argv[2:] or PARTS:
        begin = time.perf_counter()
        try:
            PARTS[name]()
        except Exception:  # noqa: BLE001 - the others go on: time on a GPU is short
            print(f"{name} FAILED")
            traceback.print_exc(file=sys.stdout)
        print(f"-- {name}: {time.perf_counter() - begin:.1f} s", flush=True)
    for e in ENGINE:
        e.close()
    print(json.dumps(FOUND))


if __name__ == "__main__":
    main()
