"""Quantizes the modules of a folder's model.safetensors in the layouts of other projects, with packers of its own.

Each `FORMATS[name](w)` quantizes a float32 matrix (N, K): the file's tensors by what follows the module's name, and the
float32 matrix that they stand for, as the layout's definition gives it. `CONFIGS[name]` is what config.json says.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
GROUP = 16  # of the layouts that allow any
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: nibble i of a word holds this column of eight


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """(rows, n) -> i32 (rows, ceil(n bits / 32)), one Python integer a row, lowest code in the lowest bits."""
    size = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(c) << bits * i for i, c in enumerate(row)).to_bytes(4 * size, "little") for row in codes]
    return torch.from_numpy(np.frombuffer(b"".join(rows), "<i4").reshape(len(codes), size).copy())


def grouped(
    w: np.ndarray, bits: int, group: int, symmetric: bool, lowest: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, K), scales f16 (N, K / g), zeros (N, K / g), with w = (code - zero) scale."""
    rows, columns = w.shape
    parts, top = w.reshape(rows, -1, group), (1 << bits) - 1
    if symmetric:
        scales = np.abs(parts).max(-1) / (top // 2) + 1e-4
        zeros = np.full(scales.shape, 1 << bits - 1)
    else:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        scales = (high - low) / top + 1e-4
        zeros = np.clip(np.round(-low / scales), lowest, top).astype(int)
    scales = scales.astype(np.float16)
    steps = np.round(parts / scales[:, :, None].astype(np.float32))
    codes = np.clip(steps + zeros[:, :, None], 0, top).astype(int)
    return codes.reshape(rows, columns), scales, zeros


def ungrouped(codes, scales, zeros):
    group = codes.shape[1] // scales.shape[1]
    steps = (codes - np.repeat(zeros, group, 1)).astype(np.float32)
    return steps * np.repeat(scales.astype(np.float32), group, 1)


def ct_packed(bits, symmetric, group=GROUP):
    def quantize(w):
        codes, scales, zeros = grouped(w, bits, group or w.shape[1], symmetric)
        tensors = {"weight_packed": words(codes, bits), "weight_scale": torch.from_numpy(scales)}
        tensors["weight_shape"] = torch.tensor(w.shape)
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return tensors, ungrouped(codes, scales, zeros)

    return quantize


def gptq(bits, version, group=GROUP):
    def quantize(w):
        codes, scales, zeros = grouped(w, bits, group, symmetric=False, lowest=version % 2)
        stored = zeros - version % 2
        tensors = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(stored.T, bits),
            "scales": torch.from_numpy(scales).T.contiguous(),
            "g_idx": torch.arange(w.shape[1], dtype=torch.int32) // group,
        }
        return tensors, ungrouped(codes, scales, zeros)

    return quantize


def awq(w):
    codes, scales, zeros = grouped(w, 4, GROUP, symmetric=False)

    def shuffled(x):
        return words(x.T.reshape(x.shape[1], -1, 8)[:, :, AWQ_ORDER].reshape(x.shape[1], -1), 4)

    tensors = {"qweight": shuffled(codes), "qzeros": shuffled(zeros), "scales": torch.from_numpy(scales).T.contiguous()}
    return tensors, ungrouped(codes, scales, zeros)


