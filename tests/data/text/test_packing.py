"""Rows and their masks, against the definitions written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.data.text import ByteTokenizer
from lightning_moe.data.text.packing import PackedRows, TextDataset

BYTES = ByteTokenizer()


def batch_of(texts: list[bytes], length: int, *, document_mask: bool, keep_partial: bool = True) -> dict[str, Any]:
    """All rows as one batch."""
    rows = PackedRows(BYTES.encode_documents(texts), length, keep_partial=keep_partial)
    dataset = TextDataset(rows, BYTES, document_mask=document_mask)
    return dict(dataset.__getitems__(list(range(len(dataset)))))


def test_by_hand() -> None:
    end = BYTES.end
    batch = batch_of([b"abc", b"d", b"efghi"], 4, document_mask=True)
    expected = {
        # abc.|d.ef|ghi.: the last row has three tokens to predict.
        "tokens": [[97, 98, 99, end], [100, end, 101, 102], [103, 104, 105, end]],
        "labels": [[98, 99, end, -100], [end, -100, 102, 103], [104, 105, end, -100]],
        "positions": [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]],
        "documents": [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]],
        "label_bytes": [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    batch = batch_of([b"abc", b"d", b"efghi"], 4, document_mask=False)
    assert batch["labels"].tolist() == [[98, 99, end, 100], [end, 101, 102, 103], [104, 105, end, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3]] * 3
    assert "documents" not in batch


def test_a_row_is_one_of_a_batch() -> None:
    dataset = TextDataset(
        PackedRows(BYTES.encode_documents([b"abcdefgh"]), 3, keep_partial=True), BYTES, document_mask=True
    )
    whole: Any = dataset.__getitems__([0, 1, 2])
    for index in range(3):
        row: Any = dataset[index]
        assert all(torch.equal(row[name], whole[name][index]) for name in whole)


@given(
    texts=st.lists(st.binary(max_size=12), min_size=1, max_size=8),
    length=st.integers(1, 9),
    document_mask=st.booleans(),
)
def test_every_token_but_the_first_is_predicted_once(texts: list[bytes], length: int, document_mask: bool) -> None:
    """Against a walk over the stream, one position at a time."""
    stream = [(token, number) for number, text in enumerate(texts) for token in (*text, BYTES.end)]
    batch = batch_of(texts, length, document_mask=document_mask)
    assert len(batch["tokens"]) == -(-(len(stream) - 1) // length)
    for place in range(len(batch["tokens"]) * length):
        row, column = divmod(place, length)
        label = int(batch["labels"][row, column])
        if place + 1 >= len(stream):
            assert label == -100, "beyond the corpus"
            assert batch["label_bytes"][row, column] == 0
            continue
        (token, document), (following, next_document) = stream[place], stream[place + 1]
        assert batch["tokens"][row, column] == token
        hidden = document_mask and next_document != document
        assert label == (-100 if hidden else following)
        assert batch["label_bytes"][row, column] == (0 if hidden or following == BYTES.end else 1)
        first = stream[row * length][1]
        begin = next(i for i in range(row * length, place + 1) if not document_mask or stream[i][1] == document)
        assert batch["positions"][row, column] == place - begin
        if document_mask:
            assert batch["documents"][row, column] == document - first


@given(
    texts=st.lists(st.binary(max_size=12), min_size=1, max_size=8),
    length=st.integers(1, 9),
    document_mask=st.booleans(),
)
def test_bytes_add_up(texts: list[bytes], length: int, document_mask: bool) -> None:
    """The labels stand for all bytes but those of first tokens: of each document with masks, of the corpus without."""
    predicted = int(batch_of(texts, length, document_mask=document_mask)["label_bytes"].sum())
    unseen = sum(bool(text) for text in texts) if document_mask else bool(texts[0])
    assert predicted == sum(map(len, texts)) - unseen


def test_training_leaves_the_shorter_row_out() -> None:
    texts = [b"abcdef"]  # seven tokens, six to predict
    for length, rows in ((6, 1), (5, 1), (3, 2), (4, 1), (7, 0)):
        tokens = BYTES.encode_documents(texts)
        assert len(PackedRows(tokens, length, keep_partial=False)) == rows
    assert (batch_of(texts, 5, document_mask=False, keep_partial=False)["labels"] != -100).all()


@pytest.mark.parametrize("document_mask", [True, False])
def test_what_fills_the_last_row_is_part_of_no_document(document_mask: bool) -> None:
    batch = batch_of([b"ab", b"c"], 8, document_mask=document_mask)
    assert batch["labels"][0, 4:].tolist() == [-100] * 4
    if document_mask:
        assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
        assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def test_rows_of_large_tokens() -> None:
    tokens = np.array([70_000, 1, 2, 80_000], dtype=np.uint32)
    rows, lengths = PackedRows(tokens, 2, keep_partial=True).read(np.array([1, 0]))
    assert rows.tolist() == [[2, 80_000, 80_000], [70_000, 1, 2]]
    assert lengths.tolist() == [2, 3]
