"""The inputs of a step on the device: one array with all fields, sent in one transfer.

A `StepShape` gives the size of each field. A step fills it exactly, or is padded to a shape that many steps share, so
that one CUDA graph can run them. Padding tokens belong to no sequence: their KV goes to the null block, and no slot
takes a token from them. Next: `model_runner.py` runs the step.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from llmrs.backends.torch.kernels.launch import num_sms
from llmrs.core.batch import Batch

TMA_MIN_PREFILL = 1536  # tokens a sequence from which prefill attention with TMA is faster
CTAS_PER_SM = 3.8  # of attention with heads of 128; three are resident at once
MAX_KV_SPLITS = 32
SHORT_CONTEXT, SHORT_MAX_KV_SPLITS = 512, 8  # up to this context one split per tile of keys is enough
ALIGN = 16  # fields begin at multiples of 64 bytes, so that kernels can load 16 bytes at a time


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step: tokens, sequences, attention tiles of decode tokens and of prefill chunks, and the number of
    KV splits (flash-decoding) of a decode token."""

    num_tokens: int
    num_seqs: int
    num_decode_tiles: int
    num_prefill_tiles: int
    num_kv_splits: int = 1

    @property
    def is_decode_only(self) -> bool:
        """One token per sequence, so that every row has logits, in order."""
        return self.num_prefill_tiles == 0 and self.num_tokens == self.num_seqs

    @property
    def is_long_prefill(self) -> bool:
        """Whether prefill chunks are long on average."""
        return self.num_tokens >= TMA_MIN_PREFILL * self.num_seqs


@dataclass(frozen=True)
class InputBuffers:
    """Views of a step's device array. Float fields hold the bits of float32."""

    input_ids: torch.Tensor  # int32 (T,): token id, or -1 - slot
    positions: torch.Tensor  # int32 (T,)
    slot_mapping: torch.Tensor  # int32 (T,): where each token's KV goes, block * block_size + offset
    decode_tiles: torch.Tensor  # int32 (num_decode_tiles, 4): work items of kernels/paged_attention.py
    prefill_tiles: torch.Tensor  # int32 (num_prefill_tiles, 4)
    logits_indices: torch.Tensor  # int32 (S,): rows that get logits
    req_slots: torch.Tensor  # int32 (S,): slot that takes the sampled token; -1: none
    rng_keys: torch.Tensor  # int32 (S,): of the Gumbel noise
    top_k: torch.Tensor  # int32 (S,)
    temperature: torch.Tensor  # float32 (S,), as the next two
    top_p: torch.Tensor
    min_p: torch.Tensor
    block_tables: torch.Tensor  # int32 (n,): one sequence's after the other


FLOATS, TILES = ("temperature", "top_p", "min_p"), ("decode_tiles", "prefill_tiles")


class StepBuffers:
    """The array of one shape: on the device, and `copies` of it in pinned host memory, used in turn, so that the last
    transfer may still be under way."""

    def __init__(self, shape: StepShape, table_size: int, device: torch.device, copies: int = 1) -> None:
        self.shape, self.spans = shape, _spans(shape, table_size)
        size, pinned = self.spans["block_tables"].stop, device.type == "cuda"
        self.on_host = [torch.empty(size, dtype=torch.int32, pin_memory=pinned) for _ in range(copies)]
        self.arrays = [{n: _view(h[s], n).numpy() for n, s in self.spans.items()} for h in self.on_host]
        self.on_device = torch.empty(size, dtype=torch.int32, device=device)
        self.fields = InputBuffers(**{n: _view(self.on_device[s], n) for n, s in self.spans.items()})
        self.buffer_index = 0

    def fill(self, batch: Batch, block_size: int, null_block: int, block_m_tokens: int) -> None:
        """Sends a step that fits. `block_m_tokens`: tokens of a prefill tile."""
        self.buffer_index = (self.buffer_index + 1) % len(self.on_host)
        arrays = self.arrays[self.buffer_index]
        _fill_forward(arrays, batch, block_size, null_block, block_m_tokens)
        _fill_sampling(arrays, batch)
        self._send(self.spans["block_tables"].start + batch.block_tables.size)

    def fill_sampling(self, batch: Batch) -> None:
        """Sends the fields of sampling only."""
        _fill_sampling(self.arrays[self.buffer_index], batch)
        self._send(self.spans["block_tables"].start)

    def _send(self, used: int) -> None:
        self.on_device[:used].copy_(self.on_host[self.buffer_index][:used], non_blocking=True)

    def fill_null(self, null_slot: int) -> None:
        """Makes it a step of padding only, whose KV goes to `null_slot`: for capture before there is a real step."""
        self.on_device.zero_()
        self.fields.slot_mapping.fill_(null_slot)
        self.fields.req_slots.fill_(-1)


def target_ctas(device: torch.device, num_kv_heads: int, head_dim: int) -> float:
    """CTAs of decode attention per KV head that fill the GPU in one wave. Small heads need more: each CTA keeps fewer
    bytes in flight."""
    return CTAS_PER_SM * num_sms(device) / num_kv_heads * 128 / head_dim


def kv_splits(num_decodes: float, ctas: float) -> int:
    """KV splits of each decode token: the power of two that makes at most `ctas` CTAs per KV head."""
    return min(1 << max(int(ctas / num_decodes).bit_length() - 1, 0), MAX_KV_SPLITS) if num_decodes else 1


