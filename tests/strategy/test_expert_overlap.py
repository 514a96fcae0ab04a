"""Training with overlapped exchanges gives what training with all-to-alls gives, on all axes and schedules."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_moe import (
    ConfigError,
    MoEConfig,
    MoELayer,
    MoEStrategy,
    OverlapConfig,
    ParallelConfig,
    ParallelMesh,
)
from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.layers import CausalSelfAttention
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.strategy.overlapped import LayerOverlap
from tests.distributed import RankPool
from tests.models.chronos_moe.configs import batch_of, small_config
from tests.models.gpt_moe.training import CONFIGS, InTurn, PackedText, SeededGPTMoE
from tests.models.staged import Staged, StageRecorder, StageRun, check_stages, sharded
from tests.strategy.tiny import Sequences, TinyMoE, relative_error, trainer

BATCH = 8
SOURCE = OverlapConfig(dispatch="p2p", chunk="source")
EXPERT = OverlapConfig(dispatch="p2p", chunk="expert", expert_groups=2)
SAVES = ("fc1", "recompute", "redispatch")
# Rates by which exchange and computation take as long as each other, everything waits for the link, and nothing does.
BALANCED = OverlapConfig(link_gigabytes_per_second=1e-3, gemm_teraflops=1e-4)
SLOW_LINK = OverlapConfig(link_gigabytes_per_second=1e-6, gemm_teraflops=1e3)
FAST_LINK = OverlapConfig(link_gigabytes_per_second=1e6, gemm_teraflops=1e-6)


@dataclass(frozen=True)
class Case:
    """A model, and how it is spread."""

    staged: Staged
    model: str = "untied"
    moe: dict[str, Any] = field(default_factory=dict)
    checkpointing: ActivationCheckpointing = "none"

    def by(self, overlap: OverlapConfig | None) -> Case:
        return replace(self, staged=replace(self.staged, overlap=overlap))


@dataclass
class Outcome:
    """What one rank saw."""

    run: StageRun
    all_to_alls: int
    run_within: int
    held: list[int]
    """Gradients in the queue after each step."""


class Watch(pl.Callback):
    """The queue of weight gradients."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.run_within = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        queue = trainer.strategy._queue
        if queue is not None:
            self.held.append(queue.num_held)
            self.run_within = queue.statistics.run_within


@contextmanager
def counted_all_to_alls() -> Iterator[list[None]]:
    calls: list[None] = []
    original = dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        yield calls
    finally:
        dist.all_to_all_single = original


