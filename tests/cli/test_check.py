"""``lightning-moe check`` on good and on malformed recipes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.cli import check
from lightning_moe.cli.schedule_rules import SCHEDULE_RULES
from lightning_moe.config.loader import Document, parse_yaml
from lightning_moe.config.recipe import check_recipe
from tests.cli.recipes import GOOD, edited


class Bad(NamedTuple):
    """One malformed recipe. The line that must be named ends in ``#!``; without one it is the file's first."""

    old: str
    new: str
    field: str
    allowed: str
    hint: str = ""


STRATEGY = "trainer.strategy.init_args"
CONFIG = "model.init_args.config"

MALFORMED = {
    # --- keys
    "unknown top-level key": Bad("seed_everything: 0", "seed: 0 #!", "seed", "seed_everything", "seed_everything"),
    "misspelt trainer key": Bad(
        "  num_nodes: 1", "  num_node: 1 #!", "trainer.num_node", "num_nodes", "did you mean 'num_nodes'?"
    ),
    "misspelt axis": Bad(
        "        expert: 2", "        experts: 2 #!", f"{STRATEGY}.parallel.experts", "expert", "did you mean 'expert'?"
    ),
    "misspelt moe key": Bad(
        "        top_k: 2", "        topk: 2 #!", f"{CONFIG}.moe.topk", "top_k", "did you mean 'top_k'?"
    ),
    "key at the wrong level": Bad(
        "      hidden_size: 64",
        "      hidden_size: 64\n      top_k: 2 #!",
        f"{CONFIG}.top_k",
        "moe",
    ),
    "argument beside init_args": Bad(
        "  class_path: lightning_moe.SeriesDataModule",
        "  class_path: lightning_moe.SeriesDataModule\n  batch_size: 96 #!",
        "data.batch_size",
        "init_args",
    ),
    "duplicate key": Bad(
        "        top_k: 2",
        "        top_k: 2\n        top_k: 1 #!",
        f"{CONFIG}.moe.top_k",
        "each key once",
        "gives it already",
    ),
    "duplicate section": Bad("data:\n", "trainer: {} #!\ndata:\n", "trainer", "each key once", "gives it already"),
    "boolean as a key": Bad("  num_nodes: 1", "  on: 1 #!", "trainer.True", "a text as the key", "quote it"),
    "missing model": Bad(
        "model:\n  class_path: lightning_moe.ChronosMoE\n",
        "model: #!\n",
        "model.class_path",
        "it has no default",
        "class_path",
    ),
    # --- types
    "null for a number": Bad(
        "        num_experts: 8", "        num_experts: #!", f"{CONFIG}.moe.num_experts", "an integer", "null"
    ),
    "boolean for an integer": Bad(
        "        top_k: 2", "        top_k: true #!", f"{CONFIG}.moe.top_k", "an integer", "boolean"
    ),
    "yes for an integer": Bad("  num_nodes: 1", "  num_nodes: yes #!", "trainer.num_nodes", "an integer", "boolean"),
    "text for a number": Bad(
        "      learning_rate: 2e-3",
        '      learning_rate: "2e-3" #!',
        "model.init_args.optimizer.learning_rate",
        "a number",
        "quotes",
    ),
    "float for an integer": Bad(
        "    batch_size: 96", "    batch_size: 96.0 #!", "data.init_args.batch_size", "an integer", "decimal point"
    ),
    "integer for a boolean": Bad(
        "        shared_expert_gate: true",
        "        shared_expert_gate: 1 #!",
        f"{CONFIG}.moe.shared_expert_gate",
        "true or false",
    ),
    "number for a list": Bad(
        "      quantiles: [0.1, 0.5, 0.9]", "      quantiles: 0.5 #!", f"{CONFIG}.quantiles", "a list", "[a, b, ...]"
    ),
    "bad entry of a list": Bad(
        "      quantiles: [0.1, 0.5, 0.9]",
        "      quantiles:\n        - 0.1\n        - half #!",
        f"{CONFIG}.quantiles[1]",
        "a number",
    ),
    "list for a mapping": Bad(
        "      parallel:\n        expert: 2",
        "      parallel: [2] #!",
        f"{STRATEGY}.parallel",
        "a mapping of the fields of ParallelConfig",
    ),
    "null for a section": Bad(
        "  init_args:\n    context_length: 144\n    prediction_length: 24\n    batch_size: 96\n",
        "  init_args: #!\n",
        "data.init_args",
        "a mapping",
        "null",
    ),
    "misspelt choice": Bad(
        "        activation: relu",
        "        activation: rleu #!",
        f"{CONFIG}.moe.activation",
        "swiglu, gelu, relu",
        "'relu'",
    ),
    "misspelt strategy": Bad(
        "    class_path: lightning_moe.MoEStrategy",
        "    class_path: lightning_moe.MoeStrategy #!",
        "trainer.strategy.class_path",
        "lightning_moe.MoEStrategy",
        "did you mean 'MoEStrategy'?",
    ),
    "misspelt precision": Bad(
        "  precision: 32-true", "  precision: b16-mixed #!", "trainer.precision", "bf16-mixed", "did you mean"
    ),
    "misspelt model class": Bad(
        "  class_path: lightning_moe.ChronosMoE",
        "  class_path: ChronosMOE2 #!",
        "model.class_path",
        "lightning_moe.ChronosMoE",
        "did you mean 'ChronosMoE'?",
    ),
    # --- ranges
    "no experts": Bad("        num_experts: 8", "        num_experts: 0 #!", f"{CONFIG}.moe.num_experts", "at least 1"),
    "axis of size zero": Bad(
        "        expert: 2", "        expert: 0 #!", f"{STRATEGY}.parallel.expert", "an integer of at least 1"
    ),
    "negative timeout": Bad(
        "      start_method: popen",
        "      timeout_seconds: -1 #!",
        f"{STRATEGY}.timeout_seconds",
        "greater than 0",
    ),
    "zero capacity": Bad(
        "        top_k: 2",
        "        capacity_factor: 0 #!",
        f"{CONFIG}.moe.capacity_factor",
        "greater than 0",
        "dropless",
    ),
    "adam's beta of one": Bad(
        "      warmup_steps: 100",
        "      betas: [0.9, 1.0] #!",
        "model.init_args.optimizer.betas",
        "less than 1",
        "for instance",
    ),
    "no devices": Bad("  devices: 2", "  devices: 0 #!", "trainer.devices", "at least 1"),
    "all devices of a CPU": Bad("  devices: 2", "  devices: -1 #!", "trainer.devices", "on CPU", "processes"),
    "limit that is no fraction": Bad(
        "  num_nodes: 1",
        "  limit_val_batches: 1.5 #!",
        "trainer.limit_val_batches",
        "between 0.0 and 1.0",
        "integer counts",
    ),
    "descending quantiles": Bad(
        "      quantiles: [0.1, 0.5, 0.9]",
        "      quantiles: [0.9, 0.5, 0.1] #!",
        f"{CONFIG}.quantiles",
        "increasing order",
        "for instance",
    ),
    # --- fields that do not fit together
    "more choices than experts": Bad(
        "        top_k: 2", "        top_k: 9 #!", f"{CONFIG}.moe.top_k", "num_experts = 8", "lower it"
    ),
    "groups that do not divide": Bad(
        "        top_k: 2", "        num_groups: 3 #!", f"{CONFIG}.moe.num_groups", "1, 2, 4, 8", "turns"
    ),
    "more chosen groups than groups": Bad(
        "        top_k: 2", "        top_k_groups: 2 #!", f"{CONFIG}.moe.top_k_groups", "num_groups = 1", "num_groups"
    ),
    "chosen groups too small": Bad(
        "        top_k: 2",
        "        top_k: 3 #!\n        num_groups: 4",
        f"{CONFIG}.moe.top_k",
        "at most 2",
        "top_k_groups",
    ),
    "placement that is no permutation": Bad(
        "        top_k: 2",
        "        expert_placement: [0, 1, 2, 3, 4, 5, 6, 6] #!",
        f"{CONFIG}.moe.expert_placement",
        "exactly once",
        "missing: [7]",
    ),
    "padding without capacity": Bad(
        "        top_k: 2",
        "        pad_to_capacity: true #!",
        f"{CONFIG}.moe.pad_to_capacity",
        "dropless",
        "capacity_factor",
    ),
    "gate without shared expert": Bad(
        "        shared_expert_hidden_size: 128\n        shared_expert_gate: true",
        "        shared_expert_gate: true #!",
        f"{CONFIG}.moe.shared_expert_gate",
        "no shared expert",
        "shared_expert_hidden_size",
    ),
    "heads that do not divide": Bad(
        "      num_heads: 2", "      num_heads: 3 #!", f"{CONFIG}.num_heads", "a divisor of hidden_size = 64"
    ),
    "odd heads": Bad("      num_heads: 2", "      num_heads: 64 #!", f"{CONFIG}.num_heads", "even", "rotary"),
    "context that is no number of patches": Bad(
        "      context_length: 144",
        "      context_length: 140 #!",
        f"{CONFIG}.context_length",
        "a multiple of patch_length = 12",
        "132 and 144",
    ),
    "dropout of everything": Bad(
        "      num_heads: 2",
        "      num_heads: 2\n      dropout: 1.0 #!",
        f"{CONFIG}.dropout",
        "less than 1",
    ),
    "own and bundled data": Bad(
        "    batch_size: 96",
        "    path: my.csv #!\n    datasets: [m1_yearly]",
        "data.init_args.path",
        "null while datasets is given",
        "leave",
    ),
    "unknown data set": Bad(
        "    batch_size: 96", "    datasets: [m3_yearl] #!", "data.init_args.datasets[0]", "m3_yearly", "'m3_yearly'"
    ),
    # --- parts of the recipe that do not fit together
    "expert axis larger than the world": Bad(
        "        expert: 2",
        "        expert: 4 #!",
        f"{STRATEGY}.parallel.expert",
        "must divide data x context x tensor = 2",
        "trainer.devices",
    ),
    "data axis that contradicts the world": Bad(
        "        expert: 2", "        data: 4 #!", f"{STRATEGY}.parallel.data", "2 (world size 2", "derived"
    ),
    "experts not divided by ranks": Bad(
        "        num_experts: 8\n        top_k: 2\n",
        "        num_experts: 7\n        top_k: 2\n",
        f"{STRATEGY}.parallel.expert",
        "a divisor of model.init_args.config.moe.num_experts = 7",
        "same number",
    ),
    "more stages than blocks": Bad(
        "        expert: 2",
        "        pipeline: 2\n      pipeline:\n        schedule: interleaved-1f1b\n        chunks: 3 #!",
        f"{STRATEGY}.pipeline.chunks",
        "at most 2, for 2 blocks on 2 ranks",
        "every stage holds something",
    ),
    "unknown schedule": Bad(
        "      start_method: popen",
        "      pipeline:\n        schedule: zb-h #!",
        f"{STRATEGY}.pipeline.schedule",
        "zb-h1",
        "did you mean 'zb-h1'?",
    ),
    "misspelt pipeline key": Bad(
        "      start_method: popen",
        "      pipeline:\n        microbatches: 4 #!",
        f"{STRATEGY}.pipeline.microbatches",
        "num_microbatches",
        "did you mean 'num_microbatches'?",
    ),
    "chunks that the schedule has not": Bad(
        "      start_method: popen",
        "      pipeline:\n        schedule: 1f1b\n        chunks: 2 #!",
        f"{STRATEGY}.pipeline.chunks",
        "1 for 1f1b",
        "",
    ),
    "more microbatches than samples": Bad(
        "      start_method: popen",
        "      pipeline:\n        num_microbatches: 97 #!",
        f"{STRATEGY}.pipeline.num_microbatches",
        "at most data.init_args.batch_size = 96",
        "a divisor of it",
    ),
    "depths of another model": Bad(
        "      start_method: popen",
        "      pipeline:\n        blocks_per_stage: [3] #!",
        f"{STRATEGY}.pipeline.blocks_per_stage",
        "add up to the model's num_layers = 2",
        "they add up to 3",
    ),
    "depths of another number of stages": Bad(
        "      start_method: popen",
        "      pipeline:\n        blocks_per_stage: [1, 1] #!",
        f"{STRATEGY}.pipeline.blocks_per_stage",
        "one for each stage",
        "",
    ),
    "costs of another model": Bad(
        "      start_method: popen",
        "      pipeline:\n        block_costs: [1, 2, 3] #!",
        f"{STRATEGY}.pipeline.block_costs",
        "2 costs",
        "3 are given",
    ),
    "depths and costs": Bad(
        "      start_method: popen",
        "      pipeline:\n        blocks_per_stage: [2] #!\n        block_costs: [1, 1]",
        f"{STRATEGY}.pipeline.blocks_per_stage",
        "null while block_costs is given",
        "leave",
    ),
    "unknown dispatch": Bad(
        "      start_method: popen",
        "      overlap:\n        dispatch: peer #!",
        f"{STRATEGY}.overlap.dispatch",
        "one of auto, blocking, p2p",
        "",
    ),
    "misspelt overlap key": Bad(
        "      start_method: popen",
        "      overlap:\n        chunks: source #!",
        f"{STRATEGY}.overlap.chunks",
        "chunk",
        "did you mean 'chunk'?",
    ),
    "link without speed": Bad(
        "      start_method: popen",
        "      overlap:\n        link_gigabytes_per_second: 0 #!",
        f"{STRATEGY}.overlap.link_gigabytes_per_second",
        "greater than 0",
        "",
    ),
    "more groups than experts of a rank": Bad(
        "      start_method: popen",
        "      overlap:\n        expert_groups: 5 #!",
        f"{STRATEGY}.overlap.expert_groups",
        "at most 4, the experts of a rank",
        "cost model",
    ),
    "axis that would split dense layers": Bad(
        "        expert: 2",
        "        expert: 1\n        tensor: 2 #!",
        f"{STRATEGY}.parallel.tensor",
        "1 with ChronosMoE",
        "its dense layers are not split",
    ),
    "context lengths that differ": Bad(
        "    context_length: 144\n    prediction_length: 24\n    batch_size: 96",
        "    context_length: 120 #!\n    prediction_length: 24\n    batch_size: 96",
        "data.init_args.context_length",
        "144, the model's",
        "same length",
    ),
    "prediction lengths that differ": Bad(
        "      context_length: 144\n      prediction_length: 24",
        "      context_length: 144\n      prediction_length: 36",
        "data.init_args.prediction_length",
        "36, the model's",
        "same length",
    ),
    "half precision on a CPU": Bad(
        "  precision: 32-true", "  precision: 16-mixed #!", "trainer.precision", "bf16-mixed", "bf16-mixed"
    ),
    "half precision by its old name": Bad(
        "  precision: 32-true", "  precision: 16 #!", "trainer.precision", "bf16-mixed", "bf16-mixed"
    ),
    "precision that cannot be clipped": Bad(
        "  precision: 32-true", "  precision: transformer-engine #!", "trainer.precision", "bf16-mixed", "bf16-mixed"
    ),
    "GPU backend on a CPU": Bad(
        "      start_method: popen",
        "      process_group_backend: nccl #!",
        f"{STRATEGY}.process_group_backend",
        "gloo",
        "leave it out",
    ),
    "warm-up longer than training": Bad(
        "      warmup_steps: 100",
        "      warmup_steps: 2000 #!",
        "model.init_args.optimizer.warmup_steps",
        "less than trainer.max_steps = 2000",
        "peak",
    ),
    "callback that averages nothing": Bad(
        "    - class_path: lightning.pytorch.callbacks.LearningRateMonitor",
        "    - class_path: lightning.pytorch.callbacks.StochasticWeightAveraging #!",
        "trainer.callbacks[1].class_path",
        "EMAWeightAveraging",
        "before its layers exist",
    ),
}

