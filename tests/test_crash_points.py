"""Commands killed at their writes, `tune` and `retrain` also by a loss of power there: the same command again gives the
unbroken result.

`tests/crashing.py` says what a write is, and what a loss of power leaves. CI tests two writes of each command, the
nightly test all of them.
"""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from searchfm.errors import StudyError
from searchfm.home import STORAGE, TRACKING, Home, file_sha256
from searchfm.records import SPEC, WEIGHTS, StudyRecord
from searchfm.search.database import read_sqlite
from searchfm.search.storage import open_storage, study_names
from searchfm.tracking import rows
from searchfm.upkeep import LOCKS
from tests import driving
from tests.crashing import NAME, Crasher
from tests.driving import facts

TOY = {"tables": {"search": {"trials": 3}, "train": {"epochs": 2}}, "workers": 1}


class Homes:
    """One home, which commands change, and copies of it by name; in one place, since MLflow keeps absolute paths.

    server: the URL of the PostgreSQL server that has its studies, in the database `home`; else they are in a file.
    """

    def __init__(self, folder: Path, crasher: Crasher, template: Path, server: str = "") -> None:
        self.path, self._folder, self.run, self.kill = folder / "home", folder, crasher.run, crasher.kill
        self.lost, self.copy, self._server = folder / "lost", folder / "copies" / "copy", server
        shutil.copytree(template, self.path)
        if server:
            for file in self.path.glob("optuna.db*"):
                file.unlink()
            self._execute("DROP DATABASE IF EXISTS home WITH (FORCE)", "CREATE DATABASE home")
        self.keep("new")
        self._tell("tune", trials=2)
        self.keep("two trials")
        self._tell("tune", trials=4)
        self.keep("tuned")
        self._tell("sync", apply=True)
        self._tell("spoil")
        self.keep("spoilt")
        self.take("tuned")
        self._tell("retrain")
        self._tell("sync", apply=True)
        self.keep("retrained")

    def _tell(self, command: str, **spec: Any) -> None:
        self.run(command, self.path, **spec)

    def _execute(self, *statements: str) -> None:
        if self._server:
            with psycopg.connect(self._server + "postgres", autocommit=True) as connection:
                for statement in statements:
                    connection.execute(statement.encode())

    def keep(self, name: str) -> None:
        """Keeps a copy of the home."""
        shutil.copytree(self.path, self._folder / name)
        # A database is copied while nobody is connected; of a process that was killed, the server may not know it yet.
        self._execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'home'",
            f'DROP DATABASE IF EXISTS "{name}"',
            f'CREATE DATABASE "{name}" TEMPLATE home',
        )

    def take(self, name: str) -> None:
        """Puts a copy in the home's place."""
        shutil.rmtree(self.path)
        shutil.copytree(self._folder / name, self.path)
        self._execute("DROP DATABASE home WITH (FORCE)", f'CREATE DATABASE home TEMPLATE "{name}"')

    def take_lost(self) -> None:
        """Puts the files that a loss of power left in the home's place."""
        shutil.rmtree(self.path)
        self.lost.rename(self.path)

    @property
    def study(self) -> StudyRecord:
        """The study as it is stored."""
        return driving.stored(Home(self.path), NAME)

    @property
    def copied(self) -> StudyRecord:
        """The study in the copy that `backup` made, which has a file for its studies."""
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(STORAGE, raising=False)
            return driving.stored(Home(self.copy), NAME)

    @property
    def trials(self) -> int:
        """How many trials the database has, of all studies."""
        storage = open_storage(Home(self.path))
        try:
            return sum(storage.get_n_trials(storage.get_study_id_from_name(name)) for name in study_names(storage))
        finally:
            driving.let_go(storage)


@pytest.fixture(scope="module")
def homes(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homes]:
    with pytest.MonkeyPatch.context() as patch:
        for name in (STORAGE, TRACKING):
            patch.delenv(name, raising=False)
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "crash-cache"))
        with Crasher("all") as crasher:
            yield Homes(tmp_path_factory.mktemp("crash-points"), crasher, template)


@pytest.fixture
def homes_on_postgresql(
    template: Path, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Homes]:
    """The same with the studies in PostgreSQL; MLflow's database stays a file."""
    monkeypatch.delenv(TRACKING, raising=False)
    monkeypatch.setenv(STORAGE, f"{postgres}home")
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "cache"))
    with Crasher("all") as crasher:
        yield Homes(tmp_path, crasher, template, postgres)


