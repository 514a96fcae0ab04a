"""``lightning-moe bench``: simulated pipelines without torch, and the hand-over to measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lightning_moe.cli import bench
from lightning_moe.pipeline.registry import schedule_names


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert bench.main(["pipeline", "--simulate", "--json", *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert len(table) == 1 + len(result["schedules"])
    return result


def test_figures_are_those_of_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    """TF = TB = TW, 4 stages, 8 microbatches: 24 units of work and 3 (TF+TB+TW) or 3 (TF+TB-TW) of bubble."""
    result = simulated(capsys, "--stages", "4", "--microbatches", "8", "--costs", "1,1,1")
    assert result["stages"] == 4
    assert result["microbatches"] == 8
    assert set(result["schedules"]) == set(schedule_names())
    one, zero = result["schedules"]["1f1b"], result["schedules"]["zb-h1"]
    assert (one["makespan"], one["peak"]) == (33, 4)
    assert one["bubble"] == pytest.approx(9 / 33, abs=1e-12)
    assert (zero["makespan"], zero["peak"]) == (27, 4)
    assert zero["bubble"] == pytest.approx(3 / 27, abs=1e-12)
    assert all(0 <= one["span_bubble"] <= one["bubble"] + 1e-12 for one in result["schedules"].values())


def test_options_reach_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(
        capsys, "--stages=2", "--microbatches=4", "--costs=2,3,1", "--communication=0.5", "--memory=4,2", "--chunks=3"
    )
    assert result["costs"] == [2, 3, 1]
    assert result["communication"] == 0.5
    assert result["memory"] == [4, 2]
    assert result["schedules"]["gpipe"]["peak"] == 4 * 4
    chunks = {name: one["chunks"] for name, one in result["schedules"].items() if "error" not in one}
    assert chunks["interleaved-1f1b"] == 3
    assert chunks["1f1b"] == 1, "it has one chunk, whatever is asked for"
    # One microbatch: F, a tensor there, F, BW, a tensor back, BW.
    result = simulated(capsys, "--stages=2", "--microbatches=1", "--costs=2,3,1", "--communication=0.5")
    assert result["schedules"]["1f1b"]["makespan"] == 2 + 0.5 + 2 + 4 + 0.5 + 4


def test_schedules_over_the_memory_limit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(capsys, "--memory-limit", "4")
    assert "pipeline.memory_limit" in result["schedules"]["gpipe"]["error"]
    assert result["schedules"]["zb-h1"]["peak"] <= 4


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--costs", "1,1"], ["--costs: '1,1'", "3 positive numbers F,B,W"]),
        (["--costs", "1,0,1"], ["--costs: '1,0,1'", "positive"]),
        (["--memory", "1,nan"], ["--memory: '1,nan'", "2 positive numbers"]),
        (["--stages", "0"], ["--stages: 0", "at least 1"]),
        (["--communication", "-1"], ["--communication: -1.0", "at least 0"]),
        (["--stages", "many"], ["--stages", "many"]),
    ],
)
def test_wrong_values(arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["pipeline", "--simulate", *arguments]) == 2
    printed = capsys.readouterr()
    assert all(message in printed.err for message in messages), printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [([], 2, "no measurement named"), (["pipelin"], 2, "did you mean 'pipeline'?"), (["--help"], 0, "--simulate")],
)
def test_usage(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(argv) == code
    printed = capsys.readouterr()
    assert message in (printed.err if code else printed.out)


@pytest.mark.parametrize("name", bench.MODULES)
def test_measurements_get_what_follows_their_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    modules = {bench.MODULES[name]: SimpleNamespace(main=given.append)}
    monkeypatch.setattr(bench, "import_module", modules.__getitem__)
    assert bench.main([name, "--json"]) == 0
    assert given == [["--json"]]


def test_without_torch() -> None:
    code = (
        "import sys; from lightning_moe.cli.main import main; "
        "main(['bench', 'pipeline', '--simulate', '--json']); "
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
