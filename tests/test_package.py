"""The package as a user meets it: names, version, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import lightning_moe


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lazy() -> None:
    heavy = "{'torch', 'lightning', 'torchmetrics', 'megatron', 'numpy', 'pandas', 'jsonargparse', 'yaml'}"
    assert run_python(f"import sys, lightning_moe; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "config.recipe",
        "errors",
        "parallel.layout",
        "moe.overlap.cost",
        "moe.overlap.plan",
        "cli.main",
        "cli.check",
        "cli.bench",
    ],
)
def test_torch_free_modules(module: str) -> None:
    code = f"import sys, lightning_moe.{module}; print(sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    assert run_python(code) == "[]\n"


def test_settings_load_without_torch() -> None:
    code = (
        "import sys; from lightning_moe import ChronosMoEConfig, ConfigError, ParallelConfig; "
        "print(ParallelConfig(expert=2).resolve(4).data, 'torch' in sys.modules)"
    )
    assert run_python(code) == "4 False\n"


@pytest.mark.parametrize("name", [name for name in lightning_moe.__all__ if name != "__version__"])
def test_every_public_name_loads(name: str) -> None:
    value = getattr(lightning_moe, name)
    assert value.__name__ == name
    assert value.__doc__


def test_dir_and_all_agree() -> None:
    assert dir(lightning_moe) == sorted(lightning_moe.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'MoeStrategy'"):
        _ = lightning_moe.MoeStrategy


def test_version_is_that_of_the_distribution() -> None:
    assert lightning_moe.__version__ == version("lightning-moe")


def test_names_survive_pickling() -> None:
    """Configurations travel to spawned ranks."""
    import pickle

    config = lightning_moe.ChronosMoEConfig(hidden_size=32)
    assert pickle.loads(pickle.dumps(config)) == config
