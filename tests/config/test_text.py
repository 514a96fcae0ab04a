"""The settings of the text data."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_moe.config import TextConfig
from lightning_moe.config.loader import Document
from lightning_moe.config.recipe import check_recipe
from lightning_moe.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"pattern": "*.md"}, "data.pattern"),
        ({"tokenizer": "byte"}, "data.tokenizer"),
        ({"tokenizer": "vocabulary.txt"}, "data.tokenizer"),
        ({"tokenizer": None}, "data.tokenizer"),
        ({"vocab_size": 300}, "data.vocab_size"),
        ({"vocab_size": 300, "tokenizer": "tokenizer.json"}, "data.vocab_size"),
        ({"vocab_size": 256, "tokenizer": "bpe"}, "data.vocab_size"),
        ({"sequence_length": 0}, "data.sequence_length"),
        ({"batch_size": 1.5}, "data.batch_size"),
        ({"holdout_modulus": 2}, "data.holdout_modulus"),
        ({"validation_sequences": 0}, "data.validation_sequences"),
        ({"batches_per_epoch": 0}, "data.batches_per_epoch"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"document_mask": "yes"}, "data.document_mask"),
    ],
)
def test_refuses(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TextConfig(**arguments)
    assert raised.value.field == field
    assert raised.value.allowed


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"path": "texts", "pattern": "*.md"},
        {"tokenizer": "bpe", "vocab_size": 257},
        {"tokenizer": "/models/tokenizer.json", "end_token": "</s>"},
        {"validation_sequences": None, "holdout_modulus": 3},
    ],
)
def test_accepts(arguments: dict[str, Any]) -> None:
    config = TextConfig(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


def test_recipes_are_checked_without_reading_the_text() -> None:
    data = {"class_path": "lightning_moe.TextDataModule", "init_args": {"path": "/nowhere", "sequence_lenght": 8}}
    verdict = check_recipe(Document({"model": {"class_path": "my.Model"}, "data": data}, {}))
    assert [problem.field for problem in verdict.problems] == ["data.init_args.sequence_lenght"]
    assert "sequence_length" in verdict.problems[0].hint
