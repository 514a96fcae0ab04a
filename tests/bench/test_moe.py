"""The benchmark of expert layers, at a size for a CPU: its contestants agree, and its report holds what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist

from lightning_moe.bench.deterministic import deterministic
from lightning_moe.bench.moe import main, parse
from lightning_moe.bench.moe_contest import SIZES, Contest, LayerSize
from lightning_moe.bench.moe_limits import hidden_fractions, limit_milliseconds, predicted_milliseconds
from lightning_moe.bench.moe_rounds import PARTS, Series, equality
from lightning_moe.bench.moe_timeline import Span, spans_of_kernels, timeline_svg
from lightning_moe.cli import bench
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe.overlap.cost import LayerShape, Rates, hideable
from lightning_moe.moe.overlap.plan import Chunking
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool

SHAPE = LayerShape(ranks=2, local_slots=4, hidden=64, up_width=128, inner=64, rows=1024, itemsize=4)
RATES = Rates(link_bytes_per_second=1e8, gemm=((16.0, 1e10),), copy_bytes_per_second=1e10)
EQUAL = {"output": True, "gradients": True, "unequal": []}
SVG = "{http://www.w3.org/2000/svg}"


def measured(*arguments: str) -> dict[str, Any]:
    """The report of rank 0."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["--device", "cpu", "--json", *arguments]) == 0
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else {}


def check_times(row: dict[str, Any]) -> None:
    for part in PARTS:
        assert 0 < row[part]["min"] <= row[part]["milliseconds"] <= row[part]["max"], (row["name"], part)
    assert row["step"]["min"] >= row["forward"]["min"]
    assert row["step_peak_gib"] is None


@pytest.mark.slow
def test_the_report(ranks: RankPool, tmp_path: Path) -> None:
    size = ("--hidden", "64", "--expert-hidden", "32", "--experts", "8", "--top-k", "2", "--tokens", "128")
    settings = ("--chunk", "source", "--balanced", "--link-gigabytes", "0.05", "--warmup", "1", "--steps", "2")
    picture = tmp_path / "step.svg"
    report, other = ranks.run(2, measured, *size, *settings, "--timeline", str(picture), init_process_group=False)
    assert other == {}, "rank 0 prints"
    assert (report["ranks"], report["dtype"], report["routing"]) == (2, "float32", "balanced")
    (run,) = report["runs"]
    assert LayerSize(**run["shape"]) == LayerSize("own", 64, 32, 8, 2, 128)
    assert run["load"] == {"busiest_expert": 1.0, "busiest_rank": 1.0}
    rows = {row["name"]: row for row in run["results"]}
    assert list(rows) == ["blocking", "p2p", "waiting", "auto"], "Megatron's layer needs CUDA"
    for name, row in rows.items():
        check_times(row)
        assert row["predicted_milliseconds"]["step"] > 0
        if name != "blocking":
            assert 0 <= row["relative_error"] <= row["max_relative_error"] < 1e-4
            assert row["worst"] in ("output", "input", "router.weight", "experts.gate_up_proj", "experts.down_proj")
    assert run["bitwise_equal"] == EQUAL
    assert rows["blocking"]["chunking"] is None
    assert rows["p2p"]["chunking"] == rows["waiting"]["chunking"] == {"by": "source", "groups": 1, "slot_major": False}
    assert run["rates"]["link_bytes_per_second"] == pytest.approx(0.05e9)
    predicted, waiting = rows["p2p"]["predicted_milliseconds"], rows["waiting"]["predicted_milliseconds"]
    for part in ("forward", "backward"):
        assert run["limit_milliseconds"][part] <= predicted[part] <= waiting[part]
        one = run["hiding"][part]
        # Without contention, which nobody measures on a simulated link.
        assert one["hideable_milliseconds"] == pytest.approx(waiting[part] - predicted[part])
        assert one["hidden_fraction"] == run["hidden_fraction"][part]
        assert one["hidden_fraction"] * one["hideable_milliseconds"] == pytest.approx(one["hidden_milliseconds"])
        assert isfinite(one["fastest_hidden_fraction"])
    assert run["timeline"] == str(picture)
    spans = [rect for rect in ElementTree.parse(picture).iter(f"{SVG}rect") if rect.get("class") == "span"]
    crossing = [rect for rect in spans if (rect.findtext(f"{SVG}title") or "").split(":")[0].endswith("bytes")]
    assert len(crossing) == 4, "there and back, forward and backward"
    assert len(spans) > len(crossing)


