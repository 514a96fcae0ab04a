"""Random costs and options of schedules for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_moe.pipeline.costs import Costs

# Multiples of a quarter add up without rounding.
TIMES = st.integers(1, 12).map(lambda quarters: quarters / 4)
LATENCIES = st.just(0.0) | st.integers(1, 8).map(lambda eighths: eighths / 8)


@st.composite
def costs(draw: st.DrawFn, *, communication: bool = True) -> Costs:
    """Costs with W taking no more memory than B."""
    return Costs(
        forward=draw(TIMES),
        backward=draw(TIMES),
        weight=draw(TIMES),
        communication=draw(LATENCIES) if communication else 0.0,
        weight_activation=draw(st.sampled_from([0.25, 0.5, 1.0])),
    )
