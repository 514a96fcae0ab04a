"""``lightning-moe plan``: mesh, stages, memory and schedules of a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lightning_moe.cli.plan import command
from lightning_moe.cli.plan.memory import RunFacts, memory_of_ranks, peak_bytes
from lightning_moe.config import GPTMoEConfig, MoEConfig, ParallelConfig, PipelineConfig
from lightning_moe.config.gpt_size import gpt_size, parameter_count
from lightning_moe.pipeline.actions import parse_actions
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.planning import schedule_of

RECIPES = Path(__file__).parents[2] / "recipes"
PIPELINE = str(RECIPES / "gpt_moe_cpu_pipeline.yaml")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict]:
    assert command.main([*arguments, "--json"]) == 0, capsys.readouterr().err
    *lines, last = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(last)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main([*arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_plan_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    text, plan = planned(capsys, PIPELINE)
    assert plan["world_size"] == 2
    assert plan["axes"]["pipeline"] == 2
    assert plan["pipelines"] == [[0, 1]]
    assert (plan["schedule"], plan["microbatches"], plan["batch_size"]) == ("zb-h1", 8, 8)
    assert [stage["blocks"] for stage in plan["stages"]] == [[0, 1], [2, 3]]
    assert [(stage["embedding"], stage["head"]) for stage in plan["stages"]] == [(True, False), (False, True)]
    assert sum(stage["cost"] for stage in plan["stages"]) == pytest.approx(2, rel=1e-12)
    zero, one = plan["schedules"]["zb-h1"], plan["schedules"]["1f1b"]
    assert zero["makespan"] < one["makespan"]
    assert "pipelines: 0 > 1" in text
    assert "blocks 2-3, head" in text


def test_pipelines_of_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    text, plan = planned(capsys, PIPELINE, "--trainer.devices", "8", "--trainer.strategy.parallel.expert", "2")
    assert plan["pipelines"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert plan["axes"] == {
        "pipeline": 2, "data": 4, "context": 1, "tensor": 1, "expert_data": 2, "expert": 2, "expert_tensor": 1
    }  # fmt: skip
    assert "0 > 4, 1 > 5" in text


def test_schedules_that_the_model_has_too_few_blocks_for(capsys: pytest.CaptureFixture[str]) -> None:
    """They are named below the table, with the reason."""
    text, plan = planned(capsys, PIPELINE, "--model.config.num_layers", "2")
    assert "   zb-v: not here, pipeline stages 4 (allowed: at most 3, for 2 blocks and head)" in text.splitlines()
    assert "at most 3" in plan["schedules"]["zb-v"]["error"]
    assert plan["schedules"]["zb-h2"]["chunks"] == 1


def test_depths_by_hand_and_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    depths = ["--trainer.strategy.pipeline.blocks_per_stage", "[1, 3]"]
    text, plan = planned(capsys, PIPELINE, *depths, "--data.batch_size", "12")
    assert "8 microbatches of 1 or 2 samples; 8 does not divide 12" in text
    assert [stage["blocks"] for stage in plan["stages"]] == [[0], [1, 2, 3]]
    _, plan = planned(capsys, PIPELINE, "--trainer.strategy.pipeline.schedule", "interleaved-1f1b")
    assert [(stage["pipeline_rank"], stage["chunk"]) for stage in plan["stages"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [stage["blocks"] for stage in plan["stages"]] == [[0], [1], [2], [3]]


def test_auto_takes_no_more_stages_than_there_are_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the model's number of blocks the check would refuse the four chunks that auto likes best."""
    schedule = ["--trainer.strategy.init_args.pipeline.schedule=auto"]
    _, plan = planned(capsys, PIPELINE, *schedule)
    assert plan["schedules"][plan["schedule"]]["chunks"] == 2
    _, plan = planned(capsys, PIPELINE, *schedule, "--trainer.strategy.pipeline.blocks_per_stage", "[3, 1]")
    assert [stage["blocks"] for stage in plan["stages"]] == [[0, 1, 2], [3]]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("costs", "[1, 1, .nan]", "three positive times"),
        ("costs", "[1, 1, .inf]", "three positive times"),
        ("communication", ".inf", "a time in the units of costs"),
        ("block_costs", "[1, 1, 1, 0]", "a positive number for each block"),
        ("block_costs", "[1, 1, 1, .nan]", "a positive number for each block"),
        ("block_costs", "[]", "a positive number for each block"),
        ("blocks_per_stage", "[2, 1, 1]", "2 numbers, one for each stage. Hint: pipeline.chunks"),
    ],
)
def test_wrong_settings_of_a_pipeline(
    setting: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = refused(capsys, PIPELINE, f"--trainer.strategy.pipeline.{setting}", value)
    assert f"init_args.pipeline.{setting}: [" in printed or f"init_args.pipeline.{setting}: inf" in printed
    assert message in printed


def test_more_chunks_than_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the chunks that are too many, not the ranks."""
    schedule = ["--trainer.strategy.pipeline.schedule", "interleaved-1f1b"]
    printed = refused(capsys, PIPELINE, *schedule, "--trainer.strategy.pipeline.chunks", "3")
    assert "init_args.pipeline.chunks: 3 is not allowed; allowed: at most 2, for 4 blocks on 2 ranks" in printed


def test_a_recipe_without_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    text, plan = planned(capsys, str(RECIPES / "gpt_moe_cpu.yaml"))
    assert len(plan["stages"]) == len(plan["memory"]) == 1
    assert plan["microbatches"] == 1
    assert "pipelines:" not in text
    _, plan = planned(capsys, str(RECIPES / "chronos_dense_cpu.yaml"), "--trainer.strategy.parallel.pipeline", "2")
    assert [stage["blocks"] for stage in plan["stages"]] == [[0], [1]]
    assert plan["memory"] is not None


def test_the_memory_that_the_mixtral_recipe_promises(capsys: pytest.CaptureFixture[str]) -> None:
    """2.82 B expert parameters at 16 bytes and 0.80 B others at 9: 49 GiB. 1 %: the digits of the recipe's comment."""
    _, plan = planned(capsys, str(RECIPES / "mixtral_8x7b_16xh100.yaml"))
    (memory,) = plan["memory"]
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert states == pytest.approx(2.82e9 * 16 + 0.80e9 * 9, rel=0.01)
    assert memory["total"] == pytest.approx(states + memory["activations"] + memory["temporary"], abs=5)


def test_memory_of_the_pipeline_recipe_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Width 64, queries 64, keys 32 wide, 8 experts of 64 of which 2 are visited, 128 tokens, float32."""
    _, plan = planned(capsys, PIPELINE)
    block = 2 * 64 * (64 + 32) + 2 * 64 + 8 * 64 + 8 * 3 * 64 * 64  # attention, norms, router, experts
    matrix, norm = 257 * 64, 64
    held = 128 * 2 * 4 * (4 * 64 + 2 * 64 + 3 * (64 + 32) + 2 * (2 * 64 + 3 * 64))
    deferred = 128 * 2 * 4 * (2 * 64 + 2 * (64 + 32) + 2 * (2 * 64 + 3 * 64))
    head = 4 * matrix + 4 * 128 * 64  # gradients of the projection and of the hidden states
    expected = [(2 * block + matrix, 2 * held, 0), (2 * block + matrix + norm, held + head + deferred, 128 * 257 * 4)]
    for memory, (parameters, activations, temporary) in zip(plan["memory"], expected, strict=True):
        assert memory["weights"] == memory["gradients"] == 4 * parameters
        assert memory["optimizer"] == 8 * parameters
        # Rank 0 holds two microbatches; rank 1 one, and the operands of one whose W lags behind.
        assert (memory["activations"], memory["temporary"]) == (activations, temporary)
    # The slower rank, at 1.0988 of the average, works without a pause once rank 0's first forward has arrived.
    slow, fast = plan["stages"][1]["cost"], plan["stages"][0]["cost"]
    assert plan["schedules"]["zb-h1"]["makespan"] == pytest.approx(fast + 8 * 3 * slow, rel=1e-12)
    assert plan["schedules"]["zb-h1"]["bubble"] == pytest.approx(fast / (fast + 8 * 3 * slow), rel=1e-9)


def test_tokens_of_a_microbatch(capsys: pytest.CaptureFixture[str]) -> None:
    """The logits show them: 257 float32 for each token. The largest microbatch counts; context ranks share tokens."""
    _, plan = planned(capsys, PIPELINE, "--data.batch_size", "12")
    assert plan["memory"][1]["temporary"] == 2 * 128 * 257 * 4
    _, plan = planned(capsys, PIPELINE, "--trainer.devices", "4", "--trainer.strategy.parallel.context", "2")
    assert plan["memory"][1]["temporary"] == 64 * 257 * 4


def test_another_model_is_planned_as_far_as_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer:\n  devices: 4\n  strategy: {class_path: lightning_moe.MoEStrategy, init_args: "
        "{parallel: {pipeline: 4}, pipeline: {schedule: 1f1b}}}\nmodel: {class_path: somebody.Model}\n"
    )
    text, plan = planned(capsys, str(recipe))
    assert plan["memory"] is None
    assert [stage["blocks"] for stage in plan["stages"]] == [None] * 4
    assert plan["schedules"]["1f1b"]["peak"] == 4
    assert "known when the model is built" in text
    assert "4.00 microbatches" in text


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, trace = tmp_path / "plan.html", tmp_path / "plan.json"
    text, plan = planned(capsys, PIPELINE, "--html", str(page), f"--trace={trace}")
    assert (plan["html"], plan["trace"]) == (str(page), str(trace))
    root = ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.get("class") == "action"]
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    # Rank 0 does not lag: 8 F and 8 BW. Rank 1: 8 F, 8 B, 8 W.
    assert len(boxes) == len(events) == 16 + 24
    assert str(root.findtext("body/pre")) in text


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["no recipe given", "usage: lightning-moe plan"]),
        ([PIPELINE, "--htm", "x"], ["unknown option: --htm"]),
        ([PIPELINE, "--html"], ["--html needs the name of a file"]),
        ([PIPELINE, "--html=a", "--trace=a"], ["two files are needed"]),
        ([PIPELINE, "--trainer.strategy.pipeline.schedule", "zbh1"], ["pipeline.schedule: 'zbh1'", "zb-h1"]),
        ([PIPELINE, "--trainer.accelerator", "gpu", "--trainer.devices", "auto"], ["trainer.devices: 'auto'"]),
        (
            [PIPELINE, "--trainer.strategy.pipeline.schedule", "no.module:f"],
            ["init_args.pipeline.schedule: 'no.module:f'", "No module named"],
        ),
        ([PIPELINE, "--html", "/nowhere/plan.html"], ["/nowhere/plan.html"]),
    ],
)
def test_refusals(arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = refused(capsys, *arguments)
    assert all(message in printed for message in messages), printed


def test_another_strategy_has_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: {strategy: ddp, devices: 2}\nmodel: {class_path: lightning_moe.GPTMoE}\n")
    assert "trainer.strategy: 'ddp' is not allowed; allowed: lightning_moe.MoEStrategy" in refused(capsys, str(recipe))


def test_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from lightning_moe.cli.main import main; "
        f"main(['plan', {PIPELINE!r}, '--html', {str(tmp_path / 'a.html')!r}]); "
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_peak_bytes() -> None:
    actions = parse_actions("F0 F1 B0 F0.1 W0 BW0.1 B1 W1")[0]
    # Held 10, deferred 4 of chunk 0; 7 of chunk 1: F0 10, F1 20, B0 14, F0.1 21, W0 17, ...
    assert peak_bytes(actions, (10.0, 7.0), (4.0, 1.0)) == 21
    assert peak_bytes(actions, (10.0, 0.0), (40.0, 1.0)) == 50


def facts(**changes: object) -> RunFacts:
    return RunFacts(
        **{
            "precision": "32-true",
            "optimizer_sharding": True,
            "checkpointing": "none",
            "fused_norm": False,
            "tokens": 64,
            "loss_chunk_tokens": None,
            "vocab_size": 257,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("precision", "weights", "state"),
    [("32-true", 4, 8), ("bf16-mixed", 4, 8), ("bf16-true", 2, 12), ("64-true", 8, 16)],
)
def test_bytes_of_a_parameter(precision: str, weights: int, state: int) -> None:
    """The table of docs/concepts/optimizer-sharding.md; four data ranks share the state."""
    config = GPTMoEConfig(moe=None)
    schedule = schedule_of(PipelineConfig(schedule="1f1b", num_microbatches=1), 1)
    (memory,) = memory_of_ranks(
        gpt_size(config), ParallelConfig(data=4), schedule, [ModelPart.whole(2)], facts(precision=precision)
    )
    total = parameter_count(config).total
    assert memory.weights == weights * total
    assert memory.gradients == max(4, weights) * total
    assert memory.optimizer == state * total / 4


def test_tied_weights_count_once_on_each_rank_that_holds_them() -> None:
    config = GPTMoEConfig(moe=MoEConfig(), tie_embeddings=True)
    matrix, total = config.vocab_size * config.hidden_size, parameter_count(config).total
    for ranks, parts, expected in (
        (1, [ModelPart.whole(2)], total),
        (2, [ModelPart(range(1), first=True), ModelPart(range(1, 2), last=True)], total + matrix),
    ):
        schedule = schedule_of(PipelineConfig(schedule="1f1b", num_microbatches=1), ranks)
        memory = memory_of_ranks(gpt_size(config), ParallelConfig(pipeline=ranks, data=1), schedule, parts, facts())
        assert sum(rank.weights for rank in memory) == 4 * expected


def test_checkpointing_moves_memory_from_activations_to_one_block() -> None:
    config = GPTMoEConfig(num_layers=4)
    schedule, parts = (
        schedule_of(PipelineConfig(schedule="1f1b"), 2),
        [
            ModelPart(range(2), first=True),
            ModelPart(range(2, 4), last=True),
        ],
    )
    none, full = (
        memory_of_ranks(
            gpt_size(config), ParallelConfig(pipeline=2, data=1), schedule, parts, facts(checkpointing=kind)
        )[0]
        for kind in ("none", "full")
    )
    assert full.activations == 2 * 2 * 64 * 64 * 4  # 2 microbatches, 2 blocks, 64 tokens of width 64
    assert none.temporary == 0
    assert full.temporary == pytest.approx(none.activations / 4, rel=1e-12)