def test_main_gradients_and_skewed_routing(ranks: RankPool) -> None:
    size = ("--hidden", "32", "--expert-hidden", "16", "--experts", "4", "--top-k", "1", "--tokens", "64")
    settings = ("--activation", "gelu", "--dtype", "bf16", "--skew", "3", "--save", "redispatch", "--main-grads")
    contestants = ("--contestants", "blocking,p2p", "--warmup", "0", "--steps", "1")
    report, _ = ranks.run(2, measured, *size, *settings, *contestants, init_process_group=False)
    (run,) = report["runs"]
    assert run["load"]["busiest_expert"] > 1.3
    assert (run["bitwise_equal"], run["hidden_fraction"]) == (None, None), "nothing waits at once"
    assert 0 < run["results"][1]["relative_error"] < 3e-2
    assert report["main_grads"] is True


def test_the_setting_of_fluid_moe(ranks: RankPool) -> None:
    report, _ = ranks.run(2, measured, "--fluid", "--warmup", "0", "--steps", "1", init_process_group=False)
    fluid = report["fluid"]
    rows = {row["name"]: row for row in fluid["results"]}
    assert list(rows) == ["blocking", "attention alone", "experts alone", "waiting", "overlap", "overlap, queue"]
    assert fluid["bitwise_equal"] == dict.fromkeys(("waiting", "overlap", "overlap, queue"), EQUAL)
    for name, row in rows.items():
        check_times(row)
        for part in PARTS:
            over = rows["blocking"][part]["milliseconds"] / row[part]["milliseconds"]
            assert row["over_blocking"][part] == pytest.approx(over)
        assert name == "blocking" or 0 < row["relative_error"] < 1e-5


@pytest.mark.gpu
def test_megatron_computes_the_same() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [
        sys.executable,
        "-m",
        "lightning_moe.bench.moe",
        "--ranks",
        "2",
        "--json",
        "--warmup",
        "1",
        "--steps",
        "2",
    ]
    size = ["--hidden", "256", "--expert-hidden", "128", "--experts", "8", "--top-k", "2", "--tokens", "512"]
    result = subprocess.run([*command, *size], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    (run,) = json.loads(result.stdout.splitlines()[-1])["runs"]
    rows = {row["name"]: row for row in run["results"]}
    assert run["bitwise_equal"] == EQUAL
    assert rows["megatron"]["relative_error"] < 3e-2
    assert rows["p2p"]["step_peak_gib"] > 0


def test_only_waiting_waits(ranks: RankPool) -> None:
    found = {"p2p": False, "waiting": True, "auto": False}
    assert ranks.run(2, who_waits) == [found] * 2


def who_waits() -> dict[str, bool]:
    options = parse(["--device", "cpu", "--hidden", "32", "--expert-hidden", "16", "--tokens", "64"])
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    overlaps = Contest(options.sizes[0], options, mesh, torch.device("cpu")).overlaps
    return {name: overlap.config.wait_at_once for name, overlap in overlaps.items() if overlap is not None}


def test_equality_is_told_apart_for_the_output_and_gradients(ranks: RankPool) -> None:
    first, second = ranks.run(2, unequal_on_the_second_rank)
    assert (
        first
        == second
        == [
            EQUAL,
            {"output": False, "gradients": True, "unequal": ["output"]},
            {"output": True, "gradients": False, "unequal": ["weight"]},
        ]
    )


def unequal_on_the_second_rank() -> list[dict[str, Any]]:
    expected = {"output": torch.ones(2), "weight": torch.zeros(2)}
    found = []
    for name in (None, "output", "weight"):
        changed = {key: value + (key == name and dist.get_rank() == 1) for key, value in expected.items()}
        found.append(equality(changed, expected, torch.device("cpu")))
    return found


def test_nondeterministic_operations_are_errors_while_bits_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic():
            # Where they only warn, fused attention goes on to use atomics.
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.are_deterministic_algorithms_enabled()
            assert "CUBLAS_WORKSPACE_CONFIG" in os.environ
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    finally:
        torch.use_deterministic_algorithms(False)
    with deterministic():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_hidden_fractions_are_those_of_the_model() -> None:
    """Waiting takes longer by half of what can be hidden in one round of three, and by all of it in two."""
    chunking = Chunking("expert", 2)
    most = {name: hideable(SHAPE, RATES, chunking, backward=name == "backward") for name in ("forward", "backward")}
    found = {"p2p": Series(), "waiting": Series()}
    for share in (1.0, 0.5, 1.0):
        for name, seconds in most.items():
            found["p2p"].seconds[name].append(2.0 - share)
            found["waiting"].seconds[name].append(2.0 - share + share * seconds)
    hiding = hidden_fractions(found, SHAPE, RATES, chunking, "fc1")
    for name, seconds in most.items():
        assert seconds > 0
        assert hiding[name]["hideable_milliseconds"] == pytest.approx(1e3 * seconds)
        assert hiding[name]["hidden_fraction"] == pytest.approx(1.0)
        assert hiding[name]["fastest_hidden_fraction"] == pytest.approx(1.0)


def test_the_limit_is_the_longer_of_both() -> None:
    chunking = Chunking("source")
    slow = Rates(link_bytes_per_second=1e6, latency=0.0, gemm=RATES.gemm, copy_bytes_per_second=1e10)
    sent = SHAPE.rows / 2 * (2 * SHAPE.hidden * 4 + 16)
    assert limit_milliseconds(SHAPE, slow, chunking, "fc1")["forward"] == pytest.approx(1e3 * sent / 1e6)
    fast = Rates(link_bytes_per_second=1e12, latency=0.0, gemm=RATES.gemm, copy_bytes_per_second=1e10)
    waiting = predicted_milliseconds(SHAPE, fast, chunking, "fc1", wait_at_once=True)
    assert limit_milliseconds(SHAPE, fast, chunking, "fc1")["step"] == pytest.approx(waiting["step"], rel=1e-3)
    assert limit_milliseconds(SHAPE, fast, chunking, "fc1")["step"] < waiting["step"]


def test_kernels_become_spans() -> None:
    def event(name: str, start: float, end: float, stream: int, annotation: bool = False) -> SimpleNamespace:
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_resource_id=stream, is_user_annotation=annotation)

    events = [
        event("ncclDevKernel_SendRecv", 1.0, 5.0, 20),
        event("nvjet_sm90_tst", 2.0, 4.0, 7),
        event("forward of the layer", 1.0, 4.0, 7, annotation=True),
        event("something else", 1.0, 9.0, 7, annotation=True),
    ]
    spans, forward_end = spans_of_kernels(events)
    assert forward_end == pytest.approx(4e-6)
    assert [(span.lane, span.kind) for span in spans] == [
        ("computation (7)", "gemm"),
        ("communication (20)", "communication"),
    ]
    picture = ElementTree.fromstring(timeline_svg(spans, forward_end, title="a < b"))
    boxes = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("class") == "span"]
    gemm, message = (float(box.get("width", "0")) for box in boxes)
    assert message == pytest.approx(2 * gemm, rel=1e-3)
    assert float(boxes[0].get("x", "0")) > float(boxes[1].get("x", "0"))
    assert any("backward" in (text.text or "") for text in picture.iter(f"{SVG}text"))
    alone = timeline_svg([Span("computation", 0.0, 0.0, "nothing", "copy")], None, title="no time at all")
    assert "forward" not in alone


