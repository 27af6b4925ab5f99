"""What the rules know of a step, and paged attention in plain mx ops.

Sequences that feed one token are padded to the longest of them and run at once; a part of a prompt runs alone.
Letters: T tokens, H query heads, Hk KV heads, d head size; s sequences of a part with n rows each, L keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from llmrs.core.batch import Batch
from llmrs.core.ir import Frequencies

Turns = tuple[mx.array, mx.array]  # float32 (T, 1, d): what a head's elements, and its halves exchanged, are times


@dataclass
class KV:
    """The KV cache of one layer: keys and values (blocks * block_size, Hk, d).

    A store replaces both arrays; it happens in place where nothing else holds the old ones.
    """

    keys: mx.array
    values: mx.array


@dataclass(frozen=True)
class Keys:
    """Which cells of the KV cache a part reads."""

    cells: mx.array  # int32 (s, L)
    mask: mx.array | str | None  # bool (s, 1, n, L), "causal", or None: all of them


class Part:
    """Sequences that run in one call of the attention function, each with `n` rows."""

    def __init__(self, batch: Batch, block_size: int, group: np.ndarray) -> None:
        self.first, self.n = int(batch.starts[group[0]]), int(batch.starts[group[0] + 1] - batch.starts[group[0]])
        self.rows = np.concatenate([np.arange(batch.starts[s], batch.starts[s + 1]) for s in group])
        self.blocks, self.lengths, self.block_size = batch.blocks[group], batch.lengths[group], block_size
        self._keys: dict[int, Keys] = {}

    @cached_property
    def _index(self) -> mx.array:
        return mx.array(self.rows.astype(np.int32))

    def of(self, x: mx.array) -> mx.array:
        """Its rows (s * n, ...) of x (T, ...)."""
        return x[self._index] if self.n == 1 else x[self.first : self.first + self.n]

    def keys(self, window: int) -> Keys:
        """What its rows see: the positions up to their own, of them the last `window` (0: any)."""
        if window not in self._keys:
            self._keys[window] = self._find(window)
        return self._keys[window]

    def _find(self, window: int) -> Keys:
        begin = np.maximum(self.lengths - self.n - window + 1, 0) if window else np.zeros_like(self.lengths)
        positions = begin[:, None] + np.arange(int((self.lengths - begin).max()), dtype=np.int32)  # (s, L)
        columns = np.minimum(positions // self.block_size, self.blocks.shape[1] - 1)
        cells = np.take_along_axis(self.blocks, columns, axis=1) * self.block_size + positions % self.block_size
        return Keys(mx.array(cells.astype(np.int32)), self._mask(positions, window))

    def _mask(self, positions: np.ndarray, window: int) -> mx.array | str | None:
        if len(self.lengths) == 1 and self.n == 1:
            return None
        if len(self.lengths) == 1 and not window:
            return "causal"
        own = self.lengths[:, None] - self.n + np.arange(self.n)  # (s, n): the rows' own positions
        distance = own[:, None, :, None] - positions[:, None, None, :]
        return mx.array((distance >= 0) & (distance < window) if window else distance >= 0)


class Context:
    """What `store`, `attend`, `rope` and `last` need of a step; each array is made when first asked for.

    `tables`, `owners`, `visible` and `longest` are what a ragged attention kernel takes.
    """

    def __init__(self, batch: Batch, block_size: int) -> None:
        self.batch, self.block_size = batch, block_size
        self._turns: dict[int, Turns] = {}

    @cached_property
    def counts(self) -> np.ndarray:
        """int32 (S,): tokens of each sequence."""
        return np.diff(self.batch.starts)

    @cached_property
    def row_of(self) -> np.ndarray:
        """int32 (T,): the sequence of each token."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    @cached_property
    def cells(self) -> mx.array:
        """int32 (T,): where each token's KV goes."""
        b, size = self.batch, self.block_size
        return mx.array(b.blocks[self.row_of, b.positions // size] * size + b.positions % size)

    @cached_property
    def rows(self) -> mx.array:
        """int32 (R,): rows whose logits are wanted."""
        return mx.array(self.batch.rows)

    @cached_property
    def rows_are_all(self) -> bool:
        return len(self.batch.rows) == len(self.batch.tokens) and len(self.counts) == len(self.batch.rows)

    @cached_property
    def parts(self) -> Sequence[Part]:
        singles = np.flatnonzero(self.counts == 1)
        groups = ([singles] if len(singles) else []) + [np.array([s]) for s in np.flatnonzero(self.counts > 1)]
        return [Part(self.batch, self.block_size, group) for group in groups]

    @cached_property
    def order(self) -> mx.array | None:
        """int32 (T,): where each row is among those of the parts; None where they are in order."""
        rows = np.concatenate([p.rows for p in self.parts])
        return None if (np.diff(rows) > 0).all() else mx.array(np.argsort(rows).astype(np.int32))

    @cached_property
    def tables(self) -> mx.array:
        """int32 (S, B): the blocks of each sequence."""
        return mx.array(self.batch.blocks)

    @cached_property
    def owners(self) -> mx.array:
        """int32 (T,): the sequence of each token."""
        return mx.array(self.row_of)

    @cached_property
    def visible(self) -> mx.array:
        """int32 (T,): how many positions of its sequence a token sees."""
        return mx.array(self.batch.positions + 1)

    @cached_property
    def longest(self) -> int:
        """The largest of `visible`."""
        return int(self.batch.lengths.max())

    def turns(self, frequencies: Frequencies, positions: mx.array) -> Turns:
        """Cosines and signed sines of a step's positions, the same for all layers of a kind."""
        key = id(frequencies)  # which the graph holds; its hash would cost more than all the rest
        if key not in self._turns:
            angles = positions[:, None, None] * mx.array(np.array(frequencies.values, np.float32))  # (T, 1, d/2)
            cos, sin = (f(angles) * frequencies.scale for f in (mx.cos, mx.sin))
            self._turns[key] = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
        return self._turns[key]


def plain_singles(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """The answers of a part whose sequences have one row each, q (s, H, d) -> (s, H * d); what a CPU does fastest."""
    seen = p.keys(window)
    k, v = kv.keys[seen.cells].transpose(0, 2, 3, 1), kv.values[seen.cells].swapaxes(1, 2)  # (s, Hk, d, L), (.. L, d)
    if k.dtype != q.dtype:
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = (mx.unflatten(q, 1, (v.shape[1], -1)) * scale) @ k  # (s, Hk, H / Hk, L)
    if seen.mask is not None:
        scores = mx.where(seen.mask, scores, -mx.inf)
    return mx.flatten(mx.softmax(scores, axis=-1, precise=True) @ v, 1)


def fast_singles(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """The same through MLX's own attention."""
    return mx.flatten(_attended(p, mx.expand_dims(q, 2), kv, scale, window), 1)


def _rows(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """One sequence's n rows, q (n, H, d) -> (n, H * d)."""
    y = _attended(p, mx.expand_dims(q.swapaxes(0, 1), 0), kv, scale, window)
    return mx.flatten(y[0].swapaxes(0, 1), 1)


def _attended(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """q (s, H, n, d) -> the same."""
    seen = p.keys(window)
    k, v = kv.keys[seen.cells].swapaxes(1, 2), kv.values[seen.cells].swapaxes(1, 2)  # (s, Hk, L, d)
    if k.dtype != q.dtype:
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen.mask)


def attend(
    c: Context, q: mx.array, kv: KV, scale: float, window: int, singles: Callable[..., mx.array] = plain_singles
) -> mx.array:
    """q (T, H, d) -> (T, H * d)."""
    parts = [(singles if p.n == 1 else _rows, p) for p in c.parts]
    if len(parts) == 1:
        run, p = parts[0]
        return run(p, q, kv, scale, window)
    y = mx.concatenate([run(p, p.of(q), kv, scale, window) for run, p in parts])
    return y if c.order is None else y[c.order]
