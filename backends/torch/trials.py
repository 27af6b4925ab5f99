"""Times one launch of a kernel with a cut, on the device that it is for: what `tuning` compares.

On a GPU the launches of a trial are recorded and run again, so that the host's time is not in it, and go through more
memory than the caches hold where there is so much. Attention reads the model's own KV cache while nobody needs it yet.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from llmrs.backends.torch.attn_metadata import programs, splits
from llmrs.backends.torch.cuda_graphs import Recorder
from llmrs.backends.torch.kernel_configs import Cut, Key
from llmrs.backends.torch.kernels import paged_attention as paged
from llmrs.backends.torch.kernels.matvec import matvec
from llmrs.backends.torch.ops import KV

BEYOND = 2**27  # bytes that no L2 cache holds
CONTEXT, PROMPT = 512, 2048  # tokens
ROUNDS = 20  # the least counts: the clock is low at first

Launch = Callable[[], torch.Tensor]


class Trials:
    """Times launches like those of a model whose KV cache is there: `trials(key, cut)` in seconds."""

    def __init__(self, kv: Sequence[KV], sequences: int, longest: int, device: torch.device) -> None:
        """At most `sequences` at once, of at most `longest` tokens."""
        self.kv, self.sequences, self.longest = kv, sequences, longest
        self.device, self.recorder = device, Recorder(device)

    @torch.inference_mode()
    def __call__(self, key: Key, cut: Cut) -> float:
        launches: list[Launch] = getattr(self, key.kernel)(key, cut)

        def all_of_them() -> torch.Tensor:
            return [launch() for launch in launches][-1]

        return self._seconds(self.recorder.record(all_of_them)) / len(launches)

    def end(self) -> None:
        """Gives the memory back: the KV cache left little."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _seconds(self, run: Launch) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        times = []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times)

    def decode(self, key: Key, cut: Cut) -> list[Launch]:
        """Every sequence's token, in a context of up to CONTEXT."""
        context = min(CONTEXT, self.longest)
        positions = torch.full((self.sequences,), context - 1)
        return self._attention(key, cut, torch.arange(self.sequences), positions, context, 1)

    def prompt(self, key: Key, cut: Cut) -> list[Launch]:
        """One prompt of up to PROMPT tokens."""
        length = min(PROMPT, self.longest)
        begins = torch.arange(0, length, cut[0])
        return self._attention(key, cut, torch.zeros_like(begins), begins, length, length)

    def _attention(
        self, key: Key, cut: Cut, sequences: torch.Tensor, positions: torch.Tensor, context: int, new: int
    ) -> list[Launch]:
        """A launch on each of some layers; tiles of up to cut[0] of a sequence's `new` tokens."""
        (group, size), kvs = key.shape, [kv for kv in self.kv if kv.keys.shape[3] == key.shape[1]]
        blocks, block_size, kv_heads, _ = kvs[0].keys.shape
        width, count = -(-context // block_size), int(sequences.max()) + 1
        tables = torch.arange(count * width) % blocks
        first = sequences if new == 1 else positions
        rows = torch.clamp(context - positions, max=cut[0])
        tiles = torch.stack([sequences * width, first, rows, positions], dim=1)
        q = torch.zeros(count * new, kv_heads * group, size, dtype=key.types[0], device=self.device)
        y = torch.empty(len(q), kv_heads * group * size, dtype=q.dtype, device=self.device)
        split = splits(len(tiles), programs(self.device, kv_heads, size)) if new == 1 else 1
        tables, tiles = (t.to(self.device, torch.int32) for t in (tables, tiles))
        scale, tiling = size**-0.5, paged.Tiling(*cut)

        def launch(kv: KV) -> torch.Tensor:
            paged.attention(q, kv.keys, kv.values, tables, tiles, y, scale=scale, window=0, cut=tiling, split=split)
            return y

        read = 2 * count * context * kv_heads * size * key.types[1].itemsize
        return [partial(launch, kv) for kv in kvs[: self._copies(read)]]

    def matvec(self, key: Key, cut: Cut) -> list[Launch]:
        """Matrices of this shape, of as many of their rows as fit."""
        count, width = key.shape
        itemsize = key.types[0].itemsize
        count = min(count, max(self._room() // (width * itemsize), 1))
        copies = self._copies(count * width * itemsize)
        weights = torch.zeros(copies, count, width, dtype=key.types[0], device=self.device)
        x = torch.zeros(1, width, dtype=key.types[0], device=self.device)
        return [partial(matvec, x, w, None, cut[0]) for w in weights]

    def _room(self) -> int:
        return BEYOND if self.device.type == "cuda" else 2**12

    def _copies(self, size: int) -> int:
        """Launches of `size` bytes each that go through what no cache holds; on a CPU one."""
        return min(max(BEYOND // max(size, 1), 1), 64) if self.device.type == "cuda" else 1