LINES_OF_OTHERS = {
    # The problem shows where one of two fields stands, not necessarily the edited one.
    "experts not divided by ranks": "        expert: 2",
    "prediction lengths that differ": "    prediction_length: 24\n    batch_size",
}


def expected_line(name: str, text: str) -> int:
    marker = LINES_OF_OTHERS.get(name, "#!")
    return text[: text.index(marker)].count("\n") + 1


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = MALFORMED[name]
    text = edited(bad.old, bad.new)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    assert check.main([str(path), "--json"]) == 2

    *messages, count, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["ok"] is False
    assert found["world_size"] is None
    errors = {error["field"]: error for error in found["errors"]}
    assert bad.field in errors, f"found instead: {list(errors)}"
    error = errors[bad.field]
    assert error["location"] == f"{path}:{expected_line(name, text)}"
    assert bad.allowed in error["allowed"]
    assert bad.hint in error["hint"]
    assert len(messages) == len(errors)
    assert any(message.startswith(f"{error['location']}: {bad.field}: ") for message in messages)
    assert all("; allowed: " in message for message in messages)
    assert f"{len(errors)} problem" in count


def test_one_mistake_gives_one_message() -> None:
    """Rules that need a value which is missing or mistyped stay silent instead of guessing."""
    for name, bad in MALFORMED.items():
        problems = check_recipe(parse_yaml(edited(bad.old, bad.new), "r.yaml"), SCHEDULE_RULES).problems
        assert len(problems) == 1, f"{name}: {[str(problem) for problem in problems]}"


