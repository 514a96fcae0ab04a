"""A corpus as rows of tokens for training, validation and test; here out of documents that fit into memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from lightning_moe.data.text.documents import Document, Split
from lightning_moe.data.text.packing import PackedRows, Rows
from lightning_moe.data.text.tokenizer import Tokenizer


class Corpus(ABC):
    """Rows of a corpus.

    Attributes:
        tokenizer: The vocabulary.
        rows: The rows by part; the last one of the evaluated parts may be shorter.
    """

    tokenizer: Tokenizer
    rows: Split[Rows]

    @abstractmethod
    def held_out_text(self, most: int) -> bytes:
        """The documents of the test in UTF-8, one after the other; the first ``most`` bytes of them."""


class DocumentCorpus(Corpus):
    """Documents in memory, as tokens of two or four bytes.

    Args:
        documents: The documents by part.
        tokenizer: The vocabulary.
        sequence_length: Tokens that a row predicts.
    """

    def __init__(self, documents: Split[list[Document]], tokenizer: Tokenizer, sequence_length: int) -> None:
        def rows(part: Sequence[Document], *, keep_partial: bool) -> Rows:
            tokens = tokenizer.encode_documents([document.text for document in part])
            return PackedRows(tokens, sequence_length, keep_partial=keep_partial)

        self.tokenizer = tokenizer
        self.rows = Split(
            training=rows(documents.training, keep_partial=False),
            validation=rows(documents.validation, keep_partial=True),
            test=rows(documents.test, keep_partial=True),
        )
        self._held_out = b"".join(document.text for document in documents.test)

    @override
    def held_out_text(self, most: int) -> bytes:
        return self._held_out[:most]
