"""Quantized weights on an NVIDIA GPU: a model's rates by type, beside bf16 in the same run. Needs no file.

    python tests/bench/bench_quantized.py qwen3-8b bf16 q4k q8_0 fp8 [--workloads single,batch,prefill] [--profile]

With `--workloads ''` it only loads, which compiles the kernels.

Random weights of the model's shapes, in the types of `llmrs quantize`: a few rows of each are quantized, and repeated.
The last line is JSON.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

for part in ("helpers", "tools"):
    sys.path.append(str(Path(__file__).parent.parent / part))

import texts
from random_checkpoint import SHAPES

import llmrs.model
from llmrs import Engine, EngineConfig
from llmrs.bench import profile, report
from llmrs.bench.roofline import Device
from llmrs.bench.workloads import Workload, run
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.weights import stored_name
from llmrs.quant.schemes import find_scheme
from llmrs.quant.tensor import AnyTensor, QuantTensor, Stored, Tensor
from llmrs.quantizing import convert, plan_types

ROWS = 128  # that are quantized
WORKLOADS = {
    "single": Workload("single", 1, (128, 128), (256, 256)),
    "batch": Workload("batch", 64, (128, 128), (512, 512)),
    "prefill": Workload("prefill", 16, (4096, 4096), (1, 1)),
}


class RandomSource:
    """A `WeightSource` of random weights."""

    def __init__(self, config: ModelConfig, quant: str) -> None:
        """`quant`: of EngineConfig, or bf16."""
        names = family(config.architecture).names
        shapes = {s.tensor: (s.rows, *w.columns) for w in graph_of(config).weights() for s in w.segments}
        dense = {n: Stored("bf16", shape, 2 * int(np.prod(shape))) for n, shape in shapes.items()}
        types = dict.fromkeys(shapes) if quant == "bf16" else plan_types(find_scheme(quant), config, dense)
        self.shapes = {stored_name(n, names): shape for n, shape in shapes.items()}
        self.types = {stored_name(n, names): kind for n, kind in types.items()}

    def names(self) -> Iterator[str]:
        return iter(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def stored(self, name: str) -> Stored:
        t = self.tensor(name)
        return Stored(t.format, self.shape(name), t.nbytes)

    def tensor(self, name: str) -> AnyTensor:
        return random_tensor(self.shapes[name], self.types[name])

    def close(self) -> None:
        pass


@cache
def random_tensor(shape: tuple[int, ...], kind: str | None) -> AnyTensor:
    n, k = shape if len(shape) == 2 else (1, shape[0])
    x = np.random.default_rng(0).standard_normal((min(n, ROWS), k), np.float32) * np.float32(0.02)
    if len(shape) == 1:
        x = np.ones((1, k), np.float32)
    dense = Tensor("bf16", x.shape, (x.view(np.uint32) >> 16).astype(np.uint16))
    few = dense if kind is None else convert(dense, kind)
    times = -(-n // len(x))
    if isinstance(few, QuantTensor):
        arrays = {name: np.tile(a, (times, 1))[:n] for name, a in few.arrays.items()}
        return dataclasses.replace(few, shape=(n, k), arrays=arrays)
    return Tensor("bf16", shape, np.tile(few.data, (times, 1))[:n].reshape(shape))


def measure(folder: Path, quant: str, workloads: list[Workload], *, profiled: bool) -> dict[str, float]:
    source = RandomSource(read_config(folder), quant)
    llmrs.model.open_weights = lambda path: source
    begin = time.perf_counter()
    options = {"max_num_seqs": 64, "max_model_len": 4224, "max_num_batched_tokens": 8192, "prefix_cache": False}
    with Engine(EngineConfig(folder, device="cuda:0", kv_cache_memory=40 * 10**9, **options)) as engine:
        plan = engine.memory_plan
        print(f"{quant}: {plan.weight_bytes / 1e9:.2f} GB of weights, ready in {time.perf_counter() - begin:.1f} s")
        device, rates = Device.of(engine), dict[str, float]()
        for w in workloads:
            specs = w.make_requests(engine.model.config.vocab_size)
            result = [run(engine, specs) for _ in range(2)][-1]
            tokens = sum(len(s.prompt) for s in specs) if w.is_prefill else result.tokens
            rates[w.name] = tokens / result.seconds
            print(f"{quant} {w.name}: {rates[w.name]:,.1f} tokens/s", flush=True)
        if profiled:
            for batch in (1, 64):
                print(
                    "\n".join(report.TABLES["profiles"]([profile.profile_step(engine, device, batch, 512)])), flush=True
                )
    random_tensor.cache_clear()
    return rates | {"read_tb_s": device.bandwidth / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("types", nargs="+", help="bf16, or what `quant` takes")
    parser.add_argument("--workloads", default="single,batch,prefill")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[args.shape]), "utf-8")
        texts.write_text_files(Path(folder))
        workloads = [WORKLOADS[name] for name in filter(None, args.workloads.split(","))]
        found = {quant: measure(Path(folder), quant, workloads, profiled=args.profile) for quant in args.types}
    first = found[args.types[0]]
    for quant, rates in found.items():
        print(
            quant,
            ", ".join(
                f"{n} {r:,.0f} ({r / first[n]:.2f} x {args.types[0]})" for n, r in rates.items() if n in WORKLOADS
            ),
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
