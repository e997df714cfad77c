"""Commands killed just before a given write, and what is on the disk after a loss of power there.

`main` reads one JSON object a line, runs its command in a forked child, and prints one with the child's exit status,
the number of its writes and what it returned. Imports happen once, in the parent: a process of its own takes seconds.

A write is a statement of SQLAlchemy that changes a database, or a change to a file below the home, or beside the copy
that `backup` makes; not to a file that is locked. Jobs run in the same process (`Inline`), so that a kill ends
coordinator and worker at once; those of `toy` run in workers, which a kill leaves to end by themselves.
"""

import json
import os
import pkgutil
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import sqlalchemy

from searchfm.errors import StudyError
from searchfm.home import Home, write_whole
from searchfm.jobs import Context, EpochDone, Event, Finished, Interrupted, Job, Result
from searchfm.records import PROGRAM, Epoch
from searchfm.search.storage import open_storage
from tests.driving import let_go, search, toy

CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.truncate": 1}  # paths
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

# A study of two trials or more, whose training takes milliseconds.
STUDY: dict[str, Any] = {
    "search": {"trials": 2, "keep": 2, "checkpoint_seconds": 0, "sampler": {"name": "random"}, "pruner": "none"},
    "data": {"name": "digits", "subset": 0.2},
    "model": {"name": "mlp", "mlp": {"layers": 1, "width": {"choice": [4, 8, 16, 32]}}},
    "optimizer": {"lr": {"low": 1e-3, "high": 1e-2, "log": True}},
    "train": {"epochs": 2, "batch_size": 64},
}
NAME = "digits"


# --- in the child -----------------------------------------------------------------------------------------------------


class KillAt:
    """Counts writes, of files below `folders`, and before number `at` calls `last`, then kills this process."""

    def __init__(self, at: int | None, folders: Sequence[Path], last: Callable[[], object] = lambda: None) -> None:
        self.at, self.seen, self.last = at, 0, last
        self._folders, self._dying = tuple(f"{folder}/" for folder in folders), threading.local()

    def write(self) -> None:
        if getattr(self._dying, "here", False):
            return  # a write of `last`
        self.seen += 1
        if self.seen == self.at:
            self._dying.here = True
            self.last()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Starts counting, in this process."""

        def on_statement(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
            if not text.lstrip().upper().startswith(("SELECT", "PRAGMA")):
                self.write()

        def on_call(name: str, arguments: tuple[Any, ...]) -> None:
            if name == "open":
                path, mode, flags = arguments
                if not (set(mode) & set("wax+") if isinstance(mode, str) else flags & WRITING):
                    return
                paths, folder = [path], -1
            elif name in CHANGES:
                paths, folder = [*arguments[: CHANGES[name]]], arguments[-1]
            else:
                return
            if any(self._counts(path, folder) for path in paths):
                self.write()

        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", on_statement)
        sys.addaudithook(on_call)

    def _counts(self, path: Any, folder: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor
        text = os.fsdecode(path)
        if not text.startswith("/") and isinstance(folder, int) and folder >= 0:  # `shutil.rmtree`
            text = f"{Path(f'/proc/self/fd/{folder}').readlink()}/{text}"
        return text.startswith(self._folders) and not text.endswith(".lock")


class Disk:
    """What of a home a loss of power leaves: the content that a file had when it was last flushed (`os.fsync`), under
    the names that its folder had when that was last flushed. What was there at first is on the disk.

    The databases are not part of it: SQLite flushes each transaction (`synchronous=FULL`), below Python.
    """

    def __init__(self, home: Path) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        self.home = home
        self._content: dict[int, bytes] = {}  # by inode
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}  # by inode of a folder: inodes, and whether folders
        self._open: list[int] = []  # of all these inodes, so that no number is used again
        for folder, _, files in os.walk(home):
            for path in (folder, *(f"{folder}/{file}" for file in files)):
                descriptor = os.open(path, os.O_RDONLY)
                self._flush(descriptor)
                os.close(descriptor)

    def watch(self) -> None:
        """From here on notices each flush of this process."""
        fsync = os.fsync

        def flush(file: Any) -> None:
            fsync(file)
            self._flush(file if isinstance(file, int) else file.fileno())

        os.fsync = flush  # type: ignore[assignment]

    def _flush(self, descriptor: int) -> None:
        inode, path = os.fstat(descriptor).st_ino, Path(f"/proc/self/fd/{descriptor}")
        if inode not in self._content and inode not in self._names:
            self._open.append(os.dup(descriptor))
        if path.is_dir():
            self._names[inode] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self._content[inode] = path.read_bytes()

    def lose_power(self, target: Path) -> None:
        """Writes what is left into `target`, which does not exist; and the databases that are files as they are."""
        self._restore(self.home.stat().st_ino, target)
        for name in (name for name in ("optuna.db", "mlflow.db") if (self.home / name).exists()):
            for left in target.glob(f"{name}*"):
                left.unlink()
            with (
                closing(sqlite3.connect(self.home / name)) as database,
                closing(sqlite3.connect(target / name)) as copy,
            ):
                database.backup(copy)

    def _restore(self, folder: int, path: Path) -> None:
        path.mkdir()
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                self._restore(inode, path / name)
            else:  # never flushed: empty, the worst that a file system makes of it
                (path / name).write_bytes(self._content.get(inode, b""))


class Inline:
    """An engine with one worker, which is this process."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._epochs: Generator[Epoch, None, Result]

    @property
    def free(self) -> int:
        return int(self._job is None)

    @property
    def busy(self) -> bool:
        return self._job is not None

    def expand(self, _: Mapping[str, int]) -> Sequence[str]:
        return ["cpu"]

    def each(self, job: Job) -> None:
        pass

    def pack(self, _: float) -> str:
        return ""

    def submit(self, job: Job) -> None:
        folder = job.folder / f"attempt-{job.attempt}" if job.folder else None
        earlier = [folder.with_name(f"attempt-{n}") for n in range(job.attempt - 1, 0, -1)] if folder else []
        context = Context(folder, tuple(path for path in earlier if path.is_dir()), "cpu", lambda: None)
        entry = export if job.entry.endswith(":export") else pkgutil.resolve_name(job.entry)
        self._job, self._epochs = job, entry(job.payload, context)

    def stop(self, job: str) -> None:
        assert self._job is not None
        assert self._job.id == job
        self._epochs.close()

    def next_event(self, timeout: float) -> Event | None:
        job = self._job
        if job is None:
            return None
        if self._epochs.gi_frame is None:
            self._job = None
            return Interrupted(job.id, job.attempt)
        try:
            return EpochDone(job.id, job.attempt, next(self._epochs))
        except StopIteration as end:
            self._job = None
            return Finished(job.id, job.attempt, end.value)

    def close(self) -> None:
        if self._job is not None:
            self._epochs.close()


