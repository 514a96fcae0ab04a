"""The documentation's pages and what is in them: fenced blocks, links, headings.

A comment in front of a block, ``<!-- test: ranks=2 -->``, says how it is tested: ``ranks=N`` runs the Python blocks of
the page on N ranks, ``refused`` marks a recipe that ``lightning-moe check`` must refuse, and ``on=NAME`` says which of
the repository's recipes a part of a recipe is laid on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>[^`]*)$")
_DIRECTIVE = re.compile(r"^<!-- test: (?P<what>[\w=]+) -->$")
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
# No character matches in two ways: else an open bracket takes time exponential in the code spans after it.
_REFERENCE = re.compile(r"\[(?:[^\[\]`]|`[^`]*`)+\]\[(?P<name>[\w.]+)\]")
_RENDERED = re.compile(r"^::: (?P<name>[\w.]+)\n(?P<settings>(?:(?: {4}.*)?\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """Line of the file that the block's first line is on, from 1."""
    language: str
    title: str
    """File name given in the fence; empty without one."""
    directive: str
    """What the comment in front of the block says; empty without one."""
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def pages() -> list[Path]:
    """README and every page of ``docs/``."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    """Path of a page from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in the given languages; all of them when none is given."""
    return [block for block in _blocks(page) if not languages or block.language in languages]


def prose_of(page: Path) -> str:
    """The page without its fenced blocks and code spans: what links and headings are looked for in."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in _blocks(page):
        stop = block.line + len(block.text.splitlines())
        lines[block.line - 2 : stop] = [""] * (stop - block.line + 2)
    return "\n".join(lines)


def links_of(page: Path) -> list[str]:
    """Targets of the page's inline links."""
    return [match["target"] for match in _LINK.finditer(prose_of(page))]


def references_of(page: Path) -> list[str]:
    """Names of objects that the page links to (``[text][package.name]``)."""
    return [match["name"] for match in _REFERENCE.finditer(prose_of(page))]


def rendered_by(page: Path) -> dict[str, list[str] | None]:
    """Objects whose documentation the page renders (``::: package.name``), with the members it is limited to."""
    rendered = {}
    for match in _RENDERED.finditer(prose_of(page) + "\n"):
        settings = yaml.safe_load(match["settings"]) or {}
        rendered[match["name"]] = settings.get("options", {}).get("members")
    return rendered


def anchors_of(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#{1,6} (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def _blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start, fence, directive = 0, None, ""
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if fence is None:
            if match is not None:
                start, fence = number + 1, match
            elif line.strip():
                said = _DIRECTIVE.match(line)
                directive = said["what"] if said is not None else ""
        elif match is not None and not match["language"]:
            indent = len(fence["indent"])
            text = "".join(f"{inner[indent:]}\n" for inner in lines[start:number])
            title = _TITLE.search(fence["rest"])
            yield Block(page, start + 1, fence["language"], title["title"] if title else "", directive, text)
            fence, directive = None, ""
    assert fence is None, f"{name_of(page)}:{start}: the block has no end"
