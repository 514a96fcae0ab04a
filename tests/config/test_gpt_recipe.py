"""What ``lightning-moe check`` finds in a recipe for GPT-MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moe.cli.check import check, summarize

GOOD = """\
trainer:
  accelerator: cpu
  devices: 8
  max_steps: 50
  strategy:
    class_path: lightning_moe.MoEStrategy
    init_args:
      parallel: {tensor: 2, context: 2, expert: 2, expert_tensor: 2}
model:
  class_path: lightning_moe.GPTMoE
  init_args:
    config:
      num_heads: 4
      num_kv_heads: 2
      max_sequence_length: 64
      moe: {num_experts: 8, expert_hidden_size: 32}
    optimizer: {warmup_steps: 10}
    activation_checkpointing: selective
data:
  class_path: lightning_moe.TextDataModule
  init_args: {sequence_length: 64}
"""

PARALLEL = "trainer.strategy.init_args.parallel"
CONFIG = "model.init_args.config"


def verdict_of(folder: Path, text: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return check([str(path)])


def test_a_good_recipe(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, GOOD)
    assert [str(problem) for problem in verdict.problems] == []
    assert summarize(verdict.recipe) == {
        "world_size": 8,
        "data": 2,
        "expert": 2,
        "expert_data": 2,
        "experts_per_rank": 4,
    }


def test_a_recipe_that_leaves_everything_to_defaults(tmp_path: Path) -> None:
    text = "model: {class_path: lightning_moe.GPTMoE}\ndata: {class_path: lightning_moe.TextDataModule}\n"
    assert [str(problem) for problem in verdict_of(tmp_path, text).problems] == []


BAD = {
    "heads over tensor ranks": ("num_kv_heads: 2", "num_kv_heads: 1", f"{PARALLEL}.tensor", "key-value heads, 1"),
    "odd heads over tensor ranks": (
        "num_heads: 4\n      num_kv_heads: 2",
        "hidden_size: 40\n      num_heads: 5\n      num_kv_heads: 5",
        f"{PARALLEL}.tensor",
        "key-value heads, 5",
    ),
    "heads over context ranks": (
        "num_heads: 4\n      num_kv_heads: 2",
        "hidden_size: 48\n      num_heads: 6\n      num_kv_heads: 2",
        f"{PARALLEL}.context",
        "query heads of one tensor rank, 3",
    ),
    "experts over ranks": ("num_experts: 8", "num_experts: 7", f"{PARALLEL}.expert", "a divisor of"),
    "expert width over ranks": (
        "expert_hidden_size: 32",
        "expert_hidden_size: 33",
        f"{PARALLEL}.expert_tensor",
        "moe.expert_hidden_size = 33",
    ),
    "tokens over ranks": (
        "sequence_length: 64}",
        "sequence_length: 62}",
        "data.init_args.sequence_length",
        "a multiple of 4",
    ),
    "sequences too long": ("sequence_length: 64}", "sequence_length: 128}", "data.init_args.sequence_length", "= 64"),
    "bytes unknown": ("num_heads: 4", "num_heads: 4\n      vocab_size: 256", f"{CONFIG}.vocab_size", "at least 257"),
    "trained tokens unknown": (
        "sequence_length: 64}",
        "sequence_length: 64, tokenizer: bpe, vocab_size: 1000}",
        f"{CONFIG}.vocab_size",
        "at least 1000",
    ),
    "trained tokens unknown, in the customary number": (
        "sequence_length: 64}",
        "sequence_length: 64, tokenizer: bpe}",
        f"{CONFIG}.vocab_size",
        "at least 4096",
    ),
    "stages": (
        "tensor: 2, context: 2, expert: 2, expert_tensor: 2",
        "pipeline: 4",
        f"{PARALLEL}.pipeline",
        "at most 3, for 2 blocks",
    ),
    "microbatches": (
        "{tensor: 2, context: 2, expert: 2, expert_tensor: 2}",
        "{pipeline: 2}\n      pipeline: {num_microbatches: 9}",
        "trainer.strategy.init_args.pipeline.num_microbatches",
        "at most data.init_args.batch_size = 8",
    ),
    "warm-up": ("warmup_steps: 10", "warmup_steps: 50", "model.init_args.optimizer.warmup_steps", "less than"),
    "unknown checkpointing": (
        "selective",
        "block",
        "model.init_args.activation_checkpointing",
        "none, selective, full",
    ),
    "no tokens at a time": (
        "activation_checkpointing: selective",
        "loss_chunk_tokens: 0",
        "model.init_args.loss_chunk_tokens",
        "at least 1",
    ),
    "field of another model": (
        "num_heads: 4",
        "num_heads: 4\n      patch_length: 12",
        f"{CONFIG}.patch_length",
        "one of the keys",
    ),
    "kind of rotary scaling": (
        "num_heads: 4",
        "num_heads: 4\n      rope_scaling: {type: longrope, factor: 2.0}",
        f"{CONFIG}.rope_scaling.type",
        "yarn",
    ),
    "series routing": (
        "expert_hidden_size: 32",
        "expert_hidden_size: 32, routing_granularity: series",
        f"{CONFIG}.moe.routing_granularity",
        "token",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe(name: str, tmp_path: Path) -> None:
    old, new, field, allowed = BAD[name]
    assert GOOD.count(old) == 1
    problems = verdict_of(tmp_path, GOOD.replace(old, new)).problems
    assert [problem.field for problem in problems] == [field]
    assert allowed in problems[0].allowed
    assert problems[0].location.startswith(str(tmp_path))


def test_sequences_need_not_be_split_over_tensor_ranks_without_sequence_parallelism(tmp_path: Path) -> None:
    text = GOOD.replace("tensor: 2,", "tensor: 2, sequence_parallel: false,").replace("length: 64}", "length: 62}")
    assert not verdict_of(tmp_path, text).problems


def test_rules_of_one_model_leave_the_other_alone(tmp_path: Path) -> None:
    """Neither has the fields that the other's rules read, and neither default is taken for the other's."""
    text = """\
trainer:
  devices: 2
  accelerator: cpu
  strategy: {class_path: lightning_moe.MoEStrategy, init_args: {parallel: {tensor: 2}}}
model: {class_path: somebody.Model}
data: {class_path: lightning_moe.TextDataModule, init_args: {sequence_length: 7}}
"""
    assert not verdict_of(tmp_path, text).problems
