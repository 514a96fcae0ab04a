"""Settings of a pipeline, from Python, from YAML and in recipes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_moe import ConfigError, PipelineConfig
from lightning_moe.config.loader import parse_yaml
from lightning_moe.config.mapping import from_mapping
from lightning_moe.config.recipe import check_recipe
from lightning_moe.config.recipe_facts import pipeline_config


class Strategy:
    """Takes the argument as MoEStrategy does."""

    def __init__(self, pipeline: PipelineConfig | None = None) -> None:
        self.pipeline = pipeline


def test_from_yaml() -> None:
    """LightningCLI's parser makes tuples of lists."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Strategy, "strategy")
    text = "strategy: {pipeline: {schedule: zb-v, num_microbatches: 8, blocks_per_stage: [1, 2], costs: [1, 2, 1.5]}}"
    given = parser.parse_string(text).strategy.pipeline.as_dict()
    config = from_mapping(PipelineConfig, given, "pipeline")
    assert config == PipelineConfig(schedule="zb-v", num_microbatches=8, blocks_per_stage=(1, 2), costs=(1.0, 2.0, 1.5))


def test_to_json_and_back() -> None:
    config = PipelineConfig(chunks=2, block_costs=(1.0, 2.0), memory_limit=3.5)
    assert from_mapping(PipelineConfig, json.loads(json.dumps(asdict(config))), "pipeline") == config


def test_microbatches_are_twice_the_ranks_unless_given() -> None:
    assert PipelineConfig().microbatches(4) == 8
    assert PipelineConfig(num_microbatches=3).microbatches(4) == 3


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_microbatches", 0, "at least 1"),
        ("chunks", 0, "at least 1"),
        ("max_lag", -1, "at least 0"),
        ("memory_limit", 0.0, "greater than 0"),
        ("weight_grad_megabytes", 0.0, "greater than 0"),
        ("communication", -0.1, "at least 0"),
        ("costs", (1.0, 0.0, 1.0), "three positive times"),
        ("costs", (1.0, 1.0), "3 values"),
        ("blocks_per_stage", (2, -1), "a number of blocks for each stage"),
        ("transport", "pigeon", "auto, p2p, copy"),
        ("num_microbatches", True, "an integer"),
    ],
)
def test_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PipelineConfig(**{field: value})
    assert refused.value.field == f"pipeline.{field}"
    assert allowed in refused.value.allowed


RECIPE = """\
trainer:
  devices: 2
  strategy: STRATEGY
model: {class_path: lightning_moe.GPTMoE}
"""


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("moe", None),
        ("ddp", None),
        ("{class_path: lightning_moe.MoEStrategy}", None),
        ("{class_path: lightning_moe.MoEStrategy, init_args: {parallel: {pipeline: 2}}}", PipelineConfig()),
        (
            "{class_path: lightning_moe.MoEStrategy, init_args: {pipeline: {schedule: 1f1b, num_microbatches: 4}}}",
            PipelineConfig(schedule="1f1b", num_microbatches=4),
        ),
    ],
)
def test_what_a_recipe_says(strategy: str, expected: PipelineConfig | None) -> None:
    verdict = check_recipe(parse_yaml(RECIPE.replace("STRATEGY", strategy), "r.yaml"))
    assert verdict.problems == ()
    assert pipeline_config(verdict.recipe) == expected
