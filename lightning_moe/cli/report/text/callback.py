"""The report of a test of a language model: bits per byte beside compressors, and a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import lightning.pytorch as pl
import torch
from rich.console import Console
from typing_extensions import override

from lightning_moe.cli.report.callback import Report
from lightning_moe.cli.report.summary import RunFacts
from lightning_moe.cli.report.text.summary import TextSummary
from lightning_moe.cli.report.text.tables import print_text_summary
from lightning_moe.data.text import TextDataModule, compression_bits_per_byte
from lightning_moe.models.gpt_moe import GPTMoE

_SAMPLE_TOKENS: Final = 256
_MOST_COMPRESSED: Final = 1 << 26
"""Bytes of the held-out text that compressors are tried on: the other ranks wait meanwhile, for half a minute."""


class TextResults(NamedTuple):
    """What takes all ranks to find out."""

    bits_per_byte: float
    test_loss: float
    prompt: str
    sample: str


class TextReport(Report[GPTMoE, TextDataModule, TextResults]):
    """The report of a language model."""

    model_type = GPTMoE
    data_type = TextDataModule

    @override
    def gather(self, trainer: pl.Trainer, model: GPTMoE, data: TextDataModule) -> TextResults:
        metrics = trainer.callback_metrics
        prompt, sample = _sample(model, data)
        return TextResults(
            bits_per_byte=metrics["test_bits_per_byte"].item(),
            test_loss=metrics["test_loss"].item(),
            prompt=prompt,
            sample=sample,
        )

    @override
    def summarize(
        self, gathered: TextResults, model: GPTMoE, data: TextDataModule, folder: Path, facts: RunFacts
    ) -> TextSummary:
        text = data.corpus.held_out_text(_MOST_COMPRESSED)
        compressed = compression_bits_per_byte(text)
        return TextSummary(
            **facts,
            bits_per_byte=gathered.bits_per_byte,
            gzip_bits_per_byte=compressed["gzip"],
            bz2_bits_per_byte=compressed["bz2"],
            xz_bits_per_byte=compressed["xz"],
            held_out_bytes=len(text),
            test_loss=gathered.test_loss,
            tokens_seen=data.tokens_seen if facts["command"] == "fit" else None,
            sample_prompt=gathered.prompt,
            sample=gathered.sample,
        )

    @override
    @staticmethod
    def show(path: Path, console: Console) -> TextSummary:
        summary = TextSummary.read(path)
        print_text_summary(summary, console)
        return summary


def _sample(model: GPTMoE, data: TextDataModule) -> tuple[str, str]:
    """Continue the beginning of the held-out text, which nobody has picked; a collective call."""
    size = min(_SAMPLE_TOKENS, model.config.max_sequence_length)
    begin = data.corpus.held_out_text(size).decode(errors="ignore")
    prompt = data.tokenizer.encode(begin)[: max(size // 4, 1)]
    tokens = model.generate(torch.tensor([prompt]), size - len(prompt), temperature=0.8, seed=0)[0].tolist()
    return data.tokenizer.decode(prompt), data.tokenizer.decode(tokens[len(prompt) :])
