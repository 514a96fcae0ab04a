"""Recipes and command lines in README and docs pass ``lightning-moe check``, or fail it with the text shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_moe.cli import check
from lightning_moe.cli.arguments import split_arguments
from lightning_moe.cli.main import TRAINER_COMMANDS, main
from tests.docs.pages import ROOT, Block, blocks_of, pages

DEFAULT = ROOT / "recipes" / "chronos_moe_cpu.yaml"


def blocks(*languages: str) -> list[Block]:
    return [block for page in pages() for block in blocks_of(page, *languages)]


def command_lines(block: Block) -> list[str]:
    """The commands of a block, comments and prompts taken off and continued lines put together."""
    text = block.text.replace("\\\n", " ")
    return [line.removeprefix("$ ").partition("  # ")[0].strip() for line in text.splitlines() if line.strip()]


def titled_files(page: Path, folder: Path) -> None:
    """Write the page's titled recipes into a folder, beside the repository's own."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for block in blocks_of(page, "yaml"):
        if block.title:
            (folder / block.title).write_text(block.text)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_recipe_passes_the_check(block: Block, tmp_path: Path) -> None:
    """A part of a recipe is checked on top of a whole one, as a second ``--config``."""
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text)
    is_whole = re.search(r"^model:", block.text, re.MULTILINE) and re.search(r"^trainer:", block.text, re.MULTILINE)
    base = ROOT / "recipes" / f"{block.directive.removeprefix('on=')}.yaml" if "on=" in block.directive else DEFAULT
    verdict = check.check([str(path)] if is_whole else [str(base), str(path)])
    refused = [str(problem) for problem in verdict.problems]
    assert bool(refused) == (block.directive == "refused"), refused


@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_console_shows_what_the_command_prints(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    titled_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    prompt, shown = block.text.split("\n", 1)
    program, *arguments = shlex.split(prompt.removeprefix("$ "))
    assert prompt.startswith("$ ")
    assert program == "lightning-moe"
    main(arguments)
    assert capsys.readouterr().out == shown


TRAINER_LINES = [
    (block, line)
    for block in blocks("bash")
    for line in command_lines(block)
    if re.search(rf"lightning-moe ({'|'.join(TRAINER_COMMANDS)}|check)\b", line)
]


@pytest.mark.parametrize(
    ("block", "line"), TRAINER_LINES, ids=[f"{block}-{i}" for i, (block, _) in enumerate(TRAINER_LINES)]
)
def test_command_line_passes_the_check(
    block: Block, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titled_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    program = next(i for i, word in enumerate(words) if word.endswith("lightning-moe"))
    arguments = split_arguments(words[program + 2 :])
    paths = [*arguments.paths, *(word for word in arguments.rest if not word.startswith("-"))]
    assert paths, f"{line}: no recipe"
    verdict = check.check(paths, arguments.settings)
    assert not verdict.problems, [str(problem) for problem in verdict.problems]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        match[1]
        for block in blocks("bash")
        for line in command_lines(block)
        for match in re.finditer(r"\bmake (?:\w+=\S* )*([a-z][\w-]*)", line)
    }
    assert named
    assert named <= targets
