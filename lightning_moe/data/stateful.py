"""Resuming in mid-epoch with the data loaders that users write.

[Note: an epoch is replayed, not stored] Where a plain loader is within its epoch is a number of batches, once the order
of the epoch is known. Samplers derive the order when an epoch begins: from a seed and the number of the epoch, or from
random generators. So a position keeps the states that the generators had when the epoch began. To resume, the
generators are set back to them, the sampler begins the epoch again and the batches that have been served are passed
over, without loading them; then the default generators get back the states that they should have now. Nothing in a
position belongs to a worker process, so the number of workers may change.

[Note: loaders begin late] Lightning makes an iterator when it sets up the data, and may drop it again; a run that
resumes makes more of them than one that is not interrupted. An iterator draws, for the sampler and for the seed of the
workers. So here the sampler begins with the first batch and not before, and the seed comes from a generator of the
loader's own: workers that live on do not get a new one at every epoch, those of a run that resumes do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.rng import capture_generators, fold_seed, restore_generators

Batch = TypeVar("Batch")

_COMMON_ARGUMENTS = (
    "dataset",
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def make_resumable(loader: object) -> object:
    """Give a training loader a position where it can have one.

    Args:
        loader: What a user passes to ``Trainer.fit``, after Lightning has put its sampler in.

    Returns:
        A :class:`PositionedDataLoader` with the same arguments, for a plain :class:`~torch.utils.data.DataLoader` over
        a map-style dataset; a ``StatefulDataLoader`` for one over an iterable dataset with a state; loaders that have
        a state already, in a :class:`LookBackLoader` if they do not know their length; anything else as it is.
    """
    if type(loader) is DataLoader:
        if not isinstance(loader.dataset, IterableDataset):
            return PositionedDataLoader(**_arguments(loader))
        if isinstance(loader.dataset, Stateful):
            with warnings.catch_warnings():
                # torchdata 0.11 makes a call that newer versions of torch ask their users not to make.
                warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
                loader = StatefulDataLoader(**_arguments(loader))
    if isinstance(loader, Stateful) and sized_len(loader) is None:
        return LookBackLoader(loader)
    return loader


def _arguments(loader: DataLoader[Any]) -> dict[str, Any]:
    arguments = {name: getattr(loader, name) for name in _COMMON_ARGUMENTS}
    if loader.batch_size is None and loader.batch_sampler is not None:
        return {**arguments, "batch_sampler": loader.batch_sampler}
    arguments |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return arguments if isinstance(loader.dataset, IterableDataset) else {**arguments, "sampler": loader.sampler}


def give_generator(loader: DataLoader[Any]) -> None:
    """Let a loader draw the seeds of its workers from a generator of its own, unless the user gave it one."""
    if loader.generator is None:
        loader.generator = torch.Generator().manual_seed(fold_seed(torch.initial_seed(), "workers"))


def distributed_sampler(loader: object) -> DistributedSampler[Any] | None:
    """The sampler that gives each rank its samples, Lightning's or the user's; None where there is none."""
    return next((sampler for sampler in _samplers(loader) if isinstance(sampler, DistributedSampler)), None)


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    outer = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    # Lightning cuts the indices of a sampler it does not know into shards: DistributedSamplerWrapper.
    return outer + [getattr(getattr(sampler, "dataset", None), "_sampler", None) for sampler in outer]


class _Position(NamedTuple):
    served: int
    """Batches of the iteration that have been served."""
    begin: dict[str, Any] | None
    """States of the generators when the iteration began; None before that."""


class PositionedDataLoader(DataLoader[Batch]):
    """A data loader over a map-style dataset that continues at the next batch after a resume.

    The order of an epoch must follow from ``set_epoch``, from the default generators, or from a ``torch.Generator``
    that is the ``generator`` of the loader or of its sampler; and a sampler that draws must not do so in turn with the
    dataset. Random numbers that a dataset draws in worker processes are not part of the position: workers are seeded
    as at the beginning of the epoch.

    The state counts samples of all ranks together under a :class:`~torch.utils.data.DistributedSampler`, so it fits
    another number of ranks with the same global batch. With another global batch that would begin within one of the
    old, the samples between are served again, with a warning.

    Args:
        *args: As for :class:`~torch.utils.data.DataLoader`.
        **kwargs: As for :class:`~torch.utils.data.DataLoader`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_generator(self)
        self._indices = _SkippingSampler(super()._index_sampler)
        self._position = self._previous = _Position(0, None)
        self._resumed: _Position | None = None

    @property
    def _index_sampler(self) -> _SkippingSampler:  # DataLoader takes its indices from here
        return self._indices

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Taken here and not when the first batch is: whoever resumes at the end of an epoch drops this iterator.
        resumed, self._resumed = self._resumed, None
        return self._batches(resumed)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches that have been served, as plain values."""
        return self._state(self._position)

    def previous_state_dict(self) -> dict[str, Any]:
        """Return the position before the last batch was asked for."""
        return self._state(self._previous)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on where the loader that returned ``state_dict`` was.

        Raises:
            ConfigError: The state is that of another kind of loader.
        """
        if "served" not in state_dict:
            raise ConfigError(
                "train_dataloader", "a plain DataLoader", "the kind of loader that the checkpoint was written with"
            )
        self._set_generators(state_dict["generators"])
        served, global_batch = state_dict["served"], self._global_batch()
        if state_dict["global_batch"] not in (0, global_batch) and global_batch:
            served, again = divmod(served * state_dict["global_batch"], global_batch)
            if again:
                rank_zero_warn(
                    f"The checkpoint was written with a global batch of {state_dict['global_batch']} samples; one of "
                    f"{global_batch} does not begin where it ends, so {again} samples are seen twice in this epoch."
                )
        self._resumed = self._position = self._previous = _Position(served, state_dict["begin"])

    def _batches(self, resumed: _Position | None) -> Iterator[Batch]:
        if resumed is None or resumed.begin is None:
            generators = [generator.get_state() for generator in self._generators()]
            self._position = _Position(0, {"default": capture_generators(), "generators": generators})
            iterator: Iterator[Batch] = super().__iter__()
        else:
            self._position = resumed
            iterator = self._replay(resumed.served, resumed.begin)
        while True:
            self._previous = self._position
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._position = _Position(self._previous.served + 1, self._previous.begin)
            yield batch

    def _replay(self, served: int, begin: dict[str, Any]) -> Iterator[Batch]:
        now = capture_generators()
        self._set_generators(begin["generators"])
        try:
            restore_generators(begin["default"])
            self._indices.skip = served
            iterator = super().__iter__()
            self._indices.pass_over()  # here, where the generators are those of the beginning
        finally:
            self._indices.skip = 0
            restore_generators(now)
        return iterator

    def _state(self, position: _Position) -> dict[str, Any]:
        return {
            **position._asdict(),
            "global_batch": self._global_batch(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _generators(self) -> list[torch.Generator]:
        """Generators that the order of an epoch or the seeds of workers may come from, each once."""
        found = [getattr(place, "generator", None) for place in (self, *_samplers(self))]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state.cpu())

    def _global_batch(self) -> int:
        """Samples in a batch of all ranks together; 0 where a batch sampler may make batches of any size."""
        sampler = distributed_sampler(self)
        return (self.batch_size or 0) * (1 if sampler is None else sampler.num_replicas)


class _SkippingSampler:
    """Indices of a sampler; an iteration can begin further on.

    Args:
        sampler: A sampler, or a batch sampler.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._latest: _Indices | None = None
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        self._latest = _Indices(iter(self._sampler), self.skip)
        return self._latest

    def __len__(self) -> int:
        return len(self._sampler)

    def pass_over(self) -> None:
        """Pass over what is to be skipped by the latest iteration, now and not when the first index is taken."""
        assert self._latest is not None
        self._latest.pass_over()


class _Indices(Iterator[Any]):
    def __init__(self, iterator: Iterator[Any], skip: int) -> None:
        self._iterator, self._skip = iterator, skip

    def pass_over(self) -> None:
        skip, self._skip = self._skip, 0
        for _ in islice(self._iterator, skip):
            pass

    def __next__(self) -> Any:
        self.pass_over()
        return next(self._iterator)


class LookBackLoader:
    """A loader with a state, and with the state that it had before the last batch was asked for.

    Lightning asks a loader that does not know its length for one batch more than it trains on, to know which one is the
    last. A checkpoint must not count it. In everything else it is the loader that it was made of.

    Args:
        loader: The loader.
    """

    _OWN = frozenset({"_loader", "_previous", "_generators", "_first"})

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._previous: dict[str, Any] | None = None
        self._generators: dict[str, Any] | None = None
        self._first: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self._batches(iter(self._loader))

    def _batches(self, iterator: Iterator[Any]) -> Iterator[Any]:
        first, self._first = self._first, None
        if first is not None:
            restore_generators(first)
        while True:
            # Copied: a data set may return what it goes on working with.
            self._previous, self._generators = deepcopy(self._loader.state_dict()), capture_generators()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def previous_state_dict(self) -> dict[str, Any]:
        """Return the loader's state before the last batch was asked for."""
        return self.state_dict() if self._previous is None else self._previous

    def previous_generators(self) -> dict[str, Any] | None:
        """Return the states of the default generators at that time, for datasets that draw; None before any batch."""
        return self._generators

    def first_draws_from(self, generators: Mapping[str, Any] | None) -> None:
        """Set the default generators to what :meth:`previous_generators` was, when the next batch is asked for."""
        self._first = generators

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hand the state to the loader."""
        self._previous = None
        self._loader.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not there yet, while Python makes a copy
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:  # Lightning gives loaders a worker_init_fn
            setattr(self._loader, name, value)
