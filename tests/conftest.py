"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported: up to four ranks share two cores, where a thread pool per rank slows everything.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch looks up a name for every connection it opens; without a name server each would take ten seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import hypothesis
import pytest

from tests.distributed import RankPool

# The same examples in every run, and no deadline: the suite asserts nothing about time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what a test does to the environment, which later tests hand on to their workers.

    ``seed_everything`` leaves its seed there, and a strategy in a worker of another test would start from it.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Worker processes for tests on several ranks: see :mod:`tests.distributed`."""
    with RankPool() as pool:
        yield pool