def fp8(rows, columns, dtype=torch.float32, name="weight_scale_inv", shape=None):
    """Blocks of rows x columns; 0: all."""

    def quantize(w):
        n, k = rows or w.shape[0], columns or w.shape[1]
        out, scale = np.empty(w.shape, np.float32), np.empty((-(-w.shape[0] // n), -(-w.shape[1] // k)), np.float32)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = w[i * n : (i + 1) * n, j * k : (j + 1) * k]
                scale[i, j] = 2.0 ** np.ceil(np.log2(np.abs(block).max() / 448 + 1e-12))
                scale[i, j] *= 1 if dtype in (torch.uint8, torch.float8_e8m0fnu) else 1.25
                out[i * n : (i + 1) * n, j * k : (j + 1) * k] = block / scale[i, j]
        codes = torch.from_numpy(out).to(torch.float8_e4m3fn)
        exponents = torch.from_numpy(np.log2(scale).astype(int) + 127).to(torch.uint8)
        stored = exponents.view(dtype) if dtype in (torch.uint8, torch.float8_e8m0fnu) else torch.from_numpy(scale)
        stored = stored if stored.dtype == dtype else stored.to(dtype)
        full = np.kron(stored.float().numpy() if dtype != torch.uint8 else scale, np.ones((n, k), np.float32))
        values = codes.float().numpy() * full[: w.shape[0], : w.shape[1]]
        return {"weight": codes, name: stored if shape is None else stored.reshape(shape)}, values

    return quantize


def nearest_e2m1(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values."""
    table = np.array([*E2M1, *(-v for v in E2M1)], np.float32)
    codes = np.abs(x[..., None] - table).argmin(-1)
    return codes, table[codes]


def in_pairs(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))


def nvfp4(inverse):
    """compressed-tensors' spelling, or modelopt's."""

    def quantize(w):
        factor = np.float32(np.abs(w).max() / (6 * 448))
        parts = w.reshape(len(w), -1, 16)
        scales = torch.from_numpy(np.abs(parts).max(-1) / 6 / factor).to(torch.float8_e4m3fn)
        given = np.float32(1) / factor if inverse else factor
        true = scales.float().numpy() * (np.float32(1) / given if inverse else given)
        codes, values = nearest_e2m1(parts / np.maximum(true, 1e-9)[:, :, None])
        packed, tensor = in_pairs(codes.reshape(w.shape)), torch.tensor([given])
        if inverse:
            tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": tensor}
            tensors["input_global_scale"] = torch.ones(1)
        else:
            tensors = {"weight": packed, "weight_scale": scales, "weight_scale_2": tensor[0].clone()}
            tensors["input_scale"] = torch.tensor(0.5)
        return tensors, (values * true[:, :, None]).reshape(w.shape)

    return quantize


def ct_mxfp4(w):
    parts = w.reshape(len(w), -1, 32)
    exponents = np.ceil(np.log2(np.abs(parts).max(-1) / 6 + 1e-12)).astype(int)
    true = np.exp2(exponents).astype(np.float32)
    codes, values = nearest_e2m1(parts / true[:, :, None])
    tensors = {
        "weight_packed": in_pairs(codes.reshape(w.shape)),
        "weight_scale": torch.from_numpy((exponents + 127).astype(np.uint8)),
    }
    return tensors, (values * true[:, :, None]).reshape(w.shape)


def mlx(mode, bits, group, dtype="float16"):
    """By MLX itself."""

    def quantize(w):
        import mlx.core as mx

        weight, *rest = mx.quantize(mx.array(w).astype(getattr(mx, dtype)), group, bits, mode)
        tensors = {"weight": torch.from_numpy(np.array(weight))}
        numpy = [np.array(r.astype(mx.float32) if r.dtype != mx.uint8 else r) for r in rest]
        stored = [
            torch.from_numpy(n) if n.dtype == np.uint8 else torch.from_numpy(n).to(getattr(torch, dtype)) for n in numpy
        ]
        tensors |= dict(zip(("scales", "biases"), stored, strict=False))
        wide = [mx.array(n) for n in numpy]
        values = mx.dequantize(weight, *wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        return tensors, np.array(values)

    return quantize


def ct(style, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": None}}
    common = {"quant_method": "compressed-tensors", "format": style, "kv_cache_scheme": None}
    return {"quantization_config": {**common, "config_groups": groups, "ignore": ["lm_head"]}}


def ct_int(bits, symmetric, group=GROUP):
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    return ct("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, actorder=None, **strategy)


def gptq_config(bits, style):
    common = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False}
    return {"quantization_config": {**common, "checkpoint_format": style}}


def fp8_config(block, **more):
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3", **more}}


def ct_fp8(strategy, **more):
    return ct("float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy, **more)


def modelopt(algorithm):
    return {"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head*"]}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int"}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MXFP4 = {**NVFP4, "strategy": "group", "group_size": 32}
F8E8M0 = torch.float8_e8m0fnu

# name -> quantizes a matrix, what config.json says
FILES = {
    **{f"int{b}": (ct_packed(b, True), ct_int(b, True)) for b in (2, 3, 4, 5, 6, 8)},
    "int4-asymmetric": (ct_packed(4, False), ct_int(4, False)),
    "int8-asymmetric": (ct_packed(8, False), ct_int(8, False)),
    "int3-asymmetric": (ct_packed(3, False), ct_int(3, False)),
    "int4-channel": (ct_packed(4, True, 0), ct_int(4, True, 0)),
    "int8-channel-asymmetric": (ct_packed(8, False, 0), ct_int(8, False, 0)),
    **{f"gptq{b}": (gptq(b, 1, 32), gptq_config(b, "gptq")) for b in (2, 3, 4, 8)},
    "gptq-v2": (gptq(4, 2), gptq_config(4, "gptq_v2")),
    "awq": (awq, {"quantization_config": AWQ}),
    "auto-round-gptq": (
        gptq(4, 1),
        {"quantization_config": {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}},
    ),
    "auto-round-awq": (awq, {"quantization_config": {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}}),
    "fp8": (fp8(24, 32), fp8_config([24, 32])),
    "fp8-bf16-scales": (fp8(24, 32, torch.bfloat16), fp8_config([24, 32])),
    "fp8-ue8m0": (fp8(128, 128, F8E8M0), fp8_config([128, 128], scale_fmt="ue8m0")),
    "fp8-tensor": (fp8(0, 0, shape=()), fp8_config(None, activation_scheme="static")),
    "fp8-ct-tensor": (fp8(0, 0, torch.bfloat16, "weight_scale", (1,)), ct_fp8("tensor")),
    "fp8-ct-channel": (fp8(1, 0, torch.bfloat16, "weight_scale"), ct_fp8("channel")),
    "fp8-ct-block": (fp8(16, 48, torch.float32, "weight_scale"), ct_fp8("block", block_structure=[16, 48])),
    "mxfp8-ct": (
        fp8(1, 32, torch.uint8, "weight_scale"),
        ct("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"),
    ),
    "fp8-modelopt": (fp8(0, 0, name="weight_scale", shape=()), modelopt("FP8")),
    "nvfp4-ct": (nvfp4(True), ct("nvfp4-pack-quantized", **NVFP4)),
    "nvfp4-modelopt": (nvfp4(False), modelopt("NVFP4")),
    "mxfp4-ct": (ct_mxfp4, ct("mxfp4-pack-quantized", **MXFP4)),
}
for _bits in (2, 3, 4, 8):
    FILES[f"gptq{_bits}"][1]["quantization_config"]["group_size"] = 32
if find_spec("mlx"):
    FILES |= {
        f"mlx{b}-g{g}-{d}": (
            mlx("affine", b, g, d),
            {"quantization": {"group_size": g, "bits": b}, "quantization_config": {"group_size": g, "bits": b}},
        )
        for b, g, d in (
            (2, 32, "float32"), (3, 32, "float16"), (4, 32, "bfloat16"), (5, 64, "float16"), (6, 64, "bfloat16"),
            (8, 128, "float16"), (4, 64, "float16"),
        )
    }  # fmt: skip
    FILES |= {
        f"mlx-{m}": (mlx(m, b, g, "float32"), {"quantization": {"group_size": g, "bits": b, "mode": m}})
        for m, b, g in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
    }


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantize_folder(folder: Path, to: Path, name: str, chosen=is_linear) -> tuple[Path, Path]:
    """Copies a folder twice: quantized, and in float32 with the values that the quantized one stands for."""
    quantize, config = FILES[name]
    tensors = load_file(folder / "model.safetensors")
    packed, dense = dict(tensors), dict(tensors)
    for n in filter(chosen, tensors):
        parts, values = quantize(packed.pop(n).float().numpy())
        packed |= {f"{n.removesuffix('weight')}{part}": t for part, t in parts.items()}
        dense[n] = torch.from_numpy(np.ascontiguousarray(values))
    return write(folder, to / "packed", packed, config), write(folder, to / "dense", dense, {})


def write(folder: Path, to: Path, tensors: Tensors, config) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, to / "model.safetensors")
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **config}), "utf-8")
    return to
