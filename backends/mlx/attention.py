"""What the rules know of a step, and paged attention in plain mx ops.

Sequences that feed one token are padded to the longest of them and run at once; a part of a prompt runs alone.
Letters: T tokens, H query heads, Hk KV heads, d head size; s sequences of a part with n rows each, L keys.

A token's KV goes to a cell, and a head of its keys or values to a place there: a row of d elements. So keys are
gathered as (s, Hk, L, d), as they are multiplied.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.core.batch import Batch
from llmrs.core.ir import RopeFrequencies

Key = tuple[Any, ...]  # a name and numbers
Turns = tuple[mx.array, mx.array]  # float32 (T, 1, d): what a head's elements, and its halves exchanged, are times


class KV:
    """The KV cache of one layer by places, (blocks * block_size * heads, d).

    A store replaces arrays; it happens in place where nothing else holds the old ones.
    """

    def __init__(self, keys: mx.array, values: mx.array, heads: int) -> None:
        """`keys` and `values`: arrays, or `kv_fp8.Scaled`."""
        self.keys, self.values, self.heads = keys, values, heads

    def write(self, places: mx.array, k: mx.array, v: mx.array) -> None:
        """(T, Hk, d) each, to places (T, Hk)."""
        self.keys[places] = k
        self.values[places] = v

    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values]

    def replace(self, arrays: Iterator[mx.array]) -> "KV":
        """Takes the next two."""
        self.keys, self.values = next(arrays), next(arrays)
        return self


class Arrays:
    """Arrays of a step by name and numbers, each made by the method `make_<name>` when first asked for."""

    def __init__(self) -> None:
        self.arrays: dict[Key, mx.array] = {}
        self.given = False  # whether `arrays` has been filled in, and nothing else may be asked for

    def array(self, *key: Any) -> mx.array:  # a Key
        if key not in self.arrays:
            assert not self.given, f"{key} would become a constant of a compiled step"
            name, *numbers = key
            self.arrays[key] = mx.array(getattr(self, f"make_{name}")(*numbers))
        return self.arrays[key]


class Part(Arrays):
    """Sequences that run in one call of the attention function, each with `n` rows.

    The number of keys is rounded up to a multiple of `multiple`.
    """

    def __init__(self, batch: Batch, block_size: int, group: np.ndarray, multiple: int) -> None:
        super().__init__()
        self.first, self.n = (
            int(batch.query_start_loc[group[0]]),
            int(batch.query_start_loc[group[0] + 1] - batch.query_start_loc[group[0]]),
        )
        self.rows = batch.query_start_loc[group] if self.n == 1 else np.arange(self.first, self.first + self.n)
        self.blocks, self.lengths = batch.block_tables[group], batch.seq_lens[group]
        self.block_size, self.multiple = block_size, multiple
        self._biases: dict[int, mx.array] = {}

    def of(self, x: mx.array) -> mx.array:
        """Its rows (s * n, ...) of x (T, ...)."""
        return x[self.array("rows")] if self.n == 1 else x[self.first : self.first + self.n]

    def mask(self, window: int) -> mx.array | str | None:
        """Which of its keys its rows see, positions up to their own: bool (s, 1, n, L), "causal", or None: all."""
        alone = len(self.lengths) == 1 and self.multiple == 1
        if alone and (self.n == 1 or not window):
            return None if self.n == 1 else "causal"
        return self.array("mask", window)

    def bias(self, window: int, q: mx.array) -> mx.array:
        """The mask as what is added to scores, in the type of q, which all layers share."""
        if window not in self._biases:
            mask = self.mask(window)
            seen = mx.where(mask, 0.0, -mx.inf) if isinstance(mask, mx.array) else mx.zeros((1, 1, 1, 1))
            self._biases[window] = seen.astype(q.dtype)
        return self._biases[window]

    def make_rows(self) -> np.ndarray:
        return self.rows.astype(np.int32)

    def make_places(self, window: int, heads: int) -> np.ndarray:
        positions = self._positions(window)
        columns = np.minimum(positions // self.block_size, self.blocks.shape[1] - 1)
        blocks = self.blocks[np.arange(len(self.blocks))[:, None], columns]
        cells = blocks * self.block_size + positions % self.block_size  # (s, L)
        return cells[:, None] * heads + np.arange(heads, dtype=np.int32)[:, None]

    def make_mask(self, window: int) -> np.ndarray:
        own = self.lengths[:, None] - self.n + np.arange(self.n)  # (s, n): the rows' own positions
        distance = own[:, None, :, None] - self._positions(window)[:, None, None, :]
        return (distance >= 0) & (distance < window) if window else distance >= 0

    def _positions(self, window: int) -> np.ndarray:
        """int32 (s, L), or (1, L) for all: those that a row may see, and some that it may not."""
        longest = int(self.lengths.max())
        if not window:
            return np.arange(round_up(longest, self.multiple), dtype=np.int32)[None]
        begin = np.maximum(self.lengths - self.n - window + 1, 0)
        count = round_up(int((self.lengths - begin).max()), self.multiple)
        return begin[:, None] + np.arange(count, dtype=np.int32)


class Context(Arrays):
    """What `store`, `attend`, `rope` and `last` need of a step.

    `tables`, `owners`, `visible` and `longest` are what a ragged attention kernel takes.
    """

    def __init__(self, batch: Batch, block_size: int, multiple: int = 1) -> None:
        super().__init__()
        self.batch, self.block_size, self.multiple = batch, block_size, multiple
        self._turns: dict[int, Turns] = {}
        self._places: dict[int, mx.array] = {}

    @cached_property
    def counts(self) -> np.ndarray:
        """int32 (S,): tokens of each sequence."""
        return self.batch.query_start_loc[1:] - self.batch.query_start_loc[:-1]

    @cached_property
    def row_of(self) -> np.ndarray:
        """int32 (T,): the sequence of each token."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    @cached_property
    def rows_are_all(self) -> bool:
        """Whether every sequence has one token, and its logits are wanted."""
        return len(self.batch.logits_indices) == len(self.batch.input_ids) == len(self.counts)

    @cached_property
    def singles(self) -> int:
        """How many sequences of one token come first."""
        return int(np.argmax(np.append(self.counts, 2) > 1))

    @cached_property
    def parts(self) -> Sequence[Part]:
        singles = np.flatnonzero(self.counts == 1)
        groups = [singles] if len(singles) else []
        if len(singles) < len(self.counts):
            groups += [np.array([s]) for s in np.flatnonzero(self.counts > 1)]
        return [Part(self.batch, self.block_size, group, self.multiple) for group in groups]

    @cached_property
    def in_order(self) -> bool:
        """Whether the rows of the parts, one part after the other, are those of the batch."""
        return bool((np.diff(np.concatenate([p.rows for p in self.parts])) > 0).all())

    @cached_property
    def longest(self) -> int:
        """The largest of `visible`, or a little more."""
        return round_up(int(self.batch.seq_lens.max()), self.multiple)

    def places(self, width: int) -> mx.array:
        """int32 (T, width): the places of each token's cell."""
        if width not in self._places:
            self._places[width] = self.array("places", width)
        return self._places[width]

    @property
    def rows(self) -> mx.array:
        """int32 (R,): rows whose logits are wanted."""
        return self.array("rows")

    @property
    def tables(self) -> mx.array:
        """int32 (S, B): the blocks of each sequence."""
        return self.array("tables")

    @property
    def owners(self) -> mx.array:
        """int32 (T,): the sequence of each token."""
        return self.array("owners")

    @property
    def visible(self) -> mx.array:
        """int32 (T,): how many positions of its sequence a token sees."""
        return self.array("visible")

    def make_places(self, width: int) -> np.ndarray:
        b, size = self.batch, self.block_size
        cells = b.block_tables[self.row_of, b.positions // size] * size + b.positions % size
        return cells[:, None] * width + np.arange(width, dtype=np.int32)

    def make_rows(self) -> np.ndarray:
        return self.batch.logits_indices

    def make_tables(self) -> np.ndarray:
        columns = -(-self.longest // self.block_size)
        tables = self.batch.block_tables[:, :columns]
        return np.pad(tables, [(0, 0), (0, columns - tables.shape[1])])

    def make_owners(self) -> np.ndarray:
        return self.row_of

    def make_visible(self) -> np.ndarray:
        return self.batch.positions + 1

    def make_order(self) -> np.ndarray:
        """int32 (T,): where each row of the batch is among those of the parts."""
        return np.argsort(np.concatenate([p.rows for p in self.parts])).astype(np.int32)

    def turns(self, frequencies: RopeFrequencies, positions: mx.array) -> Turns:
        """Cosines and signed sines of a step's positions, the same for all layers of a kind."""
        key = id(frequencies)  # which the graph holds; its hash would cost more than all the rest
        if key not in self._turns:
            cos, sin = _cos_sin(frequencies, positions)
            self._turns[key] = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
        return self._turns[key]


def _cos_sin(frequencies: RopeFrequencies, positions: mx.array) -> Turns:
    """float32 (T, 1, d/2) each, times the frequencies' scale."""
    angles = positions[:, None, None] * mx.array(np.array(frequencies.values, np.float32))
    cos, sin = mx.cos(angles), mx.sin(angles)
    return (cos, sin) if frequencies.scale == 1 else (cos * frequencies.scale, sin * frequencies.scale)


def plain_singles(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """The answers of a part whose sequences have one row each, q (s, H, d) -> (s, H * d); what a CPU does fastest."""
    k, v = _seen(p, q, kv, window)
    q = mx.unflatten(q, 1, (kv.heads, -1))  # (s, Hk, H / Hk, d)
    scores = mx.addmm(p.bias(window, q), q, k.swapaxes(2, 3), scale)  # (s, Hk, H / Hk, L)
    return mx.flatten(mx.softmax(scores, -1, precise=True) @ v, 1)


def fast_singles(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """The same through MLX's own attention."""
    return mx.flatten(_attended(p, mx.expand_dims(q, 2), kv, scale, window), 1)


def _rows(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """One sequence's n rows, q (n, H, d) -> (n, H * d)."""
    y = _attended(p, mx.expand_dims(q.swapaxes(0, 1), 0), kv, scale, window)
    return mx.flatten(y[0].swapaxes(0, 1), 1)


def _attended(p: Part, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """q (s, H, n, d) -> the same."""
    k, v = _seen(p, q, kv, window)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=p.mask(window))


def _seen(p: Part, q: mx.array, kv: KV, window: int) -> tuple[mx.array, mx.array]:
    """The keys and values (s, Hk, L, d) that its rows may see, in the type of q."""
    places = p.array("places", window, kv.heads)  # int32 (s, Hk, L)
    k, v = kv.keys[places], kv.values[places]
    return (k, v) if k.dtype == q.dtype else (k.astype(q.dtype), v.astype(q.dtype))


def attend(
    c: Context, q: mx.array, kv: KV, scale: float, window: int, singles: Callable[..., mx.array] = plain_singles
) -> mx.array:
    """q (T, H, d) -> (T, H * d)."""
    if len(c.parts) == 1:
        p = c.parts[0]
        return (singles if p.n == 1 else _rows)(p, q, kv, scale, window)
    y = mx.concatenate([(singles if p.n == 1 else _rows)(p, p.of(q), kv, scale, window) for p in c.parts])
    return y if c.in_order else y[c.array("order")]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
