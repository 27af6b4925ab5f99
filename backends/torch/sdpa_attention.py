"""Paged attention in plain torch ops, for one ragged batch.

Sequences that feed one token are padded to the longest of them and run at once; a part of a prompt runs alone.
Letters: n rows, Hk KV heads, G query heads per KV head, d head size, L keys.
"""

from dataclasses import dataclass

import numpy as np
import torch

from llmrs.backends.torch.kv_fp8 import Scaled
from llmrs.core.batch import Batch

Pool = torch.Tensor | Scaled  # (blocks, block_size, Hk, d)


@dataclass(frozen=True)
class Part:
    """Sequences that run in one call of the attention function, each with `n` rows."""

    rows: torch.Tensor  # int64 (s * n,): where their rows lie in the batch
    blocks: torch.Tensor  # int64 (s, b)
    distance: torch.Tensor  # int32 (s, 1, n, L): how far before a row's position a key lies
    masks: dict[int, torch.Tensor]  # by window, as they are asked for
    cells: slice | None  # of one sequence whose blocks lie in a row: where in the cache its keys are

    def mask(self, window: int) -> torch.Tensor:
        """bool (s, 1, n, L): True where a row sees a key, which is one of the last `window` (0: any) up to its own."""
        if window not in self.masks:
            seen = self.distance >= 0
            self.masks[window] = seen & (self.distance < window) if window else seen
        return self.masks[window]


@dataclass(frozen=True)
class Context:
    """What `store`, `attend` and `last` need of a step, on the device and made once for all layers."""

    cells: torch.Tensor  # int64 (T,): where each token's KV goes: block * block_size + offset
    parts: list[Part]
    rows: torch.Tensor  # int64 (R,): those whose logits are wanted
    turns: dict[int, tuple[torch.Tensor, torch.Tensor]]  # rope's cos and sin, as they are asked for


def context(batch: Batch, block_size: int, device: torch.device) -> Context:
    counts = np.diff(batch.query_start_loc)
    row_of = np.repeat(np.arange(len(counts)), counts)
    blocks = batch.block_tables[row_of, batch.positions // block_size].astype(np.int64)
    singles = np.flatnonzero(counts == 1)
    groups = ([singles] if len(singles) else []) + [np.array([s]) for s in np.flatnonzero(counts > 1)]
    return Context(
        on_device(blocks * block_size + batch.positions % block_size, device),
        [_part(batch, group, block_size, device) for group in groups],
        on_device(batch.logits_indices.astype(np.int64), device),
        {},
    )


def _part(batch: Batch, group: np.ndarray, block_size: int, device: torch.device) -> Part:
    rows = np.concatenate([np.arange(batch.query_start_loc[s], batch.query_start_loc[s + 1]) for s in group])
    length = int(batch.seq_lens[group].max())
    blocks = batch.block_tables[group, : -(-length // block_size)].astype(np.int64)
    cells, keys = None, blocks.shape[1] * block_size
    if len(group) == 1 and (np.diff(blocks[0]) == 1).all():
        first, keys = int(blocks[0, 0]) * block_size, length
        cells = slice(first, first + length)
    positions = on_device(batch.positions[rows].reshape(len(group), 1, -1, 1), device)
    distance = positions - torch.arange(keys, device=device, dtype=torch.int32)
    return Part(on_device(rows, device), on_device(blocks, device), distance, {}, cells)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; from pinned memory to a GPU, so that the host need not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend(c: Context, q: torch.Tensor, keys: Pool, values: Pool, scale: float, window: int) -> torch.Tensor:
    """q (T, H, d), keys and values (blocks, block_size, Hk, d) -> (T, H * d)."""
    if len(c.parts) == 1:
        return _attend_part(c.parts[0], q, keys, values, scale, window)
    y = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    for part in c.parts:
        y[part.rows] = _attend_part(part, q[part.rows], keys, values, scale, window)
    return y


def _attend_part(p: Part, q: torch.Tensor, keys: Pool, values: Pool, scale: float, window: int) -> torch.Tensor:
    s, n, kv_heads, size = len(p.blocks), p.distance.shape[2], keys.shape[2], keys.shape[3]
    k, v = (_gathered(p, x).transpose(1, 2).to(q.dtype) for x in (keys, values))  # (s, Hk, L, d)
    rows = q.view(s, n, kv_heads, -1, size).permute(0, 2, 3, 1, 4)  # (s, Hk, G, n, d)
    group = rows.shape[2]  # query heads of one KV head become rows of one attention
    if n == 1 and p.cells is not None and not window:
        mask = None  # the last token of a sequence sees all of it
    else:
        mask = p.mask(window).repeat(1, 1, 1 if n == 1 else group, 1)
    y = torch.nn.functional.scaled_dot_product_attention(
        rows.reshape(s, kv_heads, group * n, size), k, v, attn_mask=mask, scale=scale
    )
    return y.view(s, kv_heads, group, n, size).permute(0, 3, 1, 2, 4).reshape(s * n, -1)


def _gathered(p: Part, x: Pool) -> torch.Tensor:
    """(s, L, Hk, d) from (blocks, block_size, Hk, d); a view where the blocks lie in a row."""
    if p.cells is not None:
        return x.flatten(0, 1)[None, p.cells]
    return x[p.blocks].flatten(1, 2)
