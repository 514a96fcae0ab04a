"""The command ``lightning-moe plan``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_moe.cli import check
from lightning_moe.cli.arguments import is_setting, split_arguments
from lightning_moe.cli.plan.planned import Plan, make_plan
from lightning_moe.cli.plan.report import as_json, report_lines
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.picture import schedule_page
from lightning_moe.pipeline.trace import chrome_trace

USAGE = """usage: lightning-moe plan RECIPE.yaml [RECIPE.yaml ...] [--SETTING VALUE ...]
                          [--html FILE] [--trace FILE] [--json]

Prints what a recipe's parallel axes and pipeline lead to, without importing torch: the mesh, the blocks of each stage,
an estimate of each rank's memory, and the bubble of the schedule beside those of the others. Of several recipes the
later ones win; settings such as --trainer.devices 4 win over recipes.

  --html FILE   draw the schedule: one page that needs nothing from elsewhere
  --trace FILE  write the schedule as a trace for https://ui.perfetto.dev; a unit of time is a millisecond
  --json        print one JSON object as the last line
  --help        print this text

Exit code: 0, or 2 when the recipe is refused or a file cannot be written.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` is what follows ``plan``. Returns the exit code."""
    arguments = split_arguments(argv)
    options, paths = arguments.options, arguments.recipes
    if options & {"--help", "-h"}:
        print(USAGE, end="")
        return 0
    files = {name: Path(value) for name, value in arguments.settings if name in ("html", "trace")}
    settings = [(name, value) for name, value in arguments.settings if name not in files]
    unknown = options - {"--json"} | {f"--{name}" for name, _ in settings if not is_setting(name)}
    nameless = unknown & {"--html", "--trace"}
    if not paths or unknown:
        wrong = f"unknown option: {', '.join(sorted(unknown))}" if unknown else "no recipe given"
        if nameless:
            wrong = f"{' and '.join(sorted(nameless))} needs the name of a file"
        print(f"{wrong}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    if len(files) > len(set(files.values())):
        print("--html and --trace: two files are needed, they have the same name", file=sys.stderr)
        return 2
    verdict = check.check(paths, settings)
    if verdict.problems:
        check.print_problems(verdict, file=sys.stderr)
        return 2
    try:
        plan = make_plan(verdict.recipe)
        lines = list(report_lines(plan))
        _write(plan, files, " + ".join(paths), lines)
    except (ConfigError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    for kind, path in files.items():
        print(f"{kind}: {path}")
    if "--json" in options:
        print(json.dumps(as_json(plan) | {kind: str(path) for kind, path in files.items()}))
    return 0


def _write(plan: Plan, files: dict[str, Path], title: str, lines: list[str]) -> None:
    schedule, simulation = plan.chosen.schedule, plan.chosen.simulation
    if "html" in files:
        page = schedule_page(schedule, simulation, title=title, report="\n".join(lines))
        files["html"].write_text(page, encoding="utf-8")
    if "trace" in files:
        files["trace"].write_text(json.dumps(chrome_trace(schedule, simulation)), encoding="utf-8")
