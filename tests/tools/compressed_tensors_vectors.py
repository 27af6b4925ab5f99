"""Writes tests/quant/compressed_tensors.json: small matrices that compressed-tensors 0.20.1 quantized and read back.

pip install --target DIR --no-deps compressed-tensors==0.20.1 loguru psutil
PYTHONPATH=DIR python tests/tools/compressed_tensors_vectors.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import *  # noqa: F403  (registers)
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from vectors import encoded

OUT = Path(__file__).resolve().parents[1] / "quant" / "compressed_tensors.json"


def vector(style: str, w: torch.Tensor, given: dict[str, torch.Tensor], **weights: Any) -> dict[str, Any]:
    """The file's tensors, the values read back in float32, and the config."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=style)
    compressor = BaseCompressor.get_value_from_registry(style)
    packed = compressor.compress({"weight": w, **given}, scheme)
    if style == "nvfp4-pack-quantized":  # decompress gives bf16
        codes = unpack_fp4_from_uint8(packed["weight_packed"], *w.shape, dtype=torch.float32)
        scales, factor = packed["weight_scale"].float(), packed["weight_global_scale"]
        values = dequantize(codes, scales, args=args, dtype=torch.float32, global_scale=factor)
    else:
        values = compressor.decompress(dict(packed), scheme)["weight"].float()
    group = {"targets": ["Linear"], "format": style, "weights": json.loads(args.model_dump_json())}
    return {"tensors": {n: encoded(t) for n, t in packed.items()}, "values": encoded(values), "group": group}


def main() -> None:
    torch.manual_seed(0)
    w, wide = torch.randn(9, 64), torch.randn(20, 40)
    absolute = w.reshape(9, -1, 16).abs().amax(-1)
    zeros = torch.randint(-8, 8, (9, 4), dtype=torch.int8)
    integers = {"type": "int", "strategy": "group", "group_size": 16}
    floats = {"type": "float", "symmetric": True}
    powers = torch.exp2(torch.randint(-3, 2, (9, 2)).float())
    vectors = {
        **{
            f"int{b}": vector(
                "pack-quantized", w, {"weight_scale": absolute / 2 ** (b - 1)}, num_bits=b, **integers
            )
            for b in (2, 3, 4, 5, 6, 8)
        },
        "int4-asymmetric": vector(
            "pack-quantized", w, {"weight_scale": absolute / 8, "weight_zero_point": zeros},
            num_bits=4, symmetric=False, **integers,
        ),
        "channel": vector(
            "float-quantized", w, {"weight_scale": w.abs().amax(1, keepdim=True) / 448},
            num_bits=8, strategy="channel", **floats,
        ),
        "block": vector(
            "float-quantized", wide, {"weight_scale": torch.rand(2, 3) / 50},
            num_bits=8, strategy="block", block_structure=[16, 16], **floats,
        ),
        "nvfp4": vector(
            "nvfp4-pack-quantized", w, {"weight_scale": absolute * 50, "weight_global_scale": torch.tensor([301.0])},
            num_bits=4, strategy="tensor_group", group_size=16, **floats,
        ),
        "mxfp4": vector(
            "mxfp4-pack-quantized", w, {"weight_scale": powers}, num_bits=4, strategy="group", group_size=32, **floats
        ),
        "mxfp8": vector(
            "mxfp8-quantized", w, {"weight_scale": powers / 64}, num_bits=8, strategy="group", group_size=32, **floats
        ),
    }  # fmt: skip
    OUT.write_text(json.dumps(vectors, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
