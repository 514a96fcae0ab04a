"""Which rank sees which samples, and how a data loader finds its place again after a resume.

[Note: one order for any topology] The samples of a run are numbered; step s of training takes the next
``batch_size * ranks`` numbers and rank r of R every R-th of them, from the r-th on. The global batch of a
step is thus the same set of samples for any R with the same product, and no sample is seen twice or left out.
The samplers derive from torch's ``DistributedSampler`` because Lightning replaces every other kind by one
that shuffles, and that repeats samples until all ranks have equally many: metrics over an odd number of
series would count one twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_moe.data.stateful import give_generator

Batch = TypeVar("Batch")


class Position(TypedDict):
    """A place in the samples of a run."""

    epoch: int
    """The epoch."""
    samples: int
    """Samples of the epoch that all ranks together have taken."""
    start: int
    """Number of the first sample of the epoch."""


class ShardedSampler(DistributedSampler[int]):
    """Every ``num_replicas``-th index from ``rank`` on, each index on exactly one rank, in ascending order.

    Ranks differ in length by one where the division leaves a remainder; a rank may get nothing.

    Args:
        dataset: A dataset with a length.
        num_replicas: Number of ranks that share the dataset.
        rank: This rank, from 0.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self._set_total_size(len(cast(Sized, dataset)))

    def _set_total_size(self, total_size: int) -> None:
        self.total_size = total_size
        self.num_samples = len(range(self.rank, total_size, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class EpochSampler(ShardedSampler):
    """The shard of the current epoch of an endless dataset.

    Epoch e of n samples consists of the numbers from e n to (e + 1) n - 1. The epoch is in the numbers, not in the
    dataset, whose copies in worker processes would not hear of it.

    [Note: epochs that end early] An epoch may end before its n samples are taken: when batches are limited, or after
    a resume with another n, which comes with another number of ranks, as Lightning counts batches and not samples.
    The next epoch then begins with the first sample that nobody took.

    Args:
        dataset: A dataset that serves indices beyond its length.
        num_replicas: Number of ranks that share the dataset.
        rank: This rank, from 0.
        samples_per_epoch: Samples of an epoch, of all ranks together; None for the length of the dataset.
    """

    def __init__(
        self, dataset: Dataset[Any], num_replicas: int, rank: int, samples_per_epoch: int | None = None
    ) -> None:
        super().__init__(dataset, num_replicas, rank)
        if samples_per_epoch is not None:
            self._set_total_size(samples_per_epoch)
        self._origin = (0, 0)  # an epoch, and the number of its first sample
        self._begun = Position(epoch=0, samples=0, start=0)
        self._resumed: Position | None = None
        self._global_batch = 1

    def resume(self, position: Position, global_batch: int) -> None:
        """Let the next iteration begin with the first sample after a position, in its epoch or a later one.

        Args:
            position: The position.
            global_batch: Samples in a batch of all ranks together. What is left of the epoch is rounded down to full
                ones: ranks would differ in their number of batches and wait for each other for ever.
        """
        self._resumed, self._global_batch = position, global_batch

    def position(self, samples: int) -> Position:
        """Where the run is.

        Args:
            samples: Samples of all ranks together that the current iteration has served; 0 before it began.
        """
        if samples:
            begun = self._begun
            return Position(epoch=begun["epoch"], samples=begun["samples"] + samples, start=begun["start"])
        return self._resumed or Position(epoch=self.epoch, samples=0, start=self._first())

    def numbers(self) -> Iterator[int]:
        """Begin the current epoch, and yield the numbers of this rank's samples."""
        resumed, self._resumed = self._resumed, None
        done, left = 0, self.total_size
        if resumed is not None:
            of_epoch = (self.total_size - resumed["samples"]) // self._global_batch * self._global_batch
            if resumed["epoch"] == self.epoch and of_epoch > 0:
                self._origin, done, left = (self.epoch, resumed["start"]), resumed["samples"], of_epoch
            else:
                self._origin = (self.epoch, resumed["start"] + resumed["samples"])
        first = self._first()
        self._begun = Position(epoch=self.epoch, samples=done, start=first)
        yield from range(first + done + self.rank, first + done + left, self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        # Data loaders ask for an iterator twice and use the second one. Both must be lazy, or the first would take
        # the position that was resumed.
        return self.numbers()

    def _first(self) -> int:
        epoch, start = self._origin
        return start + (self.epoch - epoch) * self.total_size


class ShuffledSampler(EpochSampler):
    """An :class:`EpochSampler` over a finite dataset: passes over all of it follow one another, each in its own order.

    Sample k is item ``k % n`` of the ``k // n``-th random order of the dataset's n items. Passes need not end where
    epochs do, so that no item is left out for the sake of full batches.

    Args:
        dataset: A dataset with a length.
        num_replicas: Number of ranks that share the dataset.
        rank: This rank, from 0.
        samples_per_epoch: Samples of an epoch, of all ranks together; None for the length of the dataset.
        seed: Seed of the orders.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int,
        rank: int,
        samples_per_epoch: int | None = None,
        *,
        seed: int,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, samples_per_epoch)
        self._seed = seed
        self._items = len(cast(Sized, dataset))

    def __iter__(self) -> Iterator[int]:
        current, order = -1, np.empty(0, dtype=np.int64)
        for number in self.numbers():
            turn, item = divmod(number, self._items)
            if turn != current:
                current, order = turn, np.random.default_rng([self._seed, turn]).permutation(self._items)
            yield int(order[item])


class ResumableDataLoader(StatefulDataLoader[Batch]):
    """A data loader over an :class:`EpochSampler` that continues at the next sample after a resume.

    Lightning writes ``state_dict`` of rank 0 into checkpoints. The state of a ``StatefulDataLoader`` holds for one
    rank and one number of workers; here it counts samples of all ranks together, so it is the same on every rank and
    fits any other number of ranks and workers. Over another kind of sampler it is that of the base class.
    """

    _batches = 0
    _before_last: Position | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11 makes a call that newer versions of torch ask their users not to make.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(*args, **kwargs)
        give_generator(self)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if not isinstance(self.sampler, EpochSampler):  # overfit_batches replaces the sampler
            yield from super().__iter__()
            return
        position = self.sampler.position(self._samples())
        if position["epoch"] != self.sampler.epoch:
            self.sampler.resume(position, self._global_batch())
        self._batches = 0
        self._before_last = self.position()
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._batches += 1
            yield batch
            self._before_last = self.position()

    def position(self) -> Position | None:
        """Where the run is; None over another kind of sampler, which does not number samples."""
        return self.sampler.position(self._samples()) if isinstance(self.sampler, EpochSampler) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        position = self.position()
        return super().state_dict() if position is None else dict(position)

    def previous_state_dict(self) -> dict[str, Any]:
        """Return the position before the last batch was asked for: Lightning may hold one that it has not used."""
        return self.state_dict() if self._before_last is None else dict(self._before_last)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the loader that returned ``state_dict`` was.

        States of the first release had no ``start``: its epochs were all of one length.
        """
        if not isinstance(self.sampler, EpochSampler):
            super().load_state_dict(state_dict)
        elif state_dict:
            epoch, samples = state_dict["epoch"], state_dict["samples"]
            start = state_dict.get("start", epoch * self.sampler.total_size)
            self.sampler.resume(Position(epoch=epoch, samples=samples, start=start), self._global_batch())
            self.sampler.set_epoch(epoch)
            self._batches, self._before_last = 0, None

    def _samples(self) -> int:
        """Samples that all ranks together have taken in the last iteration."""
        return self._batches * self._global_batch()

    def _global_batch(self) -> int:
        assert self.batch_size is not None
        assert isinstance(self.sampler, EpochSampler)
        return self.batch_size * self.sampler.num_replicas


def as_fetched(batch: Batch) -> Batch:
    """Collate function for datasets that fetch finished batches."""
    return batch


def data_shard(trainer: Trainer | None) -> tuple[int, int]:
    """Number of ranks that get different samples, and which of them this is; one outside a Trainer."""
    shard = None if trainer is None else trainer.distributed_sampler_kwargs
    return (1, 0) if shard is None else (shard["num_replicas"], shard["rank"])
