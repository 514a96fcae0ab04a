"""What ``--ckpt_path`` may name, as the user sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_moe.checkpoint import store
from lightning_moe.cli.lightning_cli import run


def command(name: str, checkpoint: Path, *options: str) -> list[str]:
    return [
        *(name, "--model", "lightning.pytorch.demos.boring_classes.BoringModel", "--ckpt_path", str(checkpoint)),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"),
        *("--trainer.default_root_dir", str(checkpoint.parent), "--trainer.enable_checkpointing", "false"),
        *options,
    ]


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """A run that failed leaves its process group behind, and other tests of this process have none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "step=1.ckpt"
    store.write(path, {"model": {"layer.weight": torch.ones(2, 32)}}, {}, step=1, group=None)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fit", "validate", "test"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_sharded_checkpoint_needs_its_strategy(
    name: str, in_folder: bool, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved.parent if in_folder else saved
    assert run(command(name, checkpoint)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"ckpt_path: '{checkpoint}' is not allowed; allowed: a file")
    assert "lightning_moe.MoEStrategy" in message
    assert "lightning-moe convert" in message


@pytest.mark.slow
def test_other_directories_are_lightnings_business(saved: Path) -> None:
    with pytest.raises(IsADirectoryError):
        run(command("test", saved.parent.parent))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_message(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "meta.pt").write_bytes(b"")
    assert run(command("test", saved, "--trainer.strategy", "moe")) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"checkpoint {saved}: file 'meta.pt' of step 1 is damaged")
