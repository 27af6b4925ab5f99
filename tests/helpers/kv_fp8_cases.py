"""Heads of a KV cache in fp8."""

import numpy as np
import torch

from llmrs.backends.reference import kv_fp8
from llmrs.backends.torch import kv_fp8 as fp8_in_torch


def zeros_in_torch(*shape: int, device: str = "cpu") -> fp8_in_torch.QuantizedKV:
    codes = torch.zeros(shape, dtype=fp8_in_torch.E4M3, device=device)
    return fp8_in_torch.QuantizedKV(codes, torch.zeros(shape[:-1], device=device))


def awkward() -> np.ndarray:
    """All e4m3 numbers, the midpoints and their neighbours, and random numbers of every magnitude, to 448."""
    rng = np.random.default_rng(0)
    numbers = np.sort(kv_fp8.E4M3_VALUES[~np.isnan(kv_fp8.E4M3_VALUES)])
    halfway = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(halfway, np.float32(to)) for to in (-np.inf, np.inf)]
    several = np.ldexp(rng.uniform(-1, 1, 200_000), rng.integers(-20, 9, 200_000)).astype(np.float32)
    return np.concatenate([numbers, halfway, *beside, several.clip(-448, 448), [np.nan]]).astype(np.float32)


def heads() -> np.ndarray:
    """float32 (n, d): ordinary heads, and zeros, tiny, huge, infinite, NaN."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 24)) * 10.0 ** rng.integers(-30, 30, (40, 1))
    x[0], x[1], x[2] = 0, 1e-31, -1e-45
    x[3], x[4, 5], x[5, 6], x[6, 7] = 3e38, np.inf, np.nan, -np.inf
    return x.astype(np.float32)
