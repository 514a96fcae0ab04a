"""Whether all ranks are still there after an exception, found out without a collective call that could hang."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store


def meet(place: str, rank: int, world_size: int, patience: timedelta) -> bool:
    """Wait until every rank has come to the same place.

    Args:
        place: What the ranks have in common, e.g. the step at which they stopped; each place is used once.
        rank: This rank.
        world_size: Number of ranks.
        patience: How long to wait for the others.

    Returns:
        Whether all have come, and know that all have come.
    """
    try:
        store = PrefixStore(f"meeting/{place}", _get_default_store())
        store.set(str(rank), "here")
        store.wait([str(other) for other in range(world_size)], patience)
        # A rank that has seen all says so, and nobody goes on before all have said it.
        store.set(f"{rank} has seen all", "yes")
        store.wait([f"{other} has seen all" for other in range(world_size)], patience)
    except (RuntimeError, ValueError):  # nobody came in time; or the process that keeps the store is gone
        return False
    return True
