"""The data module: the same batches for any topology, exact resumes, and honest evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.data import has_len_all_ranks
from torch import Tensor

from lightning_moe import ConfigError, MoEStrategy, TextDataModule
from lightning_moe.data.text import TextBatch
from tests.data.text.folder import write_texts
from tests.distributed import RankPool

SETTINGS: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "holdout_modulus": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


def module(folder: Path | str, **settings: Any) -> TextDataModule:
    data = TextDataModule(str(folder), **SETTINGS | settings)
    data.prepare_data()
    data.setup("fit")
    return data


class Shard:
    """What the data module asks of a trainer."""

    def __init__(self, num_replicas: int, rank: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": num_replicas, "rank": rank}


def on_ranks(num_replicas: int, folder: Path, **settings: Any) -> list[TextDataModule]:
    """One data module for each data rank, the global batch always the same."""
    modules = [module(folder, **settings, batch_size=4 // num_replicas) for _ in range(num_replicas)]
    for rank, data in enumerate(modules):
        data.trainer = Shard(num_replicas, rank)  # type: ignore[assignment]
    return modules


def rows_of(batches: Iterable[TextBatch]) -> list[tuple[int, ...]]:
    """Rows of all batches, sorted: a global batch is a set."""
    return sorted(tuple(row) for batch in batches for row in batch["tokens"].tolist())


def global_batches(loaders: list[Any]) -> list[list[tuple[int, ...]]]:
    return [rows_of(parts) for parts in zip(*loaders, strict=True)]


# --- what is in the batches


def test_standard_library_in_bytes_by_default() -> None:
    data = TextDataModule()
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size == 257
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"tokens", "labels", "positions", "documents", "label_bytes"}
    assert all(tensor.shape == (8, 512) and tensor.dtype == torch.int64 for tensor in batch.values())
    held_out = len(data.corpus.held_out_text(1 << 30))
    predicted = sum(int(batch["label_bytes"].sum()) for batch in data.test_dataloader())
    documents = sum(int((batch["labels"] == data.tokenizer.end).sum()) for batch in data.test_dataloader())
    assert predicted == held_out - documents
    assert sum(len(batch["tokens"]) for batch in data.val_dataloader()) == 128


def test_parts_share_no_text(folder: Path) -> None:
    data = module(folder)
    texts = {path: path.read_bytes() for path in folder.rglob("*.txt")}
    assert sum(map(len, texts.values())) > sum(len(rows) for rows in data.corpus.rows) * 15
    held_out = data.corpus.held_out_text(1 << 30)
    parts = [sorted(rows_of(loader)) for loader in (data.train_dataloader(), data.test_dataloader())]
    assert not set(parts[0]) & set(parts[1])
    shown = b"".join(bytes(t for t in row if t < 256) for batch in data.test_dataloader() for row in batch["tokens"])
    assert shown[: len(held_out)] == held_out[: len(shown)]


def test_validation_rows_are_spread_evenly(folder: Path) -> None:
    every = rows_of(module(folder, validation_sequences=None).val_dataloader())
    assert len(every) > 40
    few = rows_of(module(folder, validation_sequences=7).val_dataloader())
    assert len(few) == 7
    assert set(few) <= set(every)
    assert rows_of(module(folder, validation_sequences=10_000).val_dataloader()) == every


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_each_evaluated_row_is_on_one_rank(folder: Path, num_replicas: int) -> None:
    def loaders(ranks: int) -> list[TextBatch]:
        modules = on_ranks(ranks, folder) if ranks == 1 else [module(folder, batch_size=4) for _ in range(ranks)]
        for rank, data in enumerate(modules):
            data.trainer = Shard(ranks, rank)  # type: ignore[assignment]
        return [batch for data in modules for batch in data.test_dataloader()]

    assert rows_of(loaders(num_replicas)) == rows_of(module(folder).test_dataloader())


# --- the order of training


def test_global_batches_do_not_depend_on_the_ranks(folder: Path) -> None:
    expected = global_batches([module(folder).train_dataloader()])
    for num_replicas in (2, 4):
        assert global_batches([data.train_dataloader() for data in on_ranks(num_replicas, folder)]) == expected
    assert global_batches([module(folder, seed=1).train_dataloader()]) != expected
    assert global_batches([module(folder, num_workers=2).train_dataloader()]) == expected


def test_epochs_are_shuffled_anew(folder: Path) -> None:
    loader: Any = module(folder).train_dataloader()
    first = global_batches([loader])
    loader.sampler.set_epoch(1)
    second = global_batches([loader])
    assert len(first) == len(second) == len(loader) == len(loader.dataset) // 4
    assert first != second
    of_first = {row for batch in first for row in batch}
    of_second = {row for batch in second for row in batch}
    assert len(of_first & of_second) > 0.9 * len(of_first)
    assert len(module(folder, batches_per_epoch=7).train_dataloader()) == 7


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_in_mid_epoch_on_another_number_of_ranks(folder: Path, num_workers: int) -> None:
    saved: Any = module(folder, num_workers=num_workers).train_dataloader()
    saved.sampler.set_epoch(1)
    batches = iter(saved)
    for _ in range(3):
        next(batches)
    state = saved.state_dict()
    rest = global_batches([batches])
    for num_replicas, workers in ((1, 2 - num_workers), (2, num_workers), (4, 0)):
        modules = on_ranks(num_replicas, folder, num_workers=workers)
        loaders: list[Any] = [data.train_dataloader() for data in modules]
        for loader in loaders:
            loader.load_state_dict(state)
        assert global_batches(loaders) == rest


# --- under a Trainer


class Recorder(pl.LightningModule):
    """Keeps the rows that it trains on, of all data ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows: list[list[tuple[int, ...]]] = []

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        gathered = [batch["tokens"]]
        if torch.distributed.is_initialized():
            gathered = [torch.empty_like(batch["tokens"]) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(gathered, batch["tokens"])
        self.rows.append(sorted(tuple(row) for part in gathered for row in part.tolist()))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(folder: str, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=f"{folder}/runs",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def train(world_size: int, folder: str, steps: int, resume: str | None, **settings: Any) -> dict[str, Any]:
    """Train up to ``steps`` in total; return the rows of this run by step, the tokens seen, and two checkpoints.

    One is written during the last step, in mid-epoch; the other after it, when Lightning counts the epoch as complete.
    """
    path = f"{folder}/runs/{world_size}-{steps}-{settings['batch_size']}"
    trainer = quiet_trainer(
        folder,
        devices=world_size,
        strategy=MoEStrategy(),
        max_steps=steps,
        max_epochs=100,
        callbacks=ModelCheckpoint(path, filename="during", every_n_train_steps=steps, enable_version_counter=False),
    )
    model = Recorder()
    data = TextDataModule(folder, **SETTINGS | settings)
    trainer.fit(model, data, ckpt_path=resume)
    trainer.save_checkpoint(f"{path}/after.ckpt")
    return {"rows": model.rows, "tokens": data.tokens_seen, "path": path}


@pytest.mark.slow
def test_a_resumed_training_goes_on_with_the_next_rows(ranks: RankPool, tmp_path: Path) -> None:
    """Over the ends of epochs of 15 batches, from one process to two and back, the global batch kept or doubled."""
    write_texts(tmp_path, 30)

    def run(world_size: int, steps: int, resume: str | None, batch_size: int, num_workers: int = 0) -> dict[str, Any]:
        settings = {"batch_size": batch_size, "num_workers": num_workers, "batches_per_epoch": 15}
        results: list[dict[str, Any]] = ranks.run(
            world_size, train, world_size, str(tmp_path), steps, resume, **settings, init_process_group=False
        )
        assert all(result["rows"] == results[0]["rows"] for result in results)
        return results[0]

    whole = run(1, 40, None, 4)
    assert whole["tokens"] == 40 * 4 * 16
    part = run(1, 11, None, 4)
    assert part["rows"] == whole["rows"][:11]
    same = run(2, 25, f"{part['path']}/during.ckpt", 2)
    assert same["rows"] == whole["rows"][11:25]
    assert same["tokens"] == 25 * 4 * 16
    back = run(1, 40, f"{same['path']}/during.ckpt", 4, num_workers=2)
    assert back["rows"] == whole["rows"][25:]
    for when in ("during", "after"):
        doubled = run(2, 25, f"{part['path']}/{when}.ckpt", 4)
        pairs = zip(whole["rows"][11::2], whole["rows"][12::2], strict=False)
        assert doubled["rows"] == [sorted(first + second) for first, second in pairs]


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on short epochs and validation
def test_epochs_that_lightning_ends_or_repeats(folder: Path) -> None:
    def rows(**settings: Any) -> tuple[list[list[tuple[int, ...]]], int | None]:
        model, data = Recorder(), TextDataModule(str(folder), **SETTINGS)
        quiet_trainer(str(folder), enable_checkpointing=False, **settings).fit(model, data)
        return model.rows, data.tokens_seen

    whole, tokens = rows(max_steps=12)
    assert tokens == 12 * 4 * 16
    assert rows(max_epochs=3, limit_train_batches=4) == (whole, tokens), "no row is left out"
    again, _ = rows(max_epochs=3, limit_train_batches=4, reload_dataloaders_every_n_epochs=1)
    assert len({tuple(batch) for batch in again}) == 12, "a new loader does not begin from the start"
    repeated, unknown = rows(max_epochs=2, overfit_batches=2)
    assert repeated[:2] == repeated[2:]
    assert unknown is None


class Both:
    """What Lightning asks of a strategy on the second of two ranks, the first of which has one batch."""

    root_device = torch.device("cpu")

    def reduce(self, length: Tensor, reduce_op: str) -> Tensor:
        return length + 1


def test_a_rank_without_rows_to_validate_on_is_refused(folder: Path) -> None:
    """It would skip the loop, and the others would wait for its scores."""
    data = on_ranks(2, folder, validation_sequences=1)[1]
    allowed = data.allow_zero_length_dataloader_with_multiple_devices
    with pytest.raises(RuntimeError, match="zero length"):
        has_len_all_ranks(data.val_dataloader(), Both(), allowed)  # type: ignore[arg-type]


# --- trained vocabularies


def test_a_trained_vocabulary_is_kept_and_found_again(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 300, "cache_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        TextDataModule(str(folder), **SETTINGS | settings).setup("fit")
    data = module(folder, **settings)
    assert data.vocab_size == 300
    (path,) = tmp_path.rglob("*.json")
    written = path.stat().st_mtime_ns
    again = module(folder, **settings)
    assert path.stat().st_mtime_ns == written
    assert global_batches([again.train_dataloader()]) == global_batches([data.train_dataloader()])
    from_file = module(folder, tokenizer=str(path))
    assert global_batches([from_file.train_dataloader()]) == global_batches([data.train_dataloader()])
    held_out = data.corpus.held_out_text(1 << 30)
    masked = sum(int(batch["label_bytes"].sum()) for batch in data.test_dataloader())
    whole = sum(int(b["label_bytes"].sum()) for b in module(folder, document_mask=False, **settings).test_dataloader())
    first = data.tokenizer.encode_bytes(held_out)[0]
    assert whole == len(held_out) - len(data.tokenizer.token_bytes[first])
    assert masked < whole


def test_a_vocabulary_that_is_not_whole_is_trained_again(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 280, "cache_dir": str(tmp_path)}
    module(folder, **settings)
    (path,) = tmp_path.rglob("*.json")
    description = path.read_text()
    path.write_text(description[:100])
    module(folder, **settings)
    assert path.read_text() == description


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*file' .* can be written to"):
        module(folder, tokenizer="bpe", vocab_size=280, cache_dir=str(tmp_path / "file"))


def test_where_vocabularies_are_kept_by_default(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module(folder, tokenizer="bpe", vocab_size=280)
    assert [path.name for path in (tmp_path / "lightning_moe").rglob("*.*")] == ["tokenizer.json"]


# --- refusals


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size: 0"):
        TextDataModule(batch_size=0)
    with pytest.raises(ConfigError, match=r"data\.path: .*nowhere"):
        module(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.pattern: '\*\.rst'"):
        module(folder, pattern="*.rst")
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 1000000"):
        module(folder, sequence_length=1_000_000)


def test_the_home_folder_may_be_named_by_a_tilde(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    settings: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 270}
    data = module(f"~/{folder.name}", cache_dir=f"~/{tmp_path.name}", **settings)
    assert rows_of(data.test_dataloader()) == rows_of(
        module(folder, cache_dir=str(tmp_path), **settings).test_dataloader()
    )
    assert list((folder.parent / tmp_path.name).iterdir())
