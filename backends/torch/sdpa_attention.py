"""Paged attention in plain torch ops (SDPA), for one ragged batch. `kernels/paged_attention.py` is the fast one.

Sequences with one token are padded to the longest and run as one group; each prefill chunk is a group of its own.
Letters: n tokens of a sequence, Hk KV heads, G query heads per KV head, d head_dim, L keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from llmrs.backends.torch.kv_fp8 import QuantizedKV
from llmrs.core.batch import Batch
from llmrs.core.ir import RopeFrequencies

Pool = torch.Tensor | QuantizedKV  # (blocks, block_size, Hk, d)


@dataclass(frozen=True)
class AttnGroup:
    """s sequences with n tokens each, in one SDPA call."""

    token_rows: torch.Tensor  # int64 (s * n,): their tokens in the batch
    block_tables: torch.Tensor  # int64 (s, b)
    seq_lens: torch.Tensor  # int64 (s,)
    max_seq_len: int
    positions: torch.Tensor  # int32 (s, 1, n, 1)
    num_keys: int  # L
    masks: dict[int, torch.Tensor]  # by window, made on demand
    kv_slice: slice | None  # KV slots of one sequence whose blocks are contiguous

    @cached_property
    def relative_pos(self) -> torch.Tensor:
        """Query position - key position: int32 (s, 1, n, L)."""
        return self.positions - torch.arange(self.num_keys, device=self.positions.device, dtype=torch.int32)

    def mask(self, window: int) -> torch.Tensor:
        """bool (s, 1, n, L): causal, and with a window only the last `window` keys."""
        if window not in self.masks:
            causal = self.relative_pos >= 0
            self.masks[window] = causal & (self.relative_pos < window) if window else causal
        return self.masks[window]


AttendGroup = Callable[[AttnGroup, torch.Tensor, Pool, Pool, float, int], torch.Tensor]


@dataclass(frozen=True)
class AttnMetadata:
    """What the ops need of a step, on the device, made once for all layers."""

    slot_mapping: torch.Tensor  # int64 (T,): where each token's KV goes, block * block_size + offset
    groups: list[AttnGroup]
    logits_indices: torch.Tensor  # int64 (R,)
    cos_sin: dict[RopeFrequencies, tuple[torch.Tensor, torch.Tensor]]  # made on demand
    all_rows: bool = False  # logits_indices are all tokens, in order


def attn_metadata(batch: Batch, block_size: int, device: torch.device) -> AttnMetadata:
    query_lens = np.diff(batch.query_start_loc)
    seq_of_token = np.repeat(np.arange(len(query_lens)), query_lens)
    blocks = batch.block_tables[seq_of_token, batch.positions // block_size].astype(np.int64)
    decodes = np.flatnonzero(query_lens == 1)
    groups = ([decodes] if len(decodes) else []) + [np.array([s]) for s in np.flatnonzero(query_lens > 1)]
    return AttnMetadata(
        on_device(blocks * block_size + batch.positions % block_size, device),
        [_group(batch, group, block_size, device) for group in groups],
        on_device(batch.logits_indices.astype(np.int64), device),
        {},
        all_rows=np.array_equal(batch.logits_indices, np.arange(len(batch.positions))),
    )


def _group(batch: Batch, seqs: np.ndarray, block_size: int, device: torch.device) -> AttnGroup:
    starts = batch.query_start_loc
    rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in seqs])
    max_seq_len = int(batch.seq_lens[seqs].max())
    blocks = batch.block_tables[seqs, : -(-max_seq_len // block_size)].astype(np.int64)
    kv_slice, num_keys = None, blocks.shape[1] * block_size
    if len(seqs) == 1 and (np.diff(blocks[0]) == 1).all():
        first, num_keys = int(blocks[0, 0]) * block_size, max_seq_len
        kv_slice = slice(first, first + max_seq_len)
    positions = on_device(batch.positions[rows].reshape(len(seqs), 1, -1, 1), device)
    seq_lens = on_device(batch.seq_lens[seqs].astype(np.int64), device)
    return AttnGroup(
        on_device(rows, device), on_device(blocks, device), seq_lens, max_seq_len, positions, num_keys, {}, kv_slice
    )


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend(
    c: AttnMetadata, q: torch.Tensor, keys: Pool, values: Pool, scale: float, window: int,
    decode: AttendGroup | None = None,
) -> torch.Tensor:  # fmt: skip
    """q (T, H, d), keys and values (blocks, block_size, Hk, d) -> (T, H * d). `decode` takes sequences with one token,
    if given."""

    def run(g: AttnGroup, q: torch.Tensor) -> torch.Tensor:
        kernel = decode if decode and g.positions.shape[2] == 1 else attend_group
        return kernel(g, q, keys, values, scale, window)

    if len(c.groups) == 1:
        return run(c.groups[0], q)
    y = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    for group in c.groups:
        y[group.token_rows] = run(group, q[group.token_rows])
    return y


def attend_group(g: AttnGroup, q: torch.Tensor, keys: Pool, values: Pool, scale: float, window: int) -> torch.Tensor:
    s, n, num_kv_heads, head_dim = len(g.block_tables), g.positions.shape[2], keys.shape[2], keys.shape[3]
    k, v = (_gather_kv(g, x).transpose(1, 2).to(q.dtype) for x in (keys, values))  # (s, Hk, L, d)
    q = q.view(s, n, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)  # (s, Hk, G, n, d)
    group_size = q.shape[2]  # query heads of one KV head become rows of one attention
    if n == 1 and g.kv_slice is not None and not window:
        mask = None  # the last token sees the whole sequence
    else:
        mask = g.mask(window).repeat(1, 1, 1 if n == 1 else group_size, 1)
    y = torch.nn.functional.scaled_dot_product_attention(
        q.reshape(s, num_kv_heads, group_size * n, head_dim), k, v, attn_mask=mask, scale=scale
    )
    return y.view(s, num_kv_heads, group_size, n, head_dim).permute(0, 3, 1, 2, 4).reshape(s * n, -1)


def _gather_kv(g: AttnGroup, x: Pool) -> torch.Tensor:
    """(s, L, Hk, d) from (blocks, block_size, Hk, d); a view if the blocks are contiguous."""
    if g.kv_slice is not None:
        return x.flatten(0, 1)[None, g.kv_slice]
    return x[g.block_tables].flatten(1, 2)
