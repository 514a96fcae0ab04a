from __future__ import annotations

from typing import Any, Literal

import pytest

from lightning_moe.config.typecheck import check_type, closest, describe


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        (True, bool, True),
        ("a", str, "a"),
        (None, int | None, None),
        (1, int | float, 1),
        (1.0, int | float, 1.0),
        (True, int | bool, True),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), tuple[float, float], (1.0, 2.0)),
        ((1, 2), list[int], [1, 2]),
        ("relu", Literal["gelu", "relu"], "relu"),
        (16, Literal[16, "16"], 16),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        (object, Any, object),
    ],
)
def test_accepts_and_normalises(value: object, annotation: Any, expected: object) -> None:
    checked, problems = check_type("field", value, annotation)
    assert problems == []
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "allowed", "hint"),
    [
        (None, int, "an integer", "null is no value here"),
        (True, int, "an integer", "true is a boolean"),
        (False, float, "a number", "false is a boolean"),
        (2.0, int, "an integer", "decimal point"),
        ("2", int, "an integer", "quotes"),
        (1, bool, "true or false", "it is a int"),
        (3, str, "a text", "it is a int"),
        (None, str | int, "a text or an integer", "null"),
        (3, list[int] | None, "a list, each entry an integer or null", "it is a int"),
        ([0.9], tuple[float, float], "a list of 2 values", "1 values were given"),
        ("rleu", Literal["gelu", "relu"], "one of gelu, relu", "did you mean 'relu'?"),
        (True, Literal["on", "off"], "one of on, off", "quote it"),
        (None, Literal["none", "auxiliary"], "one of none, auxiliary", "write none"),
        ([], dict[str, Any], "a mapping", "it is a list"),
    ],
)
def test_refuses(value: object, annotation: Any, allowed: str, hint: str) -> None:
    _, (problem,) = check_type("some.field", value, annotation)
    assert problem.field == "some.field"
    assert problem.value == value
    assert allowed in problem.allowed
    assert hint in problem.hint


def test_names_the_entry_of_a_list() -> None:
    _, problems = check_type("placement", [0, "1", 2.5], tuple[int, ...] | None)
    assert [problem.field for problem in problems] == ["placement[1]", "placement[2]"]


def test_true_is_not_the_literal_one() -> None:
    _, problems = check_type("precision", True, Literal[1])
    assert len(problems) == 1


@pytest.mark.parametrize(("name", "expected"), [("Expert", "expert"), ("exprt", "expert"), ("xyz", "")])
def test_closest(name: str, expected: str) -> None:
    assert closest(name, ["expert", "data"]) == (f"did you mean {expected!r}?" if expected else "")


def test_describe_lists_equal_spellings_once() -> None:
    assert describe(Literal[16, "16", "bf16"]) == "one of 16, bf16"
