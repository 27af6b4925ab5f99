"""Ops with C++ kernels (ops.cpp, attention.cpp). What they don't take runs as torch ops, which define them."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmrs.backends.torch import ops, sdpa_attention
from llmrs.backends.torch.cpu.library import DTYPES, Kernels, fields
from llmrs.backends.torch.kv_fp8 import QuantizedKV
from llmrs.backends.torch.ops import KV, Norm
from llmrs.backends.torch.sdpa_attention import AttnGroup, AttnMetadata, Pool
from llmrs.core.ir import RopeFrequencies

Tensor = torch.Tensor


class CNorm(ctypes.Structure):
    """`Norm` of ops.cpp."""

    _fields_ = fields("x y w total out", "rows n x_stride y_stride", "dtype", "eps offset")


class CGate(ctypes.Structure):
    """`Gate` of ops.cpp."""

    _fields_ = fields("gate up out", "rows n gate_stride up_stride", "dtype is_gelu")


class CRope(ctypes.Structure):
    """`Rope` of ops.cpp."""

    _fields_ = fields(
        "q k v norms cos sin slots out keys values",
        "tokens size heads kv_heads q_stride q_head_stride k_stride k_head_stride v_stride v_head_stride",
        "dtype norm_dtype kv_dtype", "eps",
    )  # fmt: skip


class CAttention(ctypes.Structure):
    """`Attention` of attention.cpp."""

    _fields_ = fields(
        "q keys values out blocks lengths",
        "sequences heads kv_heads size block_size blocks_stride q_stride window max_length",
        "dtype kv_dtype", "scale",
    )  # fmt: skip


@dataclass(frozen=True)
class CPUOps:
    """Rules of ops, as in `ops.OPS`, with the kernels of a library."""

    kernels: Kernels

    def table(self) -> dict[str, Callable[..., Any]]:
        mine = (
            self.rms_norm, self.fused_add_rms_norm, self.silu_and_mul, self.gelu_and_mul, self.qk_norm_rope_write_kv,
            self.rope_write_kv, self.attend, self.gather_logits_rows,
        )  # fmt: skip
        return {**ops.OPS, **{f.__name__: f for f in mine}}

    def rms_norm(self, c: AttnMetadata, x: Tensor, norm: Norm, *, eps: float, offset: float = 0.0) -> Tensor:
        if x.dim() != 2 or not _rows(x):
            return ops.rms_norm(c, x, norm, eps=eps, offset=offset)
        out = torch.empty(x.shape, dtype=x.dtype)
        pointers = x.data_ptr(), None, norm.weight.data_ptr(), None, out.data_ptr()
        self.kernels.run("rms_norm", CNorm(*pointers, *x.shape, x.stride(0), 0, eps, offset, DTYPES[x.dtype]), x, out)
        return out

    def fused_add_rms_norm(
        self, c: AttnMetadata, x: Tensor, y: Tensor, norm: Norm, *, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        if not _rows(x, y):
            return ops.fused_add_rms_norm(c, x, y, norm, eps=eps, offset=offset)
        total, out = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
        pointers = x.data_ptr(), y.data_ptr(), norm.weight.data_ptr(), total.data_ptr(), out.data_ptr()
        sizes = *x.shape, x.stride(0), y.stride(0)
        self.kernels.run("rms_norm", CNorm(*pointers, *sizes, eps, offset, DTYPES[x.dtype]), x, y, total, out)
        return total, out

    def silu_and_mul(self, c: AttnMetadata, gate: Tensor, up: Tensor) -> Tensor:
        return self._act_and_mul(gate, up, 0) if _rows(gate, up) else ops.silu_and_mul(c, gate, up)

    def gelu_and_mul(self, c: AttnMetadata, gate: Tensor, up: Tensor) -> Tensor:
        return self._act_and_mul(gate, up, 1) if _rows(gate, up) else ops.gelu_and_mul(c, gate, up)

    def _act_and_mul(self, gate: Tensor, up: Tensor, gelu: int) -> Tensor:
        out = torch.empty(gate.shape, dtype=gate.dtype)
        pointers, sizes = (gate.data_ptr(), up.data_ptr(), out.data_ptr()), (*gate.shape, gate.stride(0), up.stride(0))
        self.kernels.run("act_and_mul", CGate(*pointers, *sizes, DTYPES[gate.dtype], gelu), gate, up, out)
        return out

    def qk_norm_rope_write_kv(
        self, c: AttnMetadata, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, norms: Tensor, *,
        eps: float, frequencies: RopeFrequencies, offset: float = 0.0,
    ) -> tuple[Tensor, KV]:  # fmt: skip
        """`norms` (H + Hk, d) hold the offset already."""
        if not _rows(q, k, v) or not _takes(kv):
            return ops.qk_norm_rope_write_kv(
                c, q, positions, k, v, kv, norms, eps=eps, frequencies=frequencies, offset=offset
            )
        return self._rope_write_kv(c, q, positions, k, v, kv, norms, eps, frequencies)

    def rope_write_kv(
        self, c: AttnMetadata, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, *,
        frequencies: RopeFrequencies,
    ) -> tuple[Tensor, KV]:  # fmt: skip
        if not _rows(q, k, v) or not _takes(kv):
            return ops.rope_write_kv(c, q, positions, k, v, kv, frequencies=frequencies)
        return self._rope_write_kv(c, q, positions, k, v, kv, None, 0.0, frequencies)

    def _rope_write_kv(
        self, c: AttnMetadata, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, norms: Tensor | None,
        eps: float, frequencies: RopeFrequencies,
    ) -> tuple[Tensor, KV]:  # fmt: skip
        out = torch.empty(q.shape, dtype=q.dtype)
        cos, sin = ops.cos_sin(c, positions, frequencies)
        keys, values = kv.keys, kv.values
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        rope = CRope(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), None if norms is None else norms.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), c.slot_mapping.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr(),
            len(q), q.shape[2], q.shape[1], k.shape[1], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], eps,
            DTYPES[q.dtype], 0 if norms is None else DTYPES[norms.dtype], DTYPES[keys.dtype],
        )  # fmt: skip
        self.kernels.run("rope_write_kv", rope, q, k, v, cos, sin, out)
        return out, kv

    def gather_logits_rows(self, c: AttnMetadata, x: Tensor) -> Tensor:
        return x if c.all_rows else ops.gather_logits_rows(c, x)

    def attend(self, c: AttnMetadata, q: Tensor, kv: KV, *, scale: float, window: int = 0) -> Tensor:
        """Sequences with one new token by the kernel, prefill chunks by torch."""
        if not _takes(kv) or q.dtype not in DTYPES:
            return ops.attend(c, q, kv, scale=scale, window=window)
        return sdpa_attention.attend(c, q, kv.keys, kv.values, scale, window, decode=self._decode)

    def _decode(self, g: AttnGroup, q: Tensor, keys: Pool, values: Pool, scale: float, window: int) -> Tensor:
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        q = q.contiguous()
        s, heads, size = q.shape
        out = torch.empty(s, heads * size, dtype=q.dtype)
        attention = CAttention(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), g.block_tables.data_ptr(),
            g.seq_lens.data_ptr(), s, heads, keys.shape[2], size, keys.shape[1], g.block_tables.shape[1],
            heads * size, window, g.max_seq_len, scale, DTYPES[q.dtype], DTYPES[keys.dtype],
        )  # fmt: skip
        self.kernels.run("attend", attention, q, out)
        return out


def _rows(*tensors: Tensor) -> bool:
    """Whether the last dimension of each is contiguous, of a dtype that kernels have."""
    return all(x.dtype in DTYPES and x.stride(-1) == 1 for x in tensors)


def _takes(kv: KV) -> bool:
    return not isinstance(kv.keys, QuantizedKV)
