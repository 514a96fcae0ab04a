"""``lightning-moe check RECIPE.yaml``: refuses a bad recipe in well under a second."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from lightning_moe.cli.arguments import is_setting, load_documents, split_arguments
from lightning_moe.cli.schedule_rules import SCHEDULE_RULES
from lightning_moe.config.reader import KnownValues, UnknownValueError
from lightning_moe.config.recipe import Verdict, check_recipe
from lightning_moe.config.recipe_facts import model_config, parallel_config, world_size
from lightning_moe.errors import ConfigError

USAGE = """usage: lightning-moe check RECIPE.yaml [RECIPE.yaml ...] [--SETTING VALUE ...] [--json]

Checks a recipe without importing torch: unknown and repeated keys, types, ranges, and sizes that do not fit
together. Of several recipes the later ones win; settings such as --trainer.devices 4 win over recipes.

  --json   print one JSON object as the last line
  --help   print this text

Exit code: 0 when the recipe is good, 2 when it is not.
"""


def check(paths: Sequence[str], settings: Sequence[tuple[str, str]] = ()) -> Verdict:
    """Check recipes, the later ones laid over the earlier ones, with settings of the command line on top."""
    try:
        document = load_documents(paths, settings)
    except ConfigError as unreadable:
        return Verdict(KnownValues({}), (unreadable,))
    return check_recipe(document, SCHEDULE_RULES)


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` is what follows ``check``. Returns the exit code."""
    arguments = split_arguments(argv)
    options, paths = arguments.options, arguments.recipes
    if options & {"--help", "-h"}:
        print(USAGE, end="")
        return 0
    unknown = options - {"--json"} | {f"--{key}" for key, _ in arguments.settings if not is_setting(key)}
    if not paths or unknown:
        wrong = ", ".join(sorted(unknown))
        print(
            f"unknown option: {wrong}\n" if wrong else "no recipe given\n",
            USAGE,
            sep="\n",
            end="",
            file=sys.stderr,
        )
        return 2
    verdict = check(paths, arguments.settings)
    print_problems(verdict, file=sys.stdout)
    name = " + ".join(paths)
    if verdict.problems:
        print(f"{name}: {len(verdict.problems)} problem{'s' if len(verdict.problems) > 1 else ''}")
    else:
        print(f"{name}: ok, {_describe(verdict.recipe)}")
    if "--json" in options:
        print(json.dumps(_as_json(verdict)))
    return 2 if verdict.problems else 0


def print_problems(verdict: Verdict, file: Any) -> None:
    """Print each problem on a line of its own."""
    for problem in verdict.problems:
        print(problem, file=file)


def summarize(recipe: KnownValues) -> dict[str, int]:
    """The sizes that a good recipe leads to, as far as they can be known before it runs."""
    sizes: dict[str, int] = {}
    world = world_size(recipe)
    if world is None:
        return sizes
    sizes["world_size"] = world
    parallel = parallel_config(recipe)
    if parallel is None:
        return sizes
    resolved = parallel.resolve(world)
    assert resolved.data is not None
    if resolved.pipeline > 1:
        sizes["pipeline"] = resolved.pipeline
    sizes |= {"data": resolved.data, "expert": resolved.expert, "expert_data": resolved.expert_data}
    try:
        moe = model_config(recipe).moe
    except UnknownValueError:
        return sizes
    return sizes if moe is None else sizes | {"experts_per_rank": moe.num_experts // resolved.expert}


def _describe(recipe: KnownValues) -> str:
    sizes = summarize(recipe)
    if not sizes:
        return "the number of ranks is known when it runs"
    text = f"world size {sizes.pop('world_size')}"
    return ", ".join([text, *(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items())])


def _as_json(verdict: Verdict) -> dict[str, Any]:
    errors = [
        {
            "field": problem.field,
            "value": _plain(problem.value),
            "allowed": problem.allowed,
            "hint": problem.hint,
            "location": problem.location,
        }
        for problem in verdict.problems
    ]
    sizes = {} if errors else summarize(verdict.recipe)
    return {"ok": not errors, "errors": errors, "world_size": sizes.pop("world_size", None), **sizes}


def _plain(value: object) -> object:
    """Return a value that strict JSON can hold: it has no NaN, for one."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
