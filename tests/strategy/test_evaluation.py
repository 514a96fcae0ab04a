"""Validate, test and predict with different numbers of batches on the ranks of one expert group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tests.distributed import RankFailure, RankPool
from tests.strategy.tiny import Sequences, TinyMoE, relative_error, trainer


class Streamed(IterableDataset[dict[str, torch.Tensor]]):
    """A data set without a length."""

    def __init__(self, data: Dataset[dict[str, torch.Tensor]], length: int) -> None:
        self.data, self.length = data, length

    def __iter__(self) -> Any:
        return (self.data[i] for i in range(self.length))


def _loaders(rank: int, lengths: list[list[int]], streamed: bool) -> list[DataLoader[Any]]:
    """One loader per entry of this rank's lengths, over samples that no other rank sees."""
    loaders: list[DataLoader[Any]] = []
    for number, length in enumerate(lengths[rank]):
        start = sum(each[number] for each in lengths[:rank])
        samples: Dataset[Any] = Subset(Sequences(64), range(start, start + length))
        loaders.append(DataLoader(Streamed(samples, length) if streamed else samples, batch_size=4))
    return loaders


def predict(world_size: int, expert: int, lengths: list[list[int]], streamed: bool = False) -> dict[int, Any]:
    run = trainer(world_size, expert, use_distributed_sampler=False)
    predictions = run.predict(TinyMoE(), _loaders(run.global_rank, lengths, streamed))
    assert predictions is not None
    batches = predictions if len(lengths[0]) == 1 else [batch for loader in predictions for batch in loader]
    return {int(i): out for batch in batches for i, out in zip(batch["index"], batch["output"], strict=True)}


def validate(world_size: int, expert: int, lengths: list[list[int]], rank: int | None = None) -> float:
    """The logged loss; ``rank`` validates on that rank's samples in a single process."""
    run = trainer(world_size, expert, use_distributed_sampler=False)
    loaders = _loaders(run.global_rank if rank is None else rank, lengths, False)
    (metrics,) = run.validate(TinyMoE(), loaders, verbose=False)
    return metrics["val_loss"]


def predict_with_injected_sampler(world_size: int, expert: int, length: int) -> dict[int, Any]:
    run = trainer(world_size, expert)
    predictions = run.predict(TinyMoE(), DataLoader(Subset(Sequences(64), range(length)), batch_size=4))
    assert predictions is not None
    return {int(i): out for b in predictions for i, out in zip(b["index"], b["output"], strict=True)}  # type: ignore[call-overload]


def _check_predictions(results: list[dict[int, Any]], expected: dict[int, Any]) -> None:
    merged = {index: out for result in results for index, out in result.items()}
    assert merged.keys() == expected.keys()
    for index, out in merged.items():
        assert relative_error(out, expected[index]) <= 1e-5


@pytest.mark.parametrize("streamed", [False, True], ids=["sized", "streamed"])
@pytest.mark.parametrize(
    ("expert", "lengths"),
    [(2, [[12], [3]]), (2, [[1], [16]]), (4, [[4], [9], [13], [2]]), (2, [[4], [9], [13], [2]])],
)
def test_predict_with_unequal_batches(ranks: RankPool, expert: int, lengths: list[list[int]], streamed: bool) -> None:
    """Every rank gets the predictions of its own samples and nothing else, and nobody hangs."""
    world_size, total = len(lengths), sum(length for (length,) in lengths)
    results = ranks.run(world_size, predict, world_size, expert, lengths, streamed, init_process_group=False)
    expected = ranks.run(1, predict, 1, 0, [[total]], init_process_group=False)[0]
    assert [len(result) for result in results] == [length for (length,) in lengths]
    _check_predictions(results, expected)


def test_predict_with_several_unequal_dataloaders(ranks: RankPool) -> None:
    """Ranks switch dataloaders at different times."""
    lengths = [[9, 2], [3, 14]]
    results = ranks.run(2, predict, 2, 2, lengths, init_process_group=False)
    expected = ranks.run(1, predict, 1, 0, [[16]], init_process_group=False)[0]
    merged = {index: out for result in results for index, out in result.items()}
    for index, out in merged.items():
        assert relative_error(out, expected[index]) <= 1e-5
    assert len(merged) == 16