def kv_splits_of(positions: np.ndarray, ctas: float) -> int:
    """The same for a decode step with these positions. Sequences of unequal length finish late, so that splits pay for
    more of them; the exponent was measured (docs/log.md)."""
    count = len(positions)
    if count > 2 * ctas:
        return 1
    longest = int(positions.max()) + 1
    evenness = (int(positions.sum()) + count) / (count * longest)
    splits = kv_splits(count * evenness**1.2, ctas)
    return min(splits, SHORT_MAX_KV_SPLITS) if longest <= SHORT_CONTEXT else splits


def shape_of(batch: Batch, block_m_tokens: int, ctas: float) -> StepShape:
    """The exact shape of a step with prefill tiles of `block_m_tokens` tokens."""
    num_tokens, num_seqs = len(batch.input_ids), len(batch.logits_indices)
    if num_tokens == len(batch.req_slots) == num_seqs:  # the usual case, without arithmetic
        return StepShape(num_tokens, num_seqs, num_tokens, 0, kv_splits_of(batch.positions, ctas))
    query_lens = np.diff(batch.query_start_loc)
    decodes = int((query_lens == 1).sum())
    prefill_tiles = int((-(-query_lens // block_m_tokens)).sum()) - decodes
    return StepShape(num_tokens, num_seqs, decodes, prefill_tiles, kv_splits(decodes, ctas))


def _spans(shape: StepShape, table_size: int) -> dict[str, slice]:
    t = shape.num_tokens
    sizes = dict.fromkeys(("input_ids", "positions", "slot_mapping"), t)
    sizes |= {"decode_tiles": 4 * shape.num_decode_tiles, "prefill_tiles": 4 * shape.num_prefill_tiles}
    spans, begin = {}, 0
    for f in fields(InputBuffers):
        size = table_size if f.name == "block_tables" else sizes.get(f.name, shape.num_seqs)
        spans[f.name] = slice(begin, begin + size)
        begin += -(-size // ALIGN) * ALIGN
    return spans


def _view(part: torch.Tensor, name: str) -> torch.Tensor:
    return part.view(torch.float32) if name in FLOATS else part.view(-1, 4) if name in TILES else part


def _fill_forward(
    to: dict[str, np.ndarray], batch: Batch, block_size: int, null_block: int, block_m_tokens: int
) -> None:
    num_seqs, width = batch.block_tables.shape
    num_tokens, padding = len(batch.input_ids), len(to["input_ids"]) - len(batch.input_ids)
    query_lens = np.diff(batch.query_start_loc) if num_tokens > num_seqs else None  # None: one each
    block, offset = np.divmod(batch.positions, block_size)
    seq = np.arange(num_seqs) if query_lens is None else np.arange(num_seqs).repeat(query_lens)
    _put(to["input_ids"], batch.input_ids, 0)
    _put(to["positions"], batch.positions, 0)
    to["slot_mapping"][:num_tokens] = batch.block_tables[seq, block] * block_size + offset
    if padding:
        to["slot_mapping"][num_tokens:] = null_block * block_size + np.arange(padding) % block_size
    _put(to["decode_tiles"], decode_tiles(batch, query_lens, width), 0)
    if query_lens is not None:
        _put(to["prefill_tiles"], prefill_tiles(batch, query_lens, width, block_m_tokens), 0)
    _put(to["logits_indices"], batch.logits_indices, 0)
    to["block_tables"][: batch.block_tables.size] = batch.block_tables.reshape(-1)


def _fill_sampling(to: dict[str, np.ndarray], batch: Batch) -> None:
    _put(to["req_slots"], np.where(batch.do_sample, batch.req_slots, -1), -1)
    for name in ("top_k", "temperature", "top_p", "min_p"):
        _put(to[name], getattr(batch.sampling, name), 0)
    _put(to["rng_keys"], batch.sampling.rng_key.view(np.int32), 0)


def _put(to: np.ndarray, values: np.ndarray, pad_value: int) -> None:
    to[: len(values)] = values
    if len(values) < len(to):
        to[len(values) :] = pad_value


def decode_tiles(batch: Batch, query_lens: np.ndarray | None, width: int) -> np.ndarray:
    """int32 (n, 4): work items of the sequences with one token: offset of the block table, of which each has `width`
    entries, first query row, query rows, position. `query_lens` None: one token each."""
    s = np.arange(len(batch.positions)) if query_lens is None else np.flatnonzero(query_lens == 1)
    row = s if query_lens is None else batch.query_start_loc[s]
    tiles = np.ones((len(s), 4), np.int32)
    tiles[:, 0], tiles[:, 1], tiles[:, 3] = s * width, row, batch.positions[row]
    return _longest_first(tiles)


def prefill_tiles(batch: Batch, query_lens: np.ndarray, width: int, block_m_tokens: int) -> np.ndarray:
    """int32 (n, 4): work items of up to `block_m_tokens` tokens of the other sequences."""
    count = np.where(query_lens > 1, -(-query_lens // block_m_tokens), 0)
    s = np.arange(len(query_lens)).repeat(count)
    number = np.arange(len(s)) - (count.cumsum() - count).repeat(count)
    row = batch.query_start_loc[s] + number * block_m_tokens
    rows = np.minimum(batch.query_start_loc[s + 1] - row, block_m_tokens)
    return _longest_first(np.stack([s * width, row, rows, batch.positions[row]], axis=1).astype(np.int32))


def _longest_first(tiles: np.ndarray) -> np.ndarray:
    """The longest context starts first: started last, it would run on alone."""
    return tiles[np.argsort(-tiles[:, 3], kind="stable")] if len(tiles) > 1 else tiles
