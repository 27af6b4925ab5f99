"""Attention of parts of prompts by a library, where the option `attention` names one: torch's own, or flash-attn.

Libraries want keys and values side by side, so those of the step's prompts are gathered from the pages first; single
tokens stay with our kernel. Letters: s sequences, n new tokens of one, L its keys, Hq and Hk heads, d head size.
"""

from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from llmrs.backends.torch.sdpa_attention import on_device
from llmrs.core.batch import Batch
from llmrs.core.errors import BackendError
from llmrs.core.ir import Graph

if TYPE_CHECKING:
    from torch.nn.attention import SDPBackend

Tensor = torch.Tensor
CUDNN_LENGTHS = 256  # cuDNN plans anew for every length that it meets: it gets multiples of this


@dataclass(frozen=True)
class Parts:
    """The sequences from the first to the last that has more than one token in a step."""

    rows: slice  # where their tokens lie in the step
    counts: list[tuple[int, int]]  # n and L of each
    keys: int  # the sum of all L
    starts: Tensor  # int32 (s + 1,): where each one's tokens begin among theirs
    key_starts: Tensor  # int32 (s + 1,): the same for keys
    pieces: Tensor  # int32 (P, 3): what kernels/gather.py copies


class Library(Protocol):
    """A library's attention."""

    def check(self, graph: Graph, dtype: torch.dtype) -> None:
        """Raises BackendError for a model that it can't do."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: Parts, scale: float, window: int) -> Tensor:
        """q (sum of n, Hq, d), k and v (keys, Hk, d) -> (sum of n, Hq, d)."""


def parts_of(batch: Batch, block_size: int, device: torch.device) -> Parts | None:
    """None where every sequence has one token."""
    several = np.flatnonzero(np.diff(batch.query_start_loc) > 1)
    if not len(several):
        return None
    some = np.arange(several[0], several[-1] + 1)
    starts = batch.query_start_loc[some[0] : some[-1] + 2]
    lengths = batch.seq_lens[some]
    key_starts = np.concatenate([[0], lengths.cumsum()])
    blocks = -(-lengths // block_size)
    owner = np.arange(len(some)).repeat(blocks)
    number = np.arange(len(owner)) - (blocks.cumsum() - blocks).repeat(blocks)
    first = number * block_size  # of the piece's tokens, in their sequence
    pieces = np.stack(
        [
            batch.block_tables[some[owner], number],
            key_starts[owner] + first,
            np.minimum(lengths[owner] - first, block_size),
        ],
        axis=1,
    )
    arrays = starts - starts[0], key_starts, pieces
    return Parts(
        slice(int(starts[0]), int(starts[-1])),
        list(zip(np.diff(starts).tolist(), lengths.tolist(), strict=True)),
        int(key_starts[-1]),
        *(on_device(a.astype(np.int32), device) for a in arrays),
    )


class Sdpa:
    """torch's scaled_dot_product_attention, for sequences of one shape at a time."""

    def check(self, graph: Graph, dtype: torch.dtype) -> None:
        """It does every model: where no fast way is there, torch has a slow one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: Parts, scale: float, window: int) -> Tensor:
        found, row, key = [], 0, 0
        for (n, length), group in groupby(p.counts):
            s = len(list(group))
            here, there = slice(row, row + s * n), slice(key, key + s * length)
            some = (t.unflatten(0, (s, -1)).transpose(1, 2) for t in (q[here], k[there], v[there]))  # (s, H, n or L, d)
            found.append(_alike(*some, scale=scale, window=window).transpose(1, 2).flatten(0, 1))
            row, key = here.stop, there.stop
        return found[0] if len(found) == 1 else torch.cat(found)


def _alike(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
    """q (s, Hq, n, d), k and v (s, Hk, L, d) -> (s, Hq, n, d)."""
    from torch.nn.attention import sdpa_kernel  # here, since with torch._dynamo it takes seconds to import
    from torch.nn.attention.bias import causal_lower_right

    n, length = q.shape[2], k.shape[2]
    if window and window < length:
        return _windowed(q, k, v, scale, window)
    attend = torch.nn.functional.scaled_dot_product_attention
    if n < length:  # causal from the last key on, where is_causal would count from the first
        return attend(q, k, v, attn_mask=causal_lower_right(n, length), scale=scale, enable_gqa=True)
    with sdpa_kernel(_order(n), set_priority=True):
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def _order(n: int) -> "list[SDPBackend]":
    """cuDNN is the fastest on Hopper; math, which keeps all scores, the last resort."""
    from torch.nn.attention import SDPBackend

    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *flash] if n % CUDNN_LENGTHS == 0 else flash


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """With a mask, which is (n, keys that anybody sees); every query head gets keys of its own, as masks want it."""
    n, length, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    first = max(length - n - window + 1, 0)
    k, v = (x[:, :, first:].repeat_interleave(group, dim=1) for x in (k, v))
    rows = torch.arange(length - n, length, device=q.device)[:, None]
    distance = rows - torch.arange(first, length, device=q.device)
    seen = (distance >= 0) & (distance < window)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


class Flash:
    """flash-attn, all sequences in one call: version 3 (`flash_attn_interface`) where it is there, else 2."""

    def __init__(self) -> None:
        self.run = _flash_function()

    def check(self, graph: Graph, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            raise BackendError("attention: flash can't do float32", "dtype: bf16, or attention: sdpa")
        for heads in {kv.sizes for kv in graph.kv_types()}:
            if heads[1] > 256 or heads[1] % 8:
                raise BackendError(
                    f"attention: flash can't do the heads of {graph.name}, which have {heads[1]} elements; "
                    "it does multiples of 8 up to 256",
                    "attention: auto, or sdpa",
                )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: Parts, scale: float, window: int) -> Tensor:
        found = self.run(
            q,
            k,
            v,
            cu_seqlens_q=p.starts,
            cu_seqlens_k=p.key_starts,
            max_seqlen_q=max(n for n, _ in p.counts),
            max_seqlen_k=max(length for _, length in p.counts),
            softmax_scale=scale,
            causal=True,  # from the last key on
            window_size=(window - 1, 0) if window else (-1, -1),
        )
        y: Tensor = found[0] if isinstance(found, tuple) else found  # early releases of version 3 give more
        return y


def _flash_function() -> Any:
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            return import_module(name).flash_attn_varlen_func
        except ImportError as error:
            missing = error
    raise BackendError(
        f"attention: flash needs flash-attn, which can't be loaded: {missing}",
        "pip install flash-attn --no-build-isolation, or attention: auto",
    ) from missing


LIBRARIES: dict[str, type[Library]] = {"sdpa": Sdpa, "flash": Flash}
