"""What attention does for tokens that are new, in place of kernels/rope.py, where each sequence has just one.

Each program norms and rotates its own queries, and the one with a sequence's last key first makes and stores the new
token's k and v; the same bits as with a kernel in between, and a launch less.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import check_rows, require
from llmrs.backends.torch.kernels.rope import keep

NAME = "attention of new tokens"


@triton.jit
def turned_whole(x, other, w, turns, position, sines, d, eps, offset, D: tl.constexpr, NORM: tl.constexpr):
    """Queries x (R, d) after norm and rotation, as rope.py's `turned`; `other` has their halves in turn."""
    HALF: tl.constexpr = D // 2
    a, b = x.to(tl.float32), other.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        wa = tl.load(w + d, mask=d < D, other=0.0).to(tl.float32) + offset
        wb = tl.load(w + (d + HALF) % D).to(tl.float32) + offset
        a = (a * scale * wa[None, :]).to(x.dtype).to(tl.float32)
        b = (b * scale * wb[None, :]).to(x.dtype).to(tl.float32)
    angle = turns + position.to(tl.int64) * HALF + d % HALF
    cos = tl.load(angle, mask=d < D, other=0.0)[None, :]
    sin = tl.load(angle + sines, mask=d < D, other=0.0)[None, :]
    return tl.where((d < HALF)[None, :], a * cos - b * sin, a * cos + b * sin).to(x.dtype)


@triton.jit
def keep_new(
    k, v, kw, turns, keys, values, key_scales, value_scales, table, row, position, head, eps, offset, sines,
    k_row, k_head, v_row, v_head, key_block, key_token,
    D: tl.constexpr, HALF_P: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A new token's k and v of one head into the cache, of which `keys` and the rest point to that head."""
    HALF: tl.constexpr = D // 2
    half, one = tl.arange(0, HALF_P), tl.zeros([1, 1], tl.int64)
    angle = turns + position.to(tl.int64) * HALF + half
    cos = tl.load(angle, mask=half < HALF, other=0.0)
    sin = tl.load(angle + sines, mask=half < HALF, other=0.0)
    block = tl.load(table + position // BLOCK).to(tl.int64)
    base = one + block * key_block + (position % BLOCK) * key_token
    keep(k, v, row.to(tl.int64), head + one, one == 0, kw, cos, sin, half, eps, offset, keys, values, key_scales,
         value_scales, base, k_row, k_head, v_row, v_head, D, HALF, NORM)  # fmt: skip


@dataclass(frozen=True)
class New:
    """What the step's tokens bring: their k and v, and how k and queries are normed, if so, and rotated."""

    k: torch.Tensor  # (T, Hk, d), any strides but the last, and v (T, Hk, d)
    v: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor] | None  # weights (d,) for q and k
    turns: torch.Tensor  # float32 (2, positions, d / 2): cos and sin
    eps: float = 0.0
    offset: float = 0.0

    def arguments(self, q: torch.Tensor, kv_heads: int) -> tuple[tuple[object, ...], tuple[int, ...]]:
        """The kernel's, and strides of k and v. Raises BackendError."""
        (tokens, _, size), (qw, kw) = q.shape, self.norms or (None, None)
        weights = [w.shape for w in self.norms or ()]
        check_rows(NAME, self.k, self.v)
        require(NAME, self.k.dtype == q.dtype and self.k.shape == (tokens, kv_heads, size), f"k is {self.k.shape}")
        require(NAME, self.turns.shape[::2] == (2, size // 2) and self.turns.is_contiguous(), "turns have other shapes")
        require(NAME, size % 2 == 0 and all(w == (size,) for w in weights), f"norms for heads of {size}")
        found = self.k, self.v, qw, kw, self.turns, float(self.eps), float(self.offset), self.turns.stride(0)
        return found, (*self.k.stride()[:2], *self.v.stride()[:2])


NOTHING_NEW = (None, None, None, None, None, 0.0, 0.0, 0), (0, 0, 0, 0)
