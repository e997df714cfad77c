"""A study from a command line's wish to its end: opened, checked, prepared, given its workers, and tuned."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import searchfm
from searchfm import errors
from searchfm.coordinator import Coordinator, News, Tracker
from searchfm.engines import Engine
from searchfm.engines.local import default_workers
from searchfm.errors import DataError, ModelError, StudyError, UserError, WorldError
from searchfm.home import Home
from searchfm.job import Failed, Finished, Job, Left, Lost
from searchfm.search.files import StudyFile, reopen
from searchfm.search.history import StudyRow
from searchfm.search.storage import create_study, failures, load_study, open_storage, study_lock, update_study
from searchfm.search.study import Study, check_name

PREPARE = "searchfm.learn.entries:prepare"
TRACKER_SECONDS = 60.0  # what MLflow is given to catch up, at the end


@dataclass(frozen=True)
class Plan:
    """What a command line asks of a study."""

    study: Study
    home: Home
    file: Mapping[str, Any]  # the resolved study file without overrides
    stored: StudyRow | None  # what was begun earlier
    device: str = "auto"
    workers: int | None = None
    data_dir: Path | None = None
    retry_failed: bool = False


class Tuning:
    """A study being tuned: lock, engine, tracker and coordinator, opened in that order and closed in the other.

    Use as a context manager, then iterate over `run()`. Everything that can be wrong is found out on the way in, before
    anything is written: UserError means that nothing was begun.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Callable[[Sequence[str]], Engine],
        tracker: Callable[[Home, StudyRow], Tracker],
        stopping: Callable[[], bool],
    ) -> None:
        self.plan, self._engine, self._tracker, self.stopping = plan, engine, tracker, stopping
        self.stored = plan.stored
        self.devices: list[str] = []
        self.missing = 0  # trials that MLflow does not hold yet, once closed
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._failures(), ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> Iterator[News]:
        """The search itself; what it yields is news for a person. Raises WorldError."""
        with self._failures():
            yield from self.coordinator.run()

    def result(self) -> StudyRow:
        """The study as it stands."""
        return load_study(self.storage, self.plan.home, self.plan.study.name)

    def _open(self, stack: ExitStack) -> None:
        plan = self.plan
        name, home = plan.study.name, plan.home
        home.probe()
        check_lock: Callable[[], None] | None = None
        found: Mapping[str, Any] = {}
        if self.stored is not None:
            check_lock = stack.enter_context(study_lock(home, name))
            self.stored = load_study(open_storage(home), home, name)  # from here on, nobody else changes it
            found = self.stored.data
        engine = stack.enter_context(closing(self._engine(["cpu"] if self._work_left() else [])))
        if self._work_left():
            found = prepare(plan.study, engine, plan.data_dir, self.stopping)
            self.devices = choose_devices(plan.device, plan.workers, found["devices"])
            plan.study.check_images(tuple(found["shape"]))
            if self.stored is not None and self.stored.data["fingerprint"] != found["fingerprint"]:
                raise DataError(
                    f"{plan.study.data['name']}: the data have changed since study {name!r} was begun; "
                    "put them back, or begin another study with --name"
                )
        if check_lock is None:
            check_lock = stack.enter_context(study_lock(home, name))
        self.storage = open_storage(home, create=True)
        self._write_down({key: value for key, value in found.items() if key != "devices"})
        stored = self.result()
        engine.resize(self.devices)
        tracker = self._tracker(home, stored)
        tracker.reconcile(stored)
        self.coordinator = Coordinator(
            plan.study,
            stored,
            self.storage,
            engine,
            tracker,
            trials=self.trials,
            retry_failed=plan.retry_failed,
            payload={
                "data_dir": str(plan.data_dir) if plan.data_dir else None,
                "fingerprint": stored.data["fingerprint"],
                "checkpoint_seconds": plan.study.search.checkpoint_seconds,
            },
            stopping=self.stopping,
            check_lock=check_lock,
        )
        stack.callback(self._settle, tracker)

    @property
    def trials(self) -> int:
        """Trials in all: the study's number, and one more for each that failed if those are to be replaced."""
        replaced = len(self.stored.of("failed")) if self.stored and self.plan.retry_failed else 0
        return self.plan.study.trials + replaced

    def _work_left(self) -> bool:
        stored = self.stored
        return stored is None or len(stored.trials) < self.trials or bool(stored.of("running"))

    def _write_down(self, data: Mapping[str, Any]) -> None:
        """Creates the study in the database, or updates what may change in it."""
        study, stored = self.plan.study, self.stored
        kept = {
            "uuid": stored.uuid if stored else uuid.uuid4().hex,
            "resolved": study.resolved,
            "file": self.plan.file,
            "question": study.question,
            "digest": study.digest,
            "trials": study.trials,
            "data": dict(data),
            "version": searchfm.__version__,
        }
        if stored is None:
            create_study(self.storage, study.name, kept)
        else:
            update_study(self.storage, stored.number, kept)

    def _settle(self, tracker: Tracker) -> None:
        """Lets the tracker finish, for a bounded time."""
        with self._failures():
            study = self.result()
        tracker.keep(study.kept)
        self.missing = tracker.close(study, timeout=TRACKER_SECONDS)

    def _failures(self) -> AbstractContextManager[None]:
        return failures(f"study {self.plan.study.name!r}")


