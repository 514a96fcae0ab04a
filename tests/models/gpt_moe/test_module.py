"""The LightningModule: training in a plain Trainer, checkpoints, scores on any topology, refusals."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_moe import GPTMoE, GPTMoEConfig, OptimizerConfig, ParallelConfig, ParallelMesh
from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe import GPTMoEModel
from tests.distributed import RankFailure, RankPool
from tests.models.gpt_moe.training import CONFIGS, SEQUENCE, VOCABULARY, PackedText, SeededGPTMoE, loader, topology_name
from tests.strategy.tiny import trainer as parallel_trainer


class Cycle(pl.LightningDataModule):
    """Sequences that count upwards from anywhere, modulo the vocabulary."""

    vocab_size = VOCABULARY

    def _loader(self) -> DataLoader[Any]:
        counted = (torch.arange(32)[:, None] * 5 + torch.arange(SEQUENCE + 1)) % VOCABULARY
        rows = [{"tokens": row[:-1], "labels": row[1:], "label_bytes": torch.full((SEQUENCE,), 2)} for row in counted]
        return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = _loader


def quiet(path: Path, **arguments: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": path,
    }
    return pl.Trainer(**{**defaults, **arguments})


def module_of(name: str = "untied", **arguments: Any) -> SeededGPTMoE:
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    return SeededGPTMoE(replace(CONFIGS[name], init_std=0.05), optimizer, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_fit_learns(tmp_path: Path, precision: str) -> None:
    trainer = quiet(tmp_path, max_epochs=30, precision=precision, gradient_clip_val=1.0, check_val_every_n_epoch=30)
    module = module_of(activation_checkpointing="selective")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=Cycle())
    metrics = trainer.callback_metrics
    assert metrics["train_loss"] < 0.15 * math.log(VOCABULARY)
    assert metrics["val_loss"] < 0.15 * math.log(VOCABULARY)
    assert metrics["expert_load_imbalance"] >= 1.0
    assert metrics["auxiliary_loss"] > 0.0
    # It has learnt to count, and generates in the precision of the trainer.
    counted = module.generate(torch.tensor([[3, 4, 5, 6]]), 10, temperature=0.0)
    assert counted[0].tolist() == list(range(3, 17))


@pytest.mark.parametrize("dense", [{"moe": None}, {"dense_layers": (0, 1)}], ids=["no moe", "all layers dense"])
def test_a_dense_model_logs_no_routing(tmp_path: Path, dense: dict[str, Any]) -> None:
    trainer = quiet(tmp_path, max_steps=2)
    module = GPTMoE(GPTMoEConfig(vocab_size=VOCABULARY, **dense))
    trainer.fit(module, datamodule=Cycle())
    trainer.test(module, datamodule=Cycle(), verbose=False)
    assert {"auxiliary_loss", "expert_load_imbalance"}.isdisjoint(trainer.callback_metrics)
    assert module.expert_load is None


def independent_scores() -> dict[str, float]:
    """Loss and bits per byte of all rows, from whole logits; inside a worker, whose default dtype is put back."""
    torch.set_default_dtype(torch.float64)  # as the Trainer does: the router's initial weights depend on it
    values = PackedText(20, documents=True).values
    module = SeededGPTMoE(CONFIGS["untied"])
    module.configure_model()
    network = module.network().eval()
    with torch.no_grad():
        logits = network.logits(values["tokens"], values["positions"], values["documents"])
    nats = float(F.cross_entropy(logits.flatten(0, 1), values["labels"].flatten(), reduction="sum"))
    labels = int((values["labels"] != -100).sum())
    return {
        "test_loss": nats / labels,
        "test_bits_per_byte": nats / math.log(2) / int(values["label_bytes"].sum()),
        "choices": 20 * SEQUENCE * 2,
    }


def scores_on(world_size: int, parallel: ParallelConfig | None) -> tuple[dict[str, float], Tensor]:
    run = parallel_trainer(world_size, 0, parallel, precision="64-true")
    module = SeededGPTMoE(CONFIGS["untied"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (logged,) = run.test(module, loader(run.distributed_sampler_kwargs, documents=True), verbose=False)
    assert module.expert_load is not None
    return dict(logged), module.expert_load.compute()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, None),
        (2, ParallelConfig(tensor=2)),
        (2, ParallelConfig(tensor=2, sequence_parallel=False, expert=2)),
        (2, ParallelConfig(context=2, expert_tensor=2)),
        (2, ParallelConfig(expert=2)),
    ],
    ids=topology_name,
)
def test_scores(ranks: RankPool, world_size: int, parallel: ParallelConfig | None) -> None:
    """Every label counts once, whoever holds it, and so does every choice of an expert."""
    (expected,) = ranks.run(1, independent_scores)
    for logged, load in ranks.run(world_size, scores_on, world_size, parallel, init_process_group=False):
        assert logged["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-6)  # logged in float32
        assert logged["test_bits_per_byte"] == pytest.approx(expected["test_bits_per_byte"], rel=1e-6)
        assert load.shape == (1, 4)
        assert int(load.sum()) == expected["choices"]


def test_checkpoints_hold_plain_values(tmp_path: Path) -> None:
    trainer = quiet(tmp_path, max_steps=2)
    module = module_of("tied", activation_checkpointing="full", loss_chunk_tokens=None)
    trainer.fit(module, datamodule=Cycle())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = SeededGPTMoE.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.config == module.config
    assert loaded.optimizer_config == module.optimizer_config
    assert (loaded.activation_checkpointing, loaded.loss_chunk_tokens) == ("full", None)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_only_matrices_decay(tmp_path: Path) -> None:
    module = module_of()
    quiet(tmp_path, max_steps=1).fit(module, datamodule=Cycle())
    (optimizer,) = [module.optimizers(use_pl_optimizer=False)]
    decay, others = optimizer.param_groups
    assert (decay["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert {names[parameter] for parameter in others["params"]} == {name for name in names.values() if "norm" in name}


class WiderData(Cycle):
    vocab_size = VOCABULARY + 1


def test_refuses_data_with_unknown_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 38") as raised:
        quiet(tmp_path, max_steps=1).fit(module_of(), datamodule=WiderData())
    assert raised.value.field == "config.vocab_size"


def run_on(parallel: ParallelConfig, length: int) -> None:
    tokens = torch.zeros(1, length, dtype=torch.int64)
    GPTMoEModel(CONFIGS["untied"], ParallelMesh.build(parallel))(tokens, tokens)


@pytest.mark.parametrize(
    ("parallel", "length", "allowed"),
    [
        (ParallelConfig(tensor=2), 7, "a multiple of 2"),
        (ParallelConfig(context=2), 7, "a multiple of 2"),
        (ParallelConfig(tensor=2, sequence_parallel=False), 17, "at most config.max_sequence_length = 16"),
    ],
    ids=topology_name,
)
def test_refuses_sequences_that_cannot_be_split(
    ranks: RankPool, parallel: ParallelConfig, length: int, allowed: str
) -> None:
    with pytest.raises(RankFailure) as raised:
        ranks.run(2, run_on, parallel, length)
    for error in raised.value.errors.values():
        assert isinstance(error, ConfigError)
        assert error.field == "data.sequence_length"
        assert allowed in error.allowed


def test_refuses_heads_that_cannot_be_split(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as raised:
        ranks.run(3, run_on, ParallelConfig(tensor=3), 6)
    assert "parallel.tensor" in str(raised.value)
