from __future__ import annotations

import pytest

import lightning_moe
from lightning_moe.cli import main as main_module
from lightning_moe.cli.main import main
from tests.cli.recipes import GOOD, edited


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_lists_the_commands(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 0
    printed = capsys.readouterr().out
    commands = ("fit", "validate", "test", "predict", "check", "plan", "convert", "bench")
    assert all(f"\n  {command} " in printed for command in commands)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-moe {lightning_moe.__version__}\n"


def test_check_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "no command given"), (["fitt"], "did you mean 'fit'?"), (["xyzzy"], "unknown command 'xyzzy'")],
)
def test_unknown_command(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "\n  check " in printed.err
    assert printed.out == ""


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that reach LightningCLI."""
    calls: list[list[str]] = []

    def hand_over(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(main_module, "_hand_over", hand_over)
    return calls


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_training_commands_check_first(
    command: str, tmp_path, handed_over: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(edited("  devices: 2", "  devices: 3"))
    assert main([command, "--config", str(path)]) == 2
    assert "trainer.strategy.init_args.parallel.expert: 2 is not allowed" in capsys.readouterr().err
    assert handed_over == []

    good = [command, f"--config={path}", "--trainer.devices", "4", "--trainer.max_steps=200"]
    assert main(good) == 0
    assert handed_over == [good]


@pytest.mark.parametrize(
    "options",
    [
        ["--help"],
        ["--print_config"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_wql"],
        ["--model", "my_package.MyModule"],
        ["--trainer.strategy", "moe_spawn"],
        ["--trainer.logger.save_dir", "elsewhere"],
        ["--data.path", "my.csv"],
    ],
)
def test_options_that_the_check_leaves_alone(options: list[str], tmp_path, handed_over: list[list[str]]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert main(["fit", "--config", str(path), *options]) == 0
    assert len(handed_over) == 1


def test_without_a_recipe_lightning_explains(handed_over: list[list[str]]) -> None:
    assert main(["fit", "--help"]) == 0
    assert handed_over == [["fit", "--help"]]
