from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler

from lightning_moe.data.loading import EpochSampler, ResumableDataLoader, ShardedSampler


class Numbers(Dataset[Any]):
    """Serves every index as itself."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("length", [0, 1, 6, 7])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_every_index_is_on_one_rank(length: int, num_replicas: int) -> None:
    shards = [ShardedSampler(Numbers(length), num_replicas, rank) for rank in range(num_replicas)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("epoch", [0, 3])
def test_global_batches_are_the_same_for_any_number_of_ranks(epoch: int) -> None:
    def global_batches(num_replicas: int) -> list[set[int]]:
        loaders = []
        for rank in range(num_replicas):
            sampler = EpochSampler(Numbers(36), num_replicas, rank)
            sampler.set_epoch(epoch)
            loaders.append(ResumableDataLoader(sampler.dataset, sampler=sampler, batch_size=12 // num_replicas))
        return [set(torch.cat(batches).tolist()) for batches in zip(*loaders, strict=True)]

    expected = [set(range(36 * epoch + first, 36 * epoch + first + 12)) for first in (0, 12, 24)]
    assert [global_batches(num_replicas) for num_replicas in (1, 2, 3, 4)] == [expected] * 4


def loader(num_replicas: int = 1, rank: int = 0, batch_size: int = 4, num_workers: int = 0) -> ResumableDataLoader:
    dataset = Numbers(24)
    sampler = EpochSampler(dataset, num_replicas, rank)
    return ResumableDataLoader(dataset, sampler=sampler, batch_size=batch_size, num_workers=num_workers)


def first_of(batches: list[torch.Tensor]) -> list[int]:
    return [int(batch.min()) for batch in batches]


def test_state_before_the_first_batch() -> None:
    """A checkpoint may be written before any batch is drawn, e.g. by the learning-rate finder."""
    assert loader().state_dict() == {"epoch": 0, "samples": 0}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_resumes_at_the_next_sample_on_another_number_of_ranks(num_replicas: int, num_workers: int) -> None:
    saved = loader()
    saved.sampler.set_epoch(2)  # type: ignore[attr-defined]
    batches = iter(saved)
    for _ in range(2):
        next(batches)
    state = saved.state_dict()
    rest = set(torch.cat(list(batches)).tolist())

    seen: set[int] = set()
    for rank in range(num_replicas):
        resumed = loader(num_replicas, rank, 4 // num_replicas, num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state  # a checkpoint before the first batch
        resumed.sampler.set_epoch(2)  # type: ignore[attr-defined]  # as Lightning does
        own = list(resumed)
        assert len(own) == 4
        assert seen.isdisjoint(torch.cat(own).tolist())
        seen.update(torch.cat(own).tolist())
        assert len(resumed) == 6  # the length is that of a whole epoch, as Lightning expects
        assert first_of(list(resumed)) == [48 + num_replicas * 0 + rank + 4 * step for step in range(6)]
    assert seen == rest


def test_position_counts_what_was_handed_out_not_what_workers_prepared() -> None:
    ahead = loader(num_workers=1)
    batches = iter(ahead)
    next(batches)
    assert ahead.state_dict() == {"epoch": 0, "samples": 4}


def test_a_finished_epoch_resumes_at_the_next_one() -> None:
    finished = loader()
    list(finished)
    assert finished.state_dict() == {"epoch": 0, "samples": 24}
    resumed = loader()
    resumed.load_state_dict(finished.state_dict())
    assert first_of(list(resumed))[0] == 24


def test_positions_add_up_over_two_resumes() -> None:
    one = loader()
    next(iter(one))
    two = loader()
    two.load_state_dict(one.state_dict())
    next(iter(two))
    assert two.state_dict() == {"epoch": 0, "samples": 8}


def test_a_replaced_sampler_is_served_as_it_is() -> None:
    dataset = Numbers(24)
    plain = ResumableDataLoader(dataset, sampler=SequentialSampler(dataset), batch_size=4)
    assert first_of(list(plain)) == [0, 4, 8, 12, 16, 20]
    plain.load_state_dict(plain.state_dict())
    assert len(list(plain)) == 6
