"""Paged attention of a ragged step: decode tokens, prefill chunks, or both.

Defined by `attend` in backends/reference/ops.py; backends/torch/sdpa_attention.py is plain torch.
T tokens, Hq query heads, Hk KV heads, GROUP = Hq / Hk, d head size.

    q (T, Hq, d)   k_cache, v_cache (blocks, block_size, Hk, d), any strides but the last   out (T, Hq * d)
    fp8: k_scales, v_scales float32 (blocks, block_size, Hk), strides those of the cache over d
    tiles int32 (n, 4): offset of the sequence's block table in `block_tables`, first row of q, rows (0: skip the
    tile), position of the first row. Rows of a tile are consecutive tokens of one sequence.

A CTA takes one tile and one KV head: rows x GROUP queries, padded to BLOCK_M >= 16, against BLOCK_N keys at a time,
with online softmax (arXiv 1805.02867). Where tiles are too few to fill the GPU, NUM_SPLITS CTAs share the keys of a
decode token (flash-decoding) and `combine_splits_kernel` reduces their partial results. Fused: fp8 dequantization.
Bytes moved per tile and KV head: 2 * d * keys elements, nearly all that a decode step reads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.kv_fp8 import check_cache, fold_v_scales, scale_q_to_fp16
from llmrs.backends.torch.kernels.launch import check, check_tensors, dot_precision, next_power_of_2, pdl_wait
from llmrs.backends.torch.kv_fp8 import QuantizedKV

NAME = "paged_attention"
NEG_INF = tl.constexpr(-1e30)  # a masked score; finite, so that exp2 of differences never meets inf - inf
LOG2E = 1.4426950408889634


@triton.jit
def _kv_offsets(block_table, start_n, end, stride_cb, stride_ct, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of keys start_n .. start_n + BLOCK_N - 1 in the cache, int64 (BLOCK_N,); undefined from `end` on."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:  # within one block
        block = tl.load(block_table + start_n // BLOCK_SIZE, mask=start_n < end, other=0).to(tl.int64) * stride_cb
    else:
        block = tl.load(block_table + offs_n // BLOCK_SIZE, mask=offs_n < end, other=0).to(tl.int64) * stride_cb
    return block + (offs_n % BLOCK_SIZE) * stride_ct


@triton.jit
def causal_mask(q_pos, offs_n, end, WINDOW: tl.constexpr):
    """(BLOCK_M, BLOCK_N): which keys each query position sees."""
    distance = q_pos[:, None] - offs_n[None, :]
    mask = (distance >= 0) & (offs_n < end)[None, :]
    if WINDOW > 0:
        mask = mask & (distance < WINDOW)
    return mask


@triton.jit
def load_tile(block_tables, tiles, tile):
    """A tile's block table, first row, rows, and first position."""
    block_table = block_tables + tl.load(tiles + tile * 4)
    q_start = tl.load(tiles + tile * 4 + 1)
    q_len = tl.load(tiles + tile * 4 + 2)
    pos_start = tl.load(tiles + tile * 4 + 3)
    return block_table, q_start, q_len, pos_start