def test_all_problems_are_told_in_the_order_of_the_file() -> None:
    text = GOOD.replace("  devices: 2", "  devices: two").replace("top_k: 2", "top_k: 0").replace("96", "null")
    problems = check_recipe(parse_yaml(text, "r.yaml")).problems
    assert [problem.field for problem in problems] == [
        "trainer.devices",
        f"{CONFIG}.moe.top_k",
        "data.init_args.batch_size",
    ]


def test_good_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert check.main([str(path), "--json"]) == 0
    summary, last = capsys.readouterr().out.splitlines()
    assert summary == f"{path}: ok, world size 2, data 2, expert 2, expert data 1, experts per rank 4"
    assert json.loads(last) == {
        "ok": True,
        "errors": [],
        "world_size": 2,
        "data": 2,
        "expert": 2,
        "expert_data": 1,
        "experts_per_rank": 4,
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  precision: 32-true", "  precision: bf16"),
        ("  precision: 32-true", "  precision: 64"),
        ("  devices: 2", '  devices: "2"'),
        ("  devices: 2", "  devices: 4"),
        ("  gradient_clip_val: 1.0", "  gradient_clip_val: 1"),
        ("  max_steps: 2000", "  max_epochs: 1"),
        ("  max_steps: 2000", "  max_time: {hours: 1}"),
        ("  accelerator: cpu\n  devices: 2", "  accelerator: gpu\n  devices: [0, 3]"),
        ("  accelerator: cpu\n  devices: 2", "  accelerator: gpu\n  devices: auto"),
        ("        top_k: 2", "        expert_placement: [7, 6, 5, 4, 3, 2, 1, 0]"),
        ("        top_k: 2", "        capacity_factor: 1\n        pad_to_capacity: true"),
        ("  class_path: lightning_moe.ChronosMoE", "  class_path: my_package.MyModule"),
        ("  class_path: lightning_moe.SeriesDataModule", "  class_path: my_package.data.MyData"),
        ("    class_path: lightning_moe.MoEStrategy", "    class_path: lightning_moe.strategy.MoEStrategy"),
        ("        expert: 2", "        expert: 1\n        data: 2"),
        ("seed_everything: 0", "seed_everything: true\nckpt_path: last.ckpt"),
        ("        expert: 2", "        pipeline: 2"),
        (
            "        expert: 2",
            "        pipeline: 2\n      pipeline: {schedule: zb-h2, num_microbatches: 7, max_lag: 1}",
        ),
        ("        expert: 2", "        pipeline: 2\n      pipeline: {schedule: 1f1b, blocks_per_stage: [0, 2]}"),
        ("        expert: 2", "        pipeline: 2\n      pipeline: {schedule: interleaved-1f1b}"),
        ("      start_method: popen", "      pipeline: {schedule: my_package.schedules:mine, num_microbatches: 4}"),
        ("      start_method: popen", "      overlap: {}"),
        ("      start_method: popen", "      overlap: {dispatch: p2p, chunk: expert, expert_groups: 4}"),
        ("      start_method: popen", "      overlap: {dispatch: blocking, expert_groups: 5}"),
        ("        expert: 2", "        expert: 1\n      overlap: {expert_groups: 9}"),
    ],
)
def test_other_good_recipes(old: str, new: str) -> None:
    assert check_recipe(parse_yaml(edited(old, new), "r.yaml"), SCHEDULE_RULES).problems == ()


