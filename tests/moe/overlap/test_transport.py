"""The order in which messages are posted and work is queued."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from lightning_moe.moe.overlap.transport import post_between


class Streams:
    """Stands in for CUDA's: writes down which stream things are called on, and what waits for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.log = "main", list[str]()
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def wait_stream(self, other: str) -> None:
        self.log.append(f"wait for {other}")

    @contextlib.contextmanager
    def on(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.current = "beside"
        yield
        self.current = "main"

    def call(self, name: str) -> str:
        self.log.append(f"{name} on {self.current}")
        return name


@pytest.mark.parametrize(
    ("posts", "works", "order"),
    [
        (2, 3, ["w0 on main", "p0 on beside", "w1 on main", "p1 on beside", "w2 on main"]),
        (3, 1, ["w0 on main", "p0 on beside", "p1 on beside", "p2 on beside"]),
        (1, 0, ["p0 on beside"]),
        (0, 2, ["w0 on main", "w1 on main"]),
    ],
)
def test_on_cuda_they_take_turns(posts: int, works: int, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    names = [[f"p{i}" for i in range(posts)], [f"w{i}" for i in range(works)]]
    calls = [[partial(streams.call, name) for name in each] for each in names]
    results = post_between(*calls, torch.device("cuda"))
    assert streams.log == ["wait for main", *order]
    assert list(results) == names


def test_on_the_cpu_messages_go_first() -> None:
    log = list[str]()
    calls = [[partial(log.append, f"{kind}{i}") for i in range(2)] for kind in "pw"]
    post_between(*calls, torch.device("cpu"))
    assert log == ["p0", "p1", "w0", "w1"]
