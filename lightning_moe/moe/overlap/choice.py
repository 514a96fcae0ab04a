"""Chooses how an expert layer's calls of some shape go: by what was tried, else by the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.moe.overlap.cost import WORTHWHILE, LayerShape, Rates, choose
from lightning_moe.moe.overlap.plan import Chunking
from lightning_moe.parallel.sm_margin import sm_margin_for

LARGE_PRODUCT = 1.6e10
"""Multiply-adds that take an H200 40 microseconds: much more than it takes to launch a product."""
_TALL = 256
"""Rows of one source and expert from which a grouped product runs well; for chunks without measured rates."""
_MOST_TRIALS = 8
"""Shapes that are tried; others, as of sequences of many lengths, go by the nearest of these."""


class OverlapChoice:
    """How calls go.

    Args:
        config: What the user wants.
        rates: Measured rates; None where the config leaves nothing to be chosen.
        large_product: As of :class:`~lightning_moe.moe.overlap.executor.ExpertOverlap`.
        trials: Likewise.
        report: Likewise.
    """

    def __init__(
        self,
        config: OverlapConfig,
        rates: Rates | None,
        large_product: float,
        trials: dict[LayerShape, tuple[float, float]] | None,
        report: Callable[[str], None] | None,
    ) -> None:
        self._config, self._rates = config, rates
        self.large_product = large_product
        self.trials = trials
        self._report = report
        self._chosen: dict[tuple[LayerShape, bool], Chunking | None] = {}

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_report": None}  # a strategy's log stays here

    def chunking(self, shape: LayerShape) -> Chunking | None:
        """How calls of this shape are cut into chunks; None for an all-to-all."""
        trial = self._nearest_trial(shape)
        if trial is None:
            return self._cut(shape, asked=False)
        blocking, overlapped = trial
        return self._cut(shape, asked=True) if overlapped <= blocking * (1 - WORTHWHILE) else None

    def untried(self, shape: LayerShape) -> Chunking | None:
        """The chunks to try on a call of this shape; None where nothing is to be tried."""
        if self.trials is None or self._config.dispatch != "auto":
            return None
        if shape in self.trials or len(self.trials) == _MOST_TRIALS:
            return None
        return self._cut(shape, asked=True)

    def add_trial(self, shape: LayerShape, seconds: tuple[float, float]) -> None:
        """Keep what an all-to-all and overlap took on a call of this shape."""
        assert self.trials is not None
        self.trials[shape] = seconds
        if self._report is not None:
            blocking, overlapped = (f"{1e3 * each:.3g} ms" for each in seconds)
            chosen = "an all-to-all" if self.chunking(shape) is None else "overlap"
            self._report(
                f"overlap: {shape.rows} rows take {blocking} by an all-to-all, {overlapped} with overlap: {chosen}"
            )

    def sm_margin(self, ranks: int) -> int:
        """Multiprocessors that products leave to the messages among so many ranks."""
        return sm_margin_for(ranks, self._config.sm_margin)

    def _nearest_trial(self, shape: LayerShape) -> tuple[float, float] | None:
        """What was found for the shape, or for that with the most similar number of rows."""
        trials = self.trials or {}
        alike = [tried for tried in trials if tried.itemsize == shape.itemsize]
        if not alike or self._config.dispatch != "auto":
            return None
        return trials[min(alike, key=lambda tried: abs(log(tried.rows / shape.rows)))]

    def _cut(self, shape: LayerShape, *, asked: bool) -> Chunking | None:
        """The cost model's chunks; also where it prefers an all-to-all, if they are asked for."""
        key = shape, asked
        if key not in self._chosen:
            chosen = self._choose(shape, replace(self._config, dispatch="p2p") if asked else self._config)
            if chosen is not None:
                chosen = chosen._replace(slot_major=_products(shape, chosen) >= self.large_product)
            self._chosen[key] = chosen
        return self._chosen[key]

    def _choose(self, shape: LayerShape, config: OverlapConfig) -> Chunking | None:
        if config.dispatch == "blocking":
            return None
        if self._rates is not None:
            return choose(shape, self._rates, config)
        by = config.chunk
        if by == "auto":
            by = "source" if shape.rows >= _TALL * shape.ranks * shape.local_slots else "expert"
        groups = 1 if by == "source" else min(config.expert_groups or 4, shape.local_slots)
        return Chunking(by, groups)


def _products(shape: LayerShape, chunking: Chunking) -> float:
    """Multiply-adds of the first projection of a chunk's rows of one slot."""
    sources = 1 if chunking.by == "source" else shape.ranks - 1
    return sources * shape.rows / shape.ranks / shape.local_slots * shape.hidden * shape.up_width
