"""Checkpoints that load at another expert and data size, with Lightning's own callbacks and tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig
from tests.distributed import RankFailure, RankPool
from tests.strategy.tiny import Recorder, TinyMoE, check_losses, loader, relative_error, trainer, wholes

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]


def fit(
    world_size: int,
    expert: int,
    folder: str,
    steps: int,
    resume: str | None = None,
    model: dict[str, Any] | None = None,
    ema: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train up to ``steps`` in total; return the losses of this run, the whole weights and the best path."""
    recorder = Recorder()
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks: list[Any] = [recorder, checkpoint]
    if ema:
        callbacks.append(EMAWeightAveraging(decay=0.9))
    run = trainer(
        world_size,
        expert,
        precision="64-true",
        callbacks=callbacks,
        enable_checkpointing=True,
        max_steps=steps,
        max_epochs=100,
        **settings,
    )
    module = TinyMoE(**(model or {}))
    # Two batches an epoch, so that checkpoints lie between epochs: a plain DataLoader starts an epoch over on resume.
    run.fit(module, loader(16, 8, world_size, run.global_rank, torch.float64), ckpt_path=resume)
    losses = recorder.losses
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, losses)
        losses = [sum(values) / world_size for values in zip(*gathered, strict=True)]
    weights = wholes(module, module.state_dict())
    return {"losses": losses, "weights": weights, "step": run.global_step}


def evaluate(world_size: int, expert: int, checkpoint: str) -> float:
    run = trainer(world_size, expert, precision="64-true")
    data = loader(32, 8, world_size, run.global_rank, torch.float64)
    (metrics,) = run.validate(TinyMoE(), data, ckpt_path=checkpoint, verbose=False)
    return metrics["val_loss"]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps at expert=2, checkpointed after two, four and six."""
    folder = tmp_path_factory.mktemp("saved")
    result = ranks.run(2, fit, 2, 2, str(folder), 6, init_process_group=False)[0]
    return {"folder": folder, **result}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), TOPOLOGIES)
def test_resume_at_another_topology(
    ranks: RankPool, saved: dict[str, Any], tmp_path: Path, world_size: int, expert: int
) -> None:
    """The run that resumes after step 2 gives the losses and weights of the run that was never interrupted."""
    resumed = ranks.run(
        world_size,
        fit,
        world_size,
        expert,
        str(tmp_path),
        6,
        str(saved["folder"] / "step=2.ckpt"),
        init_process_group=False,
    )[0]
    assert resumed["step"] == 6
    check_losses(resumed["losses"], saved["losses"][2:], 1e-12)
    for name, value in resumed["weights"].items():
        assert relative_error(value, saved["weights"][name]) <= 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize("placement", [(5, 0, 3, 6, 1, 7, 2, 4), (7, 6, 5, 4, 3, 2, 1, 0)])
def test_resume_with_experts_in_other_places(
    ranks: RankPool, saved: dict[str, Any], tmp_path: Path, placement: tuple[int, ...]
) -> None:
    """Files hold logical experts; any placement reads its own."""
    model = {"expert_placement": placement}
    checkpoint = str(saved["folder"] / "step=2.ckpt")
    resumed = ranks.run(2, fit, 2, 2, str(tmp_path), 4, checkpoint, model, init_process_group=False)[0]
    check_losses(resumed["losses"], saved["losses"][2:4], 1e-12)
    again = ranks.run(2, fit, 2, 2, str(tmp_path), 6, str(tmp_path / "step=4.ckpt"), init_process_group=False)[0]
    check_losses(again["losses"], saved["losses"][4:], 1e-12)


@pytest.mark.parametrize(("world_size", "expert"), [(1, 1), (4, 2)])
def test_evaluation_from_a_checkpoint(ranks: RankPool, saved: dict[str, Any], world_size: int, expert: int) -> None:
    """Validation needs no optimizer and gives the same metric on any topology."""
    path = str(saved["folder"] / "step=6.ckpt")
    metric = ranks.run(world_size, evaluate, world_size, expert, path, init_process_group=False)[0]
    expected = ranks.run(2, evaluate, 2, 2, path, init_process_group=False)[0]
    assert abs(metric - expected) <= 1e-6 * abs(expected)


@pytest.mark.slow
def test_lightnings_consolidation_tool(ranks: RankPool, saved: dict[str, Any], tmp_path: Path) -> None:
    """The official tool turns the directory into one file that a single device and any topology can resume from."""
    target = tmp_path / "whole.ckpt"
    command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint"]
    subprocess.run(
        [*command, str(saved["folder"] / "step=6.ckpt"), "--output_file", str(target)],
        check=True,
        capture_output=True,
    )
    state = torch.load(target, weights_only=True)["state_dict"]
    for name, value in saved["weights"].items():
        assert torch.equal(state[name], value), name
    metric = ranks.run(1, evaluate, 1, 0, str(target), init_process_group=False)[0]
    expected = ranks.run(2, evaluate, 2, 2, str(saved["folder"] / "step=6.ckpt"), init_process_group=False)[0]
    assert abs(metric - expected) <= 1e-6 * abs(expected)

    subprocess.run(
        [*command, str(saved["folder"] / "step=2.ckpt"), "--output_file", str(tmp_path / "two.ckpt")],
        check=True,
        capture_output=True,
    )
    resumed = ranks.run(2, fit, 2, 2, str(tmp_path), 4, str(tmp_path / "two.ckpt"), init_process_group=False)[0]
    check_losses(resumed["losses"], saved["losses"][2:4], 1e-12)


@pytest.mark.slow
def test_resume_from_a_single_device_file(ranks: RankPool, saved: dict[str, Any], tmp_path: Path) -> None:
    """A plain Lightning checkpoint of a single-device run resumes under expert parallelism, optimizer included."""
    ranks.run(1, fit, 1, 0, str(tmp_path), 2, init_process_group=False)
    path = tmp_path / "step=2.ckpt"
    assert path.is_file()
    resumed = ranks.run(4, fit, 4, 4, str(tmp_path / "b"), 4, str(path), init_process_group=False)[0]
    check_losses(resumed["losses"], saved["losses"][2:4], 1e-12)


@pytest.mark.slow
def test_weight_averaging_survives_resharding(ranks: RankPool, tmp_path: Path) -> None:
    """EMA keeps two copies of every expert; Lightning alone would keep rank 0's."""
    whole_run = ranks.run(2, fit, 2, 2, str(tmp_path / "a"), 4, None, None, True, init_process_group=False)[0]
    path = str(tmp_path / "a" / "step=2.ckpt")
    resumed = ranks.run(4, fit, 4, 4, str(tmp_path / "b"), 4, path, None, True, init_process_group=False)[0]
    check_losses(resumed["losses"], whole_run["losses"][2:], 1e-12)
    for name, value in resumed["weights"].items():
        assert relative_error(value, whole_run["weights"][name]) <= 1e-12, name