class PlainDescent(pl.LightningModule):
    """Steps along the gradient: AdamW makes large differences between steps of rounding errors of tiny gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GPT(PlainDescent, SeededGPTMoE):
    pass


class Chronos(PlainDescent, ChronosMoE):
    pass


def module_of(case: Case) -> tuple[pl.LightningModule, Dataset[Any]]:
    if case.model == "chronos":
        torch.manual_seed(0)
        moe = MoEConfig(num_experts=4, expert_hidden_size=8, shared_expert_hidden_size=8, **case.moe)
        rows = batch_of(2 * BATCH, dtype=torch.float64)
        samples = [{name: values[i] for name, values in rows.items()} for i in range(2 * BATCH)]
        return Chronos(small_config(moe=moe)), samples  # type: ignore[return-value]
    config = CONFIGS[case.model]
    assert config.moe is not None
    module = GPT(replace(config, moe=replace(config.moe, **case.moe)), loss_chunk_tokens=5)
    return module, PackedText(2 * BATCH, documents=case.model == "untied")


def train(case: Case) -> Outcome:
    """Two steps on this rank."""
    recorder, watch = StageRecorder(), Watch()
    module, data = module_of(case)
    fit = case.staged.trainer(
        InTurn([case.checkpointing]), recorder, watch, max_steps=2, precision="64-true", use_distributed_sampler=False
    )
    with warnings.catch_warnings(), counted_all_to_alls() as calls:
        warnings.simplefilter("ignore")
        fit.fit(module, sharded(data, BATCH, fit))
    return Outcome(recorder.run(module), len(calls), watch.run_within, watch.held)


def train_all(cases: Sequence[Case]) -> list[Outcome]:
    """One after the other in the same processes."""
    return [train(case) for case in cases]


def on_ranks(ranks: RankPool, world_size: int, cases: dict[str, Case]) -> dict[str, list[Outcome]]:
    """What all ranks saw of each case."""
    by_rank = ranks.run(world_size, train_all, list(cases.values()), init_process_group=False, timeout=240)
    return {name: [outcomes[i] for outcomes in by_rank] for i, name in enumerate(cases)}


def check(found: Sequence[Outcome], expected: Sequence[Outcome], what: str, tolerance: float = 1e-12) -> None:
    """Losses, logged values, gradients and weights of all ranks."""
    check_stages([each.run for each in found], [each.run for each in expected], what, tolerance)


def spread(schedule: str | None = None, pipeline: int = 1, **axes: int) -> Staged:
    return Staged(schedule, pipeline, microbatches=4, axes=axes)


@pytest.mark.slow
def test_two_ranks(ranks: RankPool) -> None:
    """All chunks and kinds of saved activations; what auto chooses; ways of routing, checkpointing and spreading."""
    plain = Case(spread(expert=2))
    cases = {"plain": plain}
    for overlap in (SOURCE, EXPERT):
        for save in SAVES:
            cases[f"{overlap.chunk} {save}"] = plain.by(replace(overlap, save=save))
    cases["source recompute, waiting"] = plain.by(replace(SOURCE, save="recompute", wait_at_once=True))
    cases["expert redispatch, waiting"] = plain.by(replace(EXPERT, save="redispatch", wait_at_once=True))
    cases |= {"balanced": plain.by(BALANCED), "fast link": plain.by(FAST_LINK), "measured": plain.by(OverlapConfig())}
    cases["selective"] = replace(plain, checkpointing="selective").by(SOURCE)
    for save in ("recompute", "redispatch"):
        cases[f"full {save}"] = replace(plain, checkpointing="full").by(replace(SOURCE, save=save))
    outcomes = on_ranks(ranks, 2, cases)
    for name, found in outcomes.items():
        check(found, outcomes["plain"], name)
        if name not in ("plain", "fast link", "measured"):
            assert [each.all_to_alls for each in found] == [0, 0], name
        if name.endswith(", waiting"):
            check(found, outcomes[name.removesuffix(", waiting")], name, tolerance=0.0)
    assert outcomes["plain"][0].all_to_alls > 0
    # Where overlap gains nothing, the layer does what it does without.
    check(outcomes["fast link"], outcomes["plain"], "fast link", tolerance=0.0)
    assert outcomes["fast link"][0].all_to_alls == outcomes["plain"][0].all_to_alls
    with pytest.raises(AssertionError):
        check(outcomes["balanced"], outcomes["plain"], "equal bits would hide that it overlaps", tolerance=0.0)


@pytest.mark.slow
def test_other_models_and_axes_of_two_ranks(ranks: RankPool) -> None:
    cases: dict[str, tuple[Case, OverlapConfig]] = {
        "capacity": (Case(spread(expert=2), moe={"capacity_factor": 0.7}), SOURCE),
        "padded": (Case(spread(expert=2), moe={"capacity_factor": 1.25, "pad_to_capacity": True}), EXPERT),
        "parts of experts": (Case(spread(expert_tensor=2)), replace(EXPERT, expert_groups=4)),
        "context": (Case(spread(context=2, expert=2)), SOURCE),
        "context, one chunk": (Case(spread(context=2, expert=2), "tied"), replace(EXPERT, attention_chunks=1)),
        "tensor": (Case(spread(tensor=2, expert=2)), SOURCE),
        "one stage": (Case(spread("zb-h1", expert=2)), replace(EXPERT, save="recompute")),
        "chronos source": (Case(spread(expert=2), "chronos"), SOURCE),
        "chronos expert": (Case(spread(expert=2), "chronos"), replace(EXPERT, save="redispatch")),
    }
    runs = {name: case for name, (case, _) in cases.items()}
    runs |= {f"{name}, overlapped": case.by(overlap) for name, (case, overlap) in cases.items()}
    outcomes = on_ranks(ranks, 2, runs)
    for name in cases:
        check(outcomes[f"{name}, overlapped"], outcomes[name], name)


@pytest.mark.slow
def test_four_ranks(ranks: RankPool) -> None:
    eight = {"num_experts": 8, "top_k": 3}
    cases: dict[str, tuple[Case, OverlapConfig]] = {
        "experts": (Case(spread(expert=4), "tied", eight), SOURCE),
        "experts in two groups": (Case(spread(expert=4), "tied", eight), EXPERT),
        "all axes": (Case(spread(context=2, tensor=2, expert=2, expert_tensor=2)), SOURCE),
    }
    runs = {name: case for name, (case, _) in cases.items()}
    runs |= {f"{name}, overlapped": case.by(overlap) for name, (case, overlap) in cases.items()}
    outcomes = on_ranks(ranks, 4, runs)
    for name in cases:
        check(outcomes[f"{name}, overlapped"], outcomes[name], name)


@pytest.mark.slow
def test_waits_and_bubbles_share_a_queue(ranks: RankPool) -> None:
    """Two stages of two expert ranks; exchanges take weight gradients from the schedule, which has the rest."""
    plain = Case(spread("zb-h1", 2, expert=2), "tied")
    cases = {"plain": plain}
    for save in SAVES:
        overlap = replace(SLOW_LINK, dispatch="p2p", chunk="source", save=save)
        cases |= {save: plain.by(overlap), f"{save}, waiting": plain.by(replace(overlap, wait_at_once=True))}
    cases["no wait"] = plain.by(replace(FAST_LINK, dispatch="p2p", chunk="source"))
    outcomes = on_ranks(ranks, 4, cases)
    for name, found in outcomes.items():
        check(found, outcomes["plain"], name)
        assert [each.held for each in found] == [[0, 0]] * 4, name
        if name.endswith(", waiting"):
            check(found, outcomes[name.removesuffix(", waiting")], name, tolerance=0.0)
    # When weight gradients are computed changes no bit.
    check(outcomes["no wait"], outcomes["fc1"], "no wait", tolerance=0.0)
    assert all(each.run_within == 0 for name in ("plain", "no wait") for each in outcomes[name])
    # The schedule splits backward passes on the second stage only; in the others, gradients wait for the pass's end.
    for name in SAVES:
        assert all(each.run_within > 0 for each in outcomes[name]), name


# ---- evaluation


def predict(overlap: OverlapConfig | None, lengths: Sequence[int]) -> tuple[dict[int, Any], float]:
    """Predictions for this rank's samples, in batches of four, and the loss of a validation of all ranks."""
    strategy = MoEStrategy(ParallelConfig(expert=2), overlap=overlap)
    run = trainer(2, 2, strategy=strategy, use_distributed_sampler=False, precision="64-true")
    start = sum(lengths[: run.global_rank])
    samples = Subset(Sequences(64, torch.float64), range(start, start + lengths[run.global_rank]))
    torch.manual_seed(0)
    module = TinyMoE()
    predictions: Any = run.predict(module, DataLoader(samples, batch_size=4))
    (metrics,) = run.validate(module, DataLoader(samples, batch_size=4), verbose=False)
    found = {int(i): out for batch in predictions for i, out in zip(batch["index"], batch["output"], strict=True)}
    return found, metrics["val_loss"]


