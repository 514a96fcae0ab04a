"""Settings of the text data (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_moe.config.ranges import Rule, at_least, validate
from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError

BYTE_VOCABULARY = 257
"""Tokens of the byte vocabulary: all bytes and the end of a document. A trained one has at least these."""

BPE_VOCABULARY = 4096
"""Tokens of a trained vocabulary when no other number is given."""


def names_a_tokenizer(config: Any) -> ConfigError | None:
    """The tokenizer is one of ours or a file."""
    name = config.tokenizer
    if name in ("bytes", "bpe") or name.endswith(".json"):
        return None
    allowed = "bytes, bpe, or the path of a tokenizer.json"
    return ConfigError("tokenizer", name, allowed, closest(name, ("bytes", "bpe")))


def vocabulary_is_trained(config: Any) -> ConfigError | None:
    """Only a vocabulary that is trained has a size to choose."""
    if config.vocab_size is None or config.tokenizer == "bpe":
        return None
    hint = "bytes are 257 tokens, and a tokenizer.json has its own size"
    return ConfigError("vocab_size", config.vocab_size, "null, unless tokenizer is bpe", hint)


def pattern_needs_a_folder(config: Any) -> ConfigError | None:
    """The standard library's sources are all Python files."""
    if config.pattern is None or config.path is not None:
        return None
    return ConfigError("pattern", config.pattern, "null, unless path is a folder", "leave it out or give a path")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text a ``TextDataModule`` reads, and how it turns it into batches of tokens.

    Raises:
        ConfigError: A field has the wrong type or lies outside its range.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        pattern_needs_a_folder,
        names_a_tokenizer,
        vocabulary_is_trained,
        at_least("vocab_size", BYTE_VOCABULARY, "all bytes and the end of a document are tokens"),
        at_least("sequence_length", 1),
        at_least("batch_size", 1),
        at_least("holdout_modulus", 3, "one part of this many is tested on and another one validated on"),
        at_least("validation_sequences", 1),
        at_least("batches_per_epoch", 1),
        at_least("num_workers", 0),
        at_least("seed", 0),
    )

    path: str | None = None
    """Folder of text files, or prefix of a Megatron corpus (.bin and .idx); null takes Python's standard library."""
    pattern: str | None = None
    """Pattern of the files in the folder and below it; null takes "*.txt"."""
    tokenizer: str = "bytes"
    """Vocabulary: bytes, bpe (trained on the training documents), or the path of a byte-level tokenizer.json."""
    vocab_size: int | None = None
    """Number of tokens of a trained vocabulary; null takes 4096."""
    end_token: str = "<|endoftext|>"
    """Token of a tokenizer.json that ends a document."""
    sequence_length: int = 512
    """Number of tokens in a sequence."""
    batch_size: int = 8
    """Number of sequences in a batch of one data rank."""
    document_mask: bool = True
    """Whether a token sees and predicts its own document only, where a sequence holds several."""
    holdout_modulus: int = 20
    """Number of parts that documents fall into; one part is tested on, one validated on, the others trained on."""
    validation_sequences: int | None = 128
    """Number of sequences to validate on, spread evenly over those there are; null takes all."""
    batches_per_epoch: int | None = None
    """Number of training batches per rank and epoch; null takes as many as there are."""
    num_workers: int = 0
    """Number of processes that prepare batches."""
    seed: int = 0
    """Seed of the order of the training sequences."""
    cache_dir: str | None = None
    """Folder for trained vocabularies; null takes lightning_moe in the user's cache folder."""

    def __post_init__(self) -> None:
        validate(self, "data", self.rules)
