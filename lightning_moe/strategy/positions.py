"""Where training is in its data: positions of the loaders, and Lightning's count of batches and epochs.

[Note: who restores a loader] Lightning keeps the states of the loaders of rank 0, and restores them where it sets up
the data. That is too early where a user has asked for ``trainer.estimated_stepping_batches``, which sets the data up
before the checkpoint is read, and does not happen at the end of an epoch. Here every rank keeps the states of its own
loaders, and restores them when training starts. What a plain Lightning run would find in a checkpoint stays what
Lightning would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeGuard

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.stateful import Stateful

from lightning_moe.data.stateful import LookBackLoader, PositionedDataLoader, distributed_sampler
from lightning_moe.errors import ConfigError

_LIGHTNINGS = "combined_loader"
"""Where Lightning keeps the states of loaders, among those of its fit loop."""


def capture_positions(trainer: pl.Trainer) -> dict[str, Any]:
    """Positions of this rank's training loaders after the batches that were trained on.

    Returns:
        Copies, an entry for each loader: its state (None where it has none) and the seed of its distributed sampler;
        and the states of the default generators before a batch that Lightning holds, if it holds one.
    """
    loaders = _loaders(trainer)
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    holds = bool(getattr(_fetcher(trainer), "batches", None))
    failed = batches.processed < batches.ready  # an exception within a step; the batch will be trained on again
    return {
        "loaders": deepcopy([_position(loader, look_back=holds or failed) for loader in loaders]),
        "seeds": [getattr(distributed_sampler(loader), "seed", None) for loader in loaders],
        "held_batch": _generators_before_held_batch(loaders) if holds else None,
    }


def put_lightnings_states(checkpoint: Mapping[str, Any], trainer: pl.Trainer, states: Sequence[Any]) -> None:
    """Leave Lightning what it would have written, so that it can resume by itself from a consolidated checkpoint.

    Args:
        checkpoint: Lightning's dictionary.
        trainer: The trainer.
        states: Those of the loaders in :func:`capture_positions`.
    """
    fit_loop = _fit_loop_state(checkpoint)
    fit_loop.pop(_LIGHTNINGS, None)
    if plain := [
        state for loader, state in zip(_loaders(trainer), states, strict=False) if _known_to_lightning(loader)
    ]:
        fit_loop[_LIGHTNINGS] = plain


def take_lightnings_states(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Positions in a checkpoint that another strategy or an earlier release has written; None if it has none.

    They are removed, or Lightning would hand them to loaders that it does not know.
    """
    plain = _fit_loop_state(checkpoint).pop(_LIGHTNINGS, None)
    return {"known_to_lightning": plain} if plain else None


def correct_epochs(checkpoint: Mapping[str, Any]) -> None:
    """Let Lightning go on with the epoch that an uninterrupted run would be in.

    Where training stops within an epoch, by ``max_steps`` or early, Lightning counts the epoch as processed and would
    go on in the middle of the next one. In hooks at the end of an epoch, the epoch is not yet counted as completed.

    Args:
        checkpoint: Lightning's dictionary.
    """
    progress = checkpoint["loops"]["fit_loop"]
    epochs, mid_epoch = progress["epoch_progress"], _is_mid_epoch(progress["epoch_loop.batch_progress"])
    for count in (epochs["total"], epochs["current"]):
        if mid_epoch and count["ready"] == count["started"]:
            count["processed"] = min(count["processed"], count["started"] - 1)
        count["completed"] = count["processed"]