def test_predict_with_lightnings_sampler(ranks: RankPool) -> None:
    """For prediction Lightning shards without repetition: 9 samples give 5 and 4, that is 2 batches and 1."""
    results = ranks.run(2, predict_with_injected_sampler, 2, 2, 9, init_process_group=False)
    assert [len(result) for result in results] == [5, 4]
    _check_predictions(results, ranks.run(1, predict, 1, 0, [[9]], init_process_group=False)[0])


@pytest.mark.parametrize(("first", "second"), [(12, 4), (12, 3)], ids=["even total", "odd total"])
def test_validate_with_unequal_batches(ranks: RankPool, first: int, second: int) -> None:
    """The metric is that of all samples: a rank that only serves adds nothing to it, and no sample counts twice."""
    lengths = [[first], [second]]
    metrics = ranks.run(2, validate, 2, 2, lengths, init_process_group=False)
    parts = [ranks.run(1, validate, 1, 0, lengths, rank, init_process_group=False)[0] for rank in range(2)]
    # Lightning divides the ranks' mean sum of losses by their mean number of samples.
    expected = (first * parts[0] + second * parts[1]) / (first + second)
    assert abs(parts[0] - parts[1]) > 1e-2 * expected, "ranks with the same loss would hide a wrong weight"
    assert metrics == pytest.approx([expected] * 2, rel=1e-6)
    single = ranks.run(1, validate, 1, 0, [[first + second]], init_process_group=False)[0]
    assert expected == pytest.approx(single, rel=1e-6)


class MultipleForwards(TinyMoE):
    """A data-dependent number of forward passes per batch, as in autoregressive generation."""

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        out, passes = batch["input"], 1 + int(batch["index"][0]) % 3
        for _ in range(passes):
            out = self(out)[0]
        return {"index": batch["index"], "output": out, "passes": passes}


def predict_many(world_size: int, expert: int, lengths: list[list[int]]) -> tuple[dict[int, Any], list[int]]:
    """Outputs of this rank's samples, and the number of forward passes of each of its batches."""
    run = trainer(world_size, expert, use_distributed_sampler=False)
    batches: Any = run.predict(MultipleForwards(), _loaders(run.global_rank, lengths, False))
    outputs = {int(i): out for batch in batches for i, out in zip(batch["index"], batch["output"], strict=True)}
    return outputs, [batch["passes"] for batch in batches]


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [([[4], [4]], [[1], [2]]), ([[4], [8]], [[1], [2, 3]]), ([[8], [8]], [[1, 2], [3, 1]])],
    ids=["one batch", "unequal batches", "several batches"],
)
def test_numbers_of_forward_passes_may_differ(
    ranks: RankPool, lengths: list[list[int]], passes: list[list[int]]
) -> None:
    """A rank's batches need not fall together with the others': it serves when it has no pass left to make."""
    results = ranks.run(2, predict_many, 2, 2, lengths, init_process_group=False)
    assert [made for _, made in results] == passes
    total = sum(length for (length,) in lengths)
    ((expected, made),) = ranks.run(1, predict_many, 1, 0, [[total]], init_process_group=False)
    assert made == [each for rank in passes for each in rank]
    _check_predictions([outputs for outputs, _ in results], expected)


def fit_with_unequal_batches(world_size: int, expert: int) -> None:
    run = trainer(world_size, expert, use_distributed_sampler=False)
    run.fit(TinyMoE(), DataLoader(Subset(Sequences(64), range(8 + 8 * run.global_rank)), batch_size=4))


def test_training_refuses_unequal_numbers_of_batches(ranks: RankPool) -> None:
    """Training must not serve: the gradients of the missing batches would be silently left out."""
    with pytest.raises(Exception, match=r"train_dataloader: '\[2, 4\] batches on ranks 0..1'"):
        ranks.run(2, fit_with_unequal_batches, 2, 2, init_process_group=False)


def test_a_rank_without_any_batch_is_refused_on_all_ranks(ranks: RankPool) -> None:
    """Lightning would skip the loop on that rank and leave the others waiting."""
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, predict, 2, 2, [[4], [0]], init_process_group=False)
    assert len(failure.value.errors) == 2
    assert all("[1, 0] batches" in str(error) for error in failure.value.errors.values())
