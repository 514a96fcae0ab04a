"""Rows of tokens cut out of a corpus, and the batches that are made of them.

Documents, each with its end token, are laid one after the other and cut into rows of S + 1 tokens, neighbours
sharing one: a row predicts its last S tokens from its first S, so every token of a corpus but the first is
predicted once.

Shapes: B rows in a batch, S tokens in a sequence, N tokens in the corpus, V vocabulary.
"""

from __future__ import annotations

from typing import NotRequired, Protocol, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_moe.data.text.tokenizer import Tokenizer, Tokens

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

IGNORED = -100
"""Label of positions at which nothing is to be predicted; the default of PyTorch's losses."""


class TextBatch(TypedDict):
    """What every text data loader yields; all are int64 [B, S]."""

    tokens: Tensor
    """Tokens to read."""
    labels: Tensor
    """The tokens that follow them; -100 where nothing is to be predicted."""
    positions: Tensor
    """Positions within the row, or, with document masks, within the part of a document that is in the row."""
    documents: NotRequired[Tensor]
    """Number of the token's document within the row; only with document masks."""
    label_bytes: Tensor
    """UTF-8 bytes that the label stands for; 0 where nothing is to be predicted and for the end of a document."""


class Rows(Protocol):
    """Rows of S + 1 tokens."""

    def __len__(self) -> int:
        """Number of rows."""

    def read(self, indices: Integers) -> tuple[Integers, Integers]:
        """Return rows ``[B, S + 1]``, filled up to that length where one is shorter, and their lengths ``[B]``."""


class PackedRows:
    """Rows of tokens that are held in memory.

    Args:
        tokens: The corpus ``[N]``.
        sequence_length: S.
        keep_partial: Whether a last row that is shorter than the others is kept: to evaluate on every token.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, *, keep_partial: bool) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length
        predicted = max(len(tokens) - 1, 0)
        self._rows = -(-predicted // sequence_length) if keep_partial else predicted // sequence_length

    def __len__(self) -> int:
        return self._rows

    def read(self, indices: Integers) -> tuple[Integers, Integers]:
        """Return rows ``[B, S + 1]``, filled up to that length where one is shorter, and their lengths ``[B]``."""
        last = len(self._tokens) - 1
        first = indices * self._sequence_length
        places = np.minimum(first[:, None] + np.arange(self._sequence_length + 1), last)
        return self._tokens[places].astype(np.int64), np.minimum(self._sequence_length + 1, last + 1 - first)


class TextDataset(Dataset[TextBatch]):
    """Rows as a map-style dataset that fetches a whole batch at once.

    Args:
        rows: The rows.
        tokenizer: The vocabulary.
        document_mask: Whether documents are kept apart.
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer, *, document_mask: bool) -> None:
        self._rows = rows
        self._token_lengths = tokenizer.token_lengths
        self._end = tokenizer.end
        self._document_mask = document_mask

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TextBatch:
        """Return one row, without the first dimension of a batch."""
        batch = self.__getitems__([index])
        return cast(TextBatch, {name: tensor[0] for name, tensor in cast(dict[str, Tensor], batch).items()})

    def __getitems__(self, indices: list[int]) -> TextBatch:
        """Return a finished batch; torch's data loader calls this with a batch of indices where it exists."""
        rows, lengths = self._rows.read(np.asarray(indices, dtype=np.int64))
        return make_batch(rows, lengths, self._token_lengths, self._end, document_mask=self._document_mask)


def make_batch(
    rows: Integers, lengths: Integers, token_lengths: Integers, end: int, *, document_mask: bool
) -> TextBatch:
    """Make a batch out of rows.

    Args:
        rows: Tokens ``[B, S + 1]``.
        lengths: Number of tokens of each row, ``[B]``; the rest of the row is ignored.
        token_lengths: Bytes that each token stands for, ``[V]``; none for ``end``.
        end: Token that ends a document.
        document_mask: Whether documents are kept apart: the end of one predicts nothing of the next.
    """
    size = rows.shape[1] - 1
    places = np.arange(size)
    tokens = rows[:, :-1]
    # Rows are filled with anything; what stands there is no end of a document.
    ends = (tokens == end) & (places < lengths[:, None])
    predicts = places < lengths[:, None] - 1
    if document_mask:
        predicts &= ~ends
    labels = np.where(predicts, rows[:, 1:], IGNORED)
    batch = TextBatch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(_positions(ends) if document_mask else np.tile(places, (len(rows), 1))),
        label_bytes=torch.from_numpy(token_lengths[np.where(predicts, rows[:, 1:], end)]),
    )
    if document_mask:
        batch["documents"] = torch.from_numpy(np.cumsum(ends, axis=1) - ends)
    return batch


def _positions(ends: Booleans) -> Integers:
    """Positions since the last end of a document, or since the start of the row."""
    places = np.arange(ends.shape[1])
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    first: Integers = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return places - first
