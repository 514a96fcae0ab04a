"""Vocabularies: what they have in common, and bytes."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

Tokens = NDArray[np.uint16 | np.uint32]


class Tokenizer(ABC):
    """Turns texts into tokens and back without loss: ``decode(encode(text)) == text``.

    Attributes:
        end: Token that ends a document. No text is encoded to it, and it stands for no bytes.
        token_bytes: Bytes that each token stands for, UTF-8 or a part of it.
    """

    end: int
    token_bytes: tuple[bytes, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the end of a document included."""
        return len(self.token_bytes)

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The narrowest type that holds every token."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def token_lengths(self) -> NDArray[np.int64]:
        """Number of bytes that each token stands for, ``[vocab_size]``."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @abstractmethod
    def encode_bytes(self, text: bytes) -> Tokens:
        """Encode a text in UTF-8, without the end of a document."""

    def encode(self, text: str) -> list[int]:
        """Encode a text, without the end of a document."""
        return [int(token) for token in self.encode_bytes(text.encode())]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens; a character that they hold only a part of becomes the replacement character."""
        return b"".join(self.token_bytes[token] for token in tokens).decode("utf-8", errors="replace")

    def encode_documents(self, texts: Sequence[bytes]) -> Tokens:
        """Encode documents, each followed by :attr:`end`, into one array."""
        end = np.array([self.end], dtype=self.dtype)
        return np.concatenate([part for text in texts for part in (self.encode_bytes(text), end)])


class ByteTokenizer(Tokenizer):
    """Token b is the byte b, and token 256 ends a document."""

    def __init__(self) -> None:
        self.end = 256
        self.token_bytes = (*(bytes([value]) for value in range(256)), b"")

    @override
    def encode_bytes(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)


def printable(text: str) -> str:
    """Replace control characters but tabs and line ends: what a model writes must not steer the terminal."""
    return "".join("\ufffd" if unicodedata.category(one) == "Cc" and one not in "\t\n" else one for one in text)
