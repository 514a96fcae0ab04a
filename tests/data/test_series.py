from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from lightning_moe.data import ForecastBatch, SeriesDataModule
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import seasonal_error
from tests.distributed import RankPool

DTYPES = {
    "context": torch.float32,
    "target": torch.float32,
    "scale": torch.float64,
    "seasonal_error": torch.float64,
    "series_index": torch.int64,
    "dataset_index": torch.int64,
}


def competitions(**arguments: Any) -> SeriesDataModule:
    """Two data sets with series too short to be validated on, and a third of another horizon."""
    settings: dict[str, Any] = {"datasets": ["m1_yearly", "tourism_quarterly"], "batch_size": 32}
    data = SeriesDataModule(**settings | {"context_length": 24, "prediction_length": 10} | arguments)
    data.setup("fit")
    return data


def check_window(data: SeriesDataModule, item: ForecastBatch, history: np.ndarray, target: np.ndarray) -> None:
    """Compare one item with the observations before and after the cut."""
    scale = float(item["scale"])
    context = np.full(data.context_length, np.nan)
    past = history[-data.context_length :]
    context[-len(past) :] = past
    np.testing.assert_allclose(item["context"].double().numpy() * scale, context, rtol=1e-7)
    future = np.full(data.prediction_length, np.nan)
    future[: len(target)] = target
    np.testing.assert_allclose(item["target"].double().numpy() * scale, future, rtol=1e-7)


def test_batches_have_the_documented_format() -> None:
    data = competitions()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        assert {name: tensor.dtype for name, tensor in batch.items()} == DTYPES  # type: ignore[attr-defined]
        assert batch["context"].shape == (32, 24)
        assert batch["target"].shape == (32, 10)
        for name in ("scale", "seasonal_error", "series_index", "dataset_index"):
            assert batch[name].shape == (32,)  # type: ignore[literal-required]
        names = [data.dataset_names[index] for index in batch["dataset_index"]]
        assert names == [data.series[index].dataset for index in batch["series_index"]]


def test_items_are_rows_of_batches() -> None:
    dataset = competitions().train_dataloader().dataset
    batch = dataset.__getitems__([5, 2])  # type: ignore[attr-defined]
    for row, index in enumerate((5, 2)):
        item = dataset[index]
        for name in DTYPES:
            torch.testing.assert_close(item[name], batch[name][row], rtol=0, atol=0, equal_nan=True)  # type: ignore[literal-required]


def test_validation_test_and_prediction_windows() -> None:
    data = competitions()
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader(), "predict": data.predict_dataloader()}
    seen: dict[str, list[int]] = {name: [] for name in loaders}
    for name, loader in loaders.items():
        for index in range(len(loader.dataset)):  # type: ignore[arg-type]
            item = loader.dataset[index]
            series = data.series[int(item["series_index"])]
            seen[name].append(int(item["series_index"]))
            history, target = {
                "val": (series.values[: -series.horizon], series.values[-series.horizon :]),
                "test": (series.values, series.test),
                "predict": (np.r_[series.values, series.test], np.empty(0)),
            }[name]
            check_window(data, item, history, target)
            expected = seasonal_error(history, series.season_length)
            np.testing.assert_equal(float(item["seasonal_error"]), expected)
    everything = list(range(len(data.series)))
    assert seen["test"] == seen["predict"] == everything
    long_enough = [i for i in everything if len(data.series[i].values) > data.series[i].horizon + 5]
    assert seen["val"] == long_enough
    assert 0 < len(long_enough) < len(everything)


def test_training_never_sees_a_validation_or_test_target() -> None:
    data = competitions(batches_per_epoch=100)
    validated = {int(index) for batch in data.val_dataloader() for index in batch["series_index"]}
    for batch in data.train_dataloader():
        restored = (torch.cat([batch["context"], batch["target"]], dim=1) * batch["scale"][:, None]).numpy()
        for row, index in zip(restored, batch["series_index"].tolist(), strict=True):
            series = data.series[index]
            visible = series.values[: -series.horizon] if index in validated else series.values
            window = row[~np.isnan(row)]
            # The window is a contiguous part of what training may see.
            assert any(
                np.allclose(window, visible[start : start + len(window)], rtol=1e-6)
                for start in range(len(visible) - len(window) + 1)
            )
        assert (~batch["context"].isnan()).any(dim=1).all()
        assert (~batch["target"].isnan()).any(dim=1).all()


