"""How batches are cut into microbatches."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_moe import ConfigError
from lightning_moe.pipeline.splitting import pad_with_idle, split_batch


class Pair(NamedTuple):
    inputs: Tensor
    rest: Any


@dataclass
class Hidden:
    values: Tensor


@dataclass
class Settings:
    width: int = 5


def test_what_has_the_length_of_the_batch_is_cut() -> None:
    whole = torch.arange(5.0)
    groups: dict[str, list[str]] = defaultdict(list, names=list("abcde"))
    batch = Pair(
        whole,
        {
            "collated": ("a", "b", "c", "d", "e"),
            "size": (2, 5),
            "groups": groups,
            "mask": torch.eye(3),
            "scale": torch.tensor(2.0),
            "none": [None, {}, Settings()],
            "nested": [OrderedDict(x=whole.view(5, 1))],
        },
    )
    pieces = split_batch(batch, 2, context="eval", predicting=True)
    assert [(piece.index, piece.count, piece.weight) for piece in pieces] == [(0, 2, 0.6), (1, 2, 0.4)]
    for piece, samples in zip(pieces, (slice(3), slice(3, 5)), strict=True):
        assert (piece.context, piece.predicting) == ("eval", True)
        data = piece.data
        assert type(data) is Pair
        assert torch.equal(data.inputs, whole[samples])
        rest = data.rest
        assert rest["collated"] == tuple("abcde"[samples])
        assert type(rest["groups"]) is defaultdict
        assert rest["groups"] == {"names": list("abcde"[samples])}
        assert rest["groups"]["new"] == []
        assert rest["size"] == (2, 5)
        assert rest["mask"] is batch.rest["mask"]
        assert rest["scale"] is batch.rest["scale"]
        assert rest["none"] == [None, {}, Settings()]
        assert type(rest["nested"][0]) is OrderedDict
        assert torch.equal(rest["nested"][0]["x"], whole.view(5, 1)[samples])
    assert "new" not in groups


def test_tensors_of_a_short_batch_in_a_list() -> None:
    """Inputs and targets in a list, as torch collates them, are two tensors and not two samples."""
    inputs, targets = torch.zeros(2, 3), torch.ones(2)
    assert [piece.data[1].tolist() for piece in split_batch([inputs, targets], 4)] == [[1.0], [1.0]]


@pytest.mark.parametrize(
    "odd",
    [
        Hidden(torch.zeros(4)),
        UserDict(values=torch.zeros(4)),
        deque([torch.zeros(4)]),
        [{"boxes": torch.zeros(boxes, 2)} for boxes in (1, 2, 3, 5)],
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_what_might_have_samples_is_refused(odd: Any) -> None:
    """Given whole to every microbatch it would be trained on many times."""
    with pytest.raises(ConfigError, match="split"):
        split_batch({"x": torch.zeros(4, 2), "odd": odd}, 2)


def test_own_functions_cut_in_their_own_way() -> None:
    pieces = split_batch("abcd", 2, lambda batch, count: [batch[:1], batch[1:]])
    assert [(piece.data, piece.weight) for piece in pieces] == [("a", 0.5), ("bcd", 0.5)]
    with pytest.raises(ConfigError, match="no microbatches"):
        split_batch("abcd", 2, lambda batch, count: [])


@pytest.mark.parametrize("batch", [{}, {"x": torch.tensor(1.0)}, torch.zeros(0, 3)], ids=["empty", "scalar", "none"])
def test_batches_without_samples_are_refused(batch: Any) -> None:
    with pytest.raises(ConfigError, match="samples along dim 0"):
        split_batch(batch, 2)


def test_idle_microbatches_count_nowhere() -> None:
    pieces = pad_with_idle(split_batch(torch.zeros(2), 4), 4)
    assert [(piece.index, piece.count, piece.weight) for piece in pieces[2:]] == [(2, 4, 0.0), (3, 4, 0.0)]
