"""The block pool: invariants under random use, and what the prefix cache may and may not find."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmrs.core.blocks import ROOT, BlockPool

SIZE, COUNT = 2, 7


def tokens(*ids):
    return np.array(ids, np.int32)


def cached_prompt(pool, prompt):
    """Allocates and registers all full blocks of a prompt, then releases them."""
    blocks, chain = pool.allocate(len(prompt) // SIZE), ROOT
    for n, block in enumerate(blocks):
        chain = pool.cache_block(block, chain, prompt[n * SIZE : (n + 1) * SIZE])
    pool.release(blocks)
    return blocks


def test_finds_the_longest_cached_beginning():
    pool = BlockPool(COUNT, SIZE)
    blocks = cached_prompt(pool, tokens(1, 2, 3, 4))
    assert pool.match_prefix(tokens(1, 2, 3, 4, 5))[0] == blocks
    assert pool.match_prefix(tokens(1, 2, 3))[0] == blocks[:1]
    assert pool.match_prefix(tokens(3, 4))[0] == []  # the same ids, but not at the beginning
    assert pool.match_prefix(tokens(9, 2, 3, 4))[0] == []


def test_nothing_is_found_behind_an_evicted_block():
    pool = BlockPool(2, SIZE)
    cached_prompt(pool, tokens(1, 2, 3, 4))
    pool.touch(pool.match_prefix(tokens(1, 2))[0])  # keeps the first block, so the second is evicted
    (other,) = pool.allocate(1)
    pool.cache_block(other, ROOT, tokens(9, 9))
    assert len(pool.match_prefix(tokens(1, 2, 3, 4))[0]) == 1
    assert pool.match_prefix(tokens(9, 9, 3, 4))[0] == [other]  # (3, 4) followed another block


def test_uncached_blocks_are_reused_before_cached_ones():
    pool = BlockPool(3, SIZE)
    cached = cached_prompt(pool, tokens(1, 2))
    plain = pool.allocate(2)
    assert not set(plain) & set(cached)
    pool.release(plain)
    pool.allocate(2)
    assert pool.match_prefix(tokens(1, 2))[0] == cached


def test_without_the_cache_nothing_is_found():
    pool = BlockPool(COUNT, SIZE, cache=False)
    cached_prompt(pool, tokens(1, 2, 3, 4))
    assert pool.match_prefix(tokens(1, 2, 3, 4)) == ([], ROOT)


class PoolMachine(RuleBasedStateMachine):
    """Random sequences over two token ids, so that hits are common, in a pool that is too small for them."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(COUNT, SIZE)
        self.held = []  # (tokens, blocks, chain, registered)
        self.content = {}  # block -> the whole beginning that it ends, as written by its last owner

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def admit(self, ids):
        prompt = tokens(*ids)
        hit, chain = self.pool.match_prefix(prompt[:-1])
        for n, block in enumerate(hit):
            assert self.content[block] == tuple(ids[: (n + 1) * SIZE])
        needed = self.pool.blocks_for(len(ids)) - len(hit)
        if needed + self.pool.num_free_among(hit) <= self.pool.num_free:
            self.pool.touch(hit)
            new = self.pool.allocate(needed)
            assert not set(new) & set(hit)
            self.held.append([prompt, hit + new, chain, len(hit)])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit(self, data):
        """Registers the next full block of some sequence."""
        held = data.draw(st.sampled_from(self.held))
        prompt, blocks, chain, done = held
        if (done + 1) * SIZE <= len(prompt):
            self.content[blocks[done]] = tuple(prompt[: (done + 1) * SIZE].tolist())
            held[2] = self.pool.cache_block(blocks[done], chain, prompt[done * SIZE : (done + 1) * SIZE])
            held[3] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data):
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(held[1])

    @invariant()
    def every_block_is_free_or_held_as_often_as_counted(self):
        holders = np.zeros(COUNT, int)
        for _, blocks, _, _ in self.held:
            np.add.at(holders, blocks, 1)
        assert self.pool.ref_counts == holders.tolist()
        assert set(self.pool.free_queue) == set(np.flatnonzero(holders == 0).tolist())

    @invariant()
    def the_cache_points_both_ways(self):
        assert {b: k for k, (b, _) in self.pool.cached_blocks.items()} == self.pool.block_keys


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
