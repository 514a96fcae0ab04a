"""Strict checks of values against type annotations: no null for a number, no boolean for an integer.

Two callers share them: the configuration dataclasses, which check what Python code hands them, and the recipe
reader, which checks what a YAML file says. The second one collects every problem, so nothing here raises.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from lightning_moe.errors import ConfigError

_NAMES: Mapping[object, str] = types.MappingProxyType(
    {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}
)


def closest(name: object, known: Iterable[str]) -> str:
    """Return a "did you mean" sentence for ``name``, or an empty text when nothing known is close to it."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    wanted = str(name).lower()
    matches = [candidate for candidate in by_lower_case if len(wanted) > 2 and candidate.startswith(wanted)]
    matches = matches or difflib.get_close_matches(wanted, by_lower_case, n=1, cutoff=0.5)
    return f"did you mean {by_lower_case[matches[0]]!r}?" if matches else ""


def describe(annotation: Any) -> str:
    """Say in words which values ``annotation`` accepts, e.g. ``"an integer or null"``."""
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(dict.fromkeys(str(choice) for choice in arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values: " + ", ".join(describe(a) for a in arguments)
    if origin in (list, tuple):
        return f"a list, each entry {describe(arguments[0])}"
    if annotation in (dict, Mapping) or origin in (dict, Mapping):
        return "a mapping"
    if annotation is Any:
        return "any value"
    if "class_path" in getattr(annotation, "__dataclass_fields__", ()):
        return "a mapping with class_path and init_args"
    return f"a mapping of the fields of {annotation.__name__}"


def check_type(field: str, value: object, annotation: Any) -> tuple[Any, list[ConfigError]]:
    """Check one value and bring it into the form that the annotation declares.

    Args:
        field: Dotted name of the setting, for the messages.
        value: The value as given; lists are accepted for tuples and integers for floats.
        annotation: A resolved type annotation built of ``bool``, ``int``, ``float``, ``str``, ``None``,
            ``Literal``, unions, ``tuple``, ``list``, ``dict``, classes and ``Any``.

    Returns:
        The value (a tuple where a tuple is declared, a float where a float is) and the problems found.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value, []
    if origin is Literal:
        return _check_literal(field, value, arguments)
    if origin in (Union, types.UnionType):
        return _check_union(field, value, annotation)
    if origin in (list, tuple):
        return _check_sequence(field, value, annotation)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), []
    # bool is a subclass of int: `top_k: yes` would otherwise train with top_k = 1.
    if isinstance(value, origin or annotation) and not (annotation is int and isinstance(value, bool)):
        return value, []
    return value, [ConfigError(field, value, describe(annotation), _type_hint(value, annotation))]


def check_fields(config: Any, name: str) -> list[ConfigError]:
    """Check all fields of a frozen dataclass instance; store them in the form that annotations declare."""
    problems: list[ConfigError] = []
    for field, annotation in get_type_hints(type(config)).items():
        if get_origin(annotation) is ClassVar or annotation is ClassVar:
            continue
        value, found = check_type(f"{name}.{field}", getattr(config, field), annotation)
        problems += found
        object.__setattr__(config, field, value)
    return problems


def _check_literal(field: str, value: object, choices: tuple[Any, ...]) -> tuple[Any, list[ConfigError]]:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return value, []
    allowed = describe(Literal[choices])
    if isinstance(value, bool) and any(choice in ("none", "no", "off", "on", "yes") for choice in choices):
        return value, [
            ConfigError(field, value, allowed, "YAML reads a bare yes, no, on or off as a boolean: quote it")
        ]
    if value is None and "none" in choices:
        return value, [ConfigError(field, value, allowed, "write none, not null")]
    return value, [ConfigError(field, value, allowed, closest(value, (str(choice) for choice in choices)))]


def _check_union(field: str, value: object, annotation: Any) -> tuple[Any, list[ConfigError]]:
    choices = get_args(annotation)
    best: list[ConfigError] | None = None
    # Exact types first: 1 for `int | float` stays an integer.
    for choice in sorted(choices, key=lambda choice: choice is not type(value)):
        converted, problems = check_type(field, value, choice)
        if not problems:
            return converted, []
        # A list with one bad entry, or a misspelt name, is better explained by its own branch than by the
        # union.
        explains = any(problem.field != field for problem in problems) or (
            get_origin(choice) is Literal and isinstance(value, str)
        )
        if explains and best is None:
            best = problems
    return value, best or [ConfigError(field, value, describe(annotation), _type_hint(value, annotation))]


def _check_sequence(field: str, value: object, annotation: Any) -> tuple[Any, list[ConfigError]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if not isinstance(value, list | tuple):
        return value, [ConfigError(field, value, describe(annotation), "write it as [a, b, ...]")]
    fixed = origin is tuple and Ellipsis not in arguments
    if fixed and len(value) != len(arguments):
        return value, [ConfigError(field, list(value), describe(annotation), f"{len(value)} values were given")]
    converted, problems = [], []
    for position, entry in enumerate(value):
        checked, found = check_type(f"{field}[{position}]", entry, arguments[position if fixed else 0])
        converted.append(checked)
        problems += found
    return (list(converted) if origin is list else tuple(converted)), problems


def _type_hint(value: object, annotation: Any) -> str:
    if value is None:
        return "null is no value here; leave the line out to get the default"
    if isinstance(value, bool):
        return f"{str(value).lower()} is a boolean, not {describe(annotation)}"
    if isinstance(value, str) and annotation is not str:
        return "it was read as a text; remove the quotes or check the spelling"
    if isinstance(value, float):
        return f"{value!r} has a decimal point or an exponent, so it is not {describe(annotation)}"
    if isinstance(value, dict | list | tuple):
        return f"it is a {'mapping' if isinstance(value, dict) else 'list'}"
    return f"it is a {type(value).__name__}"
