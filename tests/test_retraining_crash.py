"""`retrain` killed at random moments, or stopped by a signal, gives the unbroken result: real processes."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from searchfm.home import Home
from searchfm.search.lock import holder
from searchfm.search.storage import read_study
from tests.commands import searchfm_here
from tests.driving import without_following

pytestmark = pytest.mark.nightly

RETRAIN = ("retrain", "mlp", "--top", "2", "--seeds", "2", "--workers", "2", "--json")


def start(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "searchfm", *arguments, "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(home: Path, *arguments: str) -> dict[str, Any]:
    done = searchfm_here(*arguments, "--home", str(home))
    assert done.returncode == 0, done.stderr
    output: dict[str, Any] = json.loads(done.stdout)
    return output


@pytest.fixture(scope="module")
def tuned(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = new_home(tmp_path_factory.mktemp("crash") / "tuned" / "home").path
    arguments = ("--trials", "3", "--dataset", "digits", "--epochs", "20", "--set", "search.checkpoint_seconds=0")
    with without_following():
        finish(home, "tune", "mlp", "--set", "search.pruner=none", *arguments, "--json")
    return home


@pytest.fixture(scope="module")
def unbroken(tuned: Path) -> dict[str, Any]:
    """The result of an unbroken `retrain`, without times."""
    home = copy(tuned, "unbroken")
    finish(home, *RETRAIN)
    return lasting(home)


def copy(tuned: Path, name: str) -> Path:
    home = tuned.parents[1] / name / "home"
    shutil.copytree(tuned, home)
    return home


def lasting(home: Path) -> dict[str, Any]:
    final = read_study(Home(home), "mlp").final
    assert final is not None
    assert final.model is not None
    finalists = [(one.trial, one.seeds, one.values) for one in final.finalists]
    names = ("winner", "tie", "optimism", "validation", "test", "per_class", "weights", "epochs", "plan")
    model = (final.model.version, final.model.champion)
    return {name: getattr(final, name) for name in names} | {"finalists": finalists, "model": model}


def check(home: Path, unbroken: dict[str, Any]) -> None:
    """Checks for bitwise the unbroken final model, one reading of the test part, one version, nothing half-written."""
    assert lasting(home) == unbroken
    (reads,) = json.loads((home / "test-reads.json").read_text())["reads"].values()
    assert len(reads) == 1
    left = [path for path in (home / "studies").rglob("*") if "attempt-" in path.name or path.suffix == ".tmp"]
    assert not left
    assert not list((home / "studies" / "mlp").glob("final-*"))


def begun(home: Path) -> set[Path]:
    """What each job leaves that has begun; a queued job has the folder of its attempt already."""
    study = home / "studies" / "mlp"
    finalists = [*(study / "finalists").glob("*/log.txt"), *(study / "finalists").glob("*/attempt-*")]
    return {*finalists, *study.glob("final-*"), *study.glob("final*/test.json")}


def wait_for(process: "subprocess.Popen[str]", home: Path, jobs: int) -> None:
    """Returns once `jobs` jobs have begun, or the process has ended."""
    while process.poll() is None and len(begun(home)) < jobs:
        time.sleep(0.02)


def test_after_kills_the_same_command_completes_it(
    tuned: Path, unbroken: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    """Killed before any job, among the finalists, in the final training and in the test."""
    home, chance = copy(tuned, "killed"), random.Random(0)
    for jobs in (0, 2, 5, 6):
        process = start(home, *RETRAIN)
        wait_for(process, home, jobs)
        time.sleep(chance.uniform(0, 0.3))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had not ended"
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, "workers stop when their coordinator is gone"
    finish(home, *RETRAIN)
    check(home, unbroken)
    record_property("figures", "4 kills; bitwise the unbroken final model")


def test_a_killed_worker_is_replaced(
    tuned: Path, unbroken: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    home = copy(tuned, "worker")
    process = start(home, *RETRAIN)
    wait_for(process, home, 2)
    (server,) = [child for child in psutil.Process(process.pid).children() if child.children()]
    server.children()[0].kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "lost" in err
    check(home, unbroken)
    record_property("figures", "bitwise the unbroken final model")


def test_it_holds_its_lock_and_resumes_after_a_sigterm(
    tuned: Path, unbroken: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    home = copy(tuned, "stopped")
    first = start(home, *RETRAIN)
    while first.poll() is None and f"process {first.pid} " not in (holder(Home(home), "mlp") or ""):
        time.sleep(0.02)
    second = searchfm_here(*RETRAIN, "--home", str(home))
    assert second.returncode == 2
    assert f"is held by process {first.pid}" in second.stderr
    assert second.stderr.count("searchfm:") == 1  # beside phases that took long
    wait_for(first, home, 1)
    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    first.communicate(timeout=60)
    assert time.monotonic() < began + 25
    assert first.returncode == 143
    finish(home, *RETRAIN)
    check(home, unbroken)
    record_property("figures", "stopped by SIGTERM; bitwise the unbroken final model")
