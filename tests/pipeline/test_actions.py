"""Actions as text, and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Kind, format_actions, parse_actions

ACTIONS = st.builds(Action, st.sampled_from(Kind), st.integers(0, 200), st.integers(0, 9))


@settings(max_examples=25)
@given(st.lists(st.lists(ACTIONS, max_size=6).map(tuple), min_size=1, max_size=4).map(tuple))
def test_actions_survive_their_text_form(ranks: tuple[tuple[Action, ...], ...]) -> None:
    assert parse_actions(format_actions(ranks)) == ranks


def test_text_form() -> None:
    ranks = ((Action(Kind.F, 3), Action(Kind.BW, 2, 1)), (Action(Kind.B, 10), Action(Kind.W, 10)))
    assert format_actions(ranks) == "F3 BW2.1\nB10 W10"


@pytest.mark.parametrize("text", ["", "F", "X1", "F1.", "F-1", "BW1.2.3", "f1", "F1 "])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="F, B, W or BW, the microbatch"):
        Action.parse(text)
