"""Corpora in Megatron's format, written by Megatron and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_moe import ConfigError, TextDataModule
from tests.data.text.folder import write_texts

END = 256

# Megatron's builder of corpora, which is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[bytes]]:
    """A corpus of bytes, as a prefix and as texts."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("megatron")
    texts = list(write_texts(folder / "texts", 40).values())
    prefix = str(folder / "corpus_text_document")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in texts:
        builder.add_document(torch.tensor([*text, END]), [len(text) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix, texts


def module(prefix: str, **settings: Any) -> TextDataModule:
    data = TextDataModule(prefix, **{"sequence_length": 32, "batch_size": 4, "holdout_modulus": 5} | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def documents_in(stream: list[int]) -> list[bytes]:
    texts: list[bytes] = [b""]
    for token in stream:
        if token == END:
            texts.append(b"")
        else:
            texts[-1] += bytes([token])
    assert texts.pop() == b""
    return texts


def in_order(data: TextDataModule, part: int) -> list[int]:
    """The stream of a part, its rows in the order in which Megatron cut them."""
    rows: Any = data.corpus.rows[part]
    places = np.argsort(rows._dataset.shuffle_index)
    read, lengths = rows.read(places)
    return [*(t for row, n in zip(read, lengths, strict=True) for t in row[: n - 1]), read[-1, lengths[-1] - 1]]


def test_every_document_comes_back(corpus: tuple[str, list[bytes]]) -> None:
    prefix, texts = corpus
    data = module(prefix)
    for part, remainders in ((1, {1}), (2, {0})):
        expected = [text for index, text in enumerate(texts) if index % 5 in remainders]
        assert sorted(documents_in(in_order(data, part))) == sorted(expected)
    training = [text for index, text in enumerate(texts) if index % 5 > 1]
    stream = in_order(data, 0)
    assert len(stream) == (sum(map(len, training)) + len(training) - 1) // 32 * 32 + 1, "whole rows only"
    whole = bytes(min(token, 255) for token in stream)
    assert sum(text in whole for text in training) >= len(training) - 1
    assert data.corpus.held_out_text(1 << 20) == b"".join(texts[::5])
    assert data.corpus.held_out_text(10) == texts[0][:10]


@pytest.mark.parametrize("document_mask", [True, False])
def test_batches_are_those_of_the_rows(corpus: tuple[str, list[bytes]], document_mask: bool) -> None:
    prefix, texts = corpus
    data = module(prefix, document_mask=document_mask)
    held_out = texts[::5]
    predicted = sum(int(batch["label_bytes"].sum()) for batch in data.test_dataloader())
    assert predicted == sum(map(len, held_out)) - (len(held_out) if document_mask else 1)
    for batch in data.train_dataloader():
        hidden = (batch["tokens"] == END) & document_mask
        assert torch.equal(batch["labels"] == -100, hidden)
        assert ("documents" in batch) == document_mask


def test_same_masks_as_megatron(corpus: tuple[str, list[bytes]]) -> None:
    """``GPTDataset`` with its masks on, as the reference."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    for batch in module(corpus[0]).train_dataloader():
        for row in range(len(batch["tokens"])):
            mask, loss_mask, positions = _get_ltor_masks_and_position_ids(
                batch["tokens"][row], END, True, True, True, True
            )
            documents = batch["documents"][row]
            apart = documents[:, None] != documents[None, :]
            assert torch.equal(mask[0], apart | ~torch.ones_like(apart).tril())
            assert torch.equal(positions, batch["positions"][row])
            assert torch.equal(loss_mask == 0, batch["labels"][row] == -100)


def test_tokens_outside_the_vocabulary_are_refused(corpus: tuple[str, list[bytes]], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "large")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(20):
        builder.add_document(torch.arange(250, 290), [40])
    builder.finalize(f"{prefix}.idx")
    with pytest.raises(ConfigError, match="token 289 of the corpus"):
        next(iter(module(prefix).train_dataloader()))


def test_settings_that_do_not_fit(corpus: tuple[str, list[bytes]]) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: 'bpe' .* consists of tokens already"):
        module(corpus[0], tokenizer="bpe")
    with pytest.raises(ConfigError, match=r"data\.path: .* fall to training"):
        module(corpus[0], sequence_length=100_000)
    with pytest.raises(ConfigError, match=r"data\.path: .* written without \.bin"):
        module(corpus[0] + ".bin")
