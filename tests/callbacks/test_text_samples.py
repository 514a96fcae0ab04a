"""When samples are taken, of what, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lightning_moe import ConfigError, GPTMoE, GPTMoEConfig, TextDataModule
from lightning_moe.callbacks import TextSamples
from tests.data.text.folder import write_texts


class Echo(BoringModel):
    """Continues every prompt with an escape code and its last token, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, list[list[int]], dict[str, Any]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer.weight.sum()

    def generate(self, tokens: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        assert tokens.dtype == torch.int64
        self.asked.append((self.global_step, tokens.tolist(), sampling))
        escape = torch.full_like(tokens[:, :1], 27)
        return torch.cat((tokens, escape, tokens[:, -1:].repeat(1, max_new_tokens - 1)), dim=1)


class Texts:
    """An experiment that takes texts, as TensorBoard's does."""

    def __init__(self) -> None:
        self.added: list[tuple[str, str, int]] = []

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.added.append((tag, text, step))


class TextLogger(DummyLogger):
    """A logger of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = Texts()

    @property
    def experiment(self) -> Any:
        return self.texts


def fit(folder: Path, model: pl.LightningModule, samples: TextSamples, data: Any = None, **settings: Any) -> TextLogger:
    logger = TextLogger()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        default_root_dir=folder,
        logger=[logger, DummyLogger()],
        callbacks=samples,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data or TextDataModule(str(folder), sequence_length=64, batches_per_epoch=14, holdout_modulus=5))
    return logger


def test_samples_every_so_many_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path)
    model = Echo()
    samples = TextSamples(3, "ab", 4, temperature=0.5, top_k=7, top_p=0.9, seed=5)
    logger = fit(tmp_path, model, samples, accumulate_grad_batches=2)
    sampling: dict[str, Any] = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 5}
    assert model.asked == [(step, [[97, 98]], sampling) for step in (3, 6)], "seven steps of two batches"
    assert logger.texts.added == [("sample", "ab\x1bbbb", step) for step in (3, 6)]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[step")] == ["[step 3] ab\ufffdbbb", "[step 6] ab\ufffdbbb"]


def test_training_goes_on_as_if_nothing_had_been_sampled(tmp_path: Path) -> None:
    write_texts(tmp_path)
    config = GPTMoEConfig(hidden_size=16, num_heads=2, max_sequence_length=64)

    def trained(every: int) -> dict[str, Tensor]:
        pl.seed_everything(3)
        model = GPTMoE(config)
        fit(tmp_path, model, TextSamples(every, max_new_tokens=5))
        assert model.training
        return dict(model.state_dict())

    often, never = trained(2), trained(1000)
    assert all(torch.equal(often[name], never[name]) for name in never)


def test_what_cannot_be_sampled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every_n_steps: 0"):
        TextSamples(every_n_steps=0)
    with pytest.raises(ConfigError, match="max_new_tokens: 0"):
        TextSamples(max_new_tokens=0)
    with pytest.raises(ConfigError, match="prompt"):
        TextSamples(prompt="")
    for field, value in (("temperature", -1.0), ("top_k", 0), ("top_p", 0.0)):
        with pytest.raises(ConfigError, match=f"{field}: {value}"):
            TextSamples(**{field: value})  # type: ignore[arg-type]
    write_texts(tmp_path)
    with pytest.raises(ConfigError, match=r"model: 'BoringModel' .* generate"):
        fit(tmp_path, BoringModel(), TextSamples())
    plain = torch.utils.data.DataLoader(torch.zeros(4, 32))  # type: ignore[arg-type, var-annotated]
    with pytest.raises(ConfigError, match=r"data: 'NoneType' .* tokenizer"):
        fit(tmp_path, Echo(), TextSamples(), plain)


def test_samples_longer_than_the_model_are_refused_before_training(tmp_path: Path) -> None:
    write_texts(tmp_path)
    model = GPTMoE(GPTMoEConfig(hidden_size=16, num_heads=2, max_sequence_length=64))
    with pytest.raises(ConfigError, match=r"max_new_tokens: 61 .* 4 tokens of the prompt .* = 64"):
        fit(tmp_path, model, TextSamples(1000, max_new_tokens=61))
    assert model.global_step == 0
    fit(tmp_path, model, TextSamples(1000, max_new_tokens=60))
