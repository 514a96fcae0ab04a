"""Training on any topology equals training in one process: losses, all gradients, and twenty steps.

Every combination of tensor, context, data, expert and expert_tensor in {1, 2} that fits 4 processes, with sequence
parallelism on and off, and every kind of activation checkpointing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from lightning_moe import ParallelConfig
from lightning_moe.errors import ConfigError
from tests.distributed import RankPool
from tests.models.gpt_moe.training import Case, assemble, topology_name, train_all
from tests.strategy.tiny import Run, check_equal


def topologies() -> list[tuple[int, ParallelConfig]]:
    """World size and sizes of all axes of every valid combination."""
    found = []
    for tensor, context, data, expert, expert_tensor in product((1, 2), repeat=5):
        world = tensor * context * data
        for sequence_parallel in (True, False) if tensor > 1 else (True,):
            config = ParallelConfig(
                data=data,
                context=context,
                tensor=tensor,
                expert=expert,
                expert_tensor=expert_tensor,
                sequence_parallel=sequence_parallel,
            )
            try:
                config.resolve(world)
            except ConfigError:
                continue
            if world <= 4:
                found.append((world, config))
    return found


CASES = [
    Case("untied"),
    Case("tied", steps=3),
    # Steps of a size at which AdamW does not blow up the rounding of tiny gradients beyond the tolerance; that nothing
    # but rounding is behind it shows in float64.
    Case("untied", dtype=torch.float32, learning_rate=1e-3),
]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool) -> list[Run]:
    """A single process under Lightning's own strategy, which keeps all activations and all logits."""
    plain = [replace(case, activation_checkpointing=("none",), loss_chunk_tokens=None) for case in CASES]
    return [assemble([run]) for run in ranks.run(1, train_all, 1, plain, init_process_group=False)[0]]


def test_there_are_as_many_topologies_as_the_rules_allow() -> None:
    """1 on one rank; 3 axes x 3 foldings on two and 3 pairs x 4 on four; and without sequence parallelism again."""
    assert len(topologies()) == 1 + 3 * 3 + 3 * 4 + (3 + 2 * 4)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel"), topologies(), ids=topology_name)
def test_equals_one_process(ranks: RankPool, one_process: list[Run], world_size: int, parallel: ParallelConfig) -> None:
    """Losses, all gradients of all steps, and the final weights; each step checkpoints in another way."""
    cases = [replace(case, parallel=parallel) for case in CASES]
    by_rank = ranks.run(world_size, train_all, world_size, cases, init_process_group=False)
    for case, expected, *local in zip(cases, one_process, *by_rank, strict=True):
        run = assemble(local)
        assert len(run.grads) == case.steps
        check_equal(run, expected, 1e-11 if case.dtype == torch.float64 else 1e-5)


def test_nothing_hides(one_process: list[Run]) -> None:
    """Every parameter has a gradient worth comparing, and twenty steps move every one of them."""
    for run in one_process:
        for name, grad in run.grads[0].items():
            assert grad is not None, name
            assert float(grad.abs().max()) > 1e-4, name
    twenty, _, _ = one_process
    first, last = twenty.grads[0], twenty.grads[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first)  # type: ignore[arg-type]
