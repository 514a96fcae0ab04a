"""The report of a language model: its parts, and the console command end to end on two processes."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule
from rich.console import Console
from safetensors.torch import load_file

from lightning_moe import ConfigError, GPTMoE, SeriesDataModule, TextDataModule
from lightning_moe.checkpoint.consolidate import consolidate
from lightning_moe.cli.report import TextSummary, report_on
from lightning_moe.cli.report.text import TextReport, print_text_summary
from lightning_moe.config.loader import load_yaml
from tests.data.text.folder import write_texts


def summary(**changes: Any) -> TextSummary:
    values: dict[str, Any] = {
        "command": "fit",
        "expert_load": ((0.5, 0.25, 0.125, 0.125),),
        "parameters": 408_920,
        "world_size": 2,
        "seconds": 61.4,
        "checkpoint": "/nowhere/step=2000.ckpt",
        "bits_per_byte": 1.75,
        "gzip_bits_per_byte": 1.923,
        "bz2_bits_per_byte": 1.671,
        "xz_bits_per_byte": 1.662,
        "held_out_bytes": 392_657,
        "test_loss": 1.2125,
        "tokens_seen": 1_234_567,
        "sample_prompt": "def main():\n",
        "sample": "    return [bold]0[/] \x1b[31m",
    }
    return TextSummary(**values | changes)


def printed(one: TextSummary) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_text_summary(one, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def line_of(text: str, content: str) -> str:
    return next(line for line in text.splitlines() if content in line)


# --- the parts


def test_summary_survives_json() -> None:
    assert TextSummary.from_json(summary().as_json()) == summary()
    nothing = summary(expert_load=None, checkpoint=None, tokens_seen=None)
    assert TextSummary.from_json(nothing.as_json()) == nothing
    undefined = json.loads(summary(bits_per_byte=math.nan).as_json())
    assert undefined["bits_per_byte"] is None
    assert math.isnan(TextSummary.from_json(json.dumps(undefined)).bits_per_byte)


def test_tables_show_every_figure() -> None:
    text = printed(summary())
    assert "1.750" in line_of(text, "this model  ")
    for name, figures in {"gzip": ("1.923", "0.910"), "bz2": ("1.671", "1.047"), "xz": ("1.662", "1.053")}.items():
        assert all(figure in line_of(text, f" {name} ") for figure in figures)
    for figure in (
        "392,657 bytes",
        "408,920",
        "2 ranks",
        "61 s",
        "1.2125 nats",
        "1,234,567",
        "/nowhere/step=2000.ckpt",
    ):
        assert figure in text, figure
    assert "0.125" in text
    assert "1,234,567" not in printed(summary(tokens_seen=None))


def test_a_sample_is_shown_as_it_is_but_does_not_steer_the_terminal() -> None:
    text = printed(summary())
    assert "def main():" in text
    assert "return [bold]0[/] \ufffd[31m" in text


def test_only_language_models_on_text_are_reported() -> None:
    assert report_on(GPTMoE(), TextDataModule()) is TextReport
    with pytest.raises(ConfigError, match=r"TextDataModule as data \(it is SeriesDataModule\)"):
        report_on(GPTMoE(), SeriesDataModule(datasets=["m1_yearly"]))
    with pytest.raises(ConfigError, match=r"TextDataModule as data \(it is BoringDataModule\)"):
        report_on(GPTMoE(), BoringDataModule())


# --- the command

RECIPE = """\
seed_everything: 0
report: true
trainer:
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning_moe.MoEStrategy
    init_args:
      parallel:
        expert: 2
  max_steps: 12
  val_check_interval: 6
  num_sanity_val_steps: 0
  log_every_n_steps: 6
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: runs
      name: tiny
      version: 0
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        monitor: val_bits_per_byte
        filename: "{step}"
    - class_path: lightning_moe.callbacks.TextSamples
      init_args:
        every_n_steps: 10
        prompt: token
        max_new_tokens: 8
