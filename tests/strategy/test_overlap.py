"""Who may let weights arrive while forward has begun, and that nobody reads them too early."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint, Timer
from torch import Tensor

from lightning_moe import MoEStrategy, ParallelConfig
from lightning_moe.parallel.main_params import gather_in_forward
from lightning_moe.strategy.overlap import forward_alone_reads_weights
from tests.distributed import RankPool
from tests.strategy.tiny import TinyMoE, loader, trainer


class Reader(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        """Reads weights, for all one knows."""


class Harmless(Reader):
    reads_weights = False


class Elsewhere(pl.Callback):
    def on_validation_end(self, *args: Any) -> None:
        """The strategy waits before validation."""


class ReadingModule(TinyMoE):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """May read weights as well."""


class SteppingModule(TinyMoE):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """May write weights after the step."""


class Manual(TinyMoE):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "expected"),
    [
        (TinyMoE, [], True),
        (TinyMoE, [ModelCheckpoint(), EarlyStopping("loss"), LearningRateMonitor(), Timer()], True),
        (TinyMoE, [Elsewhere(), Harmless()], True),
        (TinyMoE, [Harmless(), Reader()], False),
        (TinyMoE, [EMAWeightAveraging()], False),
        (ReadingModule, [], False),
        (SteppingModule, [], False),
        (Manual, [], False),
    ],
)
def test_code_of_users_counts_as_a_reader(module: type[TinyMoE], callbacks: list[pl.Callback], expected: bool) -> None:
    run = pl.Trainer(accelerator="cpu", callbacks=callbacks, logger=True, enable_checkpointing=True)
    run.strategy.connect(module())
    assert forward_alone_reads_weights(run) is expected


class Watched(TinyMoE):
    """Notes which gathers are under way when a step begins, and when a promised module has been called."""

    def __init__(self) -> None:
        super().__init__()
        self.pending_at_start: list[int] = []
        self.pending_in_forward: list[int] = []

    def configure_model(self) -> None:
        if self.layers is None:
            super().configure_model()
            assert self.layers is not None
            gather_in_forward(self.layers[1])
            gather_in_forward(self.embed, self.head)  # the head is not called before the embedding

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.trainer.strategy._mains._weights  # type: ignore[attr-defined]
        of_second = set(self.layers[1].parameters())  # type: ignore[index]

        def pending(only: set[Any] | None = None) -> int:
            return sum(
                w.gather is not None
                for w in weights
                if only is None or any(slot.parameter in only for slot in w.bucket.slots)
            )

        def seen(*_: Any) -> None:
            self.pending_in_forward.append(pending(of_second))

        self.pending_at_start.append(pending())
        handle = self.layers[1].router.register_forward_pre_hook(seen)  # type: ignore[index, union-attr]
        try:
            return super().forward(hidden)
        finally:
            handle.remove()


def fit(read: bool) -> tuple[list[int], list[int]]:
    module = Watched()
    run = trainer(
        2,
        0,
        strategy=MoEStrategy(ParallelConfig(), bucket_megabytes=0.002),
        callbacks=[Reader()] if read else [],
        max_steps=4,
        max_epochs=10,
    )
    run.fit(module, loader(32, 8, 2, run.global_rank))
    return module.pending_at_start, module.pending_in_forward


def test_promised_modules_wait_for_their_own_weights(ranks: RankPool) -> None:
    for at_start, in_forward in ranks.run(2, fit, False, init_process_group=False):
        assert at_start[0] == 0
        assert min(at_start[1:]) > 0
        assert in_forward == [0] * 4


def test_nothing_is_pending_where_somebody_may_read(ranks: RankPool) -> None:
    for at_start, in_forward in ranks.run(2, fit, True, init_process_group=False):
        assert at_start == in_forward == [0] * 4


class ReadsAtTheEdges(pl.Callback):
    """Hooks that come before the strategy's own, in the middle of an epoch and where training stops."""

    def __init__(self) -> None:
        self.pending: list[int] = []

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.pending.append(sum(w.gather is not None for w in trainer.strategy._mains._weights))  # type: ignore[attr-defined]

    on_train_epoch_end = on_train_end = on_validation_start


def fit_with_validation(max_steps: int) -> tuple[list[int], list[int]]:
    module, callback = Watched(), ReadsAtTheEdges()
    run = trainer(
        2,
        0,
        strategy=MoEStrategy(ParallelConfig(), bucket_megabytes=0.002),
        callbacks=[callback],
        max_steps=max_steps,
        max_epochs=2,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    data = loader(64, 8, 2, run.global_rank)
    run.fit(module, data, loader(16, 8, 2, run.global_rank))
    return callback.pending, module.pending_at_start


@pytest.mark.parametrize("max_steps", [5, -1])
def test_weights_are_whole_where_training_pauses(ranks: RankPool, max_steps: int) -> None:
    for pending, at_start in ranks.run(2, fit_with_validation, max_steps, init_process_group=False):
        assert set(pending) == {0}
        assert len(pending) >= 3
        assert max(at_start) > 0
