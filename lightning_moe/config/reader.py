"""Reads nested mappings against dataclasses and collects every problem (torch-free).

Python code meets the first problem as an exception. A recipe should instead hear of all its problems at once,
so its values are first gathered in a :class:`KnownValues`, where badly typed ones are absent, and the rules
run on that.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.ranges import Rule
from lightning_moe.config.typecheck import check_type, closest
from lightning_moe.errors import ConfigError


class UnknownValueError(Exception):
    """A rule asked for a value that is missing or badly typed; the rule has nothing to say then."""


class KnownValues:
    """The well-typed values for one dataclass, with defaults; another one raises ``UnknownValueError``."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise UnknownValueError(name) from None

    def forget(self, name: str) -> None:
        """Treat a value as unknown from now on."""
        self._values.pop(name, None)

    def as_dict(self) -> dict[str, Any]:
        """Return the values by field name."""
        return dict(self._values)


def apply_rules(rules: Sequence[Rule], known: KnownValues) -> list[ConfigError]:
    """Return what the rules have against the values, in the order of the rules.

    A refused value is forgotten, so that each mistake is told once and later rules need no guards against it.
    """
    problems = []
    for rule in rules:
        try:
            problem = rule(known)
        except UnknownValueError:
            continue
        if problem is not None:
            problems.append(problem)
            known.forget(problem.field)
    return problems


def read(key: str, value: Any, annotation: Any) -> tuple[Any, list[ConfigError]]:
    """Read one value, which may be a mapping for a dataclass, or a list of such.

    Args:
        key: Dotted key of the value, for messages.
        value: What the file says.
        annotation: Type to read it as; in unions, the member that fits the shape of the value is taken.

    Returns:
        The value, with :class:`KnownValues` in place of dataclasses, and the problems.
    """
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    # `callbacks: [some.Class]` is short for its class_path, but `strategy: moe` is a name of its own.
    is_path = isinstance(value, str) and not any(m is str or get_origin(m) is Literal for m in members)
    for member in members:
        fits = isinstance(value, Mapping) or (is_path and hasattr(member, "known"))
        if dataclasses.is_dataclass(member) and fits:
            return read_component(key, value, member) if hasattr(member, "known") else read_fields(key, value, member)
        if isinstance(value, list) and get_origin(member) is list and dataclasses.is_dataclass(get_args(member)[0]):
            entries = [read(f"{key}[{i}]", entry, get_args(member)[0]) for i, entry in enumerate(value)]
            return [entry for entry, _ in entries], [problem for _, found in entries for problem in found]
    return check_type(key, value, annotation)


def read_fields(key: str, given: Mapping[str, Any], schema: Any) -> tuple[KnownValues, list[ConfigError]]:
    """Read a mapping against the fields of a dataclass, then apply the rules of that dataclass."""
    prefix = f"{key}." if key else ""
    hints = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    problems = [_unknown_key(prefix, name, value, list(fields)) for name, value in given.items() if name not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in given:
            value, found = read(prefix + name, given[name], hints[name])
            problems += found
            if not found or isinstance(value, KnownValues):
                values[name] = value
        elif field.default is not dataclasses.MISSING:
            values[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[name] = field.default_factory()
        else:
            hint = f"add `{name}: ...`" + (f" under {key}" if key else "")
            problems.append(ConfigError(prefix + name, None, "a value: it has no default", hint))
    known = KnownValues(values)
    broken = apply_rules(_rules(schema), known)
    return known, problems + [problem.under(key) for problem in broken]


def read_component(key: str, given: Any, slot: Any) -> tuple[KnownValues, list[ConfigError]]:
    """Read ``{class_path, init_args}`` for one place in a recipe.

    Arguments of classes in ``slot.known`` are read against their dataclass. Those of other classes stay
    unread, since knowing them takes an import.
    """
    spec = {"class_path": given} if isinstance(given, str) else given
    known, problems = read_fields(key, spec, Component)
    values = known.as_dict()
    init_args = values.pop("init_args", None)
    if "class_path" not in values:
        return KnownValues(values), problems
    package, _, class_name = values["class_path"].rpartition(".")
    ours = not package or package.partition(".")[0] == "lightning_moe"
    if slot.known and ours and class_name not in slot.known:
        allowed = ", ".join(f"lightning_moe.{name}" for name in slot.known) + " or the import path of another class"
        hint = closest(class_name, slot.known)
        problems.append(ConfigError(f"{key}.class_path", values["class_path"], allowed, hint))
    elif ours and class_name in slot.known and isinstance(init_args, Mapping):
        values["init_args"], found = read_fields(f"{key}.init_args", init_args, slot.known[class_name])
        problems += found
    return KnownValues(values), problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """Base of the places in a recipe that take a class and its arguments."""

    known: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})
    """Dataclasses that describe the arguments of our own classes, by class name."""

    class_path: str
    """Import path of the class."""
    init_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the class."""
    dict_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further keyword arguments, for classes that take ``**kwargs``."""


def _unknown_key(prefix: str, name: str, value: Any, fields: list[str]) -> ConfigError:
    shown = "..." if isinstance(value, Mapping | list) else value
    return ConfigError(prefix + name, shown, "one of the keys " + ", ".join(fields), closest(name, fields))


def _rules(schema: Any) -> Sequence[Rule]:
    if schema is ParallelConfig:  # it checks itself, one field at a time
        return [_builds_parallel_config(field.name) for field in dataclasses.fields(ParallelConfig)]
    rules: Sequence[Rule] = getattr(schema, "rules", ())
    return rules


def _builds_parallel_config(name: str) -> Rule:
    def rule(config: Any) -> ConfigError | None:
        try:
            ParallelConfig(**{name: getattr(config, name)})
        except ConfigError as problem:
            return ConfigError(name, problem.value, problem.allowed, problem.hint)
        return None

    return rule
