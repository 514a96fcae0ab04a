"""The pipeline benchmark: its contestants compute the same, and its report holds what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lightning_moe.bench.pipeline import parse
from lightning_moe.bench.pipeline_blocks import BlockParts, Sleep, TransformerBlock, mean_product, weight_sinks
from lightning_moe.cli import bench
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Microbatch
from lightning_moe.weight_grad.queue import WeightGradQueue


def test_our_blocks_compute_what_torchs_blocks_do() -> None:
    """With weight gradients deferred, and without."""
    torch.manual_seed(0)
    peer = TransformerBlock(16, 2, ours=False).double()
    ours = TransformerBlock(16, 2, ours=True).double()
    ours.load_state_dict(peer.state_dict())
    hidden, target = torch.randn(2, 1, 5, 16, dtype=torch.float64)
    mean_product(peer(hidden), target).backward()
    queue = WeightGradQueue()
    weight_sinks(ours, queue)
    model = BlockParts([ModelPart(range(1), first=True, last=True)], [torch.nn.ModuleList([ours])])
    with queue.capture(0):
        loss = model.run_part(0, (), Microbatch((hidden, target))).loss
        assert loss is not None
        loss.backward()
    assert queue.num_held == 4
    queue.pop(0)
    for (name, parameter), expected in zip(ours.named_parameters(), peer.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-6, atol=1e-7, msg=name)


def test_sleeping_blocks_defer_their_weight_gradients() -> None:
    block, queue = Sleep(0.0, 0.0, 0.0), WeightGradQueue()
    weight_sinks(block, queue)
    hidden = torch.ones(2, requires_grad=True)
    with queue.capture(0):
        block(hidden).sum().backward()
    assert queue.num_held == 1
    assert torch.equal(hidden.grad, torch.ones(2))  # type: ignore[arg-type]


def test_the_command_line() -> None:
    options = parse(["--sleep", "20,30,10", "--microbatches", "4,8"])
    assert (options.sleep, options.microbatches, options.peers) == ((0.02, 0.03, 0.01), [4, 8], [])
    assert parse(["--peers", "none"]).peers == []


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--sleep", "20,20"], ["argument --sleep: '20,20'", "three positive times F,B,W"]),
        (["--sleep", "20,0,20"], ["argument --sleep: '20,0,20'"]),
        (["--microbatches", "8,x"], ["argument --microbatches: '8,x'", "positive integers"]),
        (["--microbatches", "0"], ["argument --microbatches: '0'"]),
        (["--steps", "0"], ["--steps: 0", "at least 1"]),
        (["--blocks", "10"], ["--blocks: 10", "a multiple of the 4 ranks"]),
        (["--blocks", "4"], ["--blocks: 4", "two chunks on 4 ranks"]),
        (["--peers", "ZBV1"], ["--peers: 'ZBV1'", "did you mean 'ZBV'?"]),
        (["--schedules", "zb-v/x"], ["--schedules: 'zb-v/x'", "name/chunks"]),
        (["--heads", "3"], ["--heads: 3", "a divisor of --hidden 4096"]),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(
    arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["pipeline", *arguments]) == 2
    printed = capsys.readouterr()
    assert all(message in printed.err for message in messages), printed.err
    assert printed.out == ""


@pytest.mark.slow
def test_the_report_of_sleeping_stages() -> None:
    command = [sys.executable, "-m", "lightning_moe.bench.pipeline", "--ranks", "2", "--microbatches", "4"]
    settings = ["--sleep", "12,12,12", "--steps", "2", "--warmup", "1", "--schedules", "1f1b,zb-h1,zb-v,nothing"]
    result = subprocess.run([*command, *settings, "--json"], capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    (run,) = report["runs"]
    rows = {row["name"]: row for row in run["results"]}
    assert list(rows) == ["1f1b", "zb-h1", "zb-v", "nothing"]
    assert "nothing" in rows["nothing"]["refused"]
    forward, backward, weight = run["f_b_w_milliseconds"]
    for name in ("1f1b", "zb-h1"):
        row = rows[name]
        # Four microbatches on two stages: one stage's bubble is (p - 1)(F + B + W), or (F + B - W) of ZB-H1.
        bubble = forward + backward + (weight if name == "1f1b" else -weight)
        ideal = 4 * (forward + backward + weight)
        assert row["simulated_of_bubble_free"] == pytest.approx(ideal / (ideal + bubble), rel=0.02)
        assert row["prediction_error"] == pytest.approx(row["milliseconds"] / (ideal + bubble) - 1, abs=0.02)
        assert row["of_bubble_free"] == pytest.approx(run["bubble_free_milliseconds"]["ours"] / row["milliseconds"])
