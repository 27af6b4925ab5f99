"""Paged attention in plain torch ops (SDPA), for one ragged batch. `kernels/paged_attention.py` is the fast one.

Sequences with one token are padded to the longest and run as one group; each prefill chunk is a group of its own.
Letters: n tokens of a sequence, Hk KV heads, G query heads per KV head, d head_dim, L keys.
"""

from dataclasses import dataclass

import numpy as np
import torch

from llmrs.backends.torch.kv_fp8 import QuantizedKV
from llmrs.core.batch import Batch

Pool = torch.Tensor | QuantizedKV  # (blocks, block_size, Hk, d)


@dataclass(frozen=True)
class AttnGroup:
    """s sequences with n tokens each, in one SDPA call."""

    token_rows: torch.Tensor  # int64 (s * n,): their tokens in the batch
    block_tables: torch.Tensor  # int64 (s, b)
    relative_pos: torch.Tensor  # int32 (s, 1, n, L): query position - key position
    masks: dict[int, torch.Tensor]  # by window, made on demand
    kv_slice: slice | None  # KV slots of one sequence whose blocks are contiguous

    def mask(self, window: int) -> torch.Tensor:
        """bool (s, 1, n, L): causal, and with a window only the last `window` keys."""
        if window not in self.masks:
            causal = self.relative_pos >= 0
            self.masks[window] = causal & (self.relative_pos < window) if window else causal
        return self.masks[window]


@dataclass(frozen=True)
class AttnMetadata:
    """What the ops need of a step, on the device, made once for all layers."""

    slot_mapping: torch.Tensor  # int64 (T,): where each token's KV goes, block * block_size + offset
    groups: list[AttnGroup]
    logits_indices: torch.Tensor  # int64 (R,)
    cos_sin: dict[int, tuple[torch.Tensor, torch.Tensor]]  # of RoPE, made on demand


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
    relative_pos = positions - torch.arange(num_keys, device=device, dtype=torch.int32)
    return AttnGroup(on_device(rows, device), on_device(blocks, device), relative_pos, {}, kv_slice)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend(c: AttnMetadata, q: torch.Tensor, keys: Pool, values: Pool, scale: float, window: int) -> torch.Tensor:
    """q (T, H, d), keys and values (blocks, block_size, Hk, d) -> (T, H * d)."""
    if len(c.groups) == 1:
        return _attend_group(c.groups[0], q, keys, values, scale, window)
    y = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    for group in c.groups:
        y[group.token_rows] = _attend_group(group, q[group.token_rows], keys, values, scale, window)
    return y


def _attend_group(g: AttnGroup, q: torch.Tensor, keys: Pool, values: Pool, scale: float, window: int) -> torch.Tensor:
    s, n, num_kv_heads, head_dim = len(g.block_tables), g.relative_pos.shape[2], keys.shape[2], keys.shape[3]
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
