"""Every command of README.md, as it is written."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from sklearn.datasets import load_digits

from searchfm import cli
from searchfm.home import STORAGE, TRACKING, Home
from tests.commands import searchfm_here
from tests.programs import worker_port

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)}


def blocks(section: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no {language} in {section}"
    return found


def lines(section: str) -> list[str]:
    return [line.partition("  #")[0].strip() for block in blocks(section, "sh") for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where `searchfm` is a command, with images of digits."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images[:120], digits.target, strict=False)):
        drawn = Image.fromarray((pixels * 15).astype(np.uint8))
        names = [f"photos/{label}/{index}.png", *(["image.png", "boot.png", "shirts/white.png"] if index == 0 else [])]
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            drawn.resize((28 + index % 5, 28)).save(name)
    return tmp_path


def run(*commands: str) -> str:
    """Runs commands in one shell; returns what they print."""
    shell = ["bash", "-ec", "\n".join(commands)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_here(command: str) -> str:
    """Runs one of searchfm's commands in this process, which saves its imports; returns what it prints."""
    program, *arguments = shlex.split(command)
    assert program == "searchfm"
    done = searchfm_here(*arguments)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start(command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def serve(command: str) -> str:
    """Runs a command that serves pages until Ctrl-C, which it gets once it has printed an address."""
    process = start(command)
    assert process.stdout
    printed = next(line for line in process.stdout if "http://" in line)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 0
    return printed


# --- what a reader runs -----------------------------------------------------------------------------------------------


def shortened(command: str) -> str:
    """The same command with less to train."""
    for option, value in {"--trials": 3, "--subset": 0.02, "--epochs": 1}.items():
        command = re.sub(rf"(?<={option} )\S+", str(value), command)
    return command


@pytest.mark.parametrize(
    "how_much",
    [pytest.param(shortened, marks=pytest.mark.slow(seconds=160)), pytest.param(str, marks=pytest.mark.nightly)],
    ids=["shortened", "as written"],
)
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, which SQLAlchemy warns of
def test_the_first_command_and_the_ten_minutes(
    folder: Path, how_much: Callable[[str], str], record_property: Callable[[str, object], None]
) -> None:
    record_property("figures", "the first command and the ten minutes, as written")
    first = re.search(r"^pip install uv && uv run (searchfm .*)$", TEXT, re.MULTILINE)
    assert first
    command = how_much(first[1])
    trials = re.search(r"--trials (\d+)", command)
    assert trials
    assert f"{trials[1]}/{trials[1]} trial" in run(command)
    how = {"dashboard": serve, "tune": run, "retrain": run}  # the others read what these have written
    printed = {line: how.get(line.split()[1], run_here)(how_much(line)) for line in lines("Ten minutes")}
    assert len(printed) == 9
    assert (folder / "mlp.onnx").is_file()
    assert re.search(r"^boot.png +\w+", printed["searchfm predict mlp boot.png shirts/"], re.MULTILINE)


@pytest.mark.nightly
def test_own_images(folder: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("figures", "an own folder of images, within its hour")
    *looked, tuned = lines("Your own images")
    run(*looked)
    assert "registered as models:/searchfm-any/1" in run(tuned)


@pytest.mark.slow(seconds=25)
@pytest.mark.usefixtures("unfollowed")
def test_an_own_space(folder: Path) -> None:
    (study,) = blocks("Your own space", "toml")
    (folder / "wide.toml").write_text(study)
    assert f"# Run:      {lines('Your own space')[0]}" in study
    printed = [run_here(line) for line in lines("Your own space")]
    assert re.search(r"^--warm-start wide: trials .* are tried first$", printed[-1], re.MULTILINE)


@pytest.mark.nightly
def test_an_own_model(folder: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("figures", "an own model")
    for language in ("python", "toml"):
        (text,) = blocks("Your own model", language)
        (folder / text.split()[1]).write_text(text)
    assert re.search(r"^image.png +\d", run(*lines("Your own model"))[-400:], re.MULTILINE)


@pytest.mark.nightly
def test_python(folder: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("figures", "README's script")
    (script,) = blocks("From Python", "python")
    (folder / "script.py").write_text(script)
    run("searchfm tune mlp --trials 1 --subset 0.01 --epochs 1")  # a reader has come by the first command
    printed = run("python script.py")
    assert "SearchEnded" in printed


@pytest.mark.nightly
def test_a_second_machine(
    folder: Path, new_home: Callable[[Path], Home], record_property: Callable[[str, object], None]
) -> None:
    """Both are this one, and the trials are short."""
    record_property("figures", "a second machine")
    new_home(folder / "runs")
    address = f"127.0.0.1:{worker_port(6800)}"
    tune, worker, stop = (
        line.replace("10.0.0.1:27001", address).replace("/shared", str(folder)) for line in commands("second machine")
    )
    search = start(f"{tune} --subset 0.05 --epochs 1")
    assert search.stdout
    next(line for line in search.stdout if f"searchfm worker {address}" in line)
    joined = start(worker)
    next(line for line in search.stdout if " complete " in line)
    run(stop)
    search.communicate(timeout=300)
    joined.communicate(timeout=300)
    assert (search.returncode, joined.returncode) == (143, 0), "stopped"


@pytest.mark.slow
def test_clusters_and_databases(folder: Path) -> None:
    """Dry runs, which check the flags. The engines' own tests run searches on SLURM, Ray and PostgreSQL."""
    for title in ("SLURM", "Ray"):
        *before, tune = commands(title)
        run(*before, f"{tune.replace('/shared', str(folder))} --dry-run")
    (table,) = blocks("Beyond one machine", "toml")
    (folder / "cluster.toml").write_text(table)
    run("searchfm tune cnn --dry-run --engine cluster.toml")
    variables = [line.partition("=")[0].removeprefix("export ") for line in commands("Databases")]
    assert variables == [STORAGE, TRACKING]


def commands(title: str) -> list[str]:
    """Those below a bold title."""
    section = SECTIONS["Beyond one machine"]
    (block,) = re.findall(rf"^\*\*(?:A )?{title}\b.*?^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


# --- what else is named -----------------------------------------------------------------------------------------------


def test_every_command_in_a_sentence_and_every_flag_is_one() -> None:
    group: Any = typer.main.get_command(cli.app)
    lines = set(re.findall(r"`(?:\w+=\S+ )?searchfm ([^-`][^`]*)`", TEXT))
    assert len(lines) > 20
    for line in lines:
        name, *arguments = [
            {"NUMBER": "3"}.get(word, word) for word in shlex.split(line) if word not in ("...", "[NAME]")
        ]
        group.commands[name].make_context(name, arguments, resilient_parsing=True)
    commands = (group, *group.commands.values())
    known = {"--help"} | {option for command in commands for param in command.params for option in param.opts}
    prose = re.sub(r"^```toml\n.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)  # arguments of sbatch
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) - known == {"--nightly"}


def test_every_link_leads_to_a_file_or_a_heading() -> None:
    headings = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / target).exists() or target.removeprefix("#") in headings, target
