"""Which rank sees which samples, and how a data loader finds its place again after a resume.

[Note: one order for any topology] The samples of a run are numbered; step s of training takes the next
``batch_size * ranks`` numbers and rank r of R every R-th of them, from the r-th on. The global batch of a
step is thus the same set of samples for any R with the same product, and no sample is seen twice or left out.
The samplers derive from torch's ``DistributedSampler`` because Lightning replaces every other kind by one
that shuffles, and that repeats samples until all ranks have equally many: metrics over an odd number of
series would count one twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_moe.data.datasets import ForecastBatch


class ShardedSampler(DistributedSampler[int]):
    """Every ``num_replicas``-th index from ``rank`` on, each index on exactly one rank, in ascending order.

    Ranks differ in length by one where the division leaves a remainder; a rank may get nothing.

    Args:
        dataset: A dataset with a length.
        num_replicas: Number of ranks that share the dataset.
        rank: This rank, from 0.
    """

    def __init__(self, dataset: Dataset[ForecastBatch], num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.total_size = len(cast(Sized, dataset))
        self.num_samples = len(range(rank, self.total_size, num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class EpochSampler(ShardedSampler):
    """The shard of the current epoch of an endless dataset.

    Epoch e of a dataset of length n consists of the indices from e n to (e + 1) n - 1. The epoch is in the
    indices, not in the dataset, whose copies in worker processes would not hear of it.

    Args:
        dataset: A dataset whose length is that of an epoch and which serves indices beyond it.
        num_replicas: Number of ranks that share the dataset.
        rank: This rank, from 0.

    Attributes:
        skip: Samples, of all ranks together, that the next iteration passes over.
    """

    def __init__(self, dataset: Dataset[ForecastBatch], num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank)
        self.skip = 0

    def resume(self, epoch: int, samples: int) -> None:
        """Let the next iteration begin inside an epoch.

        Args:
            epoch: The epoch.
            samples: Samples of it that are done, counted over all ranks; may be all of them.
        """
        finished, self.skip = divmod(samples, self.total_size)
        self.set_epoch(epoch + finished)

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        first = self.epoch * self.total_size
        yield from range(first + skip + self.rank, first + self.total_size, self.num_replicas)


class ResumableDataLoader(DataLoader[ForecastBatch]):
    """A data loader over an :class:`EpochSampler` that continues at the next sample after a resume.

    Lightning writes ``state_dict`` into checkpoints. It counts samples of all ranks together, so it is the
    same on every rank and fits any other number of ranks.
    """

    _epoch = 0
    _batches = 0
    _skipped = 0

    def __iter__(self) -> Iterator[ForecastBatch]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # overfit_batches replaces the sampler
            yield from super().__iter__()
            return
        self._epoch, self._batches, self._skipped = sampler.epoch, 0, sampler.skip
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of its samples that all ranks together have taken."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        assert self.batch_size is not None
        taken = self._skipped + self._batches * self.batch_size * self.sampler.num_replicas
        return {"epoch": self._epoch, "samples": taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the loader that returned ``state_dict`` was."""
        if state_dict and isinstance(self.sampler, EpochSampler):
            self.sampler.resume(state_dict["epoch"], state_dict["samples"])
            # A checkpoint may be written again before the first batch.
            self._epoch, self._batches, self._skipped = self.sampler.epoch, 0, self.sampler.skip
