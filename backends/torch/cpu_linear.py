"""y = x w^T (+ bias) on each kind of device. A CPU's 16-bit weights come in three forms, which `measured` times.

    plain    torch's own product on the weight as it is
    upcast   products in float32, on one slice of the weight after the other, widened into the L2 or L3 cache
    packed   oneDNN's blocked layout; the weight as it was is gone

Which is the fastest depends on the CPU's instructions, and capability flags do not say it: with AVX512, but without
AVX512-BF16, oneDNN emulates bf16 and reads a packed weight at a quarter of the memory's speed.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch

from llmrs.backends.base import bench

Linear = Callable[[torch.Tensor], torch.Tensor]

FULL = 4  # rows for which a packed weight is read at full speed
SLICE_BYTES = 4 * 2**20  # of a slice in float32
EVERY = 2**31  # rows: as many as there may be
MANY = 64  # rows of a prefill chunk, for timing
ROUNDS = 7  # of each trial; the fastest counts, since others may be interrupted by what else the machine does
SHAPE = (2048, 1024)  # of the weight in trials; a CPU's caches may hold it, which changes no order but that of equals


class Forms(NamedTuple):
    """What `prepare` does with 16-bit weights on this CPU."""

    packed: bool  # for all rows; else plain for few, upcast for more
    plain_rows: int  # up to here


def prepare(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """A function of x (n, K) for weight (N, K) and bias (N,) or None, all of one dtype on one device."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    forms = measured(weight.dtype, torch.get_num_threads())
    return packed(weight, bias) if forms.packed else unpacked(weight, bias, forms.plain_rows)


def unpacked(weight: torch.Tensor, bias: torch.Tensor | None, plain_rows: int) -> Linear:
    """Plain up to `plain_rows` rows, upcast above."""

    def run(x: torch.Tensor) -> torch.Tensor:
        if len(x) <= plain_rows:
            return torch.nn.functional.linear(x, weight, bias)
        return upcast(x, weight, bias)

    return run


def upcast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float32, slice by slice. The whole weight in float32 would go through memory, twice as large."""
    count, width = weight.shape
    rows = max(SLICE_BYTES // (4 * width), 64)
    columns, wide = x.float().t(), torch.empty(min(rows, count), width)
    y = torch.empty(count, len(x))  # transposed, so that a slice's part lies together
    for begin in range(0, count, rows):
        part = weight[begin : begin + rows]
        torch.mm(wide[: len(part)].copy_(part), columns, out=y[begin : begin + rows])
    return (y.t() if bias is None else y.t() + bias.float()).to(x.dtype, memory_format=torch.contiguous_format)


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A hint of 8 rows gives a layout that also suits 1 to 32. Raises RuntimeError where oneDNN has none.

    One row reads the weight a tenth slower than four do, so it is repeated.
    """
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        if rows == 1:
            x = x.expand(FULL, -1).contiguous()
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
        return y[:rows]

    return run


@cache
def measured(dtype: torch.dtype, threads: int) -> Forms:
    """The fastest forms on this machine, with this number of threads. Takes about a tenth of a second."""
    weight = torch.ones(SHAPE, dtype=dtype)
    candidates: dict[str, Linear] = {
        "plain": lambda x: torch.nn.functional.linear(x, weight),
        "upcast": lambda x: upcast(x, weight, None),
    }
    if torch.backends.mkldnn.is_available():
        with suppress(RuntimeError):  # no layout for this type and CPU
            candidates["packed"] = packed(weight, None)

    def seconds(form: str, rows: int) -> float | None:
        x = torch.ones(rows, SHAPE[1], dtype=dtype)
        return bench(lambda: candidates[form](x), lambda: None, ROUNDS) if form in candidates else None

    return fastest(seconds)


def fastest(seconds: Callable[[str, int], float | None]) -> Forms:
    """By `seconds(form, rows)`; None: the form is not there. One row is always plain or packed: to upcast
    reads as much, and writes beside it."""

    def time_of(form: str, rows: int) -> float:
        found = seconds(form, rows)
        return float("inf") if found is None else found

    rows = 2
    while rows <= MANY and time_of("plain", rows) <= time_of("upcast", rows):
        rows *= 2
    many = "upcast" if rows <= MANY else "plain"
    decode, prefill = (time_of("packed", n) / time_of(f, n) for n, f in ((1, "plain"), (MANY, many)))
    return Forms(packed=decode * prefill < 1, plain_rows=rows // 2 if rows <= MANY else EVERY)
