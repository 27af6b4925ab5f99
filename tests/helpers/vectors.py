"""Tensors in JSON: what other projects packed and read back, kept in tests/quant."""

import base64
from typing import Any

import torch


def encoded(t: torch.Tensor) -> dict[str, Any]:
    data = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "data": base64.b64encode(data).decode(),
    }  # fmt: skip


def decoded(t: dict[str, Any]) -> torch.Tensor:
    data = bytearray(base64.b64decode(t["data"]))
    return torch.frombuffer(data, dtype=getattr(torch, t["dtype"])).reshape(t["shape"])
