"""Checkpoints whose contents follow from their step, so that a reader knows what must be in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.shards import LogicalShard
from lightning_moe.parallel.sharding import ShardSpec

ROWS = 6


def whole_state(step: int) -> dict[str, dict[str, Any]]:
    """Whole tensors of several dtypes and shapes, all different from those of every other step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "sharded": torch.randn(ROWS, 40, generator=generator),
            "low": torch.randn(33, generator=generator).bfloat16(),
            "scalar": torch.tensor(float(step)),
        },
        "optimizer_0": {"exp_avg": torch.randn(ROWS, 40, generator=generator), "name": f"step {step}"},
    }


def state_of(step: int, rank: int = 0, world_size: int = 1) -> dict[str, dict[str, Any]]:
    """What one rank holds: its rows of the tensors that are sharded, and the rest as it is."""
    state = whole_state(step)
    rows = tuple(range(ROWS))[rank::world_size]
    for section, name in (("model", "sharded"), ("optimizer_0", "exp_avg")):
        whole = state[section][name]
        state[section][name] = LogicalShard.wrap(whole[list(rows)], (ShardSpec("data", 0, ROWS, rows),))
    return state


def save(path: Path, step: int, group: dist.ProcessGroup | None = None) -> int:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    state = state_of(step, rank, world_size)
    return store.write(path, state, {"epoch": 0, "global_step": step}, step=step, group=group)


def blank(step: int = 0) -> dict[str, dict[str, Any]]:
    """Targets that hold nothing of any step."""
    return {
        section: {
            name: torch.full_like(value, torch.nan) if isinstance(value, Tensor) else None
            for name, value in values.items()
        }
        for section, values in whole_state(step).items()
    }


def check(checkpoint: store.Checkpoint, step: int) -> None:
    """Assert that a checkpoint holds a step, to the bit."""
    assert checkpoint.step == step
    assert checkpoint.meta()["global_step"] == step
    state = blank()
    checkpoint.read(state)
    assert_equal(state, whole_state(step))


def assert_equal(state: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    for section, values in expected.items():
        for name, value in values.items():
            found = state[section][name]
            if isinstance(value, Tensor):
                assert found.dtype == value.dtype
                assert found.shape == value.shape
                bits, expected_bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (found, value))
                assert torch.equal(bits, expected_bits), (section, name)
            else:
                assert found == value


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
