"""From settings to a corpus: what there is to read, and the vocabulary that it is read with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from lightning_moe.config.text import BPE_VOCABULARY, TextConfig
from lightning_moe.data.text.bpe import BPETokenizer, cached_path, read_description, train_bpe, write_atomically
from lightning_moe.data.text.corpus import Corpus, DocumentCorpus
from lightning_moe.data.text.documents import Document, Split, read_folder, read_standard_library, split_documents
from lightning_moe.data.text.tokenizer import ByteTokenizer, Tokenizer
from lightning_moe.errors import ConfigError

_PATTERN: Final = "*.txt"


def prepare_corpus(config: TextConfig) -> None:
    """Train the vocabulary if the settings ask for one that the cache does not have; for one process per machine.

    Raises:
        ConfigError: The settings and the data do not fit together.
    """
    config = _at_home(config)
    if config.tokenizer != "bpe" or _is_megatron(config):
        return
    texts = _training_texts(_read_documents(config))
    path = _vocabulary_path(config, texts)
    if _is_whole(path):
        return
    description = train_bpe(texts, config.vocab_size or BPE_VOCABULARY)
    try:
        write_atomically(path, description)
    except OSError as error:
        raise ConfigError("data.cache_dir", config.cache_dir, "a folder that can be written to", str(error)) from error


def open_corpus(config: TextConfig) -> Corpus:
    """Read the documents, or open the files, that the settings name.

    Raises:
        ConfigError: The settings and the data do not fit together, or the vocabulary has not been prepared.
    """
    config = _at_home(config)
    if _is_megatron(config):
        from lightning_moe.data.text.megatron import MegatronCorpus

        assert config.path is not None
        return MegatronCorpus(config.path, config, _fixed_tokenizer(config))
    documents = _read_documents(config)
    tokenizer = _trained_tokenizer(config, documents) if config.tokenizer == "bpe" else _fixed_tokenizer(config)
    return DocumentCorpus(documents, tokenizer, config.sequence_length)


def _at_home(config: TextConfig) -> TextConfig:
    """The settings with ``~`` in their paths resolved, which only a shell would have done."""
    return replace(
        config,
        path=None if config.path is None else os.path.expanduser(config.path),
        tokenizer=os.path.expanduser(config.tokenizer),
        cache_dir=None if config.cache_dir is None else os.path.expanduser(config.cache_dir),
    )


def _is_megatron(config: TextConfig) -> bool:
    path = config.path
    return path is not None and all(Path(f"{path}{suffix}").is_file() for suffix in (".bin", ".idx"))


def _read_documents(config: TextConfig) -> Split[list[Document]]:
    if config.path is None:
        documents = read_standard_library()
    elif Path(config.path).is_dir():
        documents = read_folder(Path(config.path), config.pattern or _PATTERN)
    else:
        raise ConfigError(
            "data.path",
            config.path,
            "a folder of text files, or the prefix of a pair of files .bin and .idx",
            "the prefix is written without .bin" if config.path.endswith((".bin", ".idx")) else "check the spelling",
        )
    return split_documents(documents, config.holdout_modulus)


def _fixed_tokenizer(config: TextConfig) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        allowed = "bytes or the path of the tokenizer.json that the corpus was written with"
        raise ConfigError("data.tokenizer", "bpe", allowed, "the corpus consists of tokens already")
    return BPETokenizer(read_description(Path(config.tokenizer)), config.end_token)


def _trained_tokenizer(config: TextConfig, documents: Split[list[Document]]) -> Tokenizer:
    path = _vocabulary_path(config, _training_texts(documents))
    if not path.exists():
        hint = f"{path} is written by prepare_data(), which a Trainer calls once per machine"
        raise ConfigError("data.cache_dir", config.cache_dir, "a folder that the vocabulary was written to", hint)
    return BPETokenizer(read_description(path))


def _is_whole(path: Path) -> bool:
    """Whether the cache has a vocabulary there; a machine that lost power may leave a part of one."""
    try:
        BPETokenizer(read_description(path))
    except ConfigError:
        return False
    return True


def _training_texts(documents: Split[list[Document]]) -> list[bytes]:
    return [document.text for document in documents.training]


def _vocabulary_path(config: TextConfig, texts: list[bytes]) -> Path:
    return cached_path(_cache_folder(config), texts, config.vocab_size or BPE_VOCABULARY)


def _cache_folder(config: TextConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_moe"