def moments(writes: int, points: int | None) -> Iterator[int]:
    """Numbers of writes, as many as `points`, evenly apart and the last among them; None: all of them."""
    assert writes > 10
    count = points or writes
    return (writes * index // count for index in range(count, 0, -1))


def content(folder: Path) -> dict[str, str]:
    """All files by their hashes, databases by those of their rows; but not locks, nor what SQLite keeps beside them."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix == ".db":
            with closing(read_sqlite(path)) as database:
                found[path] = hashlib.sha256("".join(database.iterdump()).encode()).hexdigest()
        elif path.is_file() and not path.name.endswith((".lock", "owner", "-wal", "-shm")):
            found[path] = file_sha256(path)
    return {str(path.relative_to(folder)): sha256 for path, sha256 in found.items()}


def check_finished(path: Path) -> None:
    """Checks that nothing half-written is left."""
    left = [each for each in (path / "studies").rglob("*") if "attempt-" in each.name or each.name.endswith(".tmp")]
    assert not left + list((path / "studies" / NAME).glob("final-*"))


# --- what was told, after a loss of power -----------------------------------------------------------------------------


def check_told(homes: Homes) -> None:
    """Checks that a home has the files of all that its database holds: of complete trials, and of the final model."""
    study = homes.study
    kept = study.ranked(twins=False)[: study.resolved["search"]["keep"]]
    for trial in study.trials:
        assert trial.reported.keys() <= {epoch.index for epoch in trial.epochs}, f"trial {trial.number}: {trial.folder}"
        if trial.state != "running":  # it is written again when the trial is adopted
            assert b"epochs" in (trial.folder / "config.toml").read_bytes()
        for name, sha256 in trial.result.files.items() if trial.result else ():
            if trial in kept or name not in (WEIGHTS, SPEC):
                assert file_sha256(trial.folder / name) == sha256, f"trial {trial.number}: {name}"
    final = study.final
    if final is not None:
        assert file_sha256(study.final_folder / WEIGHTS) == final.weights
        assert json.loads((study.final_folder / "final.json").read_text())["weights"] == final.weights
        (reads,) = json.loads((homes.path / "test-reads.json").read_text())["reads"].values()
        assert len(reads) == 1
    for each in rows.registered(Home(homes.path)):
        folder = rows.folder(each.source)
        assert folder is not None
        assert file_sha256(folder / "extra_files" / WEIGHTS) == each.tags["weights"]


# --- the commands -----------------------------------------------------------------------------------------------------


def check_tune(homes: Homes, points: int | None) -> int:
    """Kills `tune` at its writes, with power and without. Returns how many there were."""
    homes.take("two trials")
    unbroken = facts(homes.study)
    homes.take("new")
    writes = homes.run("tune", homes.path, trials=2)["writes"]
    for moment in moments(writes, points):
        for power in (True, False):
            homes.take("new")
            homes.kill("tune", homes.path, moment, trials=2, lost=None if power else str(homes.lost))
            if not power:
                homes.take_lost()
                with suppress(StudyError):  # not begun
                    check_told(homes)
            homes.run("tune", homes.path, trials=2)
            check_told(homes)
            assert facts(homes.study) == unbroken, moment
            if power:
                check_finished(homes.path)
    return writes


def final(homes: Homes) -> dict[str, Any]:
    """What must not depend on the clock, of the final model."""
    record = homes.study.final
    assert record is not None
    assert record.model is not None
    (registered,) = rows.registered(Home(homes.path))
    names = ("winner", "tie", "optimism", "validation", "test", "per_class", "weights", "epochs", "plan")
    finalists = [(one.trial, one.seeds, one.values) for one in record.finalists]
    version = (record.model.version, registered.version, registered.aliases, registered.tags["weights"])
    return {name: getattr(record, name) for name in names} | {"finalists": finalists, "version": version}


def check_retrain(homes: Homes, points: int | None) -> int:
    """The same of `retrain`: one model, one version, one reading of the test part."""
    homes.take("retrained")
    unbroken = final(homes)
    homes.take("tuned")
    writes = homes.run("retrain", homes.path)["writes"]
    for moment in moments(writes, points):
        for power in (True, False):
            homes.take("tuned")
            homes.kill("retrain", homes.path, moment, lost=None if power else str(homes.lost))
            if not power:
                homes.take_lost()
                check_told(homes)
            homes.run("retrain", homes.path)
            check_told(homes)
            assert final(homes) == unbroken, moment
            if power:
                check_finished(homes.path)
    return writes


def check_sync(homes: Homes, points: int | None) -> int:
    """Kills `sync --apply`, where no run is there and where one is missing and one doubled."""
    total = 0
    for state in ("tuned", "spoilt"):
        homes.take(state)
        writes = homes.run("sync", homes.path, apply=True)["writes"]
        total += writes
        for moment in moments(writes, points):
            homes.take(state)
            homes.kill("sync", homes.path, moment, apply=True)
            homes.run("sync", homes.path, apply=True)
            assert homes.run("sync", homes.path, apply=False)["value"] == [], (state, moment)
    return total


def check_remove(homes: Homes, points: int | None) -> int:
    """Kills `remove`, which leaves the registered model, and `remove --models`, which leaves nothing."""
    total = 0
    for models in (False, True):
        homes.take("retrained")
        writes = homes.run("remove", homes.path, models=models)["writes"]
        total += writes
        for moment in moments(writes, points):
            homes.take("retrained")
            homes.kill("remove", homes.path, moment, models=models)
            kept = homes.run("remove", homes.path, models=models)["value"]
            assert kept == ([] if models else [f"models:/searchfm-{NAME}/1"]), moment
            # Killed after the last write to Optuna's database, it leaves a folder with the files of locks.
            assert {path.name for path in (homes.path / "studies").glob(f"{NAME}/*")} <= set(LOCKS), moment
            assert not list((homes.path / "optuna-artifacts").iterdir()), moment
            left = {path.relative_to(homes.path).parts[2] for path in homes.path.glob("mlartifacts/*/*")}
            assert left == (set() if models else {"models"}), moment
            with closing(sqlite3.connect(homes.path / "mlflow.db")) as database:
                runs = database.execute(
                    "SELECT count(*) FROM experiments WHERE lifecycle_stage = 'active' AND name = ?", (NAME,)
                )
                assert runs.fetchone() == (0,), moment
            assert homes.trials == 0, moment
    return total


def check_backup(homes: Homes, points: int | None) -> int:
    """Kills `backup`: the home stays as it is, and nothing is at the copy's path before the copy is whole."""
    homes.take("retrained")
    before = content(homes.path)
    unbroken = homes.run("backup", homes.path, target=str(homes.copy))
    assert unbroken["value"] == [1, 4, 0]
    assert facts(homes.copied) == facts(homes.study)
    whole = content(homes.copy)
    for moment in moments(unbroken["writes"], points):
        shutil.rmtree(homes.copy.parent)
        homes.kill("backup", homes.path, moment, target=str(homes.copy))
        assert content(homes.path) == before, moment
        assert not homes.copy.exists(), moment
        assert homes.run("backup", homes.path, target=str(homes.copy))["value"] == [1, 4, 0], moment
        assert content(homes.copy) == whole, moment
        assert list(homes.copy.parent.iterdir()) == [homes.copy], moment
    shutil.rmtree(homes.copy.parent)
    return int(unbroken["writes"])


def check_clean(homes: Homes, points: int | None) -> int:
    """Kills `clean --apply`: it deletes nothing else, and MLflow lacks nothing that `sync` would list."""
    homes.take("retrained")
    before = content(homes.path)
    writes = homes.run("clean", homes.path, apply=True)["writes"]
    left = content(homes.path)
    assert len(left) < len(before)
    stay = {name: sha256 for name, sha256 in left.items() if not name.endswith(".db")}
    for moment in moments(writes, points):
        homes.take("retrained")
        homes.kill("clean", homes.path, moment, apply=True)
        assert stay.items() <= content(homes.path).items(), moment
        assert homes.run("sync", homes.path, apply=False)["value"] == [], moment
        homes.run("clean", homes.path, apply=True)
        assert homes.run("clean", homes.path, apply=False)["value"] == 0, moment
        assert content(homes.path).keys() == left.keys(), moment
        assert homes.run("sync", homes.path, apply=False)["value"] == [], moment
    return writes


CHECKS: tuple[Callable[[Homes, int | None], int], ...] = (
    check_tune,
    check_retrain,
    check_sync,
    check_remove,
    check_backup,
    check_clean,
)


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("check", CHECKS)
def test_after_a_kill_at_some_writes_the_same_command_gives_the_unbroken_result(
    homes: Homes, check: Callable[[Homes, int | None], int]
) -> None:
    check(homes, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("check", CHECKS)
def test_after_a_kill_at_every_write_the_same_command_gives_the_unbroken_result(
    homes: Homes, check: Callable[[Homes, int | None], int], record_property: Callable[[str, object], None]
) -> None:
    record_property("figures", f"{check(homes, None)} writes")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("check", CHECKS)
def test_on_postgresql_every_write_of_a_command(
    homes_on_postgresql: Homes,
    check: Callable[[Homes, int | None], int],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("figures", f"{check(homes_on_postgresql, None)} writes")


def check_postgres(folder: Path, postgres: str, points: int | None) -> int:
    """Kills `tune` on toy trials, from the making of the tables on."""
    with Crasher() as crasher, pytest.MonkeyPatch.context() as patch:

        def run(name: str, *deaths: int) -> tuple[StudyRecord, int]:
            home, database = folder / name, f"crash_{hashlib.sha256(str(folder / name).encode()).hexdigest()[:16]}"
            with psycopg.connect(postgres + "postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {database}")
            patch.setenv(STORAGE, postgres + database)
            spec = {**TOY, "environment": {STORAGE: postgres + database}}
            for moment in deaths:
                crasher.kill("toy", home, moment, **spec)
            answer = crasher.run("toy", home, **spec)
            assert answer is not None
            return driving.stored(Home(home), "toy"), answer["writes"]

        unbroken, writes = run("unbroken")
        for moment in moments(writes, points):
            broken, _ = run(str(moment), moment)
            driving.check(broken, 3)
            assert facts(broken) == facts(unbroken), moment
    return writes


@pytest.mark.slow(seconds=10)
def test_on_postgresql_some_writes(tmp_path: Path, postgres: str) -> None:
    check_postgres(tmp_path, postgres, 2)


@pytest.mark.nightly
def test_on_postgresql_every_write(
    tmp_path: Path, postgres: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("figures", f"{check_postgres(tmp_path, postgres, None)} writes")
