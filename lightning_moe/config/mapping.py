"""Configurations from plain mappings, as checkpoints and JSON files hold them (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def as_config(cls: type[ConfigT], value: ConfigT | Mapping[str, Any] | None, name: str) -> ConfigT:
    """Return a configuration as it is, from a mapping of its fields, or with its defaults when there is none.

    Raises:
        ConfigError: See :func:`from_mapping`.
    """
    if isinstance(value, Mapping):
        return from_mapping(cls, value, name)
    return cls() if value is None else value


def from_mapping(cls: type[ConfigT], values: Mapping[str, Any], name: str) -> ConfigT:
    """Rebuild a configuration from what :func:`dataclasses.asdict` made of it, also after JSON.

    Args:
        cls: Dataclass to build; fields that are dataclasses themselves may be mappings.
        values: Its fields.
        name: Prefix of the fields in messages.

    Raises:
        ConfigError: An unknown field, or a value that is not allowed.
    """
    annotations = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # a dataclass
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{name}.{key}", value, "a field of " + cls.__name__, closest(key, known))
        nested = _dataclass_in(annotations[key]) if isinstance(value, Mapping) else None
        arguments[key] = value if nested is None else from_mapping(nested, value, f"{name}.{key}")
    return cls(**arguments)


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that an annotation names, alone or in a union with None."""
    members = get_args(annotation) or (annotation,)
    return next((member for member in members if is_dataclass(member) and isinstance(member, type)), None)
