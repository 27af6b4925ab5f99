"""Quantized rows in the order of the Triton kernels, which take 32 columns, a unit, at a time.

A code of b bits is split into planes of 8, 4, 2 and 1 bits: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. Column 16 o + 8 i + 2 w +
h of a unit (o, i, h < 2; w < 4) is byte 2 h + i of the quad (o, w): four columns of one half of the unit, in the bytes
of an int32, as dp2a multiplies them. The columns of one w are those that a lane of an MMA holds. Words of a unit:

    8 bits   8 words [o][w]   the quad
    4 bits   4 words [w]      the quad o in the bits 4 o of each byte
    2 bits   2 words [w / 2]  in the bits 4 (w % 2) + 2 o of each byte
    1 bit    1 word           in bit 2 w + o of each byte

Scales are those of quant/form.py. With mins they are pairs (scale, min), and (super_scale, super_min).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llmrs.backends.torch.kernels.dequantize import dequantize
from llmrs.backends.torch.quant_matrix import TORCH, VIEWS, PackedRows
from llmrs.quant.form import SUPER_BLOCK, TABLES, Form, unpack_codes

UNIT = 32  # columns
PACKED_WEIGHTS = 2**22  # that are put in order at once: temporaries of 64 MiB
SPLIT = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}  # bits -> those of `low`, and of `high`
PLANES = ("low", "high", "scales", "offsets", "supers", "row_scales")  # in the order of the kernels' arguments


def supports(form: Form, columns: int) -> bool:
    """Whether the kernels take rows of this form."""
    return columns % UNIT == 0 and (form.group == 16 or form.group % UNIT == 0)


@dataclass(frozen=True)
class TritonRows(PackedRows):
    """`PackedRows` with planes that the kernels read."""

    def __len__(self) -> int:
        return len(self.planes["low"])

    def __getitem__(self, index: slice | torch.Tensor) -> "TritonRows":
        return replace(self, planes={name: plane[index] for name, plane in self.planes.items()})

    @property
    def integers(self) -> bool:
        """Whether codes stand for integers of 8 bits, which GEMV multiplies."""
        return self.form.kind != "fp8"

    @property
    def arguments(self) -> list[torch.Tensor | None]:
        """Planes as kernels take them."""
        return [self.planes.get(name) for name in PLANES]

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The form as kernels take it; see kernels/quant_codes.py."""
        form, planes = self.form, self.planes
        low, high = SPLIT[form.bits]
        scale, offset, signed = form.scale, "", form.bits == 8 and form.zero == 128
        if form.kind == "affine" and "offsets" in planes:
            offset = "zero" if planes["offsets"].dtype == torch.uint8 else "bias"
        if form.kind == "k_quant" and form.zero == 0:
            scale, offset = ("u4_pair" if form.scale == "u4" else "u8_pair"), "min"
        return {
            "LOW_BITS": low, "HIGH_BITS": high,
            "TABLE": "" if form.code.startswith("u") else form.code.removeprefix("double_"),
            "SIGNED": signed or form.code in TABLES, "FACTOR": 0.5 if form.code == "e2m1" else 1.0,
            "ZERO": 0 if signed else form.zero, "GROUP": form.group, "SCALE": scale, "OFFSET": offset,
            "SUPER": SUPER_BLOCK if "supers" in planes else 0, "ROW_SCALE": "row_scales" in planes,
        }  # fmt: skip

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(len(self), self.columns, dtype=dtype, device=self.planes["low"].device)
        return dequantize(self.arguments, self.constants, self.columns, out)

    def gather(self, index: torch.Tensor, dtype: torch.dtype, last_tokens: torch.Tensor | None = None, *,
               pdl: bool = False) -> torch.Tensor:  # fmt: skip
        """Rows by their numbers (T,): (T, K). With `last_tokens` (slots,) the number -1 - slot is that slot's."""
        out = torch.empty(len(index), self.columns, dtype=dtype, device=index.device)
        return dequantize(
            self.arguments, self.constants, self.columns, out, index=index, last_tokens=last_tokens, pdl=pdl
        )


def pack(rows: PackedRows, dtype: torch.dtype) -> PackedRows:
    """In the order of the kernels, where they take the form; else as they are."""
    if not supports(rows.form, rows.columns):
        return rows
    low, high = SPLIT[rows.form.bits]
    planes, parts = rows.planes, list[dict[str, torch.Tensor]]()
    step = max(PACKED_WEIGHTS // rows.columns, 1)
    for begin in range(0, len(rows), step):
        codes = unpack_codes(TORCH, planes["codes"][begin : begin + step], rows.form.bits, rows.columns)
        if rows.form.bits == 8 and rows.form.zero == 128:
            codes = codes ^ 128  # signed
        parts.append({"low": words(codes & ((1 << low) - 1), low)})
        if high:
            parts[-1]["high"] = words(codes >> low, high)
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return TritonRows(rows.form, rows.columns, found | scale_planes(rows))


def scale_planes(rows: PackedRows) -> dict[str, torch.Tensor]:
    """`scales`, `offsets`, `supers` and `row_scales` of a form."""
    planes, found = rows.planes, dict[str, torch.Tensor]()
    view = VIEWS.get(rows.form.scale, torch.uint8)
    found["scales"] = planes["scales"].view(view)
    if "biases" in planes:
        found["offsets"] = planes["biases"].view(view)
    if "zeros" in planes:
        found["offsets"] = planes["zeros"]
    if "mins" in planes:
        found["scales"] = torch.stack([planes["scales"], planes["mins"]], -1).view(torch.int16).squeeze(-1)
    if "super_scales" in planes:
        found["supers"] = planes["super_scales"].view(torch.int16)
    if "super_mins" in planes:
        found["supers"] = torch.stack([planes["super_scales"], planes["super_mins"]], -1).view(torch.int32).squeeze(-1)
    if "row_scales" in planes:
        found["row_scales"] = planes["row_scales"]
    return found


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 (N, K) -> int32 (N, K * bits / 32)."""
    o, i, w, h = (torch.arange(n, device=codes.device).view(shape) for n, shape in (
        (2, (2, 1, 1, 1)), (2, (2, 1, 1)), (4, (4, 1)), (2, (2,))))  # fmt: skip
    byte = 2 * h + i
    shift = 8 * byte + {8: 0 * o, 4: 4 * o, 2: 4 * (w % 2) + 2 * o, 1: 2 * w + o}[bits]
    fields = codes.view(len(codes), -1, 2, 2, 4, 2).int() << shift
    if bits == 8:
        summed = fields.sum((3, 5))  # (N, U, o, w)
    elif bits == 2:
        summed = fields.unflatten(4, (2, 2)).sum((2, 3, 5, 6))  # (N, U, w / 2)
    else:
        summed = fields.sum((2, 3, 5) if bits == 4 else (2, 3, 4, 5))
    return summed.to(torch.int32).reshape(len(codes), -1)
