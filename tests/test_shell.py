"""What a shell gets: completions by its own protocol, mistakes in one line, and help without types of flags."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from searchfm.cli import app
from tests.commands import searchfm, searchfm_here

HEAVY = ("torch", "optuna", "mlflow", "rich.console", "numpy", "sqlalchemy")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "studies" / "my-study").mkdir(parents=True)
    return tmp_path / "home"


def completed(words: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash gets for the last of the words, which it has split at spaces and at `=`."""
    monkeypatch.setenv("SEARCHFM_HOME", str(home))
    count = str(words.count(" "))
    done = searchfm_here(_SEARCHFM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("searchfm tu", ["tune"]),
        ("searchfm tune vi", ["vit"]),
        ("searchfm tune my", ["my-study"]),
        ("searchfm status ", ["my-study"]),
        ("searchfm predict my", ["my-study"]),
        ("searchfm retrain --home /nowhere ", []),
        ("searchfm tune vit --dataset d", ["digits"]),
        ("searchfm tune vit --engine s", ["slurm"]),
        ("searchfm tune vit --set search.sampler.name = r", ["random"]),
        ("searchfm tune vit --set optimizer.l", ["optimizer.lr=0.001", "optimizer.lr={low="]),
        ("searchfm tune vit --set optimizer.name =", ["sgd", "adagrad", "rmsprop", "adam", "adamw"]),
        ("searchfm tune vit --set optimizer.name = ad", ["adagrad", "adam", "adamw"]),
        ("searchfm tune vit --set = optimizer.name = sg", ["sgd"]),
        ("searchfm tune vit --set model.mlp.batch_norm = ", ["true", "false"]),
    ],
)
def test_a_word_is_completed(words: str, expected: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(words, home, monkeypatch) == expected


def test_completion_loads_nothing_heavy(home: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('loaded', *sys.modules, file=sys.stderr))\n"
        "from searchfm.cli import main\nmain()"
    )
    words = {"_SEARCHFM_COMPLETE": "complete_bash", "COMP_WORDS": "searchfm tune vit --set mod", "COMP_CWORD": "4"}
    asked = {**os.environ, **words, "SEARCHFM_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert "model.vit.patch_size=" in done.stdout.split()
    assert not set(HEAVY) & set(done.stderr.split())


def test_the_script_of_a_shell_is_printed_for_the_command_searchfm() -> None:
    done = searchfm("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "complete -o default -F _searchfm_completion searchfm" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("tun",), "No such command 'tun'. Did you mean 'tune'?; see searchfm --help"),
        (("tune",), "Missing argument 'STUDY'; see searchfm tune --help"),
        (
            ("tune", "mlp", "--trails", "3"),
            "No such option: --trails (Possible options: --retrain, --retry-failed, --trials)",
        ),
        (("tune", "mlp", "--trials", "x"), "--trials x: must be a whole number; see searchfm tune --help"),
        (("tune", "mlp", "--trials", "0"), "--trials 0: must be >= 1; see searchfm tune --help"),
        (("dashboard", "--port", "99999"), "--port 99999: must be <= 65535; see searchfm dashboard --help"),
        (("trial", "mlp", "x"), "NUMBER x: must be a whole number; see searchfm trial --help"),
        (("dashboard", "--only", "x"), "--only x: 'x' is not one of 'optuna', 'mlflow'; see searchfm dashboard --help"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = searchfm_here(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"searchfm: {line}")


def test_without_a_command_the_help_is_shown() -> None:
    done = searchfm_here()
    assert done.returncode == 2
    assert "Usage: searchfm" in done.stdout


@pytest.mark.parametrize("command", [each.callback.__name__ for each in app.registered_commands if each.callback])
def test_help_shows_no_type_of_a_flag_and_arguments_in_capitals(command: str) -> None:
    text = searchfm_here(command, "--help").stdout
    assert "bool" not in text
    (usage,) = [line for line in text.splitlines() if "Usage:" in line]
    assert usage.partition("[OPTIONS]")[2].upper() == usage.partition("[OPTIONS]")[2]
