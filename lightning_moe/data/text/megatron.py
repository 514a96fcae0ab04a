"""Corpora in Megatron's format: tokens on disk, memory-mapped, as large as one likes.

Only this file of the data imports megatron.

Shapes: B rows in a batch, S tokens in a sequence.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from lightning_moe.config.text import TextConfig
from lightning_moe.data.text.corpus import Corpus
from lightning_moe.data.text.documents import Split
from lightning_moe.data.text.packing import Integers
from lightning_moe.data.text.tokenizer import Tokenizer
from lightning_moe.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


class MegatronCorpus(Corpus):
    """A ``.bin`` and ``.idx`` pair as Megatron's ``tools/preprocess_data.py --append-eod`` writes it.

    Sequence i of the file is tested on where ``i % holdout_modulus`` is 0, validated on where it is 1, and trained on
    otherwise. ``GPTDataset`` lays the sequences of each part one after the other, in an order drawn from the seed, and
    cuts them into rows.

    Args:
        prefix: Path without ``.bin``.
        config: Settings of the data.
        tokenizer: The vocabulary that the tokens are of.

    Raises:
        ConfigError: There are too few sequences or tokens.
    """

    def __init__(self, prefix: str, config: TextConfig, tokenizer: Tokenizer) -> None:
        with _quiet():
            from megatron.core.datasets.indexed_dataset import IndexedDataset

            self._indexed = IndexedDataset(prefix)
        self.tokenizer = tokenizer
        sequences = np.arange(len(self._indexed), dtype=np.int32)
        remainder = sequences % config.holdout_modulus
        self._parts = Split(sequences[remainder > 1], sequences[remainder == 1], sequences[remainder == 0])
        tokens = [int(self._indexed.sequence_lengths[part].sum()) for part in self._parts]
        for name, number, needed in zip(Split._fields, tokens, (config.sequence_length + 1, 2, 2), strict=True):
            if number < needed:
                hint = f"{number} tokens fall to {name}, and a row takes {needed}"
                raise ConfigError("data.path", prefix, "a corpus with enough tokens", hint)
        training, validation, test = (
            MegatronRows(self._dataset(config, part, keep_partial=part is not self._parts.training), tokenizer)
            for part in self._parts
        )
        self.rows = Split(training, validation, test)

    @override
    def held_out_text(self, most: int) -> bytes:
        text = bytearray()
        for sequence in self._parts.test:
            if len(text) >= most:
                break
            text += b"".join(self.tokenizer.token_bytes[token] for token in self._indexed.get(int(sequence)))
        return bytes(text[:most])

    def _dataset(self, config: TextConfig, part: Integers, *, keep_partial: bool) -> GPTDataset:
        with _quiet():
            from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
            from megatron.core.datasets.utils import Split as MegatronSplit

            settings = GPTDatasetConfig(
                random_seed=config.seed,
                sequence_length=config.sequence_length,
                tokenizer=_Vocabulary(self.tokenizer),
                # Masks are made from the tokens, for all corpora in the same way.
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
                drop_last_partial_validation_sequence=False,
                # The index of the rows stays in memory. Megatron writes its files on rank 0 alone and reads them
                # everywhere else at once, which only its own dataset builder knows to wait for.
                path_to_cache=None,
            )
            # Only the validation split of Megatron can keep a last row that is shorter.
            split = MegatronSplit.valid if keep_partial else MegatronSplit.train
            return GPTDataset(self._indexed, self._indexed.path_prefix, part, None, split, settings)


class MegatronRows:
    """The samples of a ``GPTDataset`` as rows.

    Args:
        dataset: The dataset.
        tokenizer: The vocabulary that its tokens are of.
    """

    def __init__(self, dataset: GPTDataset, tokenizer: Tokenizer) -> None:
        self._dataset = dataset
        self._vocab_size = tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Integers) -> tuple[Integers, Integers]:
        """Return rows ``[B, S + 1]``, filled up to that length where one is shorter, and their lengths ``[B]``.

        Raises:
            ConfigError: A token is not in the vocabulary.
        """
        samples = [self._dataset[int(index)] for index in indices]
        rows = np.stack([np.append(sample["tokens"].numpy(), sample["labels"][-1].item()) for sample in samples])
        if rows.max() >= self._vocab_size:
            raise ConfigError(
                "data.tokenizer",
                f"a vocabulary of {self._vocab_size} tokens",
                f"one that has token {rows.max()} of the corpus",
                "name the tokenizer.json that the corpus was written with",
            )
        lengths = np.array([int(sample["loss_mask"].sum()) + 1 for sample in samples])
        return rows, lengths


class _Vocabulary:
    """What a ``GPTDataset`` asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.end
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {"eod": self.eod, "vocab_size": self.vocab_size}


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out remarks on missing GPU libraries, and on the index that is not written to a file."""
    logger: Any = logging.getLogger("megatron.core.datasets.gpt_dataset")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
