"""The zero-bubble schedules of one direction: ZB-H1, on one chunk a rank and on several, and ZB-H2 (torch-free)."""

from __future__ import annotations

from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.alternating import alternate, capped
from lightning_moe.pipeline.schedules.one_f_one_b import MANY_CHUNKS, interleaved_visits
from lightning_moe.pipeline.schedules.options import ScheduleOptions


def zb_h1(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """ZB-H1 (Qi et al. 2023, arXiv:2401.10241, section 2.3): 1F1B whose weight gradients fill the bubble.

    Rank r runs ``ranks - 1 - r`` forwards ahead as 1F1B does, and its weight gradients lag r microbatches behind. It
    holds ``(ranks - r) M_B + r M_W``, no more than 1F1B's rank 0 where M_W <= M_B. The bubble is
    ``(ranks - 1) (TF + TB - TW)`` where TW <= min(TF, TB) and there are twice as many microbatches as ranks.
    ``max_lag=0`` is 1F1B.
    """
    options.chunks_of("zb-h1", range(1, 2), 1)
    visits = [(microbatch, 0) for microbatch in range(microbatches)]
    actions = tuple(
        alternate(visits, visits, warm_up=ranks - 1 - rank, lag=capped(rank, options.max_lag)) for rank in range(ranks)
    )
    return Schedule("zb-h1", Placement(ranks), microbatches, actions)


def zb_h1_interleaved(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """ZB-H1 on several looped chunks a rank.

    Forwards run as far ahead as input gradients need to come back to each rank without a pause: one round for each
    chunk but the last, and ``ranks - 1 - r`` visits; weight gradients lag r visits behind.
    """
    chunks = options.chunks_of("zb-h1-interleaved", MANY_CHUNKS, 2)
    forwards, backwards, first_round = interleaved_visits(ranks, microbatches, chunks)
    ahead = (chunks - 1) * first_round
    cap = None if options.max_lag is None else options.max_lag * chunks
    actions = tuple(
        alternate(forwards, backwards, warm_up=ahead + ranks - 1 - rank, lag=capped(rank, cap)) for rank in range(ranks)
    )
    return Schedule("zb-h1-interleaved", Placement(ranks, chunks), microbatches, actions)


def zb_h2(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """ZB-H2 (Qi et al. 2023, arXiv:2401.10241, section 2.2): about twice the memory of 1F1B for less bubble.

    Rank r runs ``2 (ranks - 1 - r)`` forwards ahead, and its weight gradients lag 2r microbatches behind. It holds
    ``(2 ranks - 2r - 1) M_B + 2r M_W``.
    """
    options.chunks_of("zb-h2", range(1, 2), 1)
    visits = [(microbatch, 0) for microbatch in range(microbatches)]
    actions = tuple(
        alternate(visits, visits, warm_up=2 * (ranks - 1 - rank), lag=capped(2 * rank, options.max_lag))
        for rank in range(ranks)
    )
    return Schedule("zb-h2", Placement(ranks), microbatches, actions)
