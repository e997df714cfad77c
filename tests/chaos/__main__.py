"""Kills processes of searches at random moments, again and again, and checks each study that comes of it.

    python -m tests.chaos [--minutes 60] [--on sqlite postgres ray listen] [--seed 1]

A round is a study of real trainings on digits, in one of four settings. The command is started again until it ends by
itself; then the study is checked. Rounds take turns until the time is over. Each setting's sums are printed, and are
appended to the table in `.github/RELIABILITY.md`, so that a further run continues it. A fault ends the run after its
row was written; Ctrl-C does so without the round of that moment.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import psutil
import psycopg
import pytest

from searchfm.home import HOME, STORAGE, TRACKING, Home
from searchfm.search.storage import read_study
from searchfm.show.dashboard import free_port
from tests.cutting import drop_all
from tests.driving import facts
from tests.engines.test_ray import START, children
from tests.nightly import COMMIT
from tests.serving import Postgres, Server

PAGE = Path(__file__).parents[2] / ".github" / "RELIABILITY.md"
HEAD = "| date | commit | setting | minutes | kills | of | trials | lost | doubled | repaired | differences |"
TRIALS, EPOCHS, WORKERS = 40, 8, 2
HANGS = 300.0  # seconds without a trial's end or a kill, after which a command is reported
TUNE = ("tune", "mlp", "--dataset", "digits", "--trials", str(TRIALS), "--epochs", str(EPOCHS))
# Whoever is killed so often fails rightly: here each trial must come to its end.
TUNE = (*TUNE, "--set", "search.retries=50", "--set", "search.checkpoint_seconds=0")


class CommandError(Exception):
    """A command hangs, or ends with an exit code that no kill explains."""


@dataclass
class Sums:
    """What came of a round, or of the rounds of a setting."""

    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    trials: int = 0
    lost: int = 0  # trials without an end, or with the wrong one
    doubled: int = 0  # trials beyond those asked for, epochs and runs of MLflow that are there twice
    repaired: int = 0  # what MLflow had missed when the command ended, and `sync --apply` sent
    differences: int = 0  # between Optuna, the folders and MLflow after that, and commands that hang or fail

    def add(self, other: "Sums") -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    @property
    def wrong(self) -> int:
        return self.lost + self.doubled + self.differences


class Setting:
    """Where studies are stored and workers run. `victims` are the processes that may be killed, by kind."""

    name: ClassVar[str]
    pause: ClassVar[tuple[float, float]] = (0.3, 3.0)  # seconds between two kills; a command takes two to begin
    weights: ClassVar[Mapping[str, int]] = {
        "worker": 10,
        "coordinator": 2,
        "process group": 1,
        "fork server": 2,
        "tracking process": 2,
    }

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.environment: dict[str, str] = {}
        self.stack = ExitStack()

    def start(self, home: Path) -> None:
        """Prepares a round."""

    def arguments(self) -> tuple[str, ...]:
        return ("--workers", str(WORKERS))

    def victims(self, command: psutil.Process) -> dict[str, list[psutil.Process]]:
        below = children(command)
        servers = [child for child in below if "multiprocessing.forkserver" in line(child)]
        return {
            "coordinator": [command],
            "process group": [command],
            "tracking process": [child for child in below if "searchfm.tracking" in line(child)],
            "fork server": servers,
            "worker": [worker for server in servers for worker in children(server)],
        }

    def others(self) -> dict[str, Callable[[], object]]:
        """What else may happen, by kind."""
        return {}

    def mend(self) -> None:
        """Starts again what was killed, and is not the command's own."""

    def end_round(self) -> None:
        """Ends what `start` started."""


class Sqlite(Setting):
    """Both databases are files of the home, workers are forked."""

    name = "sqlite"


