"""Training under the strategy equals a single process on the same global batch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_moe import ShardSpec, set_shard_spec
from lightning_moe.parallel.collectives import all_to_all
from tests.distributed import RankPool
from tests.strategy.tiny import WIDTH, Run, TinyMoE, check_equal, train

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def reference(ranks: RankPool, **settings: Any) -> Run:
    """The single process: Lightning's own single-device strategy."""
    run: Run = ranks.run(1, train, 1, 0, init_process_group=False, **settings)[0]
    return run


def parallel(ranks: RankPool, world_size: int, expert: int, **settings: Any) -> Run:
    """The same training on several ranks; every rank reports the same global run."""
    runs = ranks.run(world_size, train, world_size, expert, init_process_group=False, **settings)
    return runs[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("world_size", "expert"), TOPOLOGIES)
def test_first_step_equals_single_process(ranks: RankPool, world_size: int, expert: int, dtype: torch.dtype) -> None:
    """Loss, every gradient and every weight: one step, so that nothing can cancel or hide.

    With SGD, whose step is as exact as the gradient. Adam's first step is the gradient divided by its own size, so the
    rounding of gradients that are nearly zero would count as much as the gradients that matter.
    """
    settings = {"dtype": dtype, "steps": 1, "model": {"optimizer": "sgd", "learning_rate": 0.5}}
    check_equal(parallel(ranks, world_size, expert, **settings), reference(ranks, **settings), TOLERANCE[dtype])


TEN_STEPS: dict[str, Any] = {"steps": 10, "accumulate": 3, "gradient_clip_val": 0.05}
"""AdamW on windows of three micro-batches; the last window of each epoch is short."""


def ten_steps_reference(ranks: RankPool, dtype: torch.dtype) -> Run:
    """The single process, in which every step has to be clipped and windows have to differ in length."""
    run = reference(ranks, dtype=dtype, **TEN_STEPS)
    assert min(run.gradient_norms()) > TEN_STEPS["gradient_clip_val"]
    assert len(run.losses) == 2 * (4 * 3 + 1)
    return run


@pytest.fixture(scope="module")
def ten_steps_in_float64(ranks: RankPool) -> Run:
    return ten_steps_reference(ranks, torch.float64)


@pytest.fixture(scope="module")
def ten_steps_in_float32(ranks: RankPool) -> Run:
    return ten_steps_reference(ranks, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), TOPOLOGIES)
def test_ten_adamw_steps_in_float64(ranks: RankPool, ten_steps_in_float64: Run, world_size: int, expert: int) -> None:
    """Losses, gradients and weights, with clipping and accumulation."""
    run = parallel(ranks, world_size, expert, dtype=torch.float64, **TEN_STEPS)
    check_equal(run, ten_steps_in_float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), TOPOLOGIES)
def test_ten_adamw_steps_in_float32(ranks: RankPool, ten_steps_in_float32: Run, world_size: int, expert: int) -> None:
    """Losses to 1e-6; weights to 2e-5, and the gradients of later steps, which follow from the weights, to 1e-5.

    Adam divides every gradient by its own running size, so an element whose gradient is nearly zero moves as far as all
    others, by up to the learning rate, in a direction that rounding has a part in. Sums over ranks round differently
    from sums in one process; that nothing but the order of summation is behind it shows in the same test in float64.
    """
    run = parallel(ranks, world_size, expert, **TEN_STEPS)
    check_equal(run, ten_steps_in_float32, 1e-6, grad_tolerance=1e-5, weight_tolerance=2e-5)


@pytest.mark.parametrize("balancing", ["none", "sequence", "global"])
def test_every_load_balancing_loss(ranks: RankPool, balancing: str) -> None:
    """Losses defined per sequence or over the global batch do not depend on the topology."""
    settings = {
        "dtype": torch.float64,
        "steps": 2,
        "model": {"load_balancing": balancing, "auxiliary_loss_coefficient": 0.1, "z_loss_coefficient": 0.01},
    }
    check_equal(parallel(ranks, 2, 2, **settings), reference(ranks, **settings), 1e-12)


@pytest.mark.slow
def test_expert_bias_is_updated_from_all_ranks(ranks: RankPool) -> None:
    """The aux-loss-free bias sees the counts of the global batch, once per optimizer step."""
    settings = {
        "dtype": torch.float64,
        "steps": 3,
        "accumulate": 2,
        "model": {"expert_bias": True, "router_score": "sigmoid", "load_balancing": "none"},
    }
    two, four = parallel(ranks, 2, 2, **settings), parallel(ranks, 4, 4, **settings)
    one = parallel(ranks, 1, 1, **settings)
    for name, value in one.weights.items():
        if "bias" in name and "router" in name:
            assert value.abs().sum() > 0
    check_equal(two, one, 1e-12)
    check_equal(four, one, 1e-12)


def test_permuted_experts(ranks: RankPool) -> None:
    """Where an expert lives changes nothing."""
    settings = {"dtype": torch.float64, "steps": 3}
    placed = {**settings, "model": {"expert_placement": (5, 0, 3, 6, 1, 7, 2, 4)}}
    check_equal(parallel(ranks, 2, 2, **placed), reference(ranks, **settings), 1e-12)


