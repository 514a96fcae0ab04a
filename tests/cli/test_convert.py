"""``lightning-moe convert``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_moe.checkpoint import store
from lightning_moe.cli.main import main


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step=20.ckpt"
    state = {"model": {"w": torch.ones(2, 3)}, "current_model_state": {"w": torch.zeros(2, 3)}}
    store.write(path, state, {"objects_of_state_dict": {"w._extra_state": 1}}, step=20, group=None)
    return path


def test_converts_and_says_what(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "all.safetensors"
    assert main(["convert", str(tmp_path), str(output), "--dtype", "bfloat16", "--json"]) == 0
    loaded = load_file(output)
    assert loaded.keys() == {"w"}
    assert torch.equal(loaded["w"], torch.ones(2, 3, dtype=torch.bfloat16))
    printed = capsys.readouterr()
    text, last = printed.out.splitlines()
    assert text.startswith(f"{output}: averaged weights of step 20 from {saved}, 1 tensors, 6 values")
    result = json.loads(last)
    assert result.pop("seconds") > 0
    assert result == {
        "path": str(output),
        "checkpoint": str(saved),
        "step": 20,
        "weights": "averaged",
        "tensors": 1,
        "parameters": 6,
        "bytes": output.stat().st_size,
        "left_out": ["w._extra_state"],
    }
    assert "left out, as they are no tensors: w._extra_state" in printed.err


def test_replaces_a_file_only_when_told(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "all.safetensors"
    output.write_text("precious")
    assert main(["convert", str(saved), str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"output: '{output}' is not allowed")
    assert printed.err.count("\n") == 1
    assert output.read_text() == "precious"
    assert main(["convert", str(saved), str(output), "--force"]) == 0
    assert load_file(output).keys() == {"w"}
    assert len(capsys.readouterr().out.splitlines()) == 1, "no JSON unless it is asked for"


def test_a_damaged_checkpoint_is_one_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / ".metadata").unlink()
    assert main(["convert", str(saved), str(tmp_path / "all.safetensors")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"checkpoint {saved}: file '.metadata' of step 20 is missing")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: CHECKPOINT, OUTPUT.safetensors"),
        (["a", "b.safetensors", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a", "b.safetensors", "--forc"], "unrecognized arguments: --forc"),
    ],
)
def test_bad_arguments(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *options]) == 2
    assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from lightning_moe.cli.main import main; main(['convert', '--help'])"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--dtype {bfloat16,float16,float32}" in done.stdout
    assert "OUTPUT.safetensors" in done.stdout