def restore_positions(trainer: pl.Trainer, positions: Mapping[str, Any], then: Callable[[], None]) -> None:
    """Let the training loaders go on.

    Args:
        trainer: The trainer, in ``on_train_start``.
        positions: What :func:`capture_positions` or :func:`take_lightnings_states` returned.
        then: Restores the default generators. In the middle of an epoch it is called after the iterators of loaders
            are made: the run that was not interrupted did not draw for them. Between epochs it is called before.

    Raises:
        ConfigError: The training loaders are not those of the checkpoint.
    """
    fit_loop, fetcher = trainer.fit_loop, _fetcher(trainer)
    mid_epoch = _is_mid_epoch(fit_loop.epoch_loop.batch_progress.state_dict())
    loaders = _loaders(trainer)
    if mid_epoch:
        _warn_of_lost_positions(loaders)
    positioned = _load(loaders, positions)
    epoch: Any = fit_loop.epoch_progress.current
    for loader in positioned:
        # Lightning does so too, but later; the iterators of torchdata settle their order when they are made.
        _set_sampler_epoch(loader, epoch.processed)
        if mid_epoch and isinstance(loader, LookBackLoader):
            loader.first_draws_from(positions.get("held_batch"))
        if not mid_epoch:
            iter(loader)  # this one is at the end of the epoch that is over, the next one begins another epoch
    if not mid_epoch:
        then()
    if positioned:
        iter(fetcher)  # Lightning made the iterators before the loaders had positions
    if mid_epoch:
        then()
    if _is_between_epochs(fit_loop):
        fit_loop.epoch_loop.restarting = False


def _loaders(trainer: pl.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _fetcher(trainer: pl.Trainer) -> Any:
    return trainer.fit_loop._data_fetcher


def _fit_loop_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    return state


def _has_state(loader: Any) -> TypeGuard[Stateful]:
    return isinstance(loader, Stateful)


def _known_to_lightning(loader: Any) -> bool:
    return _has_state(loader) and not isinstance(loader, PositionedDataLoader)


def _position(loader: Any, *, look_back: bool) -> dict[str, Any] | None:
    if not _has_state(loader):
        return None
    if not look_back:
        return loader.state_dict()
    if hasattr(loader, "previous_state_dict"):
        previous: dict[str, Any] = loader.previous_state_dict()
        return previous
    rank_zero_warn(
        f"A resume from this checkpoint will leave out one batch of {type(loader).__name__}: Lightning has fetched it, "
        "but not trained on it."
    )
    return loader.state_dict()


def _generators_before_held_batch(loaders: Sequence[Any]) -> dict[str, Any] | None:
    return next((loader.previous_generators() for loader in loaders if isinstance(loader, LookBackLoader)), None)


def _is_mid_epoch(batch_progress: Mapping[str, Any]) -> bool:
    batches = batch_progress["current"]
    return bool(
        batches["ready"] > 0 and (not batch_progress["is_last_batch"] or batches["processed"] < batches["ready"])
    )


def _is_between_epochs(fit_loop: Any) -> bool:
    """Whether an epoch is over and counted: where it resumes there, Lightning would train on one more batch of it.

    It copes by itself with checkpoints that were written in the last batch, or in the validation after it.
    """
    progress, epochs = fit_loop.epoch_loop.batch_progress, fit_loop.epoch_progress.current
    is_over = progress.is_last_batch and progress.current.completed == progress.current.ready
    return bool(is_over and epochs.processed == epochs.started)


def _load(loaders: Sequence[Any], positions: Mapping[str, Any]) -> list[Any]:
    """Hand loaders their states, and return those that can have one."""
    if "loaders" in positions:
        states, seeds = positions["loaders"], positions["seeds"]
    else:
        states = positions["known_to_lightning"]
        loaders, seeds = [loader for loader in loaders if _known_to_lightning(loader)], [None] * len(states)
    if len(states) != len(loaders):
        raise ConfigError(
            "train_dataloader",
            f"{len(loaders)} loaders with a state",
            f"{len(states)}, as when the checkpoint was written",
            "resume with the loaders of that run",
        )
    positioned = []
    for loader, state, seed in zip(loaders, states, seeds, strict=True):
        sampler = distributed_sampler(loader)
        if sampler is not None and seed is not None:
            sampler.seed = seed
        if _has_state(loader):
            positioned.append(loader)
            if state is not None:
                loader.load_state_dict(state)
    return positioned


def _warn_of_lost_positions(loaders: Sequence[Any]) -> None:
    """Where Lightning is silent: it says so itself of loaders whose length it knows."""
    names = [type(loader).__name__ for loader in loaders if not _has_state(loader) and sized_len(loader) is None]
    if names:
        rank_zero_warn(
            f"The checkpoint was written within an epoch, and {', '.join(names)} has no state_dict and "
            "load_state_dict: it begins anew, and samples that were trained on come again."
        )