class OwnExpertLayer(nn.Module):
    """A user's expert layer: ``E`` matrices, token ``t`` goes to expert ``t % E``; knows only the mesh."""

    def __init__(self, mesh: Any, num_experts: int = 4) -> None:
        super().__init__()
        self.mesh = mesh
        local = num_experts // (mesh.size("expert") if mesh else 1)
        first = (mesh.rank("expert") if mesh else 0) * local
        whole = torch.randn(num_experts, WIDTH, WIDTH) * 0.2
        self.weight = nn.Parameter(whole[first : first + local].clone())
        set_shard_spec(self, "weight", ShardSpec("expert", 0, num_experts, tuple(range(first, first + local))))

    def forward(self, tokens: Tensor) -> Tensor:
        per_rank = len(tokens) // (self.mesh.size("expert") if self.mesh else 1)
        splits = [per_rank] * (len(tokens) // per_rank)
        group = self.mesh.group("expert") if self.mesh else None
        rows = all_to_all(tokens, splits, splits, group)
        blocks = rows.view(len(splits), len(self.weight), -1, WIDTH)
        out = torch.einsum("pend,edf->penf", blocks, self.weight)
        return all_to_all(out.reshape(-1, WIDTH), splits, splits, group)


class OwnExperts(pl.LightningModule):
    """A LightningModule without any of the package's layers."""

    def configure_model(self) -> None:
        if hasattr(self, "experts"):
            return
        torch.manual_seed(3)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.experts = OwnExpertLayer(getattr(self.trainer.strategy, "mesh", None))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # [B, S, D] -> expert-major rows, a whole number of rows per expert
        tokens = self.inner(batch["input"][:, :4]).transpose(0, 1).reshape(-1, WIDTH)
        return self.experts(tokens).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(("world_size", "expert"), [(2, 2), (4, 2)])
def test_any_module_with_shard_specs(ranks: RankPool, world_size: int, expert: int) -> None:
    """Nothing but a ShardSpec makes a parameter expert-parallel."""
    settings = {"dtype": torch.float64, "steps": 5, "gradient_clip_val": 0.05, "module": OwnExperts}
    check_equal(parallel(ranks, world_size, expert, **settings), reference(ranks, **settings), 1e-12)


class SometimesUnused(pl.LightningModule):
    """One parameter is used by some ranks only, another by none."""

    def configure_model(self) -> None:
        torch.manual_seed(3)
        self.used = nn.Linear(WIDTH, WIDTH)
        self.sometimes = nn.Parameter(torch.ones(WIDTH))
        self.never = nn.Parameter(torch.ones(WIDTH))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.used(batch["input"])
        losses = out.pow(2).mean(dim=(1, 2))
        special = batch["index"] == 0
        if special.any():
            losses = losses + special * (out * self.sometimes).mean(dim=(1, 2))
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def test_parameters_that_no_rank_used_keep_no_gradient(ranks: RankPool) -> None:
    """As in a single process: a zero gradient would let AdamW decay and move them."""
    settings = {"dtype": torch.float64, "steps": 6, "module": SometimesUnused}
    run = parallel(ranks, 2, 1, **settings)
    assert torch.equal(run.weights["never"], torch.ones(WIDTH, dtype=torch.float64))
    check_equal(run, reference(ranks, **settings), 1e-12)


class TwoBackwards(TinyMoE):
    """Manual optimization with two backward passes before one step."""

    def __init__(self, **moe: Any) -> None:
        super().__init__(**moe)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.manual_backward(self(batch["input"] * 0.5)[0].pow(2).mean())
        optimizer.step()
        return {"loss": loss.detach()}


def test_two_backward_passes_before_a_step(ranks: RankPool) -> None:
    """The second reduction must not scale what the first one has already reduced."""
    settings = {"dtype": torch.float64, "steps": 3, "module": TwoBackwards}
    check_equal(parallel(ranks, 4, 2, **settings), reference(ranks, **settings), 1e-12)


class OwnBackward(TinyMoE):
    """An overridden ``backward`` that runs autograd twice."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


def test_two_backward_passes_in_one_backward(ranks: RankPool) -> None:
    """The second one has to be reduced as well."""
    settings = {"dtype": torch.float64, "steps": 2, "module": OwnBackward}
    check_equal(parallel(ranks, 4, 2, **settings), reference(ranks, **settings), 1e-12)


class TwoOptimizers(TinyMoE):
    """Manual optimization in turns, as GANs do: each optimizer holds a part and the other part is frozen meanwhile."""

    def __init__(self, **moe: Any) -> None:
        super().__init__(**moe)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        assert self.layers is not None
        rest = [*self.embed.parameters(), *self.head.parameters()]
        return [torch.optim.AdamW(self.layers.parameters(), lr=1e-2), torch.optim.SGD(rest, lr=1e-2)]


@pytest.mark.slow
def test_two_optimizers_in_turns(ranks: RankPool) -> None:
    """Buckets hold parameters of both; each step sees its own gradients, reduced and clipped by its own global norm."""
    settings = {"dtype": torch.float64, "steps": 8, "module": TwoOptimizers}
    run, expected = parallel(ranks, 4, 2, **settings), reference(ranks, **settings)
    assert len(expected.grads) >= 8
    check_equal(run, expected, 1e-12)


def test_clipping_by_value(ranks: RankPool) -> None:
    settings = {"dtype": torch.float64, "steps": 3, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    check_equal(parallel(ranks, 2, 2, **settings), reference(ranks, **settings), 1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-true", 2e-2), ("bf16-mixed", 2e-2), ("16-true", 4e-3)])
def test_low_precision(ranks: RankPool, precision: str, tolerance: float) -> None:
    """Equal to the single process up to the rounding of the precision, with accumulation in float32."""
    settings = {"steps": 2, "accumulate": 2, "precision": precision, "model": {"optimizer": "sgd"}}
    if precision != "bf16-mixed":
        settings["dtype"] = torch.bfloat16 if precision == "bf16-true" else torch.float16
    two, one = parallel(ranks, 2, 2, **settings), parallel(ranks, 1, 1, **settings)
    check_equal(two, one, tolerance)
