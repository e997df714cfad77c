"""One study from open to close: locked, prepared, given its workers, tuned, followed into MLflow."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import searchfm
from searchfm.coordinator import Coordinator, Progress
from searchfm.engines import Engine
from searchfm.engines.local import LocalEngine
from searchfm.errors import DataError, StudyError, WorldError
from searchfm.home import Home
from searchfm.jobs import Job
from searchfm.pool import WorkerPool
from searchfm.records import Prepared, PrepareJob, PrepareResult, StudyHeader, StudyRecord, TrainJob
from searchfm.search import files
from searchfm.search.database import failures
from searchfm.search.lock import Lock, study_lock
from searchfm.search.storage import create_study, load_study, locked_study, open_storage, read_study, write_record
from searchfm.search.study import Study, check_name
from searchfm.tables import digest
from searchfm.tracking.follow import Tracking

PREPARE = "searchfm.learn.entries:prepare"
TRACKING_SECONDS = 60.0  # for MLflow to catch up at the end


@dataclass
class Tuning:
    """A study being tuned. Use as a context manager, then iterate over `run()`.

    Everything that can be wrong is found on the way in, before anything is written: UserError means that nothing was
    begun. `file` is the resolved study file without overrides, `stored` what was begun earlier.
    """

    study: Study
    home: Home
    file: Mapping[str, Any]
    stored: StudyRecord | None
    data_dir: Path | None = None
    retry_failed: bool = False
    stopping: Callable[[], bool] = lambda: False
    engine: Callable[[], Engine] = LocalEngine
    follow: bool = True  # into MLflow
    devices: Sequence[str] = field(default_factory=list, init=False)
    missing: int = field(default=0, init=False)  # trials that MLflow does not hold yet, once closed
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        with failures(f"study {self.study.name!r}"), ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> Iterator[Progress]:
        """The search itself. Raises WorldError."""
        with failures(f"study {self.study.name!r}"):
            yield from self.coordinator.run()

    def result(self) -> StudyRecord:
        """The study as it stands."""
        return load_study(self.storage, self.home, self.study.name)

    def check_success(self, study: StudyRecord) -> None:
        """Raises WorldError if every trial failed."""
        if study.trials and all(trial.state == "failed" for trial in study.trials):
            raise WorldError(f"study {study.name!r}: every trial failed, the last with: {study.trials[-1].reason}")

    @property
    def trials(self) -> int:
        """Trials in all: the study's number, and one for each that failed if those are to be replaced."""
        replaced = len(self.stored.of("failed")) if self.stored and self.retry_failed else 0
        return self.study.trials + replaced

    def _open(self, stack: ExitStack) -> None:
        study, home = self.study, self.home
        home.probe()
        lock: Lock | None = None
        if self.stored is not None:  # from here on, no other process changes it
            self.stored, lock = stack.enter_context(locked_study(home, study.name, self.stopping))
        stored = self.stored
        data = stored.data if stored else None
        work = stored is None or len(stored.trials) < self.trials or bool(stored.of("running"))
        engine = stack.enter_context(closing(self.engine() if work else LocalEngine([])))
        pool = WorkerPool(engine, retries=study.search.retries, stopping=self.stopping)
        if work:
            data, self.devices = prepare(study, pool, self.data_dir, data)
            study.check_images(data.shape)
        assert data is not None
        if lock is None:
            lock = stack.enter_context(study_lock(home, study.name, self.stopping))
        pool.check_lock = lock.check
        self.storage = open_storage(home, create=True, stopping=self.stopping, check_lock=lock.check)
        self._write_down(data, lock)
        if self.follow:
            stack.callback(self._close, Tracking(home, study.name))
        self.coordinator = Coordinator(
            study,
            self.result(),
            self.storage,
            pool,
            trials=self.trials,
            payload=partial(train_payload, study, data, self.data_dir, threads=None),
            retry_failed=self.retry_failed,
        )

    def _write_down(self, data: Prepared, lock: Lock) -> None:
        """Creates the study in the database, or updates what may change in it."""
        study, stored = self.study, self.stored
        header = StudyHeader(
            uuid=stored.uuid if stored else uuid.uuid4().hex,
            resolved=study.resolved,
            file=self.file,
            question=study.question,
            digest=digest(study.resolved),
            planned=study.trials,
            data=data,
            version=searchfm.__version__,
        )
        if stored is None:
            lock.claim(self.storage, create_study(self.storage, study.name, header))
        else:
            write_record(self.storage, stored.number, header)

    def _close(self, tracking: Tracking) -> None:
        self.missing = tracking.close(TRACKING_SECONDS)


def find_study(
    argument: str, name: str | None, overrides: Mapping[str, Any], home: Home
) -> tuple[Study, StudyRecord | None, Mapping[str, Any]]:
    """The study to tune, as its file says or as it was begun earlier; what is stored of it; and its resolved file
    without overrides.

    argument: a study file by name or path, or the name of a study of the home. name: of the study, which may differ
    from the file's. Raises UserError. Writes nothing.
    """
    path = files.find(argument)
    if path is None and argument.endswith(".toml"):
        raise StudyError(f"{argument}: no such file")
    file = files.read(path) if path else None
    chosen = check_name(name or (file.name if file else files.study_name(argument)))
    try:
        stored = read_study(home, chosen)
    except StudyError:
        stored = None
    if stored is not None:
        return files.reopen(file, stored, overrides), stored, file.study(name=chosen).resolved if file else stored.file
    if file is None:
        raise files.not_found(chosen, home)
    return file.study(overrides, name=chosen), None, file.study(name=chosen).resolved


def prepare(
    study: Study, pool: WorkerPool, data_dir: Path | None, before: Prepared | None
) -> tuple[Prepared, Sequence[str]]:
    """Fetches and reads the data, looks for pretrained weights and tries out the user's models, in a worker, before
    anything is written; then takes all workers, and lets every other node do the same. Returns what was found of the
    data, and the workers' devices.

    before: what an earlier command found. Raises DataError, also where the data changed since; ModelError, CodeError,
    UserError, WorldError, KeyboardInterrupt.
    """
    folder, code = str(data_dir) if data_dir else None, before.code if before else None
    payload = PrepareJob(study.data, tuple(study.transfers()), folder, custom=study.customs(), code=code)
    job = Job("prepare", None, PREPARE, payload.to_json(), label="preparing the data")
    result = PrepareResult.from_json(pool.run_one(job), "prepare")
    if before is not None and before.fingerprint != result.data.fingerprint:
        raise DataError(
            f"{study.data['name']}: the data have changed since study {study.name!r} was begun; "
            "put them back, or begin another study with --name"
        )
    devices = pool.engine.expand(result.devices)
    expected = replace(payload, fingerprint=result.data.fingerprint, code=result.data.code)
    pool.engine.each(replace(job, payload=expected.to_json()))
    return result.data, devices


def train_payload(
    study: Study, data: Prepared, data_dir: Path | None, config: Mapping[str, Any], identity: str, threads: int | None
) -> dict[str, Any]:
    """The payload of a training job."""
    folder = str(data_dir) if data_dir else None
    seconds = study.search.checkpoint_seconds
    return TrainJob(config, identity, folder, data.fingerprint, seconds, threads, data.code).to_json()