def predict_all(overlaps: Sequence[OverlapConfig | None]) -> list[tuple[dict[int, Any], float]]:
    return [predict(overlap, lengths) for overlap in overlaps for lengths in ((13, 3), (1, 16))]


@pytest.mark.slow
def test_evaluation_with_unequal_batches(ranks: RankPool) -> None:
    """A rank without batches serves its experts by the same exchange."""
    overlaps = [None, SOURCE, EXPERT, BALANCED]
    for of_rank in ranks.run(2, predict_all, overlaps, init_process_group=False):
        for i, (predictions, loss) in enumerate(of_rank):
            expected, expected_loss = of_rank[i % 2]
            assert predictions.keys() == expected.keys()
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            for index, out in predictions.items():
                assert relative_error(out, expected[index]) <= 1e-12, (overlaps[i // 2], index)


# ---- the layers' attributes


def copies() -> None:
    """Copies of a module whose layers overlap, rates of a second evaluation, and a setting that does not fit."""
    module, data = module_of(Case(spread()))
    staged = replace(spread(expert=2), overlap=OverlapConfig(dispatch="p2p"))
    averaged = EMAWeightAveraging(decay=0.5)
    fit: Any = staged.trainer(averaged, max_steps=2, precision="bf16-mixed", use_distributed_sampler=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(module, sharded(data, BATCH, fit))
        network: nn.Module = module.network()  # type: ignore[operator]
        (layer,) = (layer for layer in network.modules() if isinstance(layer, MoELayer))
        overlap = layer.overlap
        assert isinstance(overlap, ExpertOverlap)
        assert overlap.rates is not None
        fit.validate(module, sharded(data, BATCH, fit), verbose=False)
    assert layer.overlap is not None
    assert layer.overlap.rates is overlap.rates, "measured once for a mesh"
    assert [products.dtype for products in fit.strategy._layer_overlap._rates] == [torch.bfloat16]
    assert not any("overlap" in name for name in network.state_dict())
    tokens = data[0]["tokens"][None]
    with torch.no_grad():
        expected = network.logits(tokens)  # type: ignore[operator]
        assert torch.equal(copy.deepcopy(network).logits(tokens), expected)  # type: ignore[operator]
    assert pickle.loads(pickle.dumps(network)).state_dict().keys() == network.state_dict().keys()
    assert pickle.loads(pickle.dumps(LayerOverlap(SOURCE)))._config == SOURCE
    refused = replace(spread(expert=2), overlap=replace(EXPERT, expert_groups=3)).trainer(max_steps=1)
    with pytest.raises(ConfigError, match=r"overlap\.expert_groups: 3 is not allowed.*at most 2"):
        refused.fit(module, sharded(data, BATCH, refused))


def test_copies_and_refusals(ranks: RankPool) -> None:
    ranks.run(2, copies, init_process_group=False)


def test_without_an_expert_group_there_is_nothing_to_overlap() -> None:
    mesh = ParallelMesh.single()
    module = nn.ModuleList([MoELayer(8, MoEConfig(num_experts=2))])
    LayerOverlap(OverlapConfig(expert_groups=7)).set_up(module, mesh, None, nullcontext)
    assert module[0].overlap is None


def test_a_strategy_takes_away_what_another_one_has_given() -> None:
    mesh = ParallelMesh.single()
    layer, attention = MoELayer(8, MoEConfig(num_experts=2)), CausalSelfAttention(8, 2, 2, 4, mesh)
    module = nn.ModuleList([layer, attention])
    found = []
    configs = [
        OverlapConfig(wait_at_once=True, dispatch="p2p"),
        OverlapConfig(dispatch="blocking", attention_chunks=3, sm_margin=7),
        OverlapConfig(),
        None,
    ]
    for config in configs:
        layer.overlap = ExpertOverlap(SOURCE)
        LayerOverlap(config).set_up(module, mesh, None, nullcontext)
        assert layer.overlap is None
        found.append((attention.exchange_chunks, attention.wait_at_once, attention.sm_margin))
    assert found == [(2, True, 4), (3, False, 7), (1, False, 4), (1, False, 0)]
