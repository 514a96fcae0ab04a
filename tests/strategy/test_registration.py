"""The name ``"moe"`` is known once both packages are imported in the usual order."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import lightning.pytorch as pl, lightning_moe", "import lightning_moe.strategy, lightning.pytorch as pl"],
)
def test_strategy_by_name_after_importing_the_package(imports: str) -> None:
    code = f"{imports}; print(type(pl.Trainer(strategy='moe', accelerator='cpu', logger=False).strategy).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip().splitlines()[-1] == "MoEStrategy", result.stderr[-1000:]
