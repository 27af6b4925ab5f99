"""What kernels need of a step, as one array that goes to the device in one transfer.

A `Shape` says how much room each field has. A step fills it exactly, or is padded to a shape that many steps share,
so that a recorded graph can run them: what is padded belongs to no sequence, is written to a block that nobody
reads, and is drawn for no slot.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from llmrs.backends.torch.kernels.launch import num_sms
from llmrs.core.batch import Batch

LONG = 1536  # tokens
SHARING = 3.8  # programs of attention a multiprocessor for heads of 128; three run at once
MOST = 32  # programs of attention that share a token's keys
SHORT, LESS = 512, 8  # keys, up to which so many do: there is a tile of them for each
ALIGN = 16  # fields begin at multiples of 64 bytes, which lets kernels read 16 bytes at a time


@dataclass(frozen=True)
class Shape:
    """Room of a step: T tokens, S sequences, tiles of one token each, tiles of prompts; tables are what is left.
    `split` programs of attention share the keys of a single token."""

    tokens: int
    sequences: int
    singles: int
    chunks: int
    split: int = 1

    @property
    def plain(self) -> bool:
        """Whether every sequence has one token, so that all rows are wanted, in their order."""
        return self.chunks == 0 and self.tokens == self.sequences

    @property
    def long(self) -> bool:
        """Whether it is of long parts of prompts, on the average."""
        return self.tokens >= LONG * self.sequences


@dataclass(frozen=True)
class Fields:
    """The parts of a step's array. Those of floats have the same bits as float32."""

    tokens: torch.Tensor  # int32 (T,): id, or -1 - slot
    positions: torch.Tensor  # int32 (T,)
    cells: torch.Tensor  # int32 (T,): where each token's KV goes: block * block_size + offset
    singles: torch.Tensor  # int32 (singles, 4): tiles, as kernels/attention.py has them
    chunks: torch.Tensor  # int32 (chunks, 4)
    rows: torch.Tensor  # int32 (S,): those whose logits are wanted
    slots: torch.Tensor  # int32 (S,): where the token is kept; -1: nowhere
    keys: torch.Tensor  # int32 (S,): of the noise
    top_k: torch.Tensor  # int32 (S,)
    temperature: torch.Tensor  # float32 (S,), and so the rest
    top_p: torch.Tensor
    min_p: torch.Tensor
    tables: torch.Tensor  # int32 (n,): block tables, one after the other


FLOATS = ("temperature", "top_p", "min_p")


class StepInputs:
    """The array of one shape on the host, more than once, and on the device, with room for `tables` numbers."""

    def __init__(self, shape: Shape, tables: int, device: torch.device, copies: int = 1) -> None:
        self.shape, self.spans = shape, _spans(shape, tables)
        size, pinned = self.spans["tables"].stop, device.type == "cuda"
        self.on_host = [torch.empty(size, dtype=torch.int32, pin_memory=pinned) for _ in range(copies)]
        self.arrays = [{n: _host_view(h.numpy()[s], n) for n, s in self.spans.items()} for h in self.on_host]
        self.on_device = torch.empty(size, dtype=torch.int32, device=device)
        self.fields = Fields(**{n: _device_view(self.on_device[s], n) for n, s in self.spans.items()})
        self.turn = 0

    def fill(self, batch: Batch, block_size: int, spare: int, tile: int) -> None:
        """Sends a step that fits. `spare` is a block that nobody reads, `tile` the tokens of a prompt's tile.

        The host's copies take turns, so that the one before may still be on its way.
        """
        self.turn = (self.turn + 1) % len(self.on_host)
        arrays = self.arrays[self.turn]
        _fill_forward(arrays, batch, block_size, spare, tile)
        _fill_sampling(arrays, batch)
        self._send(self.spans["tables"].start + batch.block_tables.size)

    def fill_sampling(self, batch: Batch) -> None:
        """Sends only what sampling needs."""
        _fill_sampling(self.arrays[self.turn], batch)
        self._send(self.spans["tables"].start)

    def _send(self, used: int) -> None:
        self.on_device[:used].copy_(self.on_host[self.turn][:used], non_blocking=True)

    def rest(self, cell: int) -> None:
        """Makes it a step of no sequence, which writes to `cell`: to be recorded before there is a real one."""
        self.on_device.zero_()
        self.fields.cells.fill_(cell)
        self.fields.slots.fill_(-1)


def programs(device: torch.device, kv_heads: int, size: int) -> float:
    """Of attention, for each KV head, that fill the device and leave no second round to begin. With smaller heads more
    fit, and more are needed, since each asks for less at a time."""
    return SHARING * num_sms(device) / kv_heads * 128 / size


def splits(tokens: float, programs: float) -> int:
    """Programs that share each one's keys: a power of two, so that there are at most `programs` for a KV head."""
    return min(1 << max(int(programs / tokens).bit_length() - 1, 0), MOST) if tokens else 1