class OnPostgres(Setting):
    """Optuna's tables and those of an MLflow server are in PostgreSQL."""

    name = "postgres"
    weights: ClassVar[Mapping[str, int]] = {
        **Setting.weights,
        "connections": 3,
        "database server": 1,
        "MLflow server": 1,
    }

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(folder, chance)
        (folder / "postgres").mkdir()
        folder.chmod(0o755)
        self.postgres, self.round = Postgres(folder / "postgres"), 0
        self.postgres.start()
        self.stack.callback(self.postgres.stop)
        with psycopg.connect(f"{self.postgres.url}postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE mlflow")
        database = f"{self.postgres.url}mlflow".replace("postgresql:", "postgresql+psycopg:")
        self.mlflow = Server(folder, free_port(5600), database=database)
        self.mlflow.start()
        self.stack.callback(self.mlflow.kill)

    def start(self, home: Path) -> None:
        self.round += 1
        with psycopg.connect(f"{self.postgres.url}postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE round{self.round}")
        url = f"{self.postgres.url}round{self.round}"
        self.environment = {STORAGE: url, TRACKING: f"http://127.0.0.1:{self.mlflow.port}"}

    def others(self) -> dict[str, Callable[[], object]]:
        return {
            "connections": self._drop,
            "database server": self._restart,
            "MLflow server": lambda: os.killpg(self.mlflow.process.pid, signal.SIGKILL),
        }

    def _drop(self) -> None:
        drop_all(self.environment[STORAGE])

    def _restart(self) -> None:
        self.postgres.stop()
        time.sleep(self.chance.uniform(0, 3))
        self.postgres.start()

    def mend(self) -> None:
        if self.mlflow.process.poll() is not None:
            self.mlflow.start()


class Listening(Setting):
    """Workers dial in from processes of their own, as from other machines."""

    name = "listen"
    weights: ClassVar[Mapping[str, int]] = {
        "worker": 9,
        "agent": 3,
        "agent's fork server": 2,
        "coordinator": 2,
        "process group": 1,
        "tracking process": 2,
    }

    def start(self, home: Path) -> None:
        self.home, self.port = home, free_port(27100)
        self.agents: list[subprocess.Popen[bytes]] = []

    def arguments(self) -> tuple[str, ...]:
        return ("--engine", "listen", "--listen", f"127.0.0.1:{self.port}")

    def mend(self) -> None:
        self.agents = [agent for agent in self.agents if agent.poll() is None]
        while len(self.agents) < WORKERS:
            self.agents.append(
                run("worker", f"127.0.0.1:{self.port}", "--workers", "1", "--retry", "600", **self._environment)
            )

    @property
    def _environment(self) -> dict[str, str]:
        return {HOME: str(self.home)}

    def victims(self, command: psutil.Process) -> dict[str, list[psutil.Process]]:
        agents = [psutil.Process(agent.pid) for agent in self.agents if agent.poll() is None]
        servers = [child for agent in agents for child in children(agent) if "forkserver" in line(child)]
        local = super().victims(command)
        return {
            **{kind: local[kind] for kind in ("coordinator", "process group", "tracking process")},
            "agent": agents,
            "agent's fork server": servers,
            "worker": [worker for server in servers for worker in children(server)],
        }

    def end_round(self) -> None:
        for agent in self.agents:
            agent.terminate()
        for agent in self.agents:
            agent.wait(60)


