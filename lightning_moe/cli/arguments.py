"""Reading recipes and settings off a command line without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_moe.config.loader import Document, load_yaml, read_scalar
from lightning_moe.config.reader import Component
from lightning_moe.config.recipe import Recipe

_SECTIONS = frozenset(field.name for field in fields(Recipe))
_COMPONENT_KEYS = frozenset(field.name for field in fields(Component))


@dataclass(frozen=True)
class Arguments:
    """The part of a command line that makes up a recipe."""

    paths: tuple[str, ...]
    """Recipes given by ``--config``, in order."""
    settings: tuple[tuple[str, str], ...]
    """Dotted keys and the texts given for them: ``--trainer.max_steps 10``."""
    rest: tuple[str, ...]
    """Everything else: positional arguments and options without a value."""

    @property
    def options(self) -> set[str]:
        """Options without a value."""
        return {argument for argument in self.rest if argument.startswith("-")}

    @property
    def recipes(self) -> list[str]:
        """Recipes given by ``--config`` and as positional arguments, in order."""
        return [*self.paths, *(argument for argument in self.rest if not argument.startswith("-"))]


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Sort the arguments of a command into recipes, settings and the rest."""
    paths, settings, rest = [], [], []
    position = 0
    while position < len(argv):
        name, equals, value = argv[position].partition("=")
        position += 1
        if not name.startswith("-"):
            rest.append(argv[position - 1])
            continue
        if not equals and (position == len(argv) or argv[position].startswith("--")):
            rest.append(name)
            continue
        if not equals and name in ("--json", "--help", "-h", "--version"):
            rest.append(name)
            continue
        if not equals:
            value = argv[position]
            position += 1
        if name in ("--config", "-c"):
            paths.append(value)
        else:
            settings.append((name.removeprefix("--"), value))
    return Arguments(tuple(paths), tuple(settings), tuple(rest))


def load_documents(paths: Sequence[str], settings: Sequence[tuple[str, str]]) -> Document:
    """Read recipes and lay the settings of the command line on top.

    Raises:
        ConfigError: A file cannot be read, or is not YAML with a mapping at the top.
    """
    document = load_yaml(paths[0])
    for path in paths[1:]:
        document = document.merged(load_yaml(path))
    for key, text in settings:
        setting = _one_setting(document.values, key.split("."), read_scalar(text))
        document = document if setting is None else document.merged(setting)
    return document


def is_setting(key: str) -> bool:
    """Whether a dotted key of the command line belongs to a recipe, e.g. ``"trainer.devices"``."""
    return key.partition(".")[0] in _SECTIONS


def _one_setting(values: Any, names: list[str], value: Any) -> Document | None:
    """Nest one value under its dotted key; ``init_args`` may be left out, as LightningCLI allows.

    None for options that are no part of a recipe and for changes to list entries: LightningCLI checks those.
    """
    if not is_setting(names[0]) or not all(name.isidentifier() for name in names):
        return None
    path: list[str] = []
    for name in names:
        if isinstance(values, list):
            return None
        if isinstance(values, dict) and "class_path" in values and name not in _COMPONENT_KEYS:
            path.append("init_args")
            values = values.get("init_args")
        path.append(name)
        values = values.get(name) if isinstance(values, dict) else None
    if path in (["model"], ["data"]) and isinstance(value, str):
        path.append("class_path")  # `--model my.Module` names the class
    for name in reversed(path):
        value = {name: value}
    return Document(value, {".".join(path): "command line"})
