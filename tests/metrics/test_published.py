from __future__ import annotations

import pytest

from lightning_moe.metrics import BASELINE, COMPARABLE_DATASETS, PUBLISHED, published_relative


@pytest.mark.parametrize(
    ("model", "mase", "wql"),
    [
        ("Seasonal naive", 1.0, 1.0),
        ("Chronos-Bolt base", 0.887, 0.704),
        ("Chronos-Bolt tiny", 0.985, 0.745),
        ("Chronos-T5 large", 0.889, 0.736),
        ("Chronos-T5 tiny", 0.992, 0.797),
        ("TiRex", 0.821, 0.652),
        ("AutoETS", 0.838, 0.707),
        ("AutoTheta", 0.836, 0.679),
    ],
)
def test_relative_scores_equal_those_computed_from_the_full_result_files(model: str, mase: float, wql: float) -> None:
    # The figures on the right were computed apart, from the unrounded files.
    score = published_relative(model)
    assert score.mase == pytest.approx(mase, abs=6e-4)
    assert score.wql == pytest.approx(wql, abs=6e-4)


def test_every_model_has_every_data_set() -> None:
    assert BASELINE in PUBLISHED
    assert len(COMPARABLE_DATASETS) == 8
    for scores in PUBLISHED.values():
        assert tuple(scores) == COMPARABLE_DATASETS


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PUBLISHED["TiRex"]["m1_yearly"] = PUBLISHED["TiRex"]["m3_yearly"]  # type: ignore[index]
    with pytest.raises(TypeError):
        PUBLISHED["ours"] = PUBLISHED["TiRex"]  # type: ignore[index]
