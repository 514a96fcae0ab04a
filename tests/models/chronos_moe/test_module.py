"""The LightningModule: training in a plain Trainer, checkpoints, scores, global normalisation of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.config import MoEConfig, OptimizerConfig, ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.models.ranks import mean_over_data_ranks
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool
from tests.models.chronos_moe.configs import batch_of, small_config

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)


class _Data(pl.LightningDataModule):
    """The same few batches every epoch, of the data sets "a" and "b"."""

    dataset_names = ("a", "b")

    def __init__(self, batches: int = 8) -> None:
        super().__init__()
        self.batches = [batch_of(16, seed=seed) for seed in range(batches)]

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def _trainer(path: Path, **arguments: object) -> pl.Trainer:
    defaults: dict[str, object] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": path,
    }
    return pl.Trainer(**{**defaults, **arguments})  # type: ignore[arg-type]


def _module(**changes: object) -> ChronosMoE:
    torch.manual_seed(0)
    return ChronosMoE(small_config(**changes), OPTIMIZER)


def _loss(module: ChronosMoE, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss, and the number of its terms."""
    network = module.network()
    return network.loss_sum(module(context), target), network.num_terms(target)


class _Record(pl.Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object, **__: object) -> None:
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_fit_learns(tmp_path: Path, precision: str) -> None:
    record = _Record()
    trainer = _trainer(tmp_path, max_epochs=6, precision=precision, callbacks=[record], gradient_clip_val=1.0)
    module = _module()
    trainer.fit(module, datamodule=_Data())
    losses = [metrics["train_loss"] for metrics in record.metrics]
    assert len(losses) == 48
    assert sum(losses[-8:]) < 0.4 * sum(losses[:8])
    assert record.metrics[-1]["expert_load_imbalance"] >= 1.0
    assert record.metrics[-1]["auxiliary_loss"] > 0.0
    # Warm-up from 1/6 of the peak, then cosine to the floor; the rate shown is that of the next step.
    assert record.rates[0] == pytest.approx(1e-2 * 2 / 6)
    assert max(record.rates) == pytest.approx(1e-2)
    assert record.rates[-2] == pytest.approx(1e-2 * 0.02)
    assert trainer.callback_metrics["val_mase"].isfinite()


def test_dense_module_trains_and_logs_no_routing(tmp_path: Path) -> None:
    record = _Record()
    trainer = _trainer(tmp_path, max_epochs=6, callbacks=[record])
    trainer.fit(_module(moe=None), datamodule=_Data())
    assert set(record.metrics[0]) == {"train_loss"}
    assert record.metrics[-1]["train_loss"] < 0.5 * record.metrics[0]["train_loss"]