@pytest.mark.parametrize("strategy", ["auto", "moe", "moe_spawn", "moe_fork", "ddp"])
def test_strategies_by_name(strategy: str) -> None:
    start, end = GOOD.index("  strategy:"), GOOD.index("  logger:")
    text = f"{GOOD[:start]}  strategy: {strategy}\n{GOOD[end:]}"
    assert check_recipe(parse_yaml(text, "r.yaml")).problems == ()


def test_a_dense_model_needs_no_expert_axis_rule() -> None:
    start, end = GOOD.index("      moe:"), GOOD.index("    optimizer:")
    text = f"{GOOD[:start]}      moe: null\n{GOOD[end:]}"
    assert check_recipe(parse_yaml(text, "r.yaml")).problems == ()


def test_settings_of_the_command_line_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert check.main([str(path), "--trainer.devices=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["world_size"] == 4
    assert check.main(["--config", str(path), "--trainer.strategy.parallel.expert", "3", "--json"]) == 2
    errors = json.loads(capsys.readouterr().out.splitlines()[-1])["errors"]
    assert {(error["field"], error["location"]) for error in errors} == {
        (f"{STRATEGY}.parallel.expert", "command line")
    }


def test_later_recipes_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, later = tmp_path / "base.yaml", tmp_path / "later.yaml"
    base.write_text(GOOD)
    later.write_text("trainer:\n  devices: 3\n")
    assert check.main([str(base), str(later)]) == 2
    assert f"{base}:14: {STRATEGY}.parallel.expert: 2 is not allowed" in capsys.readouterr().out


def test_values_that_json_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(edited("      learning_rate: 2e-3", "      learning_rate: .nan"))
    assert check.main([str(path), "--json"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]

    def refuse(constant: str) -> object:
        raise AssertionError(f"{constant} is not JSON")

    (error,) = json.loads(last, parse_constant=refuse)["errors"]
    assert error["value"] == "nan"


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [("trainer: [1, 2\nmodel: 3\n", 2, "column"), ("- 1\n", 1, ""), (None, None, "there is no such file")],
)
def test_unreadable_recipe(
    text: str | None, line: int | None, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    assert check.main([str(path), "--json"]) == 2
    (error,) = json.loads(capsys.readouterr().out.splitlines()[-1])["errors"]
    assert error["field"] == "recipe"
    assert error["location"] == (f"{path}:{line}" if line else str(path))
    assert hint in error["hint"]


@pytest.mark.parametrize("argv", [[], ["--json"], ["recipe.yaml", "--jsn"], ["recipe.yaml", "--divices", "2"]])
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(argv) == 2
    assert "usage: lightning-moe check" in capsys.readouterr().err


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-3, max_value=300),
    st.floats(),
    st.sampled_from(["moe", "auto", "cpu", "none", "lightning_moe.ChronosMoE", "", "nccl"]),
    st.lists(st.integers(min_value=-1, max_value=9), max_size=3),
    st.dictionaries(st.sampled_from(["class_path", "init_args", "expert", "moe", "x"]), st.none() | st.integers()),
)


def paths_in(values: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of all mappings' and lists' entries."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    below = [inner for key, value in entries for inner in paths_in(value, (*path, key))]
    return ([path] if path else []) + below


@given(changes=st.lists(st.tuples(st.sampled_from(paths_in(yaml.safe_load(GOOD))), VALUES), min_size=1, max_size=4))
def test_whatever_a_recipe_says_the_check_answers(changes: list[tuple[tuple[str | int, ...], object]]) -> None:
    values = yaml.safe_load(GOOD)
    for path, value in changes:
        place = values
        for key in path[:-1]:
            try:
                place = place[key]
            except (KeyError, IndexError, TypeError):
                break
        else:
            if isinstance(place, dict) or (
                isinstance(place, list) and isinstance(path[-1], int) and path[-1] < len(place)
            ):
                place[path[-1]] = value
    document = Document(values, {"": "r.yaml:1"})
    verdict = check_recipe(document, SCHEDULE_RULES)
    assert all(problem.location == "r.yaml:1" and problem.allowed for problem in verdict.problems)
    if not verdict.problems:
        check.summarize(verdict.recipe)


COMMAND = [str(Path(sys.executable).with_name("lightning-moe"))]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["duplicate key", "null for a number", "expert axis larger than the world"])
def test_the_real_command_refuses(name: str, tmp_path: Path) -> None:
    bad = MALFORMED[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(edited(bad.old, bad.new))
    start = time.perf_counter()
    done = run_command("check", str(path), "--json")
    print(f"lightning-moe check: {time.perf_counter() - start:.2f} s")
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["errors"][0]["field"] == bad.field
    assert done.stderr == ""


def test_the_real_command_accepts(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    done = run_command("check", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}: ok, world size 2, data 2, expert 2, expert data 1, experts per rank 4\n"


def test_fit_refuses_a_bad_recipe_without_importing_torch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(edited("        top_k: 2", "        top_k: 9"))
    code = (
        "import sys; from lightning_moe.cli.main import main; code = main(['fit', '--config', sys.argv[1]]); "
        "assert not {'torch', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"{CONFIG}.moe.top_k: 9 is not allowed" in done.stderr


def test_the_check_imports_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    code = (
        "import sys; from lightning_moe.cli.main import main; assert main(['check', sys.argv[1]]) == 0; "
        "print(*sorted({'torch', 'lightning', 'numpy', 'pandas', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == ""
