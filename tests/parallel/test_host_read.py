"""Values on their way to the host."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.parallel.host_read import HostRead, NumbersOnDevice


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[HostRead]:
    """What the host has waited for."""
    found: list[HostRead] = []
    wait = HostRead.wait
    monkeypatch.setattr(HostRead, "wait", lambda read: found.append(read) or wait(read))
    return found


def test_numbers_are_those_of_the_beginning(reads: list[HostRead]) -> None:
    tensor = torch.tensor([4, 0, 7])
    numbers = NumbersOnDevice(tensor)
    tensor.fill_(-1)
    assert list(numbers) == [4, 0, 7]
    assert (len(numbers), numbers[2], numbers[1:]) == (3, 7, [0, 7])
    assert sum(numbers) == 11
    assert len(reads) == 1


@pytest.mark.gpu
def test_on_a_gpu_they_are_read_late(reads: list[HostRead]) -> None:
    tensor = torch.tensor([4, 0, 7], device="cuda").cumsum(0)
    numbers = NumbersOnDevice(tensor)
    tensor.fill_(-1)
    assert len(numbers) == 3
    assert not reads
    assert list(numbers) == [4, 4, 11]
    assert numbers[1] == 4
    assert len(reads) == 1
