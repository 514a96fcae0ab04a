"""The data module: sequences of tokens out of a corpus of text, for any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_moe.config.text import TextConfig
from lightning_moe.data.loading import ResumableDataLoader, ShardedSampler, ShuffledSampler, as_fetched, data_shard
from lightning_moe.data.text.corpus import Corpus
from lightning_moe.data.text.packing import Rows, TextBatch, TextDataset
from lightning_moe.data.text.source import open_corpus, prepare_corpus
from lightning_moe.data.text.tokenizer import Tokenizer
from lightning_moe.errors import ConfigError


class TextDataModule(LightningDataModule):
    """Sequences of tokens out of text: Python's standard library, a folder of files, or a Megatron corpus.

    Documents fall into parts by the MD5 of their path: ``md5 % holdout_modulus == 0`` is tested on, 1 is validated on,
    and the rest is trained on. Each document is followed by an end token; documents are laid one after the other and
    cut into rows of ``sequence_length``. Evaluation keeps the last, shorter row: every byte of the held-out text but
    the first (of each document, with document masks) is the label of exactly one position.

    Training takes the rows in an order drawn anew for each pass over them. The global batch of a step is the same for
    any number of ranks, workers and processes; see the note in :mod:`lightning_moe.data.loading`. Ranks of the axes
    context and tensor get the same batch. Validation and test see each row on exactly one data rank, so ranks may
    differ by one batch.

    Args:
        path: A folder of text files, in UTF-8 (what is none is replaced); the prefix of a Megatron corpus, a pair of
            files ``.bin`` and ``.idx``; None for the Python sources of the standard library, about 11 MB.
        pattern: Pattern of the files in the folder and below it; None for ``*.txt``.
        tokenizer: ``"bytes"``, 256 bytes and the end token; ``"bpe"``, trained on the training documents; or the path
            of a byte-level ``tokenizer.json``.
        vocab_size: Tokens of a trained vocabulary, the end token included; None for 4096.
        end_token: Token of a ``tokenizer.json`` that ends a document.
        sequence_length: Tokens in a sequence.
        batch_size: Sequences per batch on each data rank, as everywhere in Lightning.
        document_mask: Whether a token sees and predicts its own document only.
        holdout_modulus: Number of parts that documents fall into, at least 3.
        validation_sequences: Rows to validate on, spread evenly over those there are; None for all.
        batches_per_epoch: Training batches per rank and epoch; None for as many full ones as there are.
        num_workers: Processes that prepare batches; 0 prepares them in the training process, in well under a
            millisecond.
        seed: Seed of the order of the training sequences.
        cache_dir: Folder for trained vocabularies; None for ``lightning_moe`` in the user's cache folder.

    Attributes:
        config: The arguments.

    Raises:
        ConfigError: A value is out of range; and from ``prepare_data`` and ``setup``, when the data do not fit the
            arguments.
    """

    def __init__(
        self,
        path: str | None = None,
        pattern: str | None = None,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        end_token: str = "<|endoftext|>",
        sequence_length: int = 512,
        batch_size: int = 8,
        document_mask: bool = True,
        holdout_modulus: int = 20,
        validation_sequences: int | None = 128,
        batches_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.config = TextConfig(
            path=path,
            pattern=pattern,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            end_token=end_token,
            sequence_length=sequence_length,
            batch_size=batch_size,
            document_mask=document_mask,
            holdout_modulus=holdout_modulus,
            validation_sequences=validation_sequences,
            batches_per_epoch=batches_per_epoch,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self._corpus: Corpus | None = None
        self._tokens_seen: int | None = None

    def prepare_data(self) -> None:
        """Train the vocabulary if there is one to train, in one process per machine."""
        prepare_corpus(self.config)

    def setup(self, stage: str) -> None:
        """Read the corpus, on every rank, once.

        Args:
            stage: Ignored; all stages read the same corpus.

        Raises:
            ConfigError: The corpus cannot be read, does not fit, or is too small for a single row.
        """
        if self._corpus is not None:
            return
        corpus = open_corpus(self.config)
        if not len(corpus.rows.training):
            raise ConfigError(
                "data.sequence_length",
                self.config.sequence_length,
                "a length of which the training documents have one sequence",
                "shorten it, or add documents",
            )
        self._corpus = corpus

    @property
    def corpus(self) -> Corpus:
        """The corpus; there is one once ``setup`` has run."""
        assert self._corpus is not None, "setup() has not run"
        return self._corpus

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary; there is one once ``setup`` has run."""
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, once ``setup`` has run."""
        return self.tokenizer.vocab_size

    @property
    def tokens_seen(self) -> int | None:
        """Tokens that all ranks together have trained on, those before a resume included; None if nobody counted."""
        # Not the loader that was handed out: overfit_batches puts another one in its place.
        loader = None if self.trainer is None else self.trainer.train_dataloader
        if not isinstance(loader, ResumableDataLoader):
            return self._tokens_seen
        position = loader.position()
        return None if position is None else (position["start"] + position["samples"]) * self.config.sequence_length

    def teardown(self, stage: str) -> None:
        """Remember how much was trained on: the Trainer drops its loader when another stage begins.

        Args:
            stage: Ignored.
        """
        self._tokens_seen = self.tokens_seen

    def train_dataloader(self) -> DataLoader[TextBatch]:
        """Return the training rows in random order; see :class:`~lightning_moe.data.text.TextBatch`."""
        config, dataset = self.config, self._dataset(self.corpus.rows.training)
        num_replicas, rank = data_shard(self.trainer)
        global_batch = config.batch_size * num_replicas
        batches = config.batches_per_epoch or max(len(dataset) // global_batch, 1)
        sampler = ShuffledSampler(dataset, num_replicas, rank, batches * global_batch, seed=config.seed)
        return ResumableDataLoader(dataset, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[TextBatch]:
        """Return ``validation_sequences`` rows of the documents to validate on."""
        dataset = self._dataset(self.corpus.rows.validation)
        number = min(self.config.validation_sequences or len(dataset), len(dataset))
        # Spread evenly, so that a few rows are of many documents.
        chosen = np.arange(number) * len(dataset) // number
        return self._evaluation(Subset(dataset, chosen.tolist()))

    def test_dataloader(self) -> DataLoader[TextBatch]:
        """Return all rows of the held-out documents."""
        return self._evaluation(self._dataset(self.corpus.rows.test))

    def _dataset(self, rows: Rows) -> TextDataset:
        return TextDataset(rows, self.tokenizer, document_mask=self.config.document_mask)

    def _evaluation(self, dataset: Dataset[TextBatch]) -> DataLoader[TextBatch]:
        return DataLoader(dataset, sampler=ShardedSampler(dataset, *data_shard(self.trainer)), **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.config.batch_size,
            "collate_fn": as_fetched,
            "num_workers": self.config.num_workers,
            "persistent_workers": self.config.num_workers > 0,
        }
