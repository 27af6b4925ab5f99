"""The operations of the quantizer on a device of Torch."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from llmrs.quant.quantizer_ops import HALF_MAX, Array


class TorchOps:
    """`QuantizerOps` of Torch."""

    chunk = 2**23  # temporaries of 32 MiB, and few launches

    def __init__(self, device: str) -> None:
        self.device = device

    def upload(self, x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, device=self.device).T.contiguous()

    def download(self, x: torch.Tensor, dtype: type[Any]) -> np.ndarray:
        return x.to(getattr(torch, np.dtype(dtype).name)).cpu().numpy()

    def run(self, function: Callable[[int], None], items: Iterable[int]) -> None:
        for item in items:
            function(item)

    def nearest(
        self, x: torch.Tensor, factor: Array | float, shift: float, low: float, high: float, out: Array | None = None
    ) -> torch.Tensor:
        return (x * factor).add_(shift).round_().clamp_(low, high)

    def take(self, table: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        return torch.tensor(table, device=self.device)[index.int()]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        while len(x) > 1:  # a power of two
            x = x[: len(x) // 2] + x[len(x) // 2 :]
        return x[0]

    def dot(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.sum(x * y)

    def min(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.amin(axis)

    def max(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.amax(axis)

    def clip(self, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return x.clamp(low, high)

    def where(self, condition: torch.Tensor, x: Array | float, y: Array | float) -> torch.Tensor:
        return torch.where(condition, x, y)

    def half(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-HALF_MAX, HALF_MAX).half().float()
