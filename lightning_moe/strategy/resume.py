"""What a run needs, besides weights and optimizer state, to go on as if it had not been interrupted.

[Note: when random states are restored] Between loading a checkpoint and the first batch, Lightning draws from the
default generators (making the iterators of loaders), and so may the user's hooks. The states are therefore restored in
``on_train_start``, the last hook of the strategy before the first batch is fetched: a data set in the main process may
draw when it is. Loaders begin late for the same reason, see ``data/stateful.py``.

[Note: validation does not disturb training] A checkpoint may be written before or after a validation at the same step,
and Lightning does not repeat the validation after a resume. What is drawn in it must therefore not move the generators
that training draws from: they are put back when it ends. Its loaders get a generator of their own, as their iterators
are made before the strategy hears of the validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_moe.data.stateful import give_generator, make_resumable
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.rng import AxisRng, capture_generators, restore_generators
from lightning_moe.strategy.positions import (
    capture_positions,
    correct_epochs,
    put_lightnings_states,
    restore_positions,
    take_lightnings_states,
)

RANK_STATES = "rank_states"
"""Where a checkpoint keeps what :func:`gather` returns."""


def gather(state: Mapping[str, Any] | None, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Collect what :meth:`ExactResume.capture` returned on each rank; a collective call.

    Args:
        state: This rank's.
        group: All ranks; None for one process. Another thread than that of training needs a group of its own.

    Returns:
        The same on every rank: an entry for a checkpoint, of plain values; empty if there is nothing to keep.
    """
    states: list[Any] = [state]
    if group is not None:
        states = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, state, group=group)
    if state is None:
        return {}
    ranks = [{key: value for key, value in one.items() if key != "sizes"} for one in states]
    return {RANK_STATES: {"sizes": state["sizes"], "ranks": ranks}}


class ExactResume:
    """Random states and data positions of one rank: captured when a checkpoint is written, restored after a resume."""

    def __init__(self) -> None:
        self._training = False
        self._outside_validation: dict[str, Any] | None = None
        self._to_restore: dict[str, Any] | None = None
        self._captured: dict[str, Any] | None = None

    def process_dataloader(self, dataloader: object, trainer: pl.Trainer) -> object:
        """Give a training loader a position, and a validation loader a generator; see the notes above.

        Args:
            dataloader: What Lightning is about to use.
            trainer: Its trainer.
        """
        if trainer.training:
            return make_resumable(dataloader)
        if _is_fitting(trainer) and isinstance(dataloader, DataLoader):
            give_generator(dataloader)
        return dataloader

    def start_validation(self, trainer: pl.Trainer) -> None:
        """Remember the generators that training will draw from when the validation has ended."""
        if _is_fitting(trainer):
            self._outside_validation = capture_generators(trainer.strategy.root_device)

    def end_validation(self, trainer: pl.Trainer) -> None:
        """Put them back."""
        if self._outside_validation is not None:
            restore_generators(self._outside_validation, trainer.strategy.root_device)
            self._outside_validation = None

    def capture(
        self, checkpoint: Mapping[str, Any], trainer: pl.Trainer, rng: AxisRng | None, mesh: ParallelMesh | None
    ) -> dict[str, Any] | None:
        """This rank's state now, or that at the end of training.

        Args:
            checkpoint: Lightning's dictionary. The states of loaders in it become those that plain Lightning would
                have written for the batches that were trained on.
            trainer: The trainer.
            rng: The random streams of training.
            mesh: The mesh; None in the main process of spawn, which has nothing to add.

        Returns:
            A copy, as plain values that ``torch.load(weights_only=True)`` reads (of the user's own loaders, what they
            return); None where there is nothing to resume: before training, or for weights alone.
        """
        if mesh is None or "optimizer_states" not in checkpoint:
            return None
        if self._training:
            self._captured = self._capture(trainer, rng, mesh)
        if self._captured is not None:
            put_lightnings_states(checkpoint, trainer, self._captured["loaders"])
        return self._captured

    def end_training(self, trainer: pl.Trainer, rng: AxisRng | None, mesh: ParallelMesh) -> None:
        """Keep the state for checkpoints that are written later: Lightning takes the iterators of loaders apart."""
        self._captured, self._training = self._capture(trainer, rng, mesh), False

    def _capture(self, trainer: pl.Trainer, rng: AxisRng | None, mesh: ParallelMesh) -> dict[str, Any]:
        return {
            "sizes": _sizes(mesh),
            "generators": self._outside_validation or capture_generators(trainer.strategy.root_device),
            "streams": {} if rng is None else rng.state_dict(),
            **capture_positions(trainer),
        }

    def take(self, checkpoint: dict[str, Any], mesh: ParallelMesh) -> None:
        """Take what is this rank's out of a checkpoint that was loaded, and keep it until training starts.

        A rank of another mesh has no counterpart: its random states begin anew, and its data position is rank 0's.

        Args:
            checkpoint: Lightning's dictionary.
            mesh: The mesh.
        """
        states = checkpoint.pop(RANK_STATES, None)
        lightnings = take_lightnings_states(checkpoint)
        self._captured = None
        if states is None:
            self._to_restore = lightnings
            return
        correct_epochs(checkpoint)
        if states["sizes"] == _sizes(mesh):
            self._to_restore = self._captured = {"sizes": states["sizes"], **states["ranks"][mesh.global_rank]}
        else:
            self._to_restore = {key: states["ranks"][0][key] for key in ("loaders", "seeds")}

    def start_training(self, trainer: pl.Trainer, rng: AxisRng) -> None:
        """Restore what :meth:`take` has kept; nothing happens where there is none.

        Args:
            trainer: The trainer, in ``on_train_start``.
            rng: The random streams of training.

        Raises:
            ConfigError: The training loaders are not those of the checkpoint.
        """
        self._training, self._outside_validation = True, None
        state, self._to_restore = self._to_restore, None
        if state is None:
            return

        def restore() -> None:
            if "generators" in state:
                restore_generators(state["generators"], trainer.strategy.root_device)

        restore_positions(trainer, state, restore)
        if state.get("streams"):
            rng.load_state_dict(state["streams"])


def _is_fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _sizes(mesh: ParallelMesh) -> dict[str, int]:
    axes = (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT, Axis.TENSOR, Axis.EXPERT, Axis.EXPERT_TENSOR)
    return {str(axis): mesh.size(axis) for axis in axes}