model:
  class_path: lightning_moe.GPTMoE
  init_args:
    config:
      hidden_size: 16
      num_heads: 2
      ffn_hidden_size: 32
      max_sequence_length: 64
      moe:
        num_experts: 4
        expert_hidden_size: 16
    optimizer:
      learning_rate: 0.01
      warmup_steps: 2
data:
  class_path: lightning_moe.TextDataModule
  init_args:
    path: texts
    sequence_length: 64
    batch_size: 4
    holdout_modulus: 5
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished command."""

    folder: Path
    out: str
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("fit")
    write_texts(folder / "texts")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [str(Path(sys.executable).with_name("lightning-moe")), "fit", "--config", "recipe.yaml"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    path = folder / "runs/tiny/version_0/summary.json"
    assert process.stdout.splitlines()[-1] == f"summary: {path}"
    return Run(folder, process.stdout, json.loads(path.read_text()))


@pytest.mark.slow
def test_summary_is_complete(fitted: Run) -> None:
    values = fitted.summary
    assert set(values) == {field.name for field in dataclasses.fields(TextSummary)}
    assert (values["command"], values["world_size"]) == ("fit", 2)
    assert values["tokens_seen"] == 12 * 2 * 4 * 64
    assert values["seconds"] > 0
    load = torch.tensor(values["expert_load"])
    assert load.shape == (2, 4)
    assert load.sum(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-6)
    assert TextSummary.from_json(json.dumps(values)).bits_per_byte == values["bits_per_byte"]


@pytest.mark.slow
def test_figures_are_those_of_the_checkpoint(fitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score the held-out text in this process with the saved weights and whole logits."""
    monkeypatch.chdir(fitted.folder)
    values = fitted.summary
    recipe = load_yaml(Path(values["checkpoint"]).parents[1] / "config.yaml").values
    model = GPTMoE(recipe["model"]["init_args"]["config"])
    model.configure_model()
    consolidate(Path(values["checkpoint"]), fitted.folder / "weights.safetensors")
    model.load_state_dict(load_file(fitted.folder / "weights.safetensors"))
    model.eval()
    assert values["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    # Without document masks forward() would not hide the documents of a row from each other, so one at a time.
    data = TextDataModule(**recipe["data"]["init_args"] | {"batch_size": 1})
    data.setup("test")
    nats, num_bytes, num_labels = 0.0, 0, 0
    for batch in data.test_dataloader():
        for document in batch["documents"].unique().tolist():
            of_document = batch["documents"] == document
            tokens, labels = (batch[name][of_document][None] for name in ("tokens", "labels"))
            with torch.no_grad():
                logits = model(tokens).double()
            losses = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")
            nats += losses.item()
            num_labels += int((labels != -100).sum())
        num_bytes += int(batch["label_bytes"].sum())
    held_out = data.corpus.held_out_text(1 << 30)
    documents = sum(int((batch["labels"] == data.tokenizer.end).sum()) for batch in data.test_dataloader())
    assert num_bytes == len(held_out) - documents
    assert values["held_out_bytes"] == len(held_out)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert values["test_loss"] == pytest.approx(nats / num_labels, rel=1e-5)
    assert values["gzip_bits_per_byte"] == 8 * len(gzip.compress(held_out, 9)) / len(held_out)
    assert held_out.startswith(values["sample_prompt"].encode())
    prompt = data.tokenizer.encode(values["sample_prompt"])
    assert len(prompt) == 16
    with torch.no_grad():
        again = model.generate(torch.tensor([prompt]), 48, temperature=0.8, seed=0)[0, 16:]
    assert values["sample"] == data.tokenizer.decode(again.tolist())


@pytest.mark.slow
def test_sample_while_training_is_printed_once(fitted: Run) -> None:
    assert fitted.out.count("[step 10] token") == 1
    assert fitted.out.count("[step ") == 1
    assert fitted.out.count("Held-out text") == 1
