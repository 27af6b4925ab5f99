"""Writes tests/quant/packed_vectors.json: small matrices that AutoGPTQ, AutoRound and modelopt packed and read back.

pip install --target DIR --no-deps auto-gptq==0.7.1 auto-round==0.16.1 nvidia-modelopt==0.47.0 and what they import:
py-cpuinfo omegaconf antlr4-python3-runtime accelerate psutil datasets pyarrow pandas dill multiprocess xxhash fsspec
pulp python-dateutil pytz aiohttp httpx nvidia-ml-py pydantic pydantic-core annotated-types typing-inspection scipy
PYTHONPATH=DIR python tests/tools/packed_vectors.py
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from vectors import encoded

OUT = Path(__file__).resolve().parents[1] / "quant" / "packed_vectors.json"
ROWS, COLUMNS, GROUP = 32, 64, 32


def auto_gptq() -> Any:
    """AutoGPTQ's module, by its file: the package needs an old transformers."""
    found = next(p for p in map(Path, sys.path) if (p / "auto_gptq").is_dir())
    path = found / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def linear() -> torch.nn.Linear:
    made = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    made.weight.data = torch.randn(ROWS, COLUMNS)
    return made


def scales_and_zeros(bits: int, low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each (ROWS, groups); the scales are exact in f16. Codes stay in range for any of these zeros."""
    shape = ROWS, COLUMNS // GROUP
    return (torch.rand(shape) * 4 + 4).half().float(), torch.randint(max(low, 1), 1 << bits, shape).float()


def gptq(bits: int) -> dict[str, Any]:
    packed, layer = auto_gptq()(bits, GROUP, COLUMNS, ROWS, False), linear()
    scales, zeros = scales_and_zeros(bits, 1)
    spread = scales.repeat_interleave(GROUP, 1)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS))
    layer.weight.data = (codes - zeros.repeat_interleave(GROUP, 1)) * spread
    packed.pack(layer, scales, zeros.clone())
    if bits != 8:
        packed.qzeros[0, 0] = -1  # the largest codes: zeros of 2^bits
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    values = packed(torch.eye(COLUMNS)).T
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False}
    return vector(tensors | {"scales": tensors["scales"].half()}, values, config)


def awq() -> dict[str, Any]:
    scales, zeros = scales_and_zeros(4, 0)
    packed = WQLinear_GEMM.from_linear(
        linear(), 4, GROUP, scales=scales.T.contiguous() / 30, zeros=zeros.T.contiguous()
    )
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    values = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, GROUP).T
    return vector(tensors, values, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"})


def nvfp4() -> dict[str, Any]:
    packed, scales, factor = NVFP4QTensor.quantize(torch.randn(ROWS, COLUMNS), 16)
    values = packed.dequantize(torch.float32, scale=scales, double_scale=factor, block_sizes={-1: 16})
    tensors = {"weight": packed._quantized_data, "weight_scale": scales, "weight_scale_2": factor}
    return vector(tensors, values, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def mxfp8() -> dict[str, Any]:
    packed, scales = MXFP8QTensor.quantize(torch.randn(ROWS, COLUMNS))
    values = packed.dequantize(torch.float32, scale=scales)
    tensors = {"weight": packed._quantized_data, "weight_scale": scales}
    return vector(tensors, values, {"quant_method": "modelopt", "quant_algo": "MXFP8"})


def vector(tensors: dict[str, torch.Tensor], values: torch.Tensor, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "tensors": {name: encoded(t) for name, t in tensors.items()}, "values": encoded(values),
        "config": {"quantization_config": config},
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    vectors = {**{f"gptq{bits}": gptq(bits) for bits in (2, 3, 4, 8)}, "awq": awq(), "nvfp4": nvfp4(), "mxfp8": mxfp8()}
    OUT.write_text(json.dumps(vectors, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