@pytest.mark.slow
def test_another_model_is_refused_before_anything_is_read(
    ranks: RankPool, saved: dict[str, Any], tmp_path: Path
) -> None:
    """The message names the parameters."""
    path = str(saved["folder"] / "step=2.ckpt")
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, fit, 2, 2, str(tmp_path), 4, path, {"num_experts": 4}, init_process_group=False)
    error = failure.value.__cause__
    assert isinstance(error, ConfigError)
    assert error.field == "ckpt_path"
    assert "layers.0.experts.down_proj: (8, " in error.hint
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, fit, 2, 2, str(tmp_path), 4, path, {"shared_expert_hidden_size": 0}, init_process_group=False)
    assert "shared_expert" in str(failure.value.__cause__)


class Adafactor(TinyMoE):
    """Factored second moments: state tensors that are sharded like the experts but have other shapes."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(self.parameters(), lr=1e-2)


class Muddled(TinyMoE):
    """An optimizer whose state for the experts of a rank cannot be told apart."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        for parameter in self.parameters():
            optimizer.state[parameter]["sum"] = torch.zeros(3, 1, 1)
        return optimizer


class ExtraState(TinyMoE):
    """A state dict that holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.global_step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.restored = state


class OneLayerTwice(TinyMoE):
    """The same MoE layer at two depths: its parameters have two names."""

    def configure_model(self) -> None:
        if self.layers is None:
            super().configure_model()
            assert self.layers is not None
            self.layers[1] = self.layers[0]


class OtherNames(TinyMoE):
    """Overrides what its state dict calls the parameters."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {f"net.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({name.removeprefix("net."): v for name, v in state.items()}, *args, **kwargs)


class NoOptimizer(TinyMoE):
    def configure_optimizers(self) -> None:  # type: ignore[override]
        return None


def resume_in_process(module: type[TinyMoE], world_size: int, expert: int, folder: str) -> tuple[Any, Any, Any]:
    """Six steps at once, or the last four after a resume; returns both losses and the module that resumed."""
    runs = []
    for resume in (None, f"{folder}/step=2.ckpt"):
        recorder = Recorder()
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        run = trainer(
            world_size,
            expert,
            precision="64-true",
            callbacks=[recorder, saver],
            enable_checkpointing=True,
            max_steps=6,
            max_epochs=3,
            strategy=MoEStrategy(ParallelConfig(expert=expert), optimizer_sharding=module is not Adafactor),
        )
        instance = module()
        run.fit(instance, loader(16, 8, world_size, run.global_rank, torch.float64), ckpt_path=resume)
        runs.append(recorder.losses)
    return runs[0], runs[1], getattr(instance, "restored", None)


@pytest.mark.slow
@pytest.mark.parametrize("module", [Adafactor, ExtraState, OneLayerTwice, OtherNames, NoOptimizer])
def test_unusual_modules_and_optimizers_resume(ranks: RankPool, tmp_path: Path, module: type[TinyMoE]) -> None:
    """Every rank gets its own experts and their state back, none those of rank 0."""
    for whole_run, resumed, restored in ranks.run(
        2, resume_in_process, module, 2, 2, str(tmp_path), init_process_group=False
    ):
        if module is NoOptimizer:
            assert len(resumed) > 0
        else:
            check_losses(resumed, whole_run[2:], 1e-12)
        assert restored == ({"steps": 2} if module is ExtraState else None)


