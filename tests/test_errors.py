from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from lightning_moe.errors import CheckpointError, ConfigError

FULL = ConfigError("parallel.expert", 3, "a divisor of 8", "use 4", "r.yaml:7")


def test_message_names_everything() -> None:
    assert str(FULL) == ("r.yaml:7: parallel.expert: 3 is not allowed; allowed: a divisor of 8. Hint: use 4")


def test_message_without_hint_and_location() -> None:
    assert str(ConfigError("top_k", "2", "an integer")) == "top_k: '2' is not allowed; allowed: an integer"


def test_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="top_k"):
        raise ConfigError("top_k", 0, "at least 1")


def test_crosses_process_borders_whole() -> None:
    """Launchers pickle the error of a worker for the main process."""
    copy = pickle.loads(pickle.dumps(FULL))
    assert type(copy) is ConfigError
    assert vars(copy) == vars(FULL)
    assert str(copy) == str(FULL)


def test_at_and_under_return_changed_copies() -> None:
    moved = FULL.at("other.yaml:1").under("trainer.strategy.init_args")
    assert moved.location == "other.yaml:1"
    assert moved.field == "trainer.strategy.init_args.parallel.expert"
    assert (moved.value, moved.allowed, moved.hint) == (FULL.value, FULL.allowed, FULL.hint)
    assert FULL.location == "r.yaml:7"
    assert FULL.under("").field == "parallel.expert"


def test_checkpoint_error_names_path_reason_and_remedy() -> None:
    error = CheckpointError(Path("/runs/last.ckpt"), "rank 1 could not write it: No space left on device", "free space")
    assert str(error) == (
        "checkpoint /runs/last.ckpt: rank 1 could not write it: No space left on device. Hint: free space"
    )
    assert str(CheckpointError("a.ckpt", "is damaged")) == "checkpoint a.ckpt: is damaged"
    assert isinstance(error, RuntimeError)


def test_checkpoint_error_crosses_process_borders_whole() -> None:
    error = CheckpointError("/runs/last.ckpt", "is damaged", "load another one")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is CheckpointError
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
