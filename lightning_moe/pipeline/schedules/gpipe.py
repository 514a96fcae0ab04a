"""GPipe (torch-free)."""

from __future__ import annotations

from lightning_moe.pipeline.actions import Action, Kind
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.options import ScheduleOptions


def gpipe(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965); holds every microbatch's activations."""
    options.chunks_of("gpipe", range(1, 2), 1)
    forwards = tuple(Action(Kind.F, microbatch) for microbatch in range(microbatches))
    backwards = tuple(Action(Kind.BW, microbatch) for microbatch in range(microbatches))
    return Schedule("gpipe", Placement(ranks), microbatches, (forwards + backwards,) * ranks)