@pytest.mark.slow
def test_one_layer_twice_equals_a_single_process(ranks: RankPool, tmp_path: Path) -> None:
    """Taken for dense under its second name, it would get rank 0's experts on all ranks."""
    results = ranks.run(2, resume_in_process, OneLayerTwice, 2, 2, str(tmp_path / "2"), init_process_group=False)
    single = ranks.run(1, resume_in_process, OneLayerTwice, 1, 1, str(tmp_path / "1"), init_process_group=False)
    check_losses([sum(pair) / 2 for pair in zip(*[result[0] for result in results], strict=True)], single[0][0], 1e-12)


def test_optimizer_state_that_no_file_can_hold_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"optimizer state 'sum' of layers.0.experts"):
        ranks.run(2, resume_in_process, Muddled, 2, 2, str(tmp_path), init_process_group=False)


class Adapter(TinyMoE):
    """Saves its head only, as adapters on a frozen model do."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("head")}


def adapt(folder: str, strict: bool) -> bool:
    run = trainer(2, 2, max_steps=2)
    module = Adapter()
    data = loader(16, 8, 2, run.global_rank)
    run.fit(module, data)
    run.save_checkpoint(f"{folder}/adapter.ckpt")
    restored = Adapter()
    restored.strict_loading = strict
    trainer(2, 2).validate(restored, data, ckpt_path=f"{folder}/adapter.ckpt", verbose=False)
    same_head = torch.equal(module.head.weight, restored.head.weight)
    return same_head and not torch.equal(module.embed.weight, restored.embed.weight)


@pytest.mark.slow
def test_partial_checkpoints_load_without_strict_loading(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, adapt, str(tmp_path), False, init_process_group=False) == [True, True]
    with pytest.raises(RankFailure, match=r"missing in the file: \['embed.bias'"):
        ranks.run(2, adapt, str(tmp_path), True, init_process_group=False)


def save_at(path: str) -> None:
    run = trainer(1, 1, max_steps=1)
    run.fit(TinyMoE(), loader(8, 8, 1, 0))
    run.save_checkpoint(path)


@pytest.mark.slow
def test_remote_paths_are_refused(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Path`` would make a local directory called ``s3:`` of it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RankFailure, match="a local path"):
        ranks.run(1, save_at, "s3://bucket/run.ckpt", init_process_group=False)
    assert list(tmp_path.iterdir()) == []
    ranks.run(1, save_at, f"file://{tmp_path}/run.ckpt", init_process_group=False)
    assert (tmp_path / "run.ckpt" / "meta.pt").is_file()


def save_weight_average(folder: str) -> None:
    callbacks = [EMAWeightAveraging(decay=0.9), ModelCheckpoint(folder, filename="average")]
    run = trainer(1, 0, precision="64-true", callbacks=callbacks, enable_checkpointing=True, max_steps=2)
    run.fit(TinyMoE(), loader(16, 8, 1, 0, torch.float64))


def resume_weight_average(world_size: int, expert: int, folder: str) -> list[float]:
    recorder = Recorder()
    callbacks = [EMAWeightAveraging(decay=0.9), recorder]
    run = trainer(world_size, expert, precision="64-true", callbacks=callbacks, max_epochs=3)
    data = loader(16, 8, world_size, run.global_rank, torch.float64)
    run.fit(TinyMoE(), data, ckpt_path=f"{folder}/average.ckpt")
    return recorder.losses


@pytest.mark.slow
def test_weight_average_of_a_single_device_resumes(ranks: RankPool, tmp_path: Path) -> None:
    """Its file holds the weights twice, and both have to be cut."""
    ranks.run(1, save_weight_average, str(tmp_path), init_process_group=False)
    two = ranks.run(2, resume_weight_average, 2, 2, str(tmp_path), init_process_group=False)
    one = ranks.run(1, resume_weight_average, 1, 1, str(tmp_path), init_process_group=False)[0]
    check_losses([sum(pair) / 2 for pair in zip(*two, strict=True)], one, 1e-12)


def keep_best(world_size: int, expert: int, folder: str) -> list[str]:
    """Fit with the usual callbacks, then test the best checkpoint."""
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True)
    run = trainer(world_size, expert, callbacks=[checkpoint], enable_checkpointing=True, max_epochs=3)
    data = loader(16, 8, world_size, run.global_rank)
    run.fit(TinyMoE(), data, data)
    run.test(ckpt_path="best", dataloaders=data, verbose=False)
    assert float(run.callback_metrics["test_loss"]) == pytest.approx(float(checkpoint.best_model_score), rel=1e-6)
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.slow
def test_model_checkpoint_keeps_the_best_and_removes_the_rest(ranks: RankPool, tmp_path: Path) -> None:
    """One best and one last directory stay, the same on all ranks."""
    names = ranks.run(2, keep_best, 2, 2, str(tmp_path), init_process_group=False)
    assert names[0] == names[1]
    assert len(names[0]) == 2
    assert "last.ckpt" in names[0]