def open_study(
    home: Home, file: StudyFile | None, name: str, overrides: Mapping[str, Any]
) -> tuple[Study, StudyRow | None]:
    """The study to tune: as the file says, or as it was begun earlier. Raises UserError. Writes nothing.

    `name` is what the study goes by, which need not be the file's own name.
    """
    check_name(name)
    try:
        stored = load_study(open_storage(home), home, name)
    except StudyError:
        stored = None
    if stored is not None:
        return reopen(file, stored, overrides), stored
    if file is None:
        raise StudyError(f"study {name!r}: no such study file, and no study of that name in {home.path}")
    return file.study(overrides, name=name), None


def choose_devices(device: str, workers: int | None, found: Mapping[str, int]) -> list[str]:
    """A device for each worker. `found` counts the accelerators: {"cuda": 2, "mps": 0}. Raises UserError."""
    gpus = [f"cuda:{i}" for i in range(found["cuda"])]
    known = {"cpu": ["cpu"] * (workers or default_workers())}
    if gpus:
        known |= {"cuda": gpus} | {name: [name] for name in gpus}
    if found["mps"]:
        known["mps"] = ["mps"]
    chosen = ("cuda" if gpus else "mps" if found["mps"] else "cpu") if device == "auto" else device
    if chosen not in known:
        raise UserError(f"--device {device}: torch finds no such device here; may be auto, {', '.join(known)}")
    names = known[chosen]
    return [names[i % len(names)] for i in range(workers or len(names))]


def prepare(study: Study, engine: Engine, data_dir: Path | None, stopping: Callable[[], bool]) -> Mapping[str, Any]:
    """Has a worker fetch and read the data and look for pretrained weights, before anything is written.

    Returns what the job found (see `learn.entries.prepare`). Raises the job's own error, or KeyboardInterrupt.
    """
    payload = {"data": study.data, "models": study.transfers(), "data_dir": str(data_dir) if data_dir else None}
    job = Job("prepare", 1, None, PREPARE, payload)
    engine.submit(job)
    while not stopping():
        match engine.next_event(timeout=0.2):
            case None:
                continue
            case Finished(result=result):
                return result
            case Failed(kind=kind, reason=reason):
                known = getattr(errors, kind, WorldError)
                raise known(reason) if known in (DataError, ModelError) else WorldError(f"preparing the data: {reason}")
            case Lost(reason=reason):
                raise WorldError(f"preparing the data: {reason}")
            case Left():  # its worker was told to go
                engine.submit(job)
            case event:
                raise AssertionError(event)
    raise KeyboardInterrupt
