"""Estimated speed of Macs. `python tests/tools/paper.py` prints all chips; with docs/apple.md it renews that page."""

import re
import sys
from pathlib import Path

from random_checkpoint import QWEN3

from llmrs.bench.roofline import Device, ModelCost
from llmrs.core.ir import Graph
from llmrs.models.arch.config import parse
from llmrs.models.arch.families import family, graph_of
from llmrs.quant.ggml import TYPES, stored

# Memory bandwidth as Apple publishes it; GPU arithmetic in half precision as commonly cited, on the largest GPU.
DEVICES = [
    Device(name, gigabytes * 1e9, teraflops * 1e12)
    for name, gigabytes, teraflops in (
        *(("M1", 68, 2.6), ("M2", 100, 3.6), ("M3", 100, 4.1), ("M4", 120, 4.3)),
        *(("M1 Pro", 200, 5.2), ("M2 Pro", 200, 6.8), ("M3 Pro", 150, 7.4), ("M4 Pro", 273, 9.2)),
        *(("M1 Max", 400, 10.4), ("M2 Max", 400, 13.6), ("M3 Max", 400, 16.4), ("M4 Max", 546, 18.4)),
        *(("M1 Ultra", 800, 20.8), ("M2 Ultra", 800, 27.2), ("M3 Ultra", 819, 32.8)),
    )
]
ON_PAGE = ("M1", "M4", "M4 Pro", "M4 Max", "M1 Ultra", "M3 Ultra")  # chips in docs/apple.md
SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
}
FORMATS = {"bf16": "bf16", "Q8_0": "q8_0", "Q4_K": "q4k"}
BATCHES = (1, 8, 32)
CONTEXT, PROMPT = 512, 512
REACHED = 0.85  # of the bandwidth, by good kernels
QUANTIZED = "q2_k q3_k iq4_xs q4_0 q4_k q5_k q6_k q8_0".split()  # of KERNELS_MODEL, one sequence
KERNELS_MODEL, LOW = "Qwen3-8B", 0.55  # the share of the bandwidth that llama.cpp reaches in its slower types
MATRIX = 0.7  # of the FLOP/s, by large GEMMs
LAUNCH = 3.5e-6  # seconds between two kernels
PER_LAYER, BESIDE = 11, 8  # kernels of a decode step: 5 of ours, 4 GEMMs, 2 scatters


def graph(name: str) -> Graph:
    hidden, inner, layers, heads, tied = SHAPES[name]
    data = {
        **QWEN3,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }
    return graph_of(parse(Path(name), data, family("Qwen3ForCausalLM").defaults))


def expected(cost: ModelCost, device: Device, dtype: str, batch: int, layers: int) -> float:
    """Tokens per second of all answers together."""
    launches = (layers * PER_LAYER + BESIDE) * LAUNCH
    return batch / (cost.decode_time(device, dtype, batch, CONTEXT) / REACHED + launches)


def table(name: str) -> str:
    plain = graph(name)
    cost, layers = ModelCost.of(plain), len(plain.kv_types())
    head = [f"{f} x{b}" for f in FORMATS for b in BATCHES]
    rows = [f"| {name} | roofline bf16 | {' | '.join(head)} | prefill |", "|---" * (len(head) + 3) + "|"]
    for device in DEVICES:
        cells = [expected(cost, device, dtype, batch, layers) for dtype in FORMATS.values() for batch in BATCHES]
        floor = 1e3 * cost.decode_time(device, "bf16", 1, CONTEXT)
        prefill = PROMPT / (cost.prefill_time(device, "bf16", PROMPT) / MATRIX)
        rows.append(f"| {device.name} | {floor:.2f} ms | {' | '.join(f'{c:,.0f}' for c in cells)} | {prefill:,.0f} |")
    return "\n".join(rows)


def page_table(name: str) -> str:
    """The table with the chips of the page only."""
    left_out = tuple(f"| {device.name} |" for device in DEVICES if device.name not in ON_PAGE)
    return "\n".join(line for line in table(name).splitlines() if not line.startswith(left_out))


def quantized_table() -> str:
    """Expected tokens per second in types that the Metal kernels read, at LOW and at REACHED of the bandwidth."""
    plain = graph(KERNELS_MODEL)
    cost, launches = ModelCost.of(plain), (len(plain.kv_types()) * PER_LAYER + BESIDE) * LAUNCH
    devices = [device for device in DEVICES if device.name in ON_PAGE]
    head = ("type", "bits in the file", "bits read", *(device.name for device in devices))
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind in map(TYPES.__getitem__, QUANTIZED):
        file, read = 8 * kind.block_bytes / kind.block, 8 * stored(kind, (1, 256)).nbytes / 256
        nbytes = cost.num_weights * read / 8 + CONTEXT * cost.kv_bytes_per_token
        rates = [[1 / (nbytes / device.bandwidth / share + launches) for share in (LOW, REACHED)] for device in devices]
        cells = [kind.name.upper(), f"{file:g}", f"{read:g}", *(f"{low:.0f} to {high:.0f}" for low, high in rates)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def renewed(text: str) -> str:
    """The page with each table after its mark replaced."""
    for name, made in {**{n: page_table(n) for n in SHAPES}, "quantized": quantized_table()}.items():
        mark = f"<!-- paper: {name} -->"
        text = re.sub(re.escape(mark) + r"\n(\|.*\n)*", lambda _, m=mark, t=made: f"{m}\n{t}\n", text)
    return text


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(renewed(page.read_text("utf-8")), "utf-8")
    if not sys.argv[1:]:
        print("\n\n".join(map(table, SHAPES)))