def test_scores_are_those_of_the_forecasts(tmp_path: Path) -> None:
    module, data, trainer = _module(), _Data(), _trainer(tmp_path)
    (logged,) = trainer.test(module, datamodule=data, verbose=False)
    batches = data.batches
    forecasts = torch.cat([module.predict(batch["context"].double()) for batch in batches]) * 10.0
    target = torch.cat([batch["target"] for batch in batches]).double() * 10.0
    dataset = torch.cat([batch["dataset_index"] for batch in batches])
    error = (forecasts[:, 4] - target).abs().nanmean(1) / 2.0
    for index, name in enumerate("ab"):
        assert logged[f"test_mase/{name}"] == pytest.approx(error[dataset == index].mean().item(), rel=1e-5)
    geometric = (logged["test_mase/a"] * logged["test_mase/b"]) ** 0.5
    assert logged["test_mase"] == pytest.approx(geometric, rel=1e-5)
    assert 0.0 <= logged["test_coverage"] <= 1.0
    predicted = trainer.predict(module, datamodule=data)
    assert predicted is not None
    torch.testing.assert_close(torch.cat(predicted), forecasts.transpose(1, 2), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    # Every token with data goes to two experts: 6 patches, [REG] and 2 future tokens per series and layer.
    assert module.expert_load is not None
    load = module.expert_load.compute()
    assert load.shape == (2, 4)
    assert load.sum(1).tolist() == [8 * 16 * 9 * 2] * 2


def test_data_without_names_are_scored_together(tmp_path: Path) -> None:
    loader = DataLoader(_Data().batches, batch_size=None)  # type: ignore[arg-type]
    (logged,) = _trainer(tmp_path).test(_module(), dataloaders=loader, verbose=False)
    assert logged["test_wql"] == pytest.approx(logged["test_wql/all"])


def test_validation_loss_is_the_loss_over_all_points(tmp_path: Path) -> None:
    module, data = _module(moe=None), _Data(3)
    data.batches[0]["target"][:, 2:] = torch.nan
    (logged,) = _trainer(tmp_path).test(module, datamodule=data, verbose=False)
    whole = {key: torch.cat([batch[key] for batch in data.batches]) for key in data.batches[0]}
    expected = _loss(module, whole["context"], whole["target"])
    assert logged["test_loss"] == pytest.approx((expected[0] / expected[1]).item(), rel=1e-5)


def test_checkpoint_round_trip_without_running_code(tmp_path: Path) -> None:
    module, trainer = _module(quantiles=(0.2, 0.5)), _trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=_Data(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ChronosMoE.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.config == module.config
    assert loaded.optimizer_config == OPTIMIZER
    context = batch_of(3)["context"]
    assert torch.equal(loaded.predict(context), module.predict(context))


def test_hyperparameters_are_plain_and_rebuild_the_module() -> None:
    module = _module(moe=MoEConfig(num_experts=4, expert_placement=(1, 0, 3, 2)))
    assert type(module.hparams["config"]) is dict
    assert type(module.hparams["config"]["moe"]) is dict
    rebuilt = ChronosMoE(**module.hparams)
    assert rebuilt.config == module.config
    assert rebuilt.optimizer_config == module.optimizer_config


def test_configure_model_builds_once() -> None:
    module = ChronosMoE(small_config())
    assert not list(module.parameters())
    module.configure_model()
    first = module.network()
    module.configure_model()
    assert module.network() is first


def test_a_loaded_model_is_not_rebuilt_by_fit(tmp_path: Path) -> None:
    _module().save_pretrained(tmp_path)
    module = ChronosMoE.from_pretrained(tmp_path)
    network = module.network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=_Data(1))
    assert module.network() is network
    assert any(not torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_targets_shorter_than_the_horizon_are_fine_and_longer_ones_refused() -> None:
    module, batch = _module(), batch_of(4)
    short, valid = _loss(module, batch["context"], batch["target"][:, :5])
    padded = batch["target"].clone()
    padded[:, 5:] = torch.nan
    full, same_valid = _loss(module, batch["context"], padded)
    assert short.item() == pytest.approx(full.item(), rel=1e-6)
    assert valid == same_valid
    with pytest.raises(ConfigError, match="prediction_length"):
        _loss(module, batch["context"], torch.zeros(4, 9))


def test_a_batch_without_targets_gives_zero_loss_and_finite_gradients() -> None:
    module, batch = _module(moe=None), batch_of(4)
    batch["target"].fill_(torch.nan)
    loss_sum, valid = _loss(module, batch["context"], batch["target"])
    loss = loss_sum / mean_over_data_ranks(module, valid).clamp(min=1e-9)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and p.grad.eq(0).all() for p in module.network().parameters())


class _MeshStrategy:
    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh = mesh


class _MeshTrainer:
    """As much of a trainer as the loss looks at."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self.strategy = _MeshStrategy(mesh)
        self.world_size = mesh.world_size


def _uneven_batch() -> dict[str, Tensor]:
    batch = batch_of(8, dtype=torch.float64)
    batch["target"][:3, 2:] = torch.nan  # the first rank's half has far fewer points
    return batch


def _mean_loss_over_ranks() -> float:
    mesh = ParallelMesh.build(ParallelConfig())
    module = _module(moe=None)
    module.network().double()
    module._trainer = _MeshTrainer(mesh)  # type: ignore[assignment]
    rows = slice(4 * mesh.rank("data"), 4 * mesh.rank("data") + 4)
    batch = {key: value[rows] for key, value in _uneven_batch().items()}
    loss_sum, valid = _loss(module, batch["context"], batch["target"])
    loss = loss_sum.detach() / mean_over_data_ranks(module, valid)
    dist.all_reduce(loss)
    return loss.item() / mesh.world_size


def test_mean_loss_over_ranks_is_the_loss_of_the_global_batch(ranks: RankPool) -> None:
    module, batch = _module(moe=None), _uneven_batch()
    module.network().double()
    loss_sum, valid = _loss(module, batch["context"], batch["target"])
    expected = (loss_sum / valid).item()
    assert ranks.run(2, _mean_loss_over_ranks) == pytest.approx([expected, expected], rel=1e-14)