@triton.jit
def load_q(q, q_start, q_len, pos_start, kv_head, offs_m, offs_d, stride_qt, stride_qh,
           GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """A tile's queries (BLOCK_M, d), their mask, positions (BLOCK_M,) and heads (BLOCK_M,)."""
    mask = (offs_m < q_len * GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + offs_m % GROUP
    rows = q + (q_start + offs_m // GROUP).to(tl.int64) * stride_qt + heads * stride_qh
    return tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0), mask, pos_start + offs_m // GROUP, heads


@triton.jit
def store_out(out, acc, l_i, q_start, offs_m, heads, offs_d, stride_ot, mask,
              GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    rows = out + (q_start + offs_m // GROUP).to(tl.int64) * stride_ot + heads * HEAD_DIM
    tl.store(rows[:, None] + offs_d[None, :], (acc / l_i[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _attend_keys(
    state, q, k_cache, v_cache, k_scales, v_scales, block_table, low, high, end, q_pos, scale,
    stride_cb, stride_ct, offs_d, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low .. high - 1, those from `end` on masked. `state`: acc (BLOCK_M, d), m_i and l_i
    (BLOCK_M,)."""
    acc, m_i, l_i = state
    kv_offsets = _kv_offsets(block_table, low, end, stride_cb, stride_ct, BLOCK_SIZE, BLOCK_N)
    for start_n in range(low, high, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # the block of the next tile is looked up now: keys don't wait for it, and Triton pipelines one load, not two
        next_kv_offsets = _kv_offsets(block_table, start_n + BLOCK_N, end, stride_cb, stride_ct, BLOCK_SIZE, BLOCK_N)
        mask = (offs_n < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(k_cache + kv_offsets[:, None] + offs_d[None, :], mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BLOCK_M, BLOCK_N)
        if k_scales is not None:
            scores *= tl.load(k_scales + kv_offsets // HEAD_DIM, mask=offs_n < end, other=0.0)[None, :]
        if MASKED:
            scores = tl.where(causal_mask(q_pos, offs_n, end, WINDOW), scores, NEG_INF)
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        v = tl.load(v_cache + kv_offsets[:, None] + offs_d[None, :], mask=mask, other=0.0).to(q.dtype)
        if v_scales is None:
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        else:
            scale_v, peak = fold_v_scales(tl.load(v_scales + kv_offsets // HEAD_DIM, mask=offs_n < end, other=0.0))
            pv = tl.dot((p * scale_v[None, :]).to(q.dtype), v, input_precision=PRECISION)
            acc = acc * alpha[:, None] + pv * peak
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        kv_offsets = next_kv_offsets
    return acc, m_i, l_i


@triton.jit
def paged_attention_kernel(
    q, k_cache, v_cache, k_scales, v_scales, block_tables, tiles, out, partial_acc, partial_m, partial_l, scale,
    stride_qt, stride_qh, stride_cb, stride_ct, stride_ch, stride_ot,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    PREFILL: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block_table, q_start, q_len, pos_start = load_tile(block_tables, tiles, tile)
    pdl_wait(PDL)
    if q_len == 0:
        return
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM_PAD)
    q_tile, q_mask, q_pos, heads = load_q(q, q_start, q_len, pos_start, kv_head, offs_m, offs_d, stride_qt, stride_qh,
                                          GROUP, HEAD_DIM)  # fmt: skip

    # range of keys
    end = pos_start + q_len
    low = 0
    if WINDOW > 0:
        low = tl.maximum(pos_start - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    if NUM_SPLITS > 1:
        keys_per_split = tl.cdiv(tl.cdiv(end - low, BLOCK_N), NUM_SPLITS) * BLOCK_N
        low += split * keys_per_split
        end = tl.minimum(end, low + keys_per_split)

    state = (tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32), tl.full([BLOCK_M], NEG_INF, tl.float32),
             tl.zeros([BLOCK_M], tl.float32))  # fmt: skip
    k_cache += kv_head * stride_ch
    v_cache += kv_head * stride_ch
    if k_scales is not None:
        q_tile, scale = scale_q_to_fp16(q_tile, scale)
        k_scales += kv_head * (stride_ch // HEAD_DIM)
        v_scales += kv_head * (stride_ch // HEAD_DIM)
    if PREFILL and WINDOW == 0:  # no mask before the first row's own position
        unmasked_end = pos_start // BLOCK_N * BLOCK_N
        state = _attend_keys(state, q_tile, k_cache, v_cache, k_scales, v_scales, block_table, low, unmasked_end, end,
                             q_pos, scale, stride_cb, stride_ct, offs_d, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, False,
                             PRECISION)  # fmt: skip
        low = unmasked_end
    acc, m_i, l_i = _attend_keys(state, q_tile, k_cache, v_cache, k_scales, v_scales, block_table, low, end, end,
                                 q_pos, scale, stride_cb, stride_ct, offs_d, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW,
                                 True, PRECISION)  # fmt: skip

    if NUM_SPLITS > 1:  # (tiles, Hq, NUM_SPLITS), and d for acc; a tile is one token here
        offs = (tile * tl.num_programs(0) * GROUP + heads) * NUM_SPLITS + split
        tl.store(partial_acc + offs[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :], acc, mask=q_mask)
        tl.store(partial_m + offs, m_i, mask=offs_m < GROUP)
        tl.store(partial_l + offs, l_i, mask=offs_m < GROUP)
    else:
        store_out(out, acc, l_i, q_start, offs_m, heads, offs_d, stride_ot, q_mask, GROUP, HEAD_DIM)


@triton.jit
def combine_splits_kernel(
    partial_acc, partial_m, partial_l, tiles, out, stride_ot,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, NUM_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Reduces the splits of one head of one tile; a split without keys has m = NEG_INF."""
    head, tile = tl.program_id(0), tl.program_id(1)
    q_start = tl.load(tiles + tile * 4 + 1)
    q_len = tl.load(tiles + tile * 4 + 2)
    pdl_wait(PDL)
    if q_len == 0:
        return
    offs_d = tl.arange(0, HEAD_DIM_PAD)
    offs = (tile * tl.num_programs(0) + head) * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    m = tl.load(partial_m + offs)
    alpha = tl.exp2(m - tl.max(m, 0))
    l_i = tl.sum(alpha * tl.load(partial_l + offs), 0)
    acc_ptrs = partial_acc + offs[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :]
    acc = tl.load(acc_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    acc = tl.sum(acc * alpha[:, None], 0)
    out_ptrs = out + q_start.to(tl.int64) * stride_ot + head * HEAD_DIM + offs_d
    tl.store(out_ptrs, (acc / l_i).to(out.dtype.element_ty), mask=offs_d < HEAD_DIM)


@dataclass(frozen=True)
class AttnConfig:
    """Query tokens and keys per tile, and Triton's launch options."""

    q_tokens: int
    block_n: int
    num_warps: int
    num_stages: int


def default_config(group: int, head_dim: int, dtype: torch.dtype, *, prefill: bool, fp8: bool = False) -> AttnConfig:
    """For decode or prefill tiles; `fp8`: of the KV cache. float32 is for tests and small models."""
    block_n = 64 if head_dim <= 128 else 32
    if dtype == torch.float32:
        return AttnConfig(max(32 // next_power_of_2(group), 1) if prefill else 1, block_n // 2, 4, 1)
    if not prefill:
        small = head_dim <= 64
        return AttnConfig(1, block_n, 2 if (small or fp8) and group <= 16 else 4, 2 if small else 3)
    block_m = 128 if head_dim <= 128 else 64
    return AttnConfig(max(block_m // next_power_of_2(group), 1), block_n, 8 if block_m == 128 else 4, 3)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor | QuantizedKV, v_cache: torch.Tensor | QuantizedKV,
    block_tables: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor,
    *, scale: float, window: int, config: AttnConfig, num_splits: int = 1, pdl: bool = False,
) -> None:  # fmt: skip
    """Writes the rows of out (T, Hq * d) that `tiles` name.

    `num_splits` above 1 needs tiles of one token. Raises BackendError for unsupported shapes and dtypes.
    """
    k_cache, v_cache, *scales = check_cache(NAME, k_cache, v_cache)
    heads, head_dim = q.shape[1:]
    launch = check_attention(q, k_cache, block_tables, tiles, out, config, pdl)
    check(NAME, num_splits == 1 or config.q_tokens == 1, "splits of a tile of several tokens")
    splits = len(tiles) * heads if num_splits > 1 else 0, num_splits
    partial = [torch.empty(n, dtype=torch.float32, device=q.device) for n in ((*splits, head_dim), splits, splits)]
    paged_attention_kernel[(k_cache.shape[2], len(tiles), num_splits)](
        q, k_cache, v_cache, *scales, block_tables, tiles, out, *partial, scale * LOG2E,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], out.stride(0),
        NUM_SPLITS=num_splits, WINDOW=window, PREFILL=config.q_tokens > 1, PRECISION=dot_precision(q.dtype), **launch,
    )  # fmt: skip
    if num_splits > 1:
        combine_splits_kernel[(heads, len(tiles))](
            *partial, tiles, out, out.stride(0), HEAD_DIM=head_dim, HEAD_DIM_PAD=launch["HEAD_DIM_PAD"],
            NUM_SPLITS=num_splits, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip


def check_attention(
    q: torch.Tensor, k_cache: torch.Tensor, block_tables: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor,
    config: AttnConfig, pdl: bool,
) -> dict[str, Any]:  # fmt: skip
    """Sizes and launch options of an attention kernel. Raises BackendError."""
    (tokens, heads, head_dim), (_, block_size, kv_heads, _) = q.shape, k_cache.shape
    check_tensors(NAME, q)
    shapes = k_cache.shape[3] == head_dim <= 256 and heads % kv_heads == 0
    check(NAME, shapes, f"q {q.shape}, k_cache {k_cache.shape}")
    out_fits = out.shape == (tokens, heads * head_dim) and out.dtype == q.dtype and out.stride(1) == 1
    check(NAME, out_fits, f"out {out.shape} of {out.dtype}")
    for ints in (block_tables, tiles):
        check(NAME, ints.dtype == torch.int32 and ints.is_contiguous(), "block_tables, tiles: not int32, contiguous")
    group = heads // kv_heads
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "HEAD_DIM_PAD": next_power_of_2(head_dim, 16), "BLOCK_SIZE": block_size,
        "BLOCK_M": next_power_of_2(config.q_tokens * next_power_of_2(group), 16), "BLOCK_N": config.block_n, "PDL": pdl,
        "num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": pdl,
    }  # fmt: skip
