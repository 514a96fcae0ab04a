"""1F1B, on one chunk a rank and on several (torch-free)."""

from __future__ import annotations

from itertools import accumulate, pairwise

from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.alternating import Visit, alternate
from lightning_moe.pipeline.schedules.options import ScheduleOptions

MANY_CHUNKS = range(2, 1025)
"""Numbers of chunks that an interleaved schedule can have."""


def one_f_one_b(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """1F1B (Narayanan et al. 2019, PipeDream; flushed after every step).

    Rank r runs ``ranks - 1 - r`` forwards ahead, and so holds the activations of ``ranks - r`` microbatches. The bubble
    is ``(ranks - 1) (TF + TB + TW)``.
    """
    options.chunks_of("1f1b", range(1, 2), 1)
    visits = [(microbatch, 0) for microbatch in range(microbatches)]
    actions = tuple(alternate(visits, visits, warm_up=ranks - 1 - rank) for rank in range(ranks))
    return Schedule("1f1b", Placement(ranks), microbatches, actions)


def interleaved_one_f_one_b(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    With v chunks a rank the bubble is that of 1F1B divided by v, where the microbatches are a multiple of the ranks.
    """
    chunks = options.chunks_of("interleaved-1f1b", MANY_CHUNKS, 2)
    forwards, backwards, first_round = interleaved_visits(ranks, microbatches, chunks)
    ahead = (chunks - 1) * first_round
    actions = tuple(alternate(forwards, backwards, warm_up=ahead + 2 * (ranks - 1 - rank)) for rank in range(ranks))
    return Schedule("interleaved-1f1b", Placement(ranks, chunks), microbatches, actions)


def interleaved_visits(ranks: int, microbatches: int, chunks: int) -> tuple[list[Visit], list[Visit], int]:
    """The order in which a rank with several looped chunks visits them.

    Microbatches go through the chunks in rounds of at least as many as there are ranks (all of them, if they are
    fewer), so that the first is back at rank 0 when the round has been through there.

    Returns:
        Visits in the order of their forwards, visits in the order of their backwards, and the size of the first round.
    """
    rounds = max(1, microbatches // ranks)
    # The first rounds are the larger ones: a round that is shorter than what is in flight would leave ranks waiting.
    sizes = [microbatches // rounds + (index < microbatches % rounds) for index in range(rounds)]
    spans = [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
    forwards = [(microbatch, chunk) for span in spans for chunk in range(chunks) for microbatch in span]
    backwards = [(microbatch, chunk) for span in spans for chunk in reversed(range(chunks)) for microbatch in span]
    return forwards, backwards, sizes[0]
