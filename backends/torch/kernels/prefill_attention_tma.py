"""Prefill attention with K and V loaded by TMA, on sm_90 and later. Arguments and tiles as in paged_attention.py.

There every thread computes addresses and loads 16 bytes at a time; here one thread loads BLOCK_N x d through a tensor
descriptor, since a head's tokens of a block are contiguous in the cache. Further differences:

    only the diagonal keys of a tile are masked; sliding windows are left to the paged kernel
    the scale is applied where the maximum is subtracted, in one instruction
    acc is rescaled once per BLOCK_N keys, which takes d multiplications a row: larger BLOCK_N, fewer of them

FLOPs per tile and KV head: 4 * BLOCK_M * d * keys. Bytes: 4 * d per key, mostly from L2, which bounds BLOCK_M = 128 to
128 FLOPs a byte.
"""

from typing import TypeGuard

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from llmrs.backends.torch.kernels.kv_fp8 import check_cache
from llmrs.backends.torch.kernels.launch import check, next_power_of_2, pdl_wait
from llmrs.backends.torch.kernels.paged_attention import (
    LOG2E,
    NEG_INF,
    AttnConfig,
    causal_mask,
    check_attention,
    load_q,
    load_tile,
    store_out,
)
from llmrs.backends.torch.kv_fp8 import QuantizedKV

NAME = "prefill_attention_tma"


@triton.jit
def _kv_row(block_table, start_n, end, head_row, rows_per_block, BLOCK_SIZE: tl.constexpr):
    """The cache row (of d elements) of key start_n; undefined from `end` on."""
    block = tl.load(block_table + start_n // BLOCK_SIZE, mask=start_n < end, other=0)
    return head_row + block * rows_per_block + start_n % BLOCK_SIZE


@triton.jit
def _attend_keys(
    state, q, k_desc, v_desc, block_table, low, high, end, q_pos, scale, head_row, rows_per_block,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low .. high - 1. `state`: acc (BLOCK_M, d), m_i of scaled scores, l_i (BLOCK_M,)."""
    acc, m_i, l_i = state
    row = _kv_row(block_table, low, end, head_row, rows_per_block, BLOCK_SIZE)
    for start_n in range(low, high, BLOCK_N):
        # the next block is looked up now, so that no load waits for a block table
        next_row = _kv_row(block_table, start_n + BLOCK_N, end, head_row, rows_per_block, BLOCK_SIZE)
        # V first: Triton puts a barrier between the two loads, which the second dot then does not need
        v = v_desc.load([row, 0])  # (BLOCK_N, d)
        scores = tl.dot(q, k_desc.load([row, 0]).T)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            scores = tl.where(causal_mask(q_pos, offs_n, end, 0), scores, NEG_INF)
            v = tl.where((offs_n < end)[:, None], v, 0.0)  # unwritten cache may hold NaN, and 0 * NaN is NaN
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        row = next_row
    return acc, m_i, l_i


@triton.jit
def prefill_attention_tma_kernel(
    q, k_desc, v_desc, block_tables, tiles, out, scale, stride_qt, stride_qh, stride_ot, rows_per_block, rows_per_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    block_table, q_start, q_len, pos_start = load_tile(block_tables, tiles, tile)
    pdl_wait(PDL)
    if q_len == 0:
        return
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM_PAD)
    q_tile, q_mask, q_pos, heads = load_q(q, q_start, q_len, pos_start, kv_head, offs_m, offs_d, stride_qt, stride_qh,
                                          GROUP, HEAD_DIM)  # fmt: skip
    end = pos_start + q_len
    unmasked_end = pos_start // BLOCK_N * BLOCK_N  # every row sees all keys before it
    state = (tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32), tl.full([BLOCK_M], NEG_INF, tl.float32),
             tl.zeros([BLOCK_M], tl.float32))  # fmt: skip
    head_row = kv_head * rows_per_head
    state = _attend_keys(state, q_tile, k_desc, v_desc, block_table, 0, unmasked_end, end, q_pos, scale, head_row,
                         rows_per_block, BLOCK_SIZE, BLOCK_N, False)  # fmt: skip
    state = _attend_keys(state, q_tile, k_desc, v_desc, block_table, unmasked_end, end, end, q_pos, scale, head_row,
                         rows_per_block, BLOCK_SIZE, BLOCK_N, True)  # fmt: skip
    store_out(out, state[0], state[2], q_start, offs_m, heads, offs_d, stride_ot, q_mask, GROUP, HEAD_DIM)


def prefill_config(group: int, head_dim: int, block_size: int) -> AttnConfig:
    """What fits into shared memory and registers: 128 x 128 tiles of d = 128 take 245 of 255 registers.

    128 keys at a time need blocks of 128 tokens (`block_size: 128`).
    """
    block_m = 128 if head_dim <= 128 else 64
    block_n = min(block_size & -block_size, 128 if head_dim <= 128 else 32)
    return AttnConfig(max(block_m // next_power_of_2(group), 1), block_n, 8, 2 if block_n == 128 else 3)


def prefill_attention_tma(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor, tiles: torch.Tensor,
    out: torch.Tensor, *, scale: float, config: AttnConfig, pdl: bool = False,
) -> None:  # fmt: skip
    """Writes the rows of out (T, Hq * d) that `tiles` name. Raises BackendError for unsupported shapes and dtypes."""
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    check_cache(NAME, k_cache, v_cache)
    launch = check_attention(q, k_cache, block_tables, tiles, out, config, pdl)
    compatible = tma_compatible(k_cache, q.dtype) and block_size % config.block_n == 0
    check(NAME, compatible, f"k_cache {k_cache.shape}, {k_cache.stride()}, {config}")
    descriptors = (_descriptor(x, config.block_n, launch["HEAD_DIM_PAD"]) for x in (k_cache, v_cache))
    prefill_attention_tma_kernel[(kv_heads, len(tiles))](
        q, *descriptors, block_tables, tiles, out, scale * LOG2E, q.stride(0), q.stride(1), out.stride(0),
        k_cache.stride(0) // head_dim, k_cache.stride(2) // head_dim, **launch,
    )  # fmt: skip


def tma_compatible(cache: torch.Tensor | QuantizedKV, dtype: torch.dtype) -> TypeGuard[torch.Tensor]:
    """Whether TMA can load tiles of a cache (blocks, block_size, Hk, d): a head's tokens of a block are contiguous, at
    a multiple of 16 bytes, in the dtype of q."""
    if isinstance(cache, QuantizedKV) or cache.dtype != dtype or dtype == torch.float32:
        return False
    head_dim = cache.shape[3]
    strides = cache.stride(1) == head_dim and all(cache.stride(n) % head_dim == 0 for n in (0, 2))
    return strides and cache.shape[1] % 16 == head_dim * 2 % 16 == 0


def _descriptor(cache: torch.Tensor, block_n: int, padded: int) -> TensorDescriptor:
    """The cache as rows of d elements, loaded in tiles (block_n, padded)."""
    blocks, block_size, heads, head_dim = cache.shape
    rows = ((blocks - 1) * cache.stride(0) + (heads - 1) * cache.stride(2)) // head_dim + block_size
    check(NAME, rows < 2**31, f"{rows} cache rows, more than int32 holds")
    return TensorDescriptor(cache, [rows, head_dim], [head_dim, 1], [block_n, padded])
