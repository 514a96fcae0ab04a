from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_moe.config.loader import load_yaml, parse_yaml, read_scalar
from lightning_moe.errors import ConfigError

TEXT = """\
seed: 1
trainer:
  callbacks:
    - class_path: A
      init_args: {x: 1}
    - class_path: B

  devices: 2
"""


def test_knows_the_line_of_every_key() -> None:
    document = parse_yaml(TEXT, "r.yaml")
    assert document.values == yaml.safe_load(TEXT)
    lines = {key: int(place.rpartition(":")[2]) for key, place in document.locations.items()}
    assert lines == {
        "": 1,
        "seed": 1,
        "trainer": 2,
        "trainer.callbacks": 3,
        "trainer.callbacks[0]": 4,
        "trainer.callbacks[0].class_path": 4,
        "trainer.callbacks[0].init_args": 5,
        "trainer.callbacks[0].init_args.x": 5,
        "trainer.callbacks[1]": 6,
        "trainer.callbacks[1].class_path": 6,
        "trainer.devices": 8,
    }
    assert document.problems == ()


@pytest.mark.parametrize(
    ("key", "line"),
    [("trainer.devices", 8), ("trainer.callbacks[1].init_args.y", 6), ("trainer.callbacks[7]", 3), ("x", 1)],
)
def test_missing_keys_are_where_they_would_be(key: str, line: int) -> None:
    assert parse_yaml(TEXT, "r.yaml").location(key) == f"r.yaml:{line}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        ("-1.5", -1.5),
        ("-1", -1),
        ("0.5", 0.5),
        (".inf", float("inf")),
        ("true", True),
        ("off", False),
        ("null", None),
        ("", None),
        ("text", "text"),
        ("2024-01-01", "2024-01-01"),
        ("[1, 2]", [1, 2]),
        ("[1, 2", "[1, 2"),
    ],
)
def test_scalars_are_those_of_the_training_loader(text: str, value: Any) -> None:
    from jsonargparse._loaders_dumpers import get_yaml_default_loader

    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)
    if text != "[1, 2":
        assert yaml.load(text, Loader=get_yaml_default_loader()) == value


def test_duplicate_keys_are_refused_at_any_depth() -> None:
    text = "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n"
    problems = parse_yaml(text, "r.yaml").problems
    assert [(p.field, p.location) for p in problems] == [("a", "r.yaml:6"), ("b.c", "r.yaml:5")]
    assert "line 1 " in problems[0].hint
    assert "line 3 " in problems[1].hint


def test_anchors_and_merge_keys() -> None:
    document = parse_yaml("base: &base {x: 1, y: 2}\nother:\n  <<: *base\n  y: 3\n", "r.yaml")
    assert document.values["other"] == {"x": 1, "y": 3}
    assert document.location("other.y") == "r.yaml:4"
    assert document.problems == ()


def test_keys_must_be_texts() -> None:
    (problem,) = parse_yaml("a:\n  yes: 1\n", "r.yaml").problems
    assert (problem.field, problem.value, problem.location) == ("a.True", True, "r.yaml:2")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2\nb: 3\n", 2),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 1\nb: *missing\n", 2),
        ("a: 1\nb: &x [*x]\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", 2),
        ("a: 1\nb: !!python/name:os.getcwd\n", 2),
        ("- 1\n- 2\n", 1),
        ("", 1),
        ("just a text\n", 1),
    ],
)
def test_what_is_not_a_mapping_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "r.yaml")
    assert raised.value.field == "recipe"
    assert raised.value.location == f"r.yaml:{line}"


def test_missing_file_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"did you mean 'recipe\.yaml'"):
        load_yaml(tmp_path / "recip.yaml")


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_yaml(path)


def test_later_recipes_win() -> None:
    base = parse_yaml("a: {x: 1, y: 2}\nm: {class_path: A, init_args: {p: 1}}\n", "base.yaml")
    later = parse_yaml("a: {y: 3}\nm: {class_path: A, init_args: {q: 2}}\n", "later.yaml")
    merged = base.merged(later)
    assert merged.values["a"] == {"x": 1, "y": 3}
    assert merged.values["m"]["init_args"] == {"p": 1, "q": 2}
    assert merged.location("a.x") == "base.yaml:1"
    assert merged.location("a.y") == "later.yaml:1"


def test_arguments_of_another_class_do_not_survive() -> None:
    base = parse_yaml("m: {class_path: A, init_args: {p: 1}}\n", "base.yaml")
    later = parse_yaml("m: {class_path: B}\n", "later.yaml")
    assert base.merged(later).values == {"m": {"class_path": "B"}}
