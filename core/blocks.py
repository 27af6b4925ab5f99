"""The KV cache's blocks: which are free, who holds them, and which beginnings of prompts they contain.

A block is `size` tokens of every layer's KV. A full block whose tokens are committed may be cached under
(chain id of the block before it, its token ids): the ids are the key itself, so a hit can't be a collision, and a
chain id is never used twice, so what followed an evicted block can't be found. Blocks that nobody holds stay
cached until they are needed, the least recently used first. The device runs steps in order, so a released block
may be given away at once.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

ROOT = 0  # chain id before the first block


class BlockPool:
    """Reference-counted blocks 0 .. count-1 with a prefix cache."""

    def __init__(self, count: int, size: int, cache: bool = True) -> None:
        self.count, self.size, self.cache = count, size, cache
        self.ref_counts = [0] * count
        self.free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # next to be taken comes first
        self.block_keys: dict[int, tuple[int, bytes]] = {}  # of the blocks that are cached
        self.cached_blocks: dict[tuple[int, bytes], tuple[int, int]] = {}  # key -> block, chain id
        self._chain_ids = itertools.count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self.free_queue)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def match_prefix(self, tokens: np.ndarray) -> tuple[list[int], int]:
        """The cached blocks that `tokens` (int32) begins with, and the chain id of the last; nothing is taken."""
        blocks, chain = [], ROOT
        for start in range(0, len(tokens) - self.size + 1, self.size) if self.cache else ():
            found = self.cached_blocks.get((chain, tokens[start : start + self.size].tobytes()))
            if found is None:
                break
            blocks.append(found[0])
            chain = found[1]
        return blocks, chain

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: taking them uses up that many free ones."""
        return sum(self.ref_counts[b] == 0 for b in blocks)

    def touch(self, blocks: Iterable[int]) -> None:
        """Holds blocks that `match` found once more."""
        for block in blocks:
            self.ref_counts[block] += 1
            self.free_queue.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one holder each; the caller has made sure that they are free."""
        blocks = [self.free_queue.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
            if key := self.block_keys.pop(block, None):
                del self.cached_blocks[key]
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Gives one hold back on each block, the end of the sequence first, so that it is evicted first."""
        for block in reversed(blocks):
            assert self.ref_counts[block] > 0, f"block {block} is released more often than it was taken"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_queue[block] = None
                self.free_queue.move_to_end(block, last=block in self.block_keys)

    def cache_block(self, block: int, chain: int, tokens: np.ndarray) -> int:
        """Caches a full, committed block that follows `chain`; returns the chain id to go on with."""
        if not self.cache:
            return ROOT
        key = (chain, tokens.tobytes())
        if key not in self.cached_blocks:  # else an equal block came first; this one stays private
            self.cached_blocks[key] = (block, next(self._chain_ids))
            self.block_keys[block] = key
        return self.cached_blocks[key][1]
