"""Paged attention: split-KV decode, and tiled prefill."""

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx.kernels.launch import FLOATS, Kernel, Kernels, Template, check, require

DECODE = Kernel(
    "paged_decode", ("q", "keys", "values", "block_tables", "token_to_seq", "context_lens", "scale"), ("out",)
)
COMBINE = Kernel("paged_combine", ("partial",), ("out",))
PREFILL = Kernel(
    "paged_prefill", ("q", "keys", "values", "block_tables", "query_start_loc", "seq_lens", "tiles", "scale"),
    ("out",), ("matrices",),
)  # fmt: skip

SIMDS = 8  # simdgroups per threadgroup
MIN_KEYS_PER_SPLIT = 64
MAX_SPLITS = 32
TARGET_THREADGROUPS = 320  # one wave on a GPU of 40 cores


def paged_decode(
    kernels: Kernels, q: mx.array, keys: mx.array, values: mx.array, block_tables: mx.array, token_to_seq: mx.array,
    context_lens: mx.array, *, scale: float, window: int = 0, max_seq_len: int, num_splits: int = 0,
) -> mx.array:  # fmt: skip
    """softmax(q k^T * scale) v, (T, Hq, D) in q's dtype. Accepts any token of a ragged step; fast for decode tokens.

    q (T, Hq, D); keys, values (blocks, block_size, Hk, D); int32: block_tables (S, B), token_to_seq (T,), context_lens
    (T,). Token t attends to positions 0 .. context_lens[t] - 1, with a window to the last `window` of them.
    max_seq_len: the largest context, known on the host. num_splits: KV splits per token; 0: heuristic.
    Raises BackendError for unsupported shapes, dtypes and head sizes.
    """
    _check(DECODE, q, keys, values, block_tables)
    tokens, query_heads, size = q.shape
    _, block, kv_heads, _ = keys.shape
    for name, array in (("token_to_seq", token_to_seq), ("context_lens", context_lens)):
        check(DECODE, name, array, (tokens,), (mx.int32,))
    elements = elems_per_lane(size)
    heads = heads_per_threadgroup(query_heads // kv_heads, elements)
    splits = num_splits or choose_num_splits(tokens * query_heads // heads, min(max_seq_len, window or max_seq_len))
    split = splits > 1
    dtype = mx.float32 if split else q.dtype
    template: Template = {"T": q.dtype, "O": dtype, "D": size, "E": elements, "BLOCK": block}
    template |= {"HQ": query_heads, "HK": kv_heads, "G": heads, "SIMDS": SIMDS, "WINDOW": window, "SPLIT": split}
    shape = (tokens, query_heads, *((splits, size + 2) if split else (size,)))
    grid = (32 * SIMDS, query_heads // heads * splits, tokens)
    inputs = (q, keys, values, block_tables, token_to_seq, context_lens, scale)
    (out,) = kernels.run(DECODE, inputs, template, grid, (32 * SIMDS, 1, 1), [(shape, dtype)])
    if not split:
        return out
    grid, threadgroup = (size, tokens * query_heads, 1), (min(size, 256), 1, 1)
    outputs = [(tuple(q.shape), q.dtype)]
    return kernels.run(COMBINE, (out,), {"O": q.dtype, "D": size}, grid, threadgroup, outputs)[0]


def _check(kernel: Kernel, q: mx.array, keys: mx.array, values: mx.array, block_tables: mx.array) -> None:
    dims = q.ndim, keys.ndim, block_tables.ndim
    require(kernel, dims == (3, 4, 2), "q, keys, block_tables have 3, 4, 2 dimensions")
    tokens, query_heads, size = q.shape
    blocks, block, kv_heads, _ = keys.shape
    require(kernel, tokens > 0, "no tokens")
    require(kernel, query_heads % kv_heads == 0, f"{query_heads} query heads do not share {kv_heads} KV heads evenly")
    require(kernel, size % 8 == 0 and 16 <= size <= 256, f"head size {size} is no multiple of 8 from 16 to 256")
    check(kernel, "q", q, (tokens, query_heads, size), FLOATS)
    for name, array in (("keys", keys), ("values", values)):
        check(kernel, name, array, (blocks, block, kv_heads, size), FLOATS)
    check(kernel, "block_tables", block_tables, tuple(block_tables.shape), (mx.int32,))


def paged_prefill(
    kernels: Kernels, q: mx.array, keys: mx.array, values: mx.array, block_tables: mx.array,
    query_start_loc: np.ndarray, seq_lens: np.ndarray, *, scale: float, window: int = 0,
) -> mx.array:  # fmt: skip
    """Causal attention of a ragged step, (T, Hq, D) in q's dtype.

    q (T, Hq, D); keys, values (blocks, block_size, Hk, D) in q's dtype; int32: block_tables (S, B), query_start_loc
    (S + 1,), seq_lens (S,). Raises BackendError for unsupported shapes, dtypes and head sizes.
    """
    _check(PREFILL, q, keys, values, block_tables)
    tokens, heads, size = q.shape
    require(PREFILL, keys.dtype == q.dtype == values.dtype, f"q is {q.dtype}, keys are {keys.dtype}")
    same = len(query_start_loc) == len(seq_lens) + 1 == block_tables.shape[0] + 1
    require(PREFILL, query_start_loc[-1] == tokens and same, "S differs")
    simds = tile_simds(size, q.dtype)
    tiles = prefill_tiles(query_start_loc, 8 * simds)
    template: Template = {"T": q.dtype, "D": size, "BLOCK": keys.shape[1], "HQ": heads, "HK": keys.shape[2]}
    template |= {"SIMDS": simds, "WINDOW": window}
    host = [mx.array(a) for a in (query_start_loc, seq_lens, tiles)]
    inputs: list[mx.array | float] = [q, keys, values, block_tables, *host, scale]
    grid, threadgroup = (32 * simds, heads, len(tiles)), (32 * simds, 1, 1)
    return kernels.run(PREFILL, inputs, template, grid, threadgroup, [(tuple(q.shape), q.dtype)])[0]


def prefill_tiles(query_start_loc: np.ndarray, tile: int) -> np.ndarray:
    """int32 (N, 2): sequence and first token of each tile of up to `tile` tokens of one sequence."""
    counts = -(-np.diff(query_start_loc) // tile)
    sequences = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([sequences, query_start_loc[sequences] + number * tile], axis=1).astype(np.int32)


def tile_simds(size: int, dtype: mx.Dtype) -> int:
    """Simdgroups per tile, 8 tokens each: the most that fit 32 KiB of threadgroup memory."""
    element = 4 if dtype == mx.float32 else 2
    return next(n for n in (4, 2, 1) if 8 * n * size * element + 256 * n * n + 256 * n <= 32768)


def elems_per_lane(size: int) -> int:
    """Head elements per lane of 32: the smallest power of two that covers the head, for alignment."""
    return next(e for e in (1, 2, 4, 8) if 32 * e >= size)


def heads_per_threadgroup(group: int, elements: int) -> int:
    """Query heads of a GQA group that one threadgroup computes: the most that fit a lane's registers."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * elements <= 32))


def choose_num_splits(threadgroups: int, keys: int) -> int:
    """KV splits per token, given the threadgroups of an unsplit launch."""
    wanted = -(-TARGET_THREADGROUPS // threadgroups)
    return max(1, min(wanted, keys // MIN_KEYS_PER_SPLIT, MAX_SPLITS))