def test_the_command_line() -> None:
    options = parse(["--device", "cpu"])
    assert options.sizes == [SIZES["small"]]
    assert (options.dtype, options.link_gigabytes) == (torch.float32, 0.1)
    options = parse(["--device", "cpu", "--shapes", "mixtral,olmoe", "--tokens", "512", "--dtype", "bf16"])
    assert [(size.name, size.tokens) for size in options.sizes] == [("mixtral", 512), ("olmoe", 512)]
    assert options.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--ranks", "1"], ["--ranks: 1", "nothing to exchange"]),
        (["--ranks", "3"], ["--experts: 8", "a multiple of the 3 ranks"]),
        (["--steps", "0"], ["--steps: 0", "at least 1"]),
        (["--tokens", "0"], ["--tokens: 0", "at least 1"]),
        (["--top-k", "9"], ["--top-k: 9", "at most the 8 experts"]),
        (["--expert-groups", "0"], ["--expert-groups: 0"]),
        (["--shapes", "mixtra"], ["--shapes: 'mixtra'", "did you mean 'mixtral'?"]),
        (["--contestants", "blocking,p2"], ["--contestants: 'p2'", "did you mean 'p2p'?"]),
        (["--contestants", "p2p,p2p"], ["--contestants: 'p2p,p2p'", "each of them once"]),
        (["--contestants", "blocking,megatron"], ["--contestants: 'megatron'", "--device cuda", "streams"]),
        (["--link-gigabytes", "0"], ["--link-gigabytes: 0.0", "above 0"]),
        (["--balanced", "--hidden", "4"], ["--balanced", "at least the number of experts"]),
        (["--balanced", "--skew", "1"], ["not allowed with argument --balanced"]),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(
    arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["moe", "--device", "cpu", *arguments]) == 2
    printed = capsys.readouterr()
    assert all(message in printed.err for message in messages), printed.err
    assert printed.out == ""


def test_gpus_are_refused_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["moe", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bench.main(["moe", "--ranks", "2"]) == 2
    assert "--ranks: 2 is not allowed; allowed: at most 1" in capsys.readouterr().err
