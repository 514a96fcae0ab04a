"""Navigation, links and the reference: nothing points to what is not there, nothing public is left out."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

import lightning_moe
from tests.docs.pages import DOCS, ROOT, anchors_of, links_of, name_of, pages, references_of, rendered_by

ROOMS = (
    "callbacks",
    "config",
    "data",
    "data.text",
    "layers",
    "metrics",
    "models.chronos_moe",
    "models.gpt_moe",
    "moe",
    "strategy",
    "weight_grad",
)


def nav_files(nav: Any) -> Iterator[str]:
    match nav:
        case str():
            yield nav
        case list():
            for entry in nav:
                yield from nav_files(entry)
        case dict():
            for entry in nav.values():
                yield from nav_files(entry)


def is_rendered(name: str, value: object) -> bool:
    """Whether some page renders an object, by itself or as a member of its module."""
    for page in pages():
        for path, members in rendered_by(page).items():
            shown = resolve_name(path)
            if shown is value:
                return True
            if inspect.ismodule(shown) and (members is None or name in members) and vars(shown).get(name) is value:
                return True
    return False


def test_navigation_is_the_files_of_docs() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(nav_files(config["nav"]))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_internal_links_resolve(page: Path) -> None:
    for target in links_of(page):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)}: {target}"
        assert path.is_relative_to(ROOT if page.parent == ROOT else DOCS), f"{target} is not part of the site"
        if anchor:
            assert anchor in anchors_of(path), f"{name_of(page)}: {target}; there are {sorted(anchors_of(path))}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_named_objects_exist(page: Path) -> None:
    for path in rendered_by(page):
        resolve_name(path)
    for path in references_of(page):
        name = path.rpartition(".")[2]
        assert is_rendered(name, resolve_name(path)), f"{name_of(page)} links to {path}, which no page renders"


@pytest.mark.parametrize("name", [name for name in lightning_moe.__all__ if name != "__version__"])
def test_public_name_is_documented(name: str) -> None:
    value = getattr(lightning_moe, name)
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert docstring, f"{name} has no docstring of its own"
    # dataclass() writes the signature where there is none.
    assert not docstring.startswith(f"{name}("), f"{name} has no docstring of its own"
    assert is_rendered(name, value), f"add `::: lightning_moe.{name}` to a page of docs/reference"


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_of_rooms_are_in_the_reference(room: str) -> None:
    module = import_module(f"lightning_moe.{room}")
    for name in module.__all__:
        assert is_rendered(name, getattr(module, name)), f"lightning_moe.{room}.{name} is on no page of docs/reference"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice about the theme, not about our pages
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rendered = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert not re.findall(r":(?:class|func|meth|mod|data|attr):<", rendered), "a role was not turned into a link"
