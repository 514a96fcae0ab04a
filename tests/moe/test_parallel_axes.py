"""The layer on every mesh of two and four ranks whose axes have sizes 1 and 2, against one process with all tokens."""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool
from tests.moe.axes import CONFIGS, Case, Outcome, build, compare, random_case, run_rank, run_whole
from tests.moe.cases import relative_error


def meshes(world_size: int) -> list[ParallelConfig]:
    """Every way to use this many ranks with axes of sizes 1 and 2."""
    found = []
    for data, context, tensor, expert, expert_tensor in product((1, 2), repeat=5):
        if data * context * tensor == world_size and world_size % (expert * expert_tensor) == 0:
            sizes = {"context": context, "tensor": tensor, "expert": expert, "expert_tensor": expert_tensor}
            found.append(ParallelConfig(data=data, **sizes))
    return found


def run_cases(parallel: ParallelConfig, cases: list[Case]) -> list[tuple[tuple[int, ...], Outcome]]:
    mesh = ParallelMesh.build(parallel)
    outcomes = [run_rank(case, mesh, late_sharding=bool(number % 2)) for number, case in enumerate(cases)]
    return [(mesh.ranks("tensor"), outcome) for outcome in outcomes]


@pytest.mark.parametrize("parallel", [*meshes(2), *meshes(4)], ids=repr)
def test_equals_a_single_process(ranks: RankPool, parallel: ParallelConfig) -> None:
    assert parallel.data is not None
    modes = [False, True] if parallel.tensor > 1 else [False]
    cases = [random_case(config, parallel, slices) for slices in modes for config in CONFIGS.values()]
    world_size = parallel.data * parallel.context * parallel.tensor
    by_rank = ranks.run(world_size, run_cases, parallel, cases)
    for number, case in enumerate(cases):
        expected = run_whole(case, parallel.data)
        outcomes = [results[number][1] for results in by_rank]
        for actual, (tensor_ranks, _) in zip(outcomes, (results[number] for results in by_rank), strict=True):
            # Bitwise: a learning rate schedule or a stopping rule may look at the loss.
            assert torch.equal(actual.losses, outcomes[tensor_ranks[0]].losses)
            wrong = {name: error for name, error in compare(actual, expected).items() if not error <= 1e-12}
            assert not wrong, (case.config.load_balancing, case.token_slices, wrong)
        mean = torch.stack([actual.losses for actual in outcomes]).mean(0)
        assert relative_error(mean, expected.losses) <= 1e-12
        assert expected.losses.min() > 0


def evaluate(parallel: ParallelConfig, case: Case) -> tuple[Tensor, int]:
    """Output in evaluation, and the number of reductions."""
    layer = build(case, ParallelMesh.build(parallel), "cpu").eval()
    with torch.no_grad(), mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        output, _ = layer(case.hidden[:1, :3])
        layer(case.hidden[:1, :0])
    return output, all_reduce.call_count


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_of_copies_reduces_nothing(ranks: RankPool, name: str) -> None:
    """Fewer tokens than ranks that share them, and none, as generation may bring."""
    parallel = ParallelConfig(data=1, tensor=4, expert=2, expert_tensor=2)
    case = random_case(CONFIGS[name], parallel, False)
    expected, _ = build(case, None, "cpu").eval()(case.hidden[:1, :3])
    for output, reductions in ranks.run(4, evaluate, parallel, case):
        assert relative_error(output, expected.detach()) <= 1e-12
        assert reductions == 0