def test_epochs_differ_and_repeat_exactly() -> None:
    first, again = competitions(batches_per_epoch=3), competitions(batches_per_epoch=3, num_workers=2)
    epochs = []
    for data in (first, again):
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            epochs.append(torch.cat([batch["scale"] for batch in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])
    other_seed = torch.cat([batch["scale"] for batch in competitions(batches_per_epoch=3, seed=1).train_dataloader()])
    assert not torch.equal(epochs[0], other_seed)


def long_frame(num_series: int, length: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    times = pd.date_range("2020-01-01", periods=length, freq="MS")
    parts = [
        pd.DataFrame({"item_id": f"s{i}", "timestamp": times, "target": rng.normal(10.0, 1.0, length)})
        for i in range(num_series)
    ]
    return pd.concat(parts)


@pytest.mark.parametrize("source", ["frame", "csv"])
def test_own_data(source: str, tmp_path: Any) -> None:
    frame = long_frame(5)
    frame.to_csv(tmp_path / "sales.2024.csv", index=False)
    given: dict[str, Any] = {"frame": frame} if source == "frame" else {"path": str(tmp_path / "sales.2024.csv")}
    data = SeriesDataModule(**given, prediction_length=6, context_length=12, batch_size=2)
    data.setup("fit")
    assert data.dataset_names == (("frame",) if source == "frame" else ("sales",))
    assert [series.horizon for series in data.series] == [6] * 5
    assert [len(batch["scale"]) for batch in data.test_dataloader()] == [2, 2, 1]
    assert len(list(data.val_dataloader())) == 3
    values = frame["target"].to_numpy()[:30]
    check_window(data, data.test_dataloader().dataset[0], values[:24], values[24:])


def test_setup_twice_loads_once() -> None:
    data = competitions()
    series = data.series
    data.setup("test")
    assert data.series is series


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"datasets": ["m1_yearly"], "path": "x.csv"}, "path"),
        ({"path": "x.csv", "frame": pd.DataFrame()}, "frame"),
        ({"season_length": 12}, "season_length"),
        ({"frequency": "D"}, "frequency"),
        ({"path": "x.csv", "season_length": 0}, "season_length"),
        ({"context_length": 0}, "context_length"),
        ({"prediction_length": True}, "prediction_length"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batches_per_epoch": 0}, "batches_per_epoch"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SeriesDataModule(**arguments)
    assert caught.value.field == field


def test_a_horizon_longer_than_the_forecast_is_refused() -> None:
    data = SeriesDataModule(datasets=["m1_yearly", "m1_monthly"], prediction_length=12)
    with pytest.raises(ConfigError, match="at least 18, the horizon of m1_monthly"):
        data.setup("fit")


class Recorder(L.LightningModule):
    """Notes which windows it is given; its one weight is the sum of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: dict[str, list[list[float]]] = {"train": [], "val": [], "test": [], "predict": []}

    def _note(self, phase: str, batch: ForecastBatch) -> None:
        keys = batch["series_index"] + batch["scale"] if phase == "train" else batch["series_index"]
        self.seen[phase].append(keys.tolist())

    def training_step(self, batch: ForecastBatch, batch_idx: int) -> Tensor:
        self._note("train", batch)
        return self.weight * batch["scale"].log().mean()

    def validation_step(self, batch: ForecastBatch, batch_idx: int) -> None:
        self._note("val", batch)

    def test_step(self, batch: ForecastBatch, batch_idx: int) -> None:
        self._note("test", batch)

    def predict_step(self, batch: ForecastBatch, batch_idx: int) -> Tensor:
        self._note("predict", batch)
        return batch["series_index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(**arguments: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return L.Trainer(**quiet | defaults | arguments)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def run_everything(batch_size: int, frame: pd.DataFrame) -> tuple[dict[str, list[list[float]]], int]:
    """All four phases under DDP, or in one process without torch.distributed."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    data = SeriesDataModule(
        frame=frame, batch_size=batch_size, batches_per_epoch=3, prediction_length=6, context_length=12
    )
    module = Recorder()
    distributed: dict[str, Any] = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    run = trainer(max_epochs=2, **distributed)
    run.fit(module, data)
    module.seen["val"].clear()
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    predictions = run.predict(module, data) or []  # None where there is nothing to predict
    return module.seen, sum(len(batch) for batch in predictions)


def sorted_steps(seen: list[dict[str, list[list[float]]]], phase: str) -> list[list[float]]:
    steps = max(len(rank[phase]) for rank in seen)
    return [
        sorted(key for rank in seen for key in (rank[phase] + [[]])[min(step, len(rank[phase]))])
        for step in range(steps)
    ]


def test_ranks_share_the_data_of_one_process(ranks: RankPool) -> None:
    frame = long_frame(5)
    alone, predicted = run_everything(4, frame)
    assert predicted == 5
    results = ranks.run(2, run_everything, 2, frame)
    together = [seen for seen, _ in results]
    assert sum(count for _, count in results) == 5
    for phase in alone:
        assert sorted_steps(together, phase) == sorted_steps([alone], phase)
    assert len(alone["train"]) == 6
    for phase in ("val", "test", "predict"):
        assert sorted(key for step in alone[phase] for key in step) == [0, 1, 2, 3, 4]


def test_a_rank_without_series_takes_part(ranks: RankPool) -> None:
    results = ranks.run(2, run_everything, 2, long_frame(1))
    assert [seen["test"] for seen, _ in results] == [[[0]], []]


class SaveAt(L.Callback):
    """Saves a checkpoint after some steps, as ModelCheckpoint does."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.filterwarnings("error:.*not resumable")
def test_a_resumed_run_continues_with_the_next_window(step: int, num_workers: int, tmp_path: Any) -> None:
    # Three batches per epoch: the checkpoint lies inside the first epoch, at its end, and inside the second.
    def data() -> SeriesDataModule:
        return SeriesDataModule(
            frame=long_frame(4),
            batch_size=4,
            batches_per_epoch=3,
            prediction_length=6,
            context_length=12,
            num_workers=num_workers,
        )

    path = str(tmp_path / "step.ckpt")
    uninterrupted, resumed = Recorder(), Recorder()
    trainer(max_epochs=3, callbacks=[SaveAt(step, path)]).fit(uninterrupted, data())
    trainer(max_epochs=3).fit(resumed, data(), ckpt_path=path)
    assert resumed.seen["train"] == uninterrupted.seen["train"][step:]
    assert math.isclose(resumed.weight.item(), uninterrupted.weight.item(), rel_tol=1e-12)


def test_overfit_batches_repeats_the_first_batches() -> None:
    module = Recorder()
    data = SeriesDataModule(frame=long_frame(4), batch_size=4, batches_per_epoch=9, prediction_length=6)
    with pytest.warns(UserWarning, match="overfit"):
        trainer(max_epochs=2, overfit_batches=2, limit_val_batches=0).fit(module, data)
    assert module.seen["train"][:2] == module.seen["train"][2:]
