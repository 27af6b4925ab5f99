"""Decode steps as recorded calls of kernels: a step of few rows is a few hundred of them, some microseconds each, and
as much of Python between them.

The first step of each number of sequences runs op by op, and the arguments of its kernels are kept, with the memory
that they point to. Later ones fill that memory and replay the calls. Steps that need more than kernels and views of
tensors, such as ops of torch, are not recorded.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmrs.backends.torch import ops
from llmrs.backends.torch.cpu.library import CCall, Kernels
from llmrs.backends.torch.ops import KV
from llmrs.backends.torch.program import Program
from llmrs.backends.torch.sdpa_attention import AttnGroup, AttnMetadata
from llmrs.core.batch import Batch
from llmrs.core.ir import RopeFrequencies

MAX_ROWS = 8  # of a recorded step; above, Python takes a small part of the time


class _Watch(TorchDispatchMode):
    """Whether torch computed anything."""

    computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is not torch.ops.aten.empty and not func.is_view:
            self.computed = True
        return result


@dataclass(frozen=True)
class Recording:
    """Of steps with as many sequences as `hidden` has rows."""

    metadata: AttnMetadata  # in memory that the calls read
    hidden: torch.Tensor  # (S, D): the embedded tokens
    result: torch.Tensor  # (S, D)
    calls: ctypes.Array[CCall]
    attention: list[Any]  # arguments of `attend`, which hold the longest sequence's length
    kept: list[Any]


class Recorder:
    """Records and replays all calls of a program but the first ones, `embed`, and the last, `lm_head`."""

    def __init__(self, kernels: Kernels, program: Program, kv: Sequence[KV], block_size: int, max_blocks: int) -> None:
        self.kernels, self.program, self.kv = kernels, program, kv
        self.block_size, self.max_blocks = block_size, max_blocks
        self.recordings: dict[int, Recording | None] = {}  # by the number of sequences; None: it can't be recorded
        self.first = list(takewhile(lambda call: call.op in ("embed", "mul_scalar"), program.calls))
        *self.recorded, self.last = program.calls[len(self.first) :]
        self.possible = bool(self.first) and self.last.op == "lm_head" and self.last.outs == program.results[:1]

    def run(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits of a step, or None if it is not one to record: one of few tokens, each of another sequence."""
        count = len(tokens)
        if not self.possible or count > MAX_ROWS or not len(batch.seq_lens) == len(batch.logits_indices) == count:
            return None
        hidden = tokens
        for call in self.first:
            hidden = call.fn(None, hidden, *call.weights, **call.params)
        if count not in self.recordings:
            metadata = self._metadata(count)
            self._fill(metadata, batch)
            result = self._record(metadata, hidden.clone(), torch.from_numpy(batch.positions))
        else:
            recording = self.recordings[count]
            if recording is None:
                return None
            self._fill(recording.metadata, batch)
            recording.hidden.copy_(hidden)
            longest = int(batch.seq_lens.max())
            for arguments in recording.attention:
                arguments.max_length = longest
            self.kernels.replay(recording.calls)
            result = recording.result
        return self.last.fn(None, result, *self.last.weights, **self.last.params)

    def _metadata(self, count: int) -> AttnMetadata:
        group = AttnGroup(
            torch.arange(count), torch.zeros(count, self.max_blocks, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64), self.max_blocks * self.block_size,
            torch.zeros(count, 1, 1, 1, dtype=torch.int32), self.max_blocks * self.block_size, {}, None,
        )  # fmt: skip
        return AttnMetadata(torch.zeros(count, dtype=torch.int64), [group], torch.arange(count), {}, all_rows=True)

    def _fill(self, metadata: AttnMetadata, batch: Batch) -> None:
        (group,), positions = metadata.groups, batch.positions
        blocks = batch.block_tables[:, : self.max_blocks]
        group.block_tables.numpy()[:, : blocks.shape[1]] = blocks
        group.seq_lens.numpy()[:] = batch.seq_lens
        group.positions.numpy()[:, 0, 0, 0] = positions
        block = blocks[np.arange(len(positions)), positions // self.block_size].astype(np.int64)
        metadata.slot_mapping.numpy()[:] = block * self.block_size + positions % self.block_size
        for frequencies, (cos, sin) in metadata.cos_sin.items():
            new_cos, new_sin = ops.cos_sin_of(torch.from_numpy(positions), frequencies)
            cos.copy_(new_cos), sin.copy_(new_sin)

    def _record(self, metadata: AttnMetadata, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Runs the step, and keeps it."""
        values: list[Any] = [None] * self.program.count
        values[1 : 2 + len(self.kv)] = positions, *self.kv
        values[self.first[-1].outs[0]] = hidden
        for frequencies in {
            f for call in self.recorded for f in call.params.values() if isinstance(f, RopeFrequencies)
        }:
            ops.cos_sin(metadata, positions, frequencies)
        with self.kernels.recorded() as tape, _Watch() as watch:
            for call in self.recorded:
                result = call.fn(metadata, *[values[n] for n in call.inputs], *call.weights, **call.params)
                for n, one in zip(call.outs, [result] if len(call.outs) == 1 else result, strict=True):
                    values[n] = one
        result = values[self.last.inputs[0]]
        if watch.computed:
            self.recordings[len(hidden)] = None
            return result
        attention = [arguments for name, arguments, _ in tape if name == "attend"]
        self.recordings[len(hidden)] = Recording(
            metadata, hidden, result, self.kernels.calls(tape), attention, [tape, values]
        )
        return result
