"""Nothing is lost and nothing is doubled: real processes, real training on digits, killed at random moments.

Nightly, since `test_crash_points.py`, `test_coordinator.py` and `test_simulation.py` kill at writes in CI.
"""

import csv
import json
import random
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
from searchfm.records import StudyRecord
from searchfm.search.storage import load_study, open_storage
from tests.commands import searchfm_here
from tests.driving import without_following

pytestmark = pytest.mark.nightly

TRIALS = 10
COMMAND = ("tune", "mlp", "--trials", str(TRIALS), "--dataset", "digits", "--epochs", "6")


def start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "searchfm", *COMMAND, *arguments, "--home", str(home), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def finish(home: Path, *arguments: str) -> dict[str, Any]:
    done = searchfm_here(*COMMAND, *arguments, "--home", str(home), "--json")
    output: dict[str, Any] = json.loads(done.stdout)
    return output


def study(home: Path) -> StudyRecord:
    return load_study(open_storage(Home(home)), Home(home), "mlp")


def wait_for_trials(process: subprocess.Popen[bytes], home: Path, count: int) -> None:
    """Returns once `count` trials have begun, or the process has ended."""
    while process.poll() is None and len(list((home / "studies").glob("mlp/[0-9]*"))) < count:
        time.sleep(0.02)


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train: children of the fork server."""
    return [child for server in psutil.Process(process.pid).children() for child in server.children()]


def check(home: Path) -> None:
    """Checks that every trial has exactly one end, MLflow equals Optuna, and nothing half-written is left."""
    row = study(home)
    assert [trial.number for trial in row.trials] == list(range(TRIALS))
    assert not row.of("running")
    assert not row.of("failed"), [trial.reason for trial in row.of("failed")]
    for trial in row.trials:
        assert [epoch.index for epoch in trial.epochs] == list(trial.reported) == list(range(1, len(trial.epochs) + 1))
    assert json.loads(searchfm_here("sync", "mlp", "--home", str(home), "--json").stdout) == []
    assert not list(home.rglob("attempt-*"))
    assert not list((home / "studies").rglob("*.tmp"))


def test_after_kills_the_same_command_completes_the_study(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The coordinator is killed while MLflow's tables are made, then among the trials, then near the end."""
    home, chance = tmp_path / "home", random.Random(0)
    for begun in (3, 6, 9):
        process = start(home, "--workers", "2")
        wait_for_trials(process, home, begun)
        time.sleep(chance.uniform(0, 0.3))
        orphans = tree(process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had not ended"
        _, alive = psutil.wait_procs(orphans, timeout=30)
        assert not alive, "workers stop when their coordinator is gone"
    assert finish(home, "--workers", "2")["trials"]["total"] == TRIALS
    check(home)
    record_property("figures", f"3 kills of the coordinator, {TRIALS} trials")


def test_after_kills_of_workers_the_study_goes_on_to_its_end(
    new_home: Callable[[Path], Home], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    home = new_home(tmp_path / "home").path
    process = start(home, "--workers", "2")
    killed = set()
    for begun in (1, 4, 7):
        wait_for_trials(process, home, begun)
        for victim in workers(process)[:1]:
            victim.kill()
            killed.add(victim.pid)
    assert killed
    process.communicate(timeout=300)
    assert process.returncode == 0
    check(home)
    record_property("figures", f"{len(killed)} kills of workers, {TRIALS} trials")


def lasting(home: Path) -> list[dict[str, Any]]:
    """What must be bitwise equal in two searches: everything but times."""
    return [
        {
            "params": dict(trial.params),
            "state": trial.state,
            "value": trial.value,
            "reported": dict(trial.reported),
            "config": trial.config,
            "epochs": [
                {key: text for key, text in line.items() if key not in ("seconds", "samples_per_second", "time")}
                for line in csv.DictReader((trial.folder / "epochs.csv").read_text().splitlines())
            ],
            "files": trial.result
            and {name: digest for name, digest in trial.result.files.items() if name.endswith("tensors")},
        }
        for trial in study(home).trials
    ]


def test_one_worker_stopped_and_resumed_gives_bitwise_the_unbroken_study(
    new_home: Callable[[Path], Home], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """With hyperband, which has the most state; test_coordinator.py covers the other samplers and pruners."""
    arguments = ("--workers", "1", "--set", "search.pruner=hyperband")
    unbroken, broken = (new_home(tmp_path / name).path for name in ("unbroken", "broken"))
    with without_following():
        finish(unbroken, *arguments)
    process = start(broken, *arguments)
    wait_for_trials(process, broken, 3)
    time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 143
    finish(broken, *arguments)
    check(broken)
    assert lasting(broken) == lasting(unbroken)
    record_property("figures", f"bitwise equal: {TRIALS} trials with hyperband")
