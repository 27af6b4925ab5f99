"""Attention over the paged KV cache: one query token at a time, or tiles of prompt tokens."""

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx.kernels.launch import FLOATS, Kernel, Kernels, Template, check, require

DECODE = Kernel("paged_decode", ("q", "keys", "values", "tables", "owners", "visible", "scale"), ("out",))
COMBINE = Kernel("paged_combine", ("partial",), ("out",))

PREFILL = Kernel(
    "paged_prefill", ("q", "keys", "values", "tables", "starts", "lengths", "tiles", "scale"), ("out",), ("matrices",)
)

SIMDS = 8  # simdgroups of a threadgroup
LEAST = 64  # positions that are worth a threadgroup of their own
MOST_SPLITS = 32
THREADGROUPS = 320  # what fills a GPU of 40 cores; smaller ones run them in turn


def paged_decode(
    kernels: Kernels,
    q: mx.array,  # (T, Hq, D)
    keys: mx.array,  # (blocks, block_size, Hk, D)
    values: mx.array,  # the same
    tables: mx.array,  # int32 (S, B): block of position p of sequence s is tables[s, p // block_size]
    owners: mx.array,  # int32 (T,): sequence of each token
    visible: mx.array,  # int32 (T,): token t sees the first visible[t] positions of its sequence
    *,
    scale: float,
    window: int = 0,  # of those, the last `window`; 0: all
    longest: int,  # the largest of `visible`, which the host knows
    splits: int = 0,  # threadgroups that share a token's positions; 0: chosen here
) -> mx.array:
    """softmax(q k^T * scale) v, (T, Hq, D) of q's type. Any token of a ragged step will do; it suits single ones.

    Raises BackendError for shapes, types and head sizes that the kernel can't do.
    """
    _check(DECODE, q, keys, values, tables)
    tokens, query_heads, size = q.shape
    _, block, kv_heads, _ = keys.shape
    for name, array in (("owners", owners), ("visible", visible)):
        check(DECODE, name, array, (tokens,), (mx.int32,))
    elements = lane_elements(size)
    heads = heads_together(query_heads // kv_heads, elements)
    splits = splits or choose_splits(tokens * query_heads // heads, min(longest, window or longest))
    dtype = mx.float32 if splits > 1 else q.dtype
    template: Template = {"T": q.dtype, "O": dtype, "D": size, "E": elements, "BLOCK": block}
    template |= {"HQ": query_heads, "HK": kv_heads, "G": heads, "SIMDS": SIMDS, "WINDOW": window, "SPLIT": splits > 1}
    shape = (tokens, query_heads, *((splits, size + 2) if splits > 1 else (size,)))
    grid = (32 * SIMDS, query_heads // heads * splits, tokens)
    inputs = (q, keys, values, tables, owners, visible, scale)
    (out,) = kernels.run(DECODE, inputs, template, grid, (32 * SIMDS, 1, 1), [(shape, dtype)])
    return _combine(kernels, out, q.dtype) if splits > 1 else out


def _combine(kernels: Kernels, partial: mx.array, dtype: mx.Dtype) -> mx.array:
    tokens, heads, _, width = partial.shape
    size = width - 2
    template: Template = {"O": dtype, "D": size}
    grid, threadgroup = (size, tokens * heads, 1), (min(size, 256), 1, 1)
    return kernels.run(COMBINE, (partial,), template, grid, threadgroup, [((tokens, heads, size), dtype)])[0]


def _check(kernel: Kernel, q: mx.array, keys: mx.array, values: mx.array, tables: mx.array) -> None:
    require(kernel, q.ndim == 3 and keys.ndim == 4 and tables.ndim == 2, "q, keys, tables have 3, 4, 2 dimensions")
    tokens, query_heads, size = q.shape
    blocks, block, kv_heads, _ = keys.shape
    require(kernel, tokens > 0, "no tokens")
    require(kernel, query_heads % kv_heads == 0, f"{query_heads} query heads do not share {kv_heads} KV heads evenly")
    require(kernel, size % 8 == 0 and 16 <= size <= 256, f"head size {size} is no multiple of 8 from 16 to 256")
    check(kernel, "q", q, (tokens, query_heads, size), FLOATS)
    for name, array in (("keys", keys), ("values", values)):
        check(kernel, name, array, (blocks, block, kv_heads, size), FLOATS)
    check(kernel, "tables", tables, tuple(tables.shape), (mx.int32,))


def paged_prefill(
    kernels: Kernels,
    q: mx.array,  # (T, Hq, D)
    keys: mx.array,  # (blocks, block_size, Hk, D), of q's type
    values: mx.array,  # the same
    tables: mx.array,  # int32 (S, B)
    starts: np.ndarray,  # int32 (S + 1,), as in Batch
    lengths: np.ndarray,  # int32 (S,), as in Batch
    *,
    scale: float,
    window: int = 0,
) -> mx.array:
    """The same for a ragged step: token t sees its sequence up to its own position. (T, Hq, D) of q's type.

    Raises BackendError for shapes, types and head sizes that the kernel can't do.
    """
    _check(PREFILL, q, keys, values, tables)
    tokens, heads, size = q.shape
    require(PREFILL, keys.dtype == q.dtype == values.dtype, f"q is {q.dtype}, keys are {keys.dtype}")
    require(PREFILL, starts[-1] == tokens and len(starts) == len(lengths) + 1 == tables.shape[0] + 1, "S differs")
    simds = tile_simds(size, q.dtype)
    tiles = prompt_tiles(starts, 8 * simds)
    template: Template = {"T": q.dtype, "D": size, "BLOCK": keys.shape[1], "HQ": heads, "HK": keys.shape[2]}
    template |= {"SIMDS": simds, "WINDOW": window}
    steps = [mx.array(a) for a in (starts, lengths, tiles)]
    grid, threadgroup = (32 * simds, heads, len(tiles)), (32 * simds, 1, 1)
    return kernels.run(
        PREFILL, (q, keys, values, tables, *steps, scale), template, grid, threadgroup, [(tuple(q.shape), q.dtype)]
    )[0]


def prompt_tiles(starts: np.ndarray, rows: int) -> np.ndarray:
    """int32 (N, 2): sequence and first token of each tile of up to `rows` tokens of one sequence."""
    counts = -(-np.diff(starts) // rows)
    sequences = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([sequences, starts[sequences] + number * rows], axis=1).astype(np.int32)


def tile_simds(size: int, dtype: mx.Dtype) -> int:
    """Simdgroups of a tile, 8 tokens each: as many as 32 KiB of threadgroup memory hold."""
    element = 4 if dtype == mx.float32 else 2
    return next(n for n in (4, 2, 1) if 8 * n * size * element + 256 * n * n + 256 * n <= 32768)


def lane_elements(size: int) -> int:
    """Elements of a head for each of 32 lanes: the least power of two that covers it, so that lanes stay aligned."""
    return next(e for e in (1, 2, 4, 8) if 32 * e >= size)


def heads_together(group: int, elements: int) -> int:
    """Query heads, of the `group` that share a KV head, for one threadgroup: what fits in a lane's registers."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * elements <= 32))


def choose_splits(threadgroups: int, positions: int) -> int:
    """How many threadgroups share a token's positions, where `threadgroups` there are without sharing."""
    wanted = -(-THREADGROUPS // threadgroups)
    return max(1, min(wanted, positions // LEAST, MOST_SPLITS))
