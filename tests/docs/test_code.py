"""The Python code in README and docs runs, and prints what the pages say."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import RankPool
from tests.docs.pages import ROOT, Block, blocks_of, name_of, pages

LANGUAGES = {"python", "pycon", "yaml", "bash", "console", "text"}


def pages_with(*languages: str) -> list[Path]:
    return [page for page in pages() if blocks_of(page, *languages)]


def run_blocks(blocks: list[Block], folder: str) -> None:
    """Run the blocks one after the other, as one script whose errors name lines of the page."""
    os.chdir(folder)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, str(block.page), "exec"), namespace)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block}: language {block.language!r}"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_blocks_run(page: Path, ranks: RankPool, tmp_path: Path) -> None:
    blocks = blocks_of(page, "python")
    said = [block.directive for block in blocks if block.directive]
    assert all(one.startswith("ranks=") for one in said), said
    world_size = max((int(one.removeprefix("ranks=")) for one in said), default=1)
    ranks.run(world_size, run_blocks, blocks, str(tmp_path), init_process_group=False)


@pytest.mark.parametrize("page", pages_with("pycon"), ids=name_of)
def test_sessions_print_what_they_show(page: Path) -> None:
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    namespace: dict[str, object] = {}
    for block in blocks_of(page, "pycon"):
        test = parser.get_doctest(block.text, namespace, str(block), str(page), block.line - 1)
        assert test.examples, f"{block}: nothing to run"
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        namespace = test.globs
        assert runner.failures == 0, "".join(report)


@pytest.mark.slow
def test_the_readmes_example_is_a_script(tmp_path: Path) -> None:
    """The first one saved as a file and started by itself, so that it launches its second rank as a user's would."""
    block, *_ = blocks_of(ROOT / "README.md", "python")
    script = tmp_path / "train.py"
    script.write_text(block.text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "expert=0/2" in done.stderr + done.stdout
