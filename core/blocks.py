"""The block pool: free KV blocks, reference counts, and the prefix cache.

A block holds the KV of `size` tokens in every layer. A full block whose tokens are committed is cached under (id of the
block before it, its token ids). The ids themselves are the key, so a hit is never a hash collision; block ids are never
reused, so the successors of an evicted block can't be found. Unreferenced blocks stay cached until they are needed,
least recently used first. The device runs steps in order, so a released block may be reallocated at once.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

ROOT = 0  # parent id of a first block


class BlockPool:
    """Reference-counted blocks 0 .. count-1 with a prefix cache."""

    def __init__(self, count: int, size: int, cache: bool = True) -> None:
        self.count, self.size, self.cache = count, size, cache
        self.ref_counts = [0] * count
        self.free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # the next to allocate first
        self.block_keys: dict[int, tuple[int, bytes]] = {}  # of cached blocks
        self.cached_blocks: dict[tuple[int, bytes], tuple[int, int]] = {}  # key -> block, id
        self._ids = itertools.count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self.free_queue)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def match_prefix(self, tokens: np.ndarray) -> tuple[list[int], int]:
        """Cached blocks of the longest prefix of `tokens` int32 (n,), and the last one's id. Takes no reference."""
        blocks, parent = [], ROOT
        for start in range(0, len(tokens) - self.size + 1, self.size) if self.cache else ():
            hit = self.cached_blocks.get((parent, tokens[start : start + self.size].tobytes()))
            if hit is None:
                break
            blocks.append(hit[0])
            parent = hit[1]
        return blocks, parent

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are unreferenced: `touch` would take them from the free ones."""
        return sum(self.ref_counts[b] == 0 for b in blocks)

    def touch(self, blocks: Iterable[int]) -> None:
        """Takes a reference to each block."""
        for block in blocks:
            self.ref_counts[block] += 1
            self.free_queue.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. The caller checks `num_free`."""
        blocks = [self.free_queue.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
            if key := self.block_keys.pop(block, None):
                del self.cached_blocks[key]
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference to each block, the last of the sequence first, so that it is evicted first."""
        for block in reversed(blocks):
            assert self.ref_counts[block] > 0, f"block {block} has no reference to drop"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_queue[block] = None
                self.free_queue.move_to_end(block, last=block in self.block_keys)

    def cache_block(self, block: int, parent: int, tokens: np.ndarray) -> int:
        """Caches a full, committed block after block id `parent`; returns its own id."""
        if not self.cache:
            return ROOT
        key = (parent, tokens.tobytes())
        if key not in self.cached_blocks:  # else an equal block is cached; this one stays private
            self.cached_blocks[key] = (block, next(self._ids))
            self.block_keys[block] = key
        return self.cached_blocks[key][1]