def export(_: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """In place of the entry, which takes seconds; nobody loads this program."""
    yield from ()
    assert context.folder is not None
    return {"torch": "2.13", "files": {PROGRAM: write_whole(context.folder / PROGRAM, b"program")}}


def never() -> bool:
    """Nothing stops a command."""
    return False


def run_toy(home: Home, spec: Mapping[str, Any]) -> None:
    """`tune` on toy trials, in worker processes."""
    search(home, toy(**spec["tables"]), workers=spec["workers"], payload=spec.get("payload"))


def run_tune(home: Home, spec: Mapping[str, Any]) -> None:
    """`tune`, up to `trials`, which MLflow does not follow."""
    from searchfm.search.storage import load_study
    from searchfm.search.study import Study
    from searchfm.tuning import Tuning

    study = Study(NAME, {**STUDY, "search": {**STUDY["search"], "trials": spec["trials"]}})
    stored = None
    with suppress(StudyError):
        stored = load_study(open_storage(home), home, NAME)
    for _ in Tuning(study, home, study.resolved, stored, engine=Inline, follow=False).run():
        pass


def run_retrain(home: Home, _: Mapping[str, Any]) -> None:
    """`retrain` with two finalists and two seeds."""
    from searchfm.retraining import RetrainOptions, retrain

    for _ in retrain(RetrainOptions(home, NAME, top=2, seeds=2), never, Inline):
        pass


def run_sync(home: Home, spec: Mapping[str, Any]) -> list[str]:
    """`sync`, with --apply or without: what differs."""
    from searchfm.search.storage import locked_study, read_study
    from searchfm.tracking.follow import sync

    if not spec["apply"]:
        return [str(each) for each in sync(home, read_study(home, NAME))]
    with locked_study(home, NAME) as (study, _):
        return [str(each) for each in sync(home, study, apply=True)]


def run_spoil(home: Home, _: Mapping[str, Any]) -> None:
    """Deletes the run of trial 0 in MLflow, and doubles that of trial 1."""
    from searchfm.search.storage import read_study
    from searchfm.tracking.mirror import find

    mirror = find(home, read_study(home, NAME))
    client, (run,) = mirror.client, mirror.runs[1]
    client.delete_run(mirror.runs[0][0].id)
    client.create_run(mirror.experiment, tags=client.get_run(run.id).data.tags)


def run_remove(home: Home, spec: Mapping[str, Any]) -> list[str]:
    """`remove`, also where the study has gone: the versions in the registry that stay."""
    from searchfm import upkeep
    from searchfm.search.storage import study_names

    if NAME in study_names(open_storage(home)):
        return list(upkeep.remove(home, NAME, models=spec["models"]).kept)
    if spec["models"]:
        upkeep.remove_models(home, NAME)
    return list(upkeep.left_models(home, NAME))


def run_backup(home: Home, spec: Mapping[str, Any]) -> list[int]:
    """`backup` into `target`: how many studies and trials it has, and how many problems."""
    from searchfm.backup import backup

    done = backup(home, Path(spec["target"]))
    return [done.studies, done.trials, len(done.checked.findings)]


def run_clean(home: Home, spec: Mapping[str, Any]) -> int:
    """`clean --keep 1 --pictures`, with --apply or without: how many bytes it deletes, or would."""
    from searchfm.disk import clean

    return clean(home, keep=1, pictures=True, apply=spec["apply"]).freed


COMMANDS: dict[str, Callable[[Home, Mapping[str, Any]], object]] = {
    "toy": run_toy,
    "tune": run_tune,
    "retrain": run_retrain,
    "sync": run_sync,
    "spoil": run_spoil,
    "remove": run_remove,
    "backup": run_backup,
    "clean": run_clean,
}


def child(spec: Mapping[str, Any], answer: Path) -> None:
    """Runs a command; says how many writes it made, and what it returned."""
    signal.alarm(300)  # a command takes seconds; one that hangs is killed, and fails its test
    home = Home(Path(spec["home"]))
    os.environ.update(spec.get("environment", {}))
    last: Callable[[], object] = lambda: None  # noqa: E731
    if lost := spec.get("lost"):
        disk = Disk(home.path)
        disk.watch()
        last = partial(disk.lose_power, Path(lost))
    folders = [home.path, *(Path(target).parent for target in [spec.get("target")] if target)]
    kill = KillAt(spec.get("die_at"), folders, last)
    kill.watch()
    value = COMMANDS[spec["command"]](home, spec)
    answer.write_text(json.dumps({"writes": kill.seen, "value": value}))


def main() -> None:
    """Reads what to run from stdin. The argument `all` imports torch and MLflow, too."""
    with tempfile.TemporaryDirectory() as folder:  # imports happen once, before any child is forked
        home, answer = Home(Path(folder, "home")), Path(folder, "answer")
        let_go(open_storage(home, create=True))
        if sys.argv[1:] == ["all"]:
            import mlflow.pyfunc
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

            import searchfm.backup
            import searchfm.disk
            import searchfm.figures
            import searchfm.learn.warm
            import searchfm.retraining
            import searchfm.upkeep  # noqa: F401
        for line in sys.stdin:
            answer.unlink(missing_ok=True)
            if not (pid := os.fork()):
                try:
                    child(json.loads(line), answer)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said = json.loads(answer.read_text()) if answer.exists() else {}
            print(json.dumps({"code": code, **said}), flush=True)


# --- in the test ------------------------------------------------------------------------------------------------------


class Crasher:
    """A process of `main`: runs commands, killed at a write or to their ends."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-c", "from tests.crashing import main; main()", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._process.communicate()
        assert kind is not None or self._process.returncode == 0

    def run(self, command: str, home: Path, die_at: int | None = None, **spec: Any) -> dict[str, Any] | None:
        """The number of its writes, and what it returned; None if it was killed at write `die_at`."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({**spec, "command": command, "home": str(home), "die_at": die_at}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if die_at is not None and answer["code"] == -signal.SIGKILL:
            return None
        assert answer["code"] == 0, f"{command}, to be killed at write {die_at}: exit {answer['code']}"
        return answer

    def kill(self, command: str, home: Path, at: int, **spec: Any) -> None:
        """Runs a command that must be killed at write `at`."""
        answer = self.run(command, home, at, **spec)
        assert answer is None, f"{command}, to be killed at write {at}: ended after {answer['writes']} writes"