def split_of(positions: np.ndarray, programs: float) -> int:
    """The same for a step of single tokens, some of which see more keys than others: those end late, so that sharing
    pays for more tokens. How many more was measured (docs/log.md)."""
    count = len(positions)
    if count > 2 * programs:
        return 1
    longest = int(positions.max()) + 1
    evenness = (int(positions.sum()) + count) / (count * longest)
    found = splits(count * evenness**1.2, programs)
    return min(found, LESS) if longest <= SHORT else found


def shape_of(batch: Batch, tile: int, programs: float) -> Shape:
    """The exact shape of a step whose prompts are cut into tiles of `tile` tokens. `programs` of attention for each KV
    head fill the device."""
    if len(batch.input_ids) == len(batch.req_slots) == len(batch.logits_indices):  # the usual case, without arithmetic
        return Shape(
            len(batch.input_ids),
            len(batch.logits_indices),
            len(batch.input_ids),
            0,
            split_of(batch.positions, programs),
        )
    counts = np.diff(batch.query_start_loc)
    singles = int((counts == 1).sum())
    chunks = int((-(-counts // tile)).sum()) - singles
    return Shape(len(batch.input_ids), len(batch.logits_indices), singles, chunks, splits(singles, programs))


def _spans(shape: Shape, tables: int) -> dict[str, slice]:
    t, s = shape.tokens, shape.sequences
    room = {"tokens": t, "positions": t, "cells": t, "singles": 4 * shape.singles, "chunks": 4 * shape.chunks}
    spans, begin = {}, 0
    for f in fields(Fields):
        size = tables if f.name == "tables" else room.get(f.name, s)
        spans[f.name] = slice(begin, begin + size)
        begin += -(-size // ALIGN) * ALIGN
    return spans


def _host_view(part: np.ndarray, name: str) -> np.ndarray:
    return part.view(np.float32) if name in FLOATS else part.reshape(-1, 4) if name in ("singles", "chunks") else part


def _device_view(part: torch.Tensor, name: str) -> torch.Tensor:
    return part.view(torch.float32) if name in FLOATS else part.view(-1, 4) if name in ("singles", "chunks") else part


def _fill_forward(to: dict[str, np.ndarray], batch: Batch, block_size: int, spare: int, tile: int) -> None:
    sequences, width = batch.block_tables.shape
    tokens, padding = len(batch.input_ids), len(to["tokens"]) - len(batch.input_ids)
    counts = np.diff(batch.query_start_loc) if tokens > sequences else None  # None: one each
    at, offset = np.divmod(batch.positions, block_size)
    owner = np.arange(sequences) if counts is None else np.arange(sequences).repeat(counts)
    _put(to["tokens"], batch.input_ids, 0)
    _put(to["positions"], batch.positions, 0)
    to["cells"][:tokens] = batch.block_tables[owner, at] * block_size + offset
    if padding:
        to["cells"][tokens:] = spare * block_size + np.arange(padding) % block_size
    _put(to["singles"], single_tiles(batch, counts, width), 0)
    if counts is not None:
        _put(to["chunks"], chunk_tiles(batch, counts, width, tile), 0)
    _put(to["rows"], batch.logits_indices, 0)
    to["tables"][: batch.block_tables.size] = batch.block_tables.reshape(-1)


def _fill_sampling(to: dict[str, np.ndarray], batch: Batch) -> None:
    _put(to["slots"], np.where(batch.do_sample, batch.req_slots, -1), -1)
    for name in ("top_k", "temperature", "top_p", "min_p"):
        _put(to[name], getattr(batch.sampling, name), 0)
    _put(to["keys"], batch.sampling.rng_key.view(np.int32), 0)


def _put(to: np.ndarray, values: np.ndarray, rest: int) -> None:
    to[: len(values)] = values
    if len(values) < len(to):
        to[len(values) :] = rest


def single_tiles(batch: Batch, counts: np.ndarray | None, width: int) -> np.ndarray:
    """int32 (n, 4): the tiles of the sequences with one token; `width` is that of the block tables. `counts` are each
    sequence's tokens; None: one."""
    s = np.arange(len(batch.positions)) if counts is None else np.flatnonzero(counts == 1)
    row = s if counts is None else batch.query_start_loc[s]
    tiles = np.ones((len(s), 4), np.int32)
    tiles[:, 0], tiles[:, 1], tiles[:, 3] = s * width, row, batch.positions[row]
    return _longest_first(tiles)


def chunk_tiles(batch: Batch, counts: np.ndarray, width: int, tile: int) -> np.ndarray:
    """int32 (n, 4): those of up to `tile` tokens of the other sequences."""
    parts = np.where(counts > 1, -(-counts // tile), 0)
    s = np.arange(len(counts)).repeat(parts)
    number = np.arange(len(s)) - (parts.cumsum() - parts).repeat(parts)
    row = batch.query_start_loc[s] + number * tile
    tiles = np.stack(
        [s * width, row, np.minimum(batch.query_start_loc[s + 1] - row, tile), batch.positions[row]], axis=1
    )
    return _longest_first(tiles.astype(np.int32))


def _longest_first(tiles: np.ndarray) -> np.ndarray:
    """In the order in which they start: one with many keys that started last would run on alone."""
    return tiles[np.argsort(-tiles[:, 3], kind="stable")] if len(tiles) > 1 else tiles
