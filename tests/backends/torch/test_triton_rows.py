"""Quantized rows in the order of the Triton kernels, against quant/form.py, on random blocks of the real formats."""

import numpy as np
import pytest
import torch

from llmrs.quant.form import TABLES, Form
from llmrs.quant.tensor import QuantTensor, of_planes
from llmrs.random_model import random_quantized

pytest.importorskip("triton")
from gemm_cases import DEVICE
from quant_cases import cases

from llmrs.backends.torch import triton_rows
from llmrs.backends.torch.quant_matrix import packed_rows


@pytest.mark.parametrize("tensor", cases(), ids=lambda t: f"{t.format} {t.form}")
def test_dequantize(tensor: QuantTensor):
    """Bit for bit, and rows by their numbers."""
    rows = triton_rows.pack(packed_rows(tensor, torch.device(DEVICE)), torch.float32)
    assert isinstance(rows, triton_rows.TritonRows)
    expected = torch.from_numpy(tensor.float32())
    assert torch.equal(rows.unpack(torch.float32).cpu(), expected)
    assert torch.equal(rows[5:9].unpack(torch.float32).cpu(), expected[5:9])
    tokens, last = (
        torch.tensor([10, -2, 0, 10, -1], dtype=torch.int32, device=DEVICE),
        torch.tensor([7, 9], device=DEVICE),
    )
    found = rows.gather(tokens, torch.float16, last).cpu()
    assert torch.equal(found, expected[[10, 9, 0, 10, 7]].half())


@pytest.mark.parametrize("tensor", cases(), ids=lambda t: f"{t.format} {t.form}")
def test_memory_is_that_of_the_form(tensor: QuantTensor):
    packed = packed_rows(tensor, torch.device(DEVICE))
    rows = triton_rows.pack(packed, torch.float32)
    assert sum(p.nbytes for p in rows.planes.values()) == sum(p.nbytes for p in packed.planes.values())


def test_scales_at_the_ends_of_their_range():
    """Every byte of e8m0 and e4m3, also the subnormal ones and NaN."""
    for code, scale, group in (("e2m1", "e8m0", 32), ("double_e2m1", "half_e8m0", 32), ("e2m1", "e4m3", 16)):
        form = Form("fp4", code, group, scale)
        tensor = random_quantized(np.random.default_rng(0), form, (), (64, 128))
        planes = dict(tensor.planes())
        planes["scales"] = np.resize(np.arange(256, dtype=np.uint8), planes["scales"].shape)
        tensor = of_planes("all", form, planes)
        found = triton_rows.pack(packed_rows(tensor, torch.device(DEVICE)), torch.float32).unpack(torch.float32)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(found.cpu().numpy(), tensor.float32())
    assert code in TABLES


def test_what_kernels_lack_stays_as_it_is():
    form = Form("affine", "u4", 8, "f32")
    packed = packed_rows(random_quantized(np.random.default_rng(0), form, (), (4, 64)), torch.device(DEVICE))
    assert triton_rows.pack(packed, torch.float32) is packed
