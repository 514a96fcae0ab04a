"""Byte-pair encoding: trained here on the training documents, or read from a ``tokenizer.json``.

Only this file imports ``tokenizers``. All vocabularies are byte-level (Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019): each of the 256 bytes is written as a printable character, and tokens are
texts over these.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import numpy as np
from typing_extensions import override

from lightning_moe.data.text.tokenizer import Tokenizer, Tokens
from lightning_moe.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

END_TOKEN: Final = "<|endoftext|>"
"""End of a document in vocabularies that are trained here."""

_TRAINING: Final = "byte-level bpe 1"
"""Part of the name of a trained vocabulary in the cache; changes with the way of training."""

_LONGEST_WORD: Final = 1 << 12
"""Characters without a space from which on a text is cut for training: a megabyte in one word would take minutes."""

_PROBE: Final = "def f(x):\n\tre\u0301sume\u0301 \ufb01 \u4e16\U0001f600\r\n\x00 <|endoftext|></s>  "
"""A text that vocabularies with a normaliser, an added space or unknown characters do not give back."""


class BPETokenizer(Tokenizer):
    """A byte-level BPE out of a ``tokenizer.json``.

    What the file says on normalisation, truncation, padding and on tokens to put around a text is left aside, and
    special tokens that occur in a text are ordinary characters: every text is encoded without loss.

    Args:
        description: Content of the file.
        end_token: The token that ends a document.

    Raises:
        ConfigError: ``tokenizers`` is not installed; or the file does not describe a byte-level vocabulary with that
            token.
    """

    def __init__(self, description: str, end_token: str = END_TOKEN) -> None:
        self._description = description
        self._end_token = end_token
        self._model = _parse(description)
        self._model.normalizer = None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        end = self._model.token_to_id(end_token)
        if end is None:
            raise ConfigError("data.end_token", end_token, "a token of the vocabulary", "see added_tokens in the file")
        self.end = end
        self.token_bytes = _token_bytes(self._model, end)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise _refused("it does not give every text back")

    def __reduce__(self) -> tuple[Any, ...]:
        # The settings above are no part of what tokenizers pickles.
        return type(self), (self._description, self._end_token)

    @override
    def encode_bytes(self, text: bytes) -> Tokens:
        encoding = self._model.encode(text.decode(), add_special_tokens=False)
        tokens: Tokens = np.array(encoding.ids, dtype=self.dtype)
        if self.token_lengths[tokens].sum() != len(text):
            raise _refused("it adds or strips spaces, or finds the end token within a text")
        return tokens


def train_bpe(texts: Sequence[bytes], vocab_size: int) -> str:
    """Train a byte-level BPE.

    Args:
        texts: Documents in UTF-8.
        vocab_size: Number of tokens: 256 bytes, the end of a document, and merges.

    Returns:
        Content of a ``tokenizer.json``, a function of the arguments alone.

    Raises:
        ConfigError: ``tokenizers`` is not installed, or the documents do not yield that many tokens.
    """
    _require_tokenizers()
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_training_pieces(texts), trainer)
    if model.get_vocab_size() < vocab_size:
        raise ConfigError(
            "data.vocab_size", vocab_size, f"at most {model.get_vocab_size()}", "the documents yield no more tokens"
        )
    return model.to_str()


def _training_pieces(texts: Sequence[bytes]) -> Iterator[str]:
    """The texts, those with an endless word in pieces: training takes the square of a word's length."""
    for text in (text.decode() for text in texts):
        endless = any(run.end() - run.start() > _LONGEST_WORD for run in re.finditer(r"\S+|\s+", text))
        size = _LONGEST_WORD if endless else max(len(text), 1)
        yield from (text[start : start + size] for start in range(0, len(text), size))


def cached_path(cache: Path, texts: Sequence[bytes], vocab_size: int) -> Path:
    """Where the cache keeps the vocabulary of that size that is trained on these documents."""
    digest = hashlib.sha256(f"{_TRAINING}, {vocab_size} tokens".encode())
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    return cache / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}" / "tokenizer.json"


def read_description(path: Path) -> str:
    """Read a ``tokenizer.json``.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("data.tokenizer", str(path), "the path of a tokenizer.json", str(error)) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file that other processes see whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No NamedTemporaryFile: nobody else could read what it leaves, and a cache may be shared.
    draft = path.with_name(f"{uuid4().hex}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _parse(description: str) -> tokenizers.Tokenizer:
    _require_tokenizers()
    from tokenizers import Tokenizer as Model

    try:
        return Model.from_str(description)
    except Exception as error:  # tokenizers raises nothing more specific
        raise _refused(str(error)) from error


def _token_bytes(model: tokenizers.Tokenizer, end: int) -> tuple[bytes, ...]:
    """Bytes of each token; none for special tokens, which no text is encoded to, and for gaps in the numbering."""
    byte_of = {character: value for value, character in enumerate(_printable())}
    added = model.get_added_tokens_decoder()
    vocabulary = model.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index == end or (index in added and added[index].special):
            continue
        if index in added:
            table[index] = token.encode()
        elif all(character in byte_of for character in token):
            table[index] = bytes(byte_of[character] for character in token)
        else:
            raise _refused(f"the token {token!r} is no sequence of bytes")
    return tuple(table)


def _printable() -> list[str]:
    """The character that stands for each byte: itself where it is printable, others from 256 on."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(value if value in kept else next(moved)) for value in range(256)]


def _refused(reason: str) -> ConfigError:
    return ConfigError("data.tokenizer", "tokenizer.json", "a byte-level vocabulary, as of GPT-2 or Llama 3", reason)


def _require_tokenizers() -> None:
    if find_spec("tokenizers") is None:
        raise ConfigError("data.tokenizer", "bpe", "bytes", "BPE needs: pip install 'lightning-moe[text]'")
