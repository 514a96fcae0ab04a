"""Reading YAML so that every key knows its file and line, and no key is given twice (torch-free)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError


@dataclass(frozen=True)
class Document:
    """What a YAML file says, and where it says it."""

    values: dict[str, Any]
    """Nested dictionaries, lists and scalars."""
    locations: Mapping[str, str]
    """``"file:line"`` of each dotted key, e.g. ``"trainer.callbacks[0].class_path"``; ``""`` is the file."""
    problems: tuple[ConfigError, ...] = field(default=())
    """Duplicate keys and whatever else makes the text ambiguous, with their locations."""

    def location(self, key: str) -> str:
        """Return where ``key`` is given, or the closest key around it that is."""
        while key and key not in self.locations:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.locations.get(key, "")

    def merged(self, later: Document) -> Document:
        """Return this document with the values of ``later`` on top, as LightningCLI merges recipes."""
        return Document(
            _merge(self.values, later.values),
            {**self.locations, **later.locations},
            self.problems + later.problems,
        )


# YAML 1.1 reads 1e-3 as a text, because it has no point.
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers and dates read as LightningCLI reads them."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_scalar(text: str) -> Any:
    """Return the value of a command-line text, e.g. of ``"[1, 2]"``; broken YAML stays a text."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError:
        return text


def load_yaml(path: str | Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: The file; its name as given appears in locations.

    Raises:
        ConfigError: There is no such file, it is not text, or it is not YAML with a mapping at the top.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "recipe", str(path), "a readable YAML file", _file_hint(Path(path), error), str(path)
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """Read YAML from ``text``; ``name`` stands for the file in locations (see :func:`load_yaml`)."""
    loader = _RecipeLoader(text)
    try:
        root = loader.get_single_node()
        walk = _Walk(loader, name)
        values = None if root is None else walk.value(root, "")
    except yaml.YAMLError as error:
        raise _invalid_yaml(error, text, name) from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        found = "an empty file" if root is None else f"a {type(values).__name__} at the top level"
        raise ConfigError("recipe", found, "a mapping with trainer, model and data", "", f"{name}:1")
    return Document(values, {"": f"{name}:1", **walk.locations}, tuple(walk.problems))


class _Walk:
    """Turns YAML nodes into values, noting the line of each key."""

    def __init__(self, loader: _RecipeLoader, name: str) -> None:
        self.locations: dict[str, str] = {}
        self.problems: list[ConfigError] = []
        self._loader = loader
        self._name = name
        self._around: list[yaml.Node] = []

    def value(self, node: yaml.Node, key: str) -> Any:
        if any(node is outer for outer in self._around):
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        if not isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] not in ("map", "seq"):
            raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not read", problem_mark=node.start_mark)
        self._around.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                return [self._entry(entry, f"{key}[{i}]") for i, entry in enumerate(node.value)]
            return self._loader.construct_object(node, deep=True)
        finally:
            self._around.pop()

    def _entry(self, node: yaml.Node, key: str) -> Any:
        self.locations[key] = self._at(node)
        return self.value(node, key)

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        self._find_duplicates(node, key)
        self._loader.flatten_mapping(node)  # resolves `<<: *base`, what is written here wins
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = self._loader.construct_object(name_node, deep=True)
            if not isinstance(name, str):
                hint = "quote it" if isinstance(name, bool | int | float) else ""
                self.problems.append(
                    ConfigError(_join(key, str(name)), name, "a text as the key", hint, self._at(name_node))
                )
                continue
            path = _join(key, name)
            self.locations[path] = self._at(name_node)
            values[name] = self.value(value_node, path)
        return values

    def _find_duplicates(self, node: yaml.MappingNode, key: str) -> None:
        first: dict[str, yaml.Node] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                continue
            earlier = first.setdefault(name_node.value, name_node)
            if earlier is name_node:
                continue
            path = _join(key, name_node.value)
            given = value_node.value if isinstance(value_node, yaml.ScalarNode) else "..."
            hint = f"line {earlier.start_mark.line + 1} gives it already; YAML would silently take the last"
            self.problems.append(ConfigError(path, given, "each key once", hint, self._at(name_node)))

    def _at(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"


def _merge(base: Any, later: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(later, dict):
        return later
    if "class_path" in later and later["class_path"] != base.get("class_path"):
        return later  # another class: the arguments of the first one do not apply
    return {**base, **{key: _merge(base.get(key), value) for key, value in later.items()}}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _invalid_yaml(error: yaml.YAMLError, text: str, name: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return ConfigError("recipe", name, "valid YAML", str(error).splitlines()[0], name)
    lines = text.splitlines()
    line = lines[mark.line].strip() if mark.line < len(lines) else "end of file"
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or "it cannot be parsed"
    return ConfigError("recipe", line, "valid YAML", f"{problem} (column {mark.column + 1})", f"{name}:{mark.line + 1}")


def _file_hint(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and path.parent.is_dir():
        similar = closest(path.name, (p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")))
        return f"there is no such file; {similar}" if similar else "there is no such file"
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
