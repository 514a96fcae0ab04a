"""What a rule is, and the rules that many settings share: ranges, distinct entries, either-or (torch-free).

A rule takes a configuration and returns what is wrong with it, or ``None``. Field names in its message are
relative to that configuration (``"top_k"``); the caller puts the prefix in front (``"moe."``, or a recipe's
whole dotted path).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

from lightning_moe.config.typecheck import check_fields
from lightning_moe.errors import ConfigError

Rule = Callable[[Any], ConfigError | None]


def validate(config: Any, name: str, rules: Iterable[Rule]) -> None:
    """Check the types of all fields of a dataclass instance, then its rules.

    Raises:
        ConfigError: The first problem, with its field under ``name``.
    """
    for mistyped in check_fields(config, name):
        raise mistyped
    for rule in rules:
        problem = rule(config)
        if problem is not None:
            raise problem.under(name)


def at_least(field: str, minimum: float, hint: str = "") -> Rule:
    """Make the rule that a number (when it is not None) is at least ``minimum``."""

    def rule(config: Any) -> ConfigError | None:
        value = getattr(config, field)
        if value is None or value >= minimum:
            return None
        return ConfigError(field, value, f"at least {minimum}", hint)

    return rule


def above(field: str, bound: float, hint: str = "") -> Rule:
    """Make the rule that a number (when it is not None) is greater than ``bound``."""

    def rule(config: Any) -> ConfigError | None:
        value = getattr(config, field)
        return None if value is None or value > bound else ConfigError(field, value, f"greater than {bound}", hint)

    return rule


def finite(field: str, hint: str = "") -> Rule:
    """Make the rule that a number (when it is not None) is neither infinite nor NaN."""

    def rule(config: Any) -> ConfigError | None:
        value = getattr(config, field)
        return None if value is None or isfinite(value) else ConfigError(field, value, "a finite number", hint)

    return rule


def within(field: str, low: float, high: float) -> Rule:
    """Make the rule that ``low <= value < high``."""

    def rule(config: Any) -> ConfigError | None:
        value = getattr(config, field)
        return None if low <= value < high else ConfigError(field, value, f"at least {low} and less than {high}")

    return rule


def exclusive(field: str, other: str) -> Rule:
    """Make the rule that at most one of two settings is given."""

    def rule(config: Any) -> ConfigError | None:
        value = getattr(config, field)
        if value is None or getattr(config, other) is None:
            return None
        return ConfigError(field, value, f"null while {other} is given", f"leave {field} or {other} out")

    return rule


def distinct(field: str) -> Rule:
    """Make the rule that a list (when it is not None) has entries, none of them twice."""

    def rule(config: Any) -> ConfigError | None:
        value = getattr(config, field)
        if value is None or (value and len(set(value)) == len(value)):
            return None
        return ConfigError(field, value, "at least one entry, each once", "leave it out to take all")

    return rule


def divisors(number: int) -> str:
    """Return the divisors of ``number`` in words, for messages."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
