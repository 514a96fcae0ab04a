"""Values on their way to the host."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.parallel.host_read import HostRead, NumbersOnDevice


def test_numbers_are_read_once_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    wait = HostRead.wait
    monkeypatch.setattr(HostRead, "wait", lambda read: reads.append(read) or wait(read))
    numbers = NumbersOnDevice(torch.tensor([4, 0, 7]))
    assert len(numbers) == 3
    assert not reads
    assert list(numbers) == [4, 0, 7]
    assert (numbers[2], numbers[1:]) == (7, [0, 7])
    assert sum(numbers) == 11
    assert len(reads) == 1


@pytest.mark.gpu
def test_numbers_on_a_gpu() -> None:
    numbers = NumbersOnDevice(torch.tensor([4, 0, 7], device="cuda").cumsum(0))
    assert list(numbers) == [4, 4, 11]
