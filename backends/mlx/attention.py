"""The arrays of one step, and paged attention in mx ops.

Decode tokens (sequences with one token) are padded to the longest context and run as one batch; each prefill chunk runs
alone. Letters: T tokens, H query heads, Hk KV heads, d head_dim; s sequences of a group with n tokens each, L keys.

A KV slot has an entry of d elements per KV head, so that keys are gathered directly as (s, Hk, L, d).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.core.batch import Batch
from llmrs.core.ir import RopeFrequencies

ArrayKey = tuple[Any, ...]  # a name and numbers
CosSin = tuple[mx.array, mx.array]  # float32 (T, 1, d): [cos, cos] and [-sin, sin]


@dataclass
class KV:
    """KV cache of one layer: keys and values (blocks * block_size * heads, d), arrays or `kv_fp8.QuantizedKV`.

    A write replaces the arrays; MLX does it in place if nothing else holds the old ones.
    """

    keys: Any
    values: Any
    heads: int

    def write(self, slots: mx.array, k: mx.array, v: mx.array) -> None:
        """k, v (T, Hk, d) to the entries `slots` (T, Hk)."""
        self.keys[slots] = k
        self.values[slots] = v


class LazyArrays:
    """Arrays by name and numbers, each made by the method `make_<name>` at first use."""

    def __init__(self) -> None:
        self.arrays: dict[ArrayKey, mx.array] = {}
        self.frozen = False  # inputs of a traced step: making another array would bake in a constant

    def array(self, *key: Any) -> mx.array:
        if key not in self.arrays:
            assert not self.frozen, f"{key} would become a constant of a compiled step"
            name, *numbers = key
            self.arrays[key] = mx.array(getattr(self, f"make_{name}")(*numbers))
        return self.arrays[key]


class AttnGroup(LazyArrays):
    """Sequences of one attention call, `q_len` tokens each. The number of keys is a multiple of `key_bucket`."""

    def __init__(self, batch: Batch, block_size: int, sequences: np.ndarray, key_bucket: int) -> None:
        super().__init__()
        start, end = batch.query_start_loc[sequences[0] : sequences[0] + 2].tolist()
        self.start, self.q_len = start, end - start
        self.tokens = batch.query_start_loc[sequences] if self.q_len == 1 else np.arange(start, end)
        self.block_tables, self.seq_lens = batch.block_tables[sequences], batch.seq_lens[sequences]
        self.block_size, self.key_bucket = block_size, key_bucket
        self._biases: dict[int, mx.array] = {}

    def take(self, x: mx.array) -> mx.array:
        """The group's rows (s * n, ...) of x (T, ...)."""
        return x[self.array("tokens")] if self.q_len == 1 else x[self.start : self.start + self.q_len]

    def mask(self, window: int) -> mx.array | str | None:
        """Causal mask: bool (s, 1, n, L), "causal", or None (all keys visible)."""
        if len(self.seq_lens) == 1 and self.key_bucket == 1 and (self.q_len == 1 or not window):
            return None if self.q_len == 1 else "causal"
        return self.array("mask", window)

    def bias(self, window: int, q: mx.array) -> mx.array:
        """The mask as an additive bias in q's dtype, shared by all layers."""
        if window not in self._biases:
            mask = self.mask(window)
            bias = mx.where(mask, 0.0, -mx.inf) if isinstance(mask, mx.array) else mx.zeros((1, 1, 1, 1))
            self._biases[window] = bias.astype(q.dtype)
        return self._biases[window]

    def make_tokens(self) -> np.ndarray:
        return self.tokens.astype(np.int32)

    def make_kv_indices(self, window: int, heads: int) -> np.ndarray:
        """Entries of the visible keys and values, int32 (s, Hk, L)."""
        positions = self._key_positions(window)
        columns = np.minimum(positions // self.block_size, self.block_tables.shape[1] - 1)
        blocks = self.block_tables[np.arange(len(self.block_tables))[:, None], columns]
        slots = blocks * self.block_size + positions % self.block_size  # (s, L)
        return slots[:, None] * heads + np.arange(heads, dtype=np.int32)[:, None]

    def make_mask(self, window: int) -> np.ndarray:
        q_positions = self.seq_lens[:, None] - self.q_len + np.arange(self.q_len)  # (s, n)
        distance = q_positions[:, None, :, None] - self._key_positions(window)[:, None, None, :]
        return (distance >= 0) & (distance < window) if window else distance >= 0

    def _key_positions(self, window: int) -> np.ndarray:
        """int32 (s, L), or (1, L) for all sequences; a superset of the visible positions."""
        if not window:
            return np.arange(round_up(int(self.seq_lens.max()), self.key_bucket), dtype=np.int32)[None]
        begin = np.maximum(self.seq_lens - self.q_len - window + 1, 0)
        count = round_up(int((self.seq_lens - begin).max()), self.key_bucket)
        return begin[:, None] + np.arange(count, dtype=np.int32)


class Context(LazyArrays):
    """What the ops `write_kv`, `attend`, `rope` and `gather_logits_rows` need of a step."""

    def __init__(self, batch: Batch, block_size: int, key_bucket: int = 1) -> None:
        super().__init__()
        self.batch, self.block_size, self.key_bucket = batch, block_size, key_bucket
        self._cos_sin: dict[int, CosSin] = {}

    @cached_property
    def query_lens(self) -> np.ndarray:
        """int32 (S,): tokens of each sequence in this step."""
        return self.batch.query_start_loc[1:] - self.batch.query_start_loc[:-1]

    @cached_property
    def is_decode_only(self) -> bool:
        """One token per sequence, and logits for each."""
        return len(self.batch.logits_indices) == len(self.batch.input_ids) == len(self.query_lens)

    @cached_property
    def num_decodes(self) -> int:
        """Leading sequences with one token."""
        return int(np.argmax(np.append(self.query_lens, 2) > 1))

    @cached_property
    def groups(self) -> Sequence[AttnGroup]:
        decodes = np.flatnonzero(self.query_lens == 1)
        groups = [decodes] if len(decodes) else []
        groups += [np.array([s]) for s in np.flatnonzero(self.query_lens > 1)]
        return [AttnGroup(self.batch, self.block_size, group, self.key_bucket) for group in groups]

    @cached_property
    def in_batch_order(self) -> bool:
        """Whether the tokens of the groups, concatenated, are in batch order."""
        return bool((np.diff(np.concatenate([g.tokens for g in self.groups])) > 0).all())

    @cached_property
    def max_seq_len(self) -> int:
        """The longest context, rounded up to `key_bucket`."""
        return round_up(int(self.batch.seq_lens.max()), self.key_bucket)

    def make_slot_mapping(self, num_kv_heads: int) -> np.ndarray:  # int32 (T, num_kv_heads): KV entries of the slots
        b, size = self.batch, self.block_size
        slots = b.block_tables[self.make_token_to_seq(), b.positions // size] * size + b.positions % size
        return slots[:, None] * num_kv_heads + np.arange(num_kv_heads, dtype=np.int32)

    def make_logits_indices(self) -> np.ndarray:  # int32 (R,)
        return self.batch.logits_indices

    def make_block_tables(self) -> np.ndarray:  # int32 (S, B)
        columns = -(-self.max_seq_len // self.block_size)
        tables = self.batch.block_tables[:, :columns]
        return np.pad(tables, [(0, 0), (0, columns - tables.shape[1])])

    def make_token_to_seq(self) -> np.ndarray:  # int32 (T,): sequence of each token
        return np.repeat(np.arange(len(self.query_lens), dtype=np.int32), self.query_lens)

    def make_context_lens(self) -> np.ndarray:  # int32 (T,): positions of its sequence that a token attends to
        return self.batch.positions + 1

    def make_batch_order(self) -> np.ndarray:  # int32 (T,): index of each token among the groups' tokens
        return np.argsort(np.concatenate([g.tokens for g in self.groups])).astype(np.int32)

    def cos_sin(self, frequencies: RopeFrequencies, positions: mx.array) -> CosSin:
        """The step's rotation, shared by all layers with these frequencies."""
        key = id(frequencies)  # the graph holds it; hashing the values would be slow
        if key not in self._cos_sin:
            angles = positions[:, None, None] * mx.array(np.array(frequencies.values, np.float32))
            cos, sin = mx.cos(angles), mx.sin(angles)
            if frequencies.scale != 1:
                cos, sin = cos * frequencies.scale, sin * frequencies.scale
            self._cos_sin[key] = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
        return self._cos_sin[key]


Attention = Callable[[AttnGroup, mx.array, KV, float, int], mx.array]


def decode_attention(g: AttnGroup, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """Decode tokens q (s, H, d) -> (s, H * d) with plain matrix products: faster than SDPA on a CPU."""
    k, v = _gather_kv(g, q, kv, window)
    q = mx.unflatten(q, 1, (kv.heads, -1))  # (s, Hk, H / Hk, d)
    scores = mx.addmm(g.bias(window, q), q, k.swapaxes(2, 3), scale)  # (s, Hk, H / Hk, L)
    return mx.flatten(mx.softmax(scores, -1, precise=True) @ v, 1)


def decode_sdpa(g: AttnGroup, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """`decode_attention` with MLX's SDPA."""
    return mx.flatten(_sdpa(g, mx.expand_dims(q, 2), kv, scale, window), 1)


def _prefill_sdpa(g: AttnGroup, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """A prefill chunk of one sequence, q (n, H, d) -> (n, H * d)."""
    y = _sdpa(g, mx.expand_dims(q.swapaxes(0, 1), 0), kv, scale, window)
    return mx.flatten(y[0].swapaxes(0, 1), 1)


def _sdpa(g: AttnGroup, q: mx.array, kv: KV, scale: float, window: int) -> mx.array:
    """q (s, H, n, d) -> the same."""
    k, v = _gather_kv(g, q, kv, window)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=g.mask(window))


def _gather_kv(g: AttnGroup, q: mx.array, kv: KV, window: int) -> tuple[mx.array, mx.array]:
    """Visible keys and values (s, Hk, L, d) in q's dtype."""
    indices = g.array("kv_indices", window, kv.heads)
    k, v = kv.keys[indices], kv.values[indices]
    return (k, v) if k.dtype == q.dtype else (k.astype(q.dtype), v.astype(q.dtype))


def attend(c: Context, q: mx.array, kv: KV, scale: float, window: int, decode: Attention) -> mx.array:
    """q (T, H, d) -> (T, H * d)."""

    def run(g: AttnGroup, q: mx.array) -> mx.array:
        return (decode if g.q_len == 1 else _prefill_sdpa)(g, q, kv, scale, window)

    if len(c.groups) == 1:
        return run(c.groups[0], q)
    y = mx.concatenate([run(g, g.take(q)) for g in c.groups])
    return y if c.in_batch_order else y[c.array("batch_order")]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
