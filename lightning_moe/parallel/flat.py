"""Where parameters lie in a flat buffer that several ranks share evenly: pure arithmetic, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

# [Note: aligned cuts]
# A sharded optimizer steps runs of a parameter's elements. Vector instructions treat the last few elements of a run
# apart, by scalar code that may round differently (a fused multiply-add or not). Where a parameter starts at a multiple
# of this many elements, and is cut only there, the elements at the end of a run are the same ones as at the end of the
# whole parameter, so that a step by parts is bitwise the step as a whole.
ALIGNMENT = 64
"""Elements; a multiple of what any vector unit, unrolled, takes at a time."""


@dataclass(frozen=True)
class FlatLayout:
    """A buffer ``[parameter 0 | gap | parameter 1 | gap | ...| padding]``, cut into equal shards.

    Args:
        sizes: Number of elements of each parameter.
        ranks: Number of shards.
    """

    sizes: tuple[int, ...]
    ranks: int

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each parameter begins; multiples of :data:`ALIGNMENT`."""
        return tuple(accumulate((_aligned(size) for size in self.sizes), initial=0))[:-1]

    @cached_property
    def shard_size(self) -> int:
        """Elements of one shard, gaps and padding included; a multiple of :data:`ALIGNMENT`."""
        used = sum(_aligned(size) for size in self.sizes)
        return _aligned(-(-used // self.ranks))

    @property
    def total(self) -> int:
        """Elements of the buffer."""
        return self.ranks * self.shard_size

    def shard(self, rank: int) -> range:
        """Positions in the buffer of a rank's shard."""
        return range(rank * self.shard_size, (rank + 1) * self.shard_size)

    def run(self, index: int, rank: int) -> range:
        """Elements of parameter ``index``, counted from its first, that lie in the shard of ``rank``; may be empty."""
        shard, offset, size = self.shard(rank), self.offsets[index], self.sizes[index]
        start = min(max(shard.start - offset, 0), size)
        return range(start, min(max(shard.stop - offset, start), size))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
