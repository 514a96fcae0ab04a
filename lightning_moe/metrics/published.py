"""Published scores of known forecasters on the data sets that :mod:`lightning_moe.data` can load.

Source: the Chronos zero-shot benchmark as published in the result files of github.com/autogluon/fev
(``benchmarks/chronos_zeroshot/results``, state of 2026-08-19); benchmark: Ansari et al., "Chronos: Learning
the Language of Time Series", TMLR 2024, arXiv:2403.07815. TiRex: Auer et al., arXiv:2505.23719. AutoETS and
AutoTheta are statistical models that are fitted to each series.

The pretrained models there are zero-shot: they were not trained on these data sets. A model trained on the
history of these same series is in-domain, and its scores are not the same kind of evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Score(NamedTuple):
    """Scores of one forecaster on one data set, or relative to a baseline over several."""

    mase: float
    """Mean absolute scaled error of the median forecast."""
    wql: float
    """Weighted quantile loss over the levels 0.1, 0.2, ..., 0.9."""


COMPARABLE_DATASETS: tuple[str, ...] = (
    "m1_yearly",
    "m1_quarterly",
    "m1_monthly",
    "m3_yearly",
    "m3_quarterly",
    "m3_monthly",
    "tourism_quarterly",
    "tourism_monthly",
)
"""Data sets on which our seasonal naive forecast scores as published, so that scores can be compared.

``tourism_yearly`` is not among them: the benchmark uses another cut of it. ``m3_other`` is not in the
benchmark.
"""

BASELINE = "Seasonal naive"
"""Name of the published baseline."""


def _scores(*, mase: tuple[float, ...], wql: tuple[float, ...]) -> Mapping[str, Score]:
    rows = zip(COMPARABLE_DATASETS, mase, wql, strict=True)
    return MappingProxyType({dataset: Score(m, w) for dataset, m, w in rows})


PUBLISHED: Mapping[str, Mapping[str, Score]] = MappingProxyType(
    {
        "Seasonal naive": _scores(
            mase=(4.8943, 2.0775, 1.3145, 3.1717, 1.4253, 1.1462, 1.6990, 1.6309),
            wql=(0.20930, 0.14950, 0.19146, 0.16653, 0.10125, 0.14854, 0.11938, 0.10418),
        ),
        "Chronos-Bolt base": _scores(
            mase=(4.4044, 1.7733, 1.0999, 2.9061, 1.2888, 0.8511, 1.7560, 1.5282),
            wql=(0.15051, 0.10075, 0.13924, 0.12934, 0.07614, 0.09271, 0.06453, 0.09031),
        ),
        "Chronos-Bolt tiny": _scores(
            mase=(5.1367, 1.8952, 1.1626, 3.3682, 1.3648, 0.8745, 2.0954, 1.7891),
            wql=(0.16005, 0.09971, 0.13145, 0.15157, 0.07874, 0.09436, 0.07108, 0.10577),
        ),
        "Chronos-T5 large": _scores(
            mase=(4.4024, 1.7186, 1.0935, 3.0655, 1.1834, 0.8527, 1.6561, 1.7640),
            wql=(0.18510, 0.10273, 0.13016, 0.14692, 0.07312, 0.09455, 0.06713, 0.09533),
        ),
        "Chronos-T5 tiny": _scores(
            mase=(4.9248, 1.8597, 1.2221, 3.2172, 1.3281, 0.9076, 1.9292, 2.1558),
            wql=(0.18073, 0.10938, 0.14681, 0.14960, 0.08214, 0.10001, 0.07564, 0.11264),
        ),
        "TiRex": _scores(
            mase=(3.7032, 1.6740, 1.0604, 2.7099, 1.1542, 0.8308, 1.6060, 1.4488),
            wql=(0.13116, 0.09959, 0.13233, 0.12643, 0.06992, 0.08990, 0.05921, 0.07493),
        ),
        "AutoETS": _scores(
            mase=(3.9572, 1.6609, 1.0890, 2.6953, 1.1436, 0.8634, 1.5989, 1.5310),
            wql=(0.13928, 0.08473, 0.16529, 0.12940, 0.07030, 0.09313, 0.07064, 0.10019),
        ),
        "AutoTheta": _scores(
            mase=(3.6589, 1.6671, 1.0917, 2.6099, 1.1186, 0.8547, 1.6481, 1.6655),
            wql=(0.13730, 0.08203, 0.15903, 0.12773, 0.07017, 0.09472, 0.06124, 0.09100),
        ),
    }
)
"""Scores by forecaster and data set, in the order of :data:`COMPARABLE_DATASETS`."""


def published_relative(model: str) -> Score:
    """Geometric means of a published forecaster's scores over the baseline's, all comparable data sets.

    Args:
        model: A key of :data:`PUBLISHED`.
    """
    pairs = [(PUBLISHED[model][dataset], PUBLISHED[BASELINE][dataset]) for dataset in COMPARABLE_DATASETS]
    return Score(
        mase=math.exp(math.fsum(math.log(score.mase / base.mase) for score, base in pairs) / len(pairs)),
        wql=math.exp(math.fsum(math.log(score.wql / base.wql) for score, base in pairs) / len(pairs)),
    )
