"""The console command ``lightning-moe``: hands each command to its own file, importing no more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lightning_moe import __version__
from lightning_moe.cli import bench, check, convert
from lightning_moe.cli.arguments import split_arguments
from lightning_moe.cli.plan import command as plan
from lightning_moe.config.typecheck import closest

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
OTHER_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "check": check.main,
    "plan": plan.main,
    "convert": convert.main,
    "bench": bench.main,
}

USAGE = """usage: lightning-moe COMMAND [OPTIONS]

commands:
  fit       train a model:         lightning-moe fit --config recipes/chronos_moe_cpu.yaml
  validate  run the validation set
  test      run the test set
  predict   run the prediction set
  check     check a recipe without importing torch
  plan      show mesh, stages, memory and schedule of a recipe, without importing torch
  convert   write a checkpoint's weights as one safetensors file
  bench     measure, or simulate a pipeline: lightning-moe bench --help

options:
  --help     print this text; `lightning-moe COMMAND --help` tells more about one command
  --version  print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments after the program's name; those of this process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"lightning-moe {__version__}")
        return 0
    if command in OTHER_COMMANDS:
        return OTHER_COMMANDS[command](arguments[1:])
    if command in TRAINER_COMMANDS:
        return _run_trainer(arguments)
    problem = "no command given"
    if command:
        problem = " ".join(
            filter(None, (f"unknown command {command!r};", closest(command, (*TRAINER_COMMANDS, *OTHER_COMMANDS))))
        )
    print(problem.rstrip(";"), USAGE, sep="\n\n", end="", file=sys.stderr)
    return 2


def _run_trainer(arguments: list[str]) -> int:
    """Refuse a bad recipe before the imports that take seconds, then hand over to LightningCLI."""
    given = split_arguments(arguments[1:])
    if given.paths:
        verdict = check.check(given.paths, given.settings)
        if verdict.problems:
            check.print_problems(verdict, file=sys.stderr)
            return 2
    return _hand_over(arguments)


def _hand_over(arguments: list[str]) -> int:
    from lightning_moe.cli.lightning_cli import run

    return int(run(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