class OnRay(Setting):
    """Workers are actors of a Ray cluster of one node, which outlives the command."""

    name = "ray"
    pause = (0.5, 6.0)  # a command has its first worker after ten seconds
    weights: ClassVar[Mapping[str, int]] = {
        "worker": 7,
        "actor": 4,
        "Ray's driver": 1,
        "coordinator": 2,
        "process group": 1,
        "tracking process": 1,
    }

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(folder, chance)
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        (folder / "token").write_text("0123456789abcdef" * 4)
        (folder / "token").chmod(0o600)
        self.cluster = subprocess.Popen(
            [sys.executable, "-c", START, tempfile.mkdtemp(prefix="ray", dir="/tmp"), str(WORKERS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.stack.callback(self._end_cluster)
        assert self.cluster.stdout is not None
        for text in self.cluster.stdout:
            if text.startswith("up "):
                break
        names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.environment = {**names, "RAY_ADDRESS": text.split()[1]}

    def _end_cluster(self) -> None:
        assert self.cluster.stdin is not None
        self.cluster.stdin.close()
        self.cluster.wait(120)

    def arguments(self) -> tuple[str, ...]:
        return ("--engine", "ray", "--workers", str(WORKERS))

    def victims(self, command: psutil.Process) -> dict[str, list[psutil.Process]]:
        local = super().victims(command)
        below = children(psutil.Process(self.cluster.pid), recursive=True)
        actors = [process for process in below if line(process).startswith("ray::Worker")]
        return {
            **{kind: local[kind] for kind in ("coordinator", "process group", "tracking process")},
            "Ray's driver": [child for child in children(command) if "ray_driver" in line(child)],
            "actor": actors,
            "worker": [worker for actor in actors for server in children(actor) for worker in children(server)],
        }


SETTINGS: dict[str, type[Setting]] = {each.name: each for each in (Sqlite, OnPostgres, OnRay, Listening)}


# --- a round ----------------------------------------------------------------------------------------------------------


def line(process: psutil.Process) -> str:
    """The command line of a process; empty once it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def run(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Starts a command in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "searchfm", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=open(os.environ["CHAOS_LOG"], "ab"),  # noqa: PTH123  # the child's
        start_new_session=True,
    )


def ended(home: Home) -> dict[int, Any]:
    """What must not change of the trials that have ended."""
    try:
        study = read_study(home, "mlp")
    except Exception:  # no study yet, or no database for the moment
        return {}
    return {row[0]: row for row in facts(study) if row[1] != "running"}


def kill(setting: Setting, command: "subprocess.Popen[bytes]", chance: random.Random) -> str:
    """Kills something; returns its kind, or nothing where none of that kind is there."""
    kind = chance.choices(list(setting.weights), list(setting.weights.values()))[0]
    if action := setting.others().get(kind):
        action()
        return kind
    try:
        victims = setting.victims(psutil.Process(command.pid)).get(kind, [])
        if not victims:
            return ""
        victim = chance.choice(victims)
        if kind == "process group":
            os.killpg(victim.pid, signal.SIGKILL)
        else:
            victim.kill()
    except (psutil.Error, ProcessLookupError):
        return ""
    return kind


def play(setting: Setting, home: Home, chance: random.Random, sums: Sums, until: float) -> None:
    """Kills processes of a study until its command ends by itself. After `until` nothing more is killed."""
    before: dict[int, Any] = {}
    while True:
        setting.mend()
        environment = {**setting.environment, HOME: str(home.path)}
        command = run(*TUNE, *setting.arguments(), **environment)
        moved = time.monotonic()
        try:
            while command.poll() is None:
                time.sleep(chance.uniform(*setting.pause))
                setting.mend()
                if time.monotonic() < until and command.poll() is None and (kind := kill(setting, command, chance)):
                    sums.kills[kind] += 1
                    moved = time.monotonic()
                if time.monotonic() > moved + HANGS:
                    raise CommandError(f"{setting.name}: the command hangs: {home.path}")
        finally:
            if command.poll() is None:
                os.killpg(command.pid, signal.SIGKILL)
        now = after(setting, home)
        for number, row in before.items():
            if now.get(number) != row:
                print(f"{setting.name}: trial {number} changed after its end:\n{row}\n{now.get(number)}", flush=True)
                sums.lost += 1
        before = now
        if command.returncode == 0:
            return
        if command.returncode not in (-signal.SIGKILL, 1):  # 1: the database was away for too long
            log = Path(os.environ["CHAOS_LOG"]).read_text(errors="replace")
            raise CommandError(f"{setting.name}: exit code {command.returncode}\n{log[-2000:]}")


def turn(setting: Setting, home: Home, chance: random.Random, until: float) -> Sums:
    """One round."""
    sums, began = Sums(), time.monotonic()
    setting.start(home.path)
    try:
        play(setting, home, chance, sums, until)
        check(setting, home, sums)
    except CommandError as error:
        print(error, flush=True)
        sums.differences += 1
    finally:
        setting.end_round()
    sums.seconds = time.monotonic() - began
    return sums


def after(setting: Setting, home: Home) -> dict[int, Any]:
    """The trials that have ended, read in the environment of the setting."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in setting.environment.items():
            patch.setenv(name, value)
        return ended(home)


def check(setting: Setting, home: Home, sums: Sums) -> None:
    """Checks a study that is complete."""

    def differ(text: str) -> None:
        print(f"{setting.name}, {home.path}: {text}", flush=True)
        sums.differences += 1

    with pytest.MonkeyPatch.context() as patch:
        for name, value in setting.environment.items():
            patch.setenv(name, value)
        study = read_study(home, "mlp")
    numbers = [trial.number for trial in study.trials]
    sums.trials += len(numbers)
    sums.lost += len(set(range(TRIALS)) - set(numbers))
    sums.doubled += len(numbers) - len(set(range(TRIALS)) & set(numbers))
    for trial in study.trials:
        if trial.state not in ("complete", "pruned"):
            print(f"{setting.name}: trial {trial.number} is {trial.state}: {trial.reason}", flush=True)
            sums.lost += 1
        indices = [epoch.index for epoch in trial.epochs]
        if indices != list(range(1, len(indices) + 1)):
            print(f"{setting.name}: trial {trial.number} has epochs {indices}", flush=True)
            sums.doubled += 1
        if {epoch.index: round(epoch.val_accuracy or 0, 6) for epoch in trial.epochs} != dict(trial.reported):
            differ(f"trial {trial.number}: epochs.csv is not what Optuna holds")
    for each in sync(setting, home, apply=True):  # what MLflow missed while its process or server was away
        sums.doubled += bool(re.fullmatch(r".*: has \d+ runs", each["problem"]))
        sums.repaired += 1
    for text in sync(setting, home):
        differ(text["problem"])
    for path in [*home.path.rglob("attempt-*"), *(home.path / "studies").rglob("*.tmp")]:
        differ(f"{path} is left")


def sync(setting: Setting, home: Home, *, apply: bool = False) -> list[dict[str, Any]]:
    """What `sync` lists."""
    setting.mend()
    done = subprocess.run(
        [sys.executable, "-m", "searchfm", "sync", "mlp", "--json", *(["--apply"] if apply else [])],
        env={**os.environ, **setting.environment, HOME: str(home.path)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    return listed


# --- the page ---------------------------------------------------------------------------------------------------------


def append(name: str, sums: Sums) -> None:
    """Appends a row to the table."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sums.kills.most_common())
    facts = [datetime.datetime.now(datetime.UTC).date(), COMMIT, name, f"{sums.seconds / 60:.0f}", sums.kills.total()]
    figures = [sums.trials, sums.lost, sums.doubled, sums.repaired, sums.differences]
    row = f"| {' | '.join(map(str, [*facts, kinds, *figures]))} |\n"
    text = PAGE.read_text("utf-8")
    table = re.search(re.escape(HEAD) + r"\n(?:\|.*\n)+", text)
    assert table, f"{PAGE} has no table of chaos runs"
    PAGE.write_text(text[: table.end()] + row + text[table.end() :], "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--on", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's `&` would have it ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    until = time.monotonic() + 60 * options.minutes
    sums = {name: Sums() for name in options.on}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, ExitStack() as stack:
        os.environ["CHAOS_LOG"] = str(Path(folder, "log"))
        os.environ["SEARCHFM_CACHE"] = str(Path(folder, "cache"))
        Path(folder).chmod(0o755)
        settings = {}
        for name in options.on:
            Path(folder, name).mkdir()
            settings[name] = SETTINGS[name](Path(folder, name), chance)
            stack.callback(settings[name].stack.close)
        with suppress(KeyboardInterrupt):  # then this round does not count
            for number in itertools.count():
                if time.monotonic() > until or any(each.wrong for each in sums.values()):
                    break
                name = options.on[number % len(options.on)]
                this = turn(settings[name], Home(Path(folder, name, f"home-{number}")), chance, until)
                print(name, this, flush=True)
                sums[name].add(this)
    for name, each in sums.items():
        if each.kills and not options.no_page:
            append(name, each)
    wrong = any(each.wrong for each in sums.values())
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
