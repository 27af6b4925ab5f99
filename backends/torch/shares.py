"""Who reads which keys, where the work on single tokens is shared out evenly: the plan for kernels/shares.py.

The keys of all sequences with one token lie end to end, in tiles, and are cut into as many shares of the same size as
there are workers. A sequence may be cut anywhere between two tiles, so a share is a number of segments: sequences, and
at its ends parts of sequences. What is found in a part goes to a slot of its own; those of a sequence lie side by side.
The idea is that of stream-K (arXiv 2301.03598).
"""

from dataclasses import dataclass

import numpy as np

WIDTH = 8  # numbers of a segment


@dataclass(frozen=True)
class Shares:
    """How a step's single tokens are shared out."""

    workers: int  # for each KV head
    keys: int  # of a tile: a multiple of what the kernel reads at a time

    def rows(self, singles: int) -> int:
        """The most segments that there may be, and one more, which is read ahead and not looked at."""
        return singles + self.workers if singles else 0

    @property
    def slots(self) -> int:
        """The most parts that there may be: the ends of each share."""
        return 2 * self.workers


def share_out(shares: Shares, tiles: np.ndarray, segments: np.ndarray, begins: np.ndarray) -> None:
    """Fills int32 `segments` (rows, WIDTH) and `begins` (workers + 1,) for `tiles` (n, 4) of one token each.

    A segment is (where its block table begins, row, position of the token, first key, the key after the last, slot or
    -1 where it is the whole sequence, first slot of the sequence, parts of the sequence). Worker w has the segments
    begins[w] .. begins[w + 1] - 1; with fewer tiles of keys than workers some have none.
    """
    table, row, _, position = tiles.T
    lengths = position // shares.keys + 1  # in tiles
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(shares.workers + 1) * total // shares.workers
    starts = _without_repeats(np.sort(np.concatenate([ends - lengths, cuts[:-1]]))) if total else ends
    begins[:] = starts.searchsorted(cuts)
    s = ends.searchsorted(starts, side="right")  # whose segments they are
    before = (ends - lengths)[s]
    count = np.bincount(s, minlength=len(tiles))
    cut = count[s] > 1
    slot = np.where(cut, cut.cumsum() - 1, -1)
    low, high = (starts - before) * shares.keys, (np.append(starts[1:], total) - before) * shares.keys
    position = position[s]
    columns = table[s], row[s], position, low, np.minimum(high, position + 1), slot, slot[(count.cumsum() - count)[s]]
    for n, values in enumerate((*columns, count[s])):
        segments[: len(s), n] = values
    segments[len(s) :] = 0


def _without_repeats(sorted_ones: np.ndarray) -> np.ndarray:
    new = np.ones(len(sorted_ones), bool)
    np.not_equal(sorted_ones[1:], sorted_ones[:-1], out=new[1:])
    return sorted_ones[new]
