"""One study from open to close: locked, prepared, given its workers, tuned, followed into MLflow."""

import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import searchfm
from searchfm.coordinator import Coordinator
from searchfm.engines import Engine
from searchfm.engines.local import LocalEngine, usable_cores
from searchfm.errors import ConfigError, DataError, StudyError, WorldError
from searchfm.events import Note, Phase, SearchEvent, StudyOpened, TrialEnded
from searchfm.forecast import CONFIGS, TOP, make_forecast, reserve, space_note
from searchfm.home import Home, command_line
from searchfm.jobs import Failed, Finished, Job, Started
from searchfm.pool import WorkerPool
from searchfm.records import (
    NO_BFLOAT16,
    NUMERICS,
    Forecast,
    ForecastJob,
    ForecastResult,
    Prepared,
    PrepareJob,
    PrepareResult,
    StudyHeader,
    StudyRecord,
    TrainJob,
    Trial,
)
from searchfm.search import files, first
from searchfm.search.database import failures
from searchfm.search.lock import Lock, study_lock
from searchfm.search.storage import (
    create_study,
    import_ahead,
    load_study,
    locked_study,
    open_storage,
    read_study,
    write_record,
)
from searchfm.search.study import Study, check_name
from searchfm.stopping import StopRequest
from searchfm.tables import digest
from searchfm.tracking.follow import Tracking

PREPARE = "searchfm.learn.entries:prepare"
FORECAST = "searchfm.learn.entries:forecast"
WARM_START = 5  # trials that a study takes from an older one
TRACKING_SECONDS = 60.0  # for MLflow to catch up at the end
# To time configs in each worker, those of minimum and maximum work apart: at the start of a search, in a dry run.
FORECAST_SECONDS, DRY_RUN_SECONDS = 0.5, 10.0


@dataclass
class Tuning:
    """A study to be tuned; `run` does it, once.

    Everything that can be wrong is found before anything is written: UserError means that nothing was begun. `file` is
    the resolved study file without overrides, `stored` what was begun earlier.
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
    missing: int = field(default=0, init=False)  # trials that MLflow does not hold yet, once `run` has ended
    exhausted: bool = field(default=False, init=False)  # whether a finite space has no further point; likewise
    workers: int = field(default=1, init=False)  # likewise; 1 where nothing was left to train

    def run(self) -> Iterator[Phase | Note | StudyOpened | SearchEvent]:
        """The study from open to close. Closed early, it stops its trials, which the next search resumes.

        Raises UserError, WorldError; KeyboardInterrupt where it is stopped before the study is opened.
        """
        study = self.study
        self.home.probe()
        yield from self._notes()
        with failures(f"study {study.name!r}"), ExitStack() as stack:
            # First, since it imports MLflow while workers import torch. It ends with any error before the study.
            tracking = Tracking(self.home, study.name) if self.follow else None
            if tracking is not None:
                stack.callback(tracking.end)
            lock: Lock | None = None
            if self.stored is not None:  # from here on, no other process changes it
                self.stored, lock = stack.enter_context(locked_study(self.home, study.name, self.stopping))
            data, work = self.stored.data if self.stored else None, self._work()
            devices: Sequence[str] = ()
            engine = stack.enter_context(closing(self.engine() if work else LocalEngine([])))
            pool = WorkerPool(
                engine,
                retries=study.search.retries,
                hang_seconds=study.search.hang_seconds,
                stopping=self.stopping,
            )
            if work:
                threading.Thread(target=import_ahead, daemon=True).start()  # this thread waits for a worker
                self.study, data, devices = yield from prepare(study, pool, self.data_dir, data)
                self.study.check_images(data.shape)
                yield from self._notes()
            assert data is not None
            if lock is None:
                lock = stack.enter_context(study_lock(self.home, study.name, self.stopping))
            pool.check_lock = lock.check
            yield Phase("opening the database")
            self.storage = open_storage(self.home, create=True, stopping=self.stopping, check_lock=lock.check)
            forecast = None
            if self.stored is None:
                yield Phase("timing configs")
                forecast = self._forecast(pool, data, len(devices), FORECAST_SECONDS)
            if work and (expected := self.stored.forecast if self.stored else forecast) is not None:
                yield from self._space_notes(expected)
            self._write_down(data, lock, forecast, work)
            if tracking is not None:
                # Drawing would take a core from a worker of this machine where they have all; others are elsewhere.
                tracking.begin(draw=not isinstance(engine, LocalEngine) or len(devices) < usable_cores())
                stack.callback(self._close, tracking)
            stack.enter_context(pool)  # left first: trials stop before MLflow is waited for
            self.workers = len(devices) or 1
            yield StudyOpened(self.result(), self.trials, tuple(devices), StopRequest.of(self.stopping).left)
            coordinator = self._coordinator(data, pool)
            yield from coordinator.run()
            self.exhausted = coordinator.exhausted
            if tracking is not None:
                yield Phase("waiting for MLflow")

    def forecast(self) -> Generator[Phase | Note, None, "Forecasted"]:
        """Prepares the study as a search does, and times configs longer. Writes nothing into the home; raises as `run`
        does.
        """
        yield from self._notes()
        with closing(self.engine()) as engine:
            pool = WorkerPool(engine, stopping=self.stopping)
            before = self.stored.data if self.stored else None
            self.study, data, devices = yield from prepare(self.study, pool, self.data_dir, before)
            self.study.check_images(data.shape)
            yield from self._notes()
            yield Phase("timing configs")
            forecast = self._forecast(pool, data, len(devices), DRY_RUN_SECONDS)
        if forecast is not None:
            yield from self._space_notes(forecast)
        return Forecasted(self.study, self.stored, data, tuple(devices), forecast)

    def result(self) -> StudyRecord:
        """The study as it stands."""
        return load_study(self.storage, self.home, self.study.name)

    @property
    def trials(self) -> int:
        """Trials in all: the study's number, and one for each that failed if those are to be replaced."""
        replaced = len(self.stored.of("failed")) if self.stored and self.retry_failed else 0
        return self.study.trials + replaced

    def _work(self) -> bool:
        """Whether anything is left to train."""
        stored = self.stored
        if stored is None or stored.of("running"):
            return True
        return len(stored.trials) < self.trials and self.study.ended_by(stored.trials) is None

    def _notes(self) -> Iterator[Note]:
        """The notes of the study that were not yielded yet."""
        while self.study.notes:
            yield Note(self.study.notes.pop(0))

    def _space_notes(self, forecast: Forecast) -> Iterator[Note]:
        """A note if the disk of the home has less free space than the trials to come are forecast to take."""
        ended = sum(trial.state != "running" for trial in self.stored.trials) if self.stored else 0
        if note := space_note(forecast, self.trials - ended, self.home.free_space, str(self.home.path)):
            yield Note(note)

    def _coordinator(self, data: Prepared, pool: WorkerPool) -> Coordinator:
        return Coordinator(
            self.study,
            self.result(),
            self.storage,
            pool,
            trials=self.trials,
            payload=partial(train_payload, self.study, data, self.data_dir, threads=None),
            retry_failed=self.retry_failed,
        )

    def _forecast(self, pool: WorkerPool, data: Prepared, workers: int, seconds: float) -> Forecast | None:
        """What the trials to come take, from configs of the first of them: timed on the workers, side by side as trials
        will be. seconds: for each worker. None where nothing could be timed. Raises KeyboardInterrupt.
        """
        study, folder = self.study, str(self.data_dir) if self.data_dir else None
        tables = [config.to_table() for config in study.samples(CONFIGS)]
        count = min(workers, max(1, len(tables) // 2))
        payloads = [
            ForecastJob(tuple(tables[i::count]), folder, seconds, data.code, data.bfloat16).to_json()
            for i in range(count)
        ]
        jobs = [Job(f"forecast {i}", None, FORECAST, payload) for i, payload in enumerate(payloads)]
        with closing(pool.run_all(jobs)) as events:
            ends = [event for event in events if isinstance(event, Finished)]
        results = [ForecastResult.from_json(end.result, end.job) for end in ends]
        return make_forecast(
            [timing for result in results for timing in result.timings],
            max((result.memory for result in results), default=0),
            search=study.search,
            subset=study.data["subset"],
            data=data,
            startup=study.startup(getattr(study.search.pruner, "startup_trials", 0)),
            trials=max(0, self.trials - (len(self.stored.trials) if self.stored else 0)),
            workers=workers,
            finalists=TOP + study.default,
        )

    def _write_down(self, data: Prepared, lock: Lock, forecast: Forecast | None, work: bool) -> None:
        """Creates the study in the database, or updates what may change in it. work: whether anything is trained."""
        study, stored = self.study, self.stored
        header = StudyHeader(
            uuid=stored.uuid if stored else uuid.uuid4().hex,
            resolved=study.resolved,
            file=self.file,
            question=study.question,
            digest=digest(study.resolved),
            planned=study.trials,
            data=data,
            forecast=stored.forecast if stored else forecast,
            version=searchfm.__version__,
            command=command_line(),
            numerics=tuple(dict.fromkeys([*(stored.numerics if stored else ()), *([NUMERICS] if work else [])])),
        )
        if stored is None:
            lock.claim(self.storage, create_study(self.storage, study.name, header))
        else:
            write_record(self.storage, stored.number, header)

    def _close(self, tracking: Tracking) -> None:
        self.missing = tracking.close(min(TRACKING_SECONDS, StopRequest.of(self.stopping).exit_in))


@dataclass(frozen=True)
class Forecasted:
    """A study, not begun or not continued, and what its trials to come would take."""

    study: Study
    stored: StudyRecord | None  # the study of this name that exists
    data: Prepared | None = None  # None where workers would have to start elsewhere
    devices: tuple[str, ...] = ()  # of the workers
    forecast: Forecast | None = None  # None where nothing could be timed


def reserving(
    events: Iterator[Phase | Note | StudyOpened | SearchEvent], stop: StopRequest, timeout: float
) -> Generator[Phase | Note | StudyOpened | SearchEvent, None, None]:
    """The events of a search, which is stopped so early that the final training ends before `timeout` (seconds), as far
    as that can be forecast from the trials that ended.
    """
    study: StudyRecord | None = None
    workers, trials = 1, list[Trial]()
    for event in events:
        match event:
            case StudyOpened(study=study, workers=devices):
                workers, trials = len(devices) or 1, list(study.trials)
            case TrialEnded(record=trial):
                trials.append(trial)
        if study is not None and isinstance(event, StudyOpened | TrialEnded):
            kept = [trial for trial in trials if trial.state == "complete" or trial.number == 0]  # all that matter
            trials = sorted(kept, key=lambda trial: trial.number)  # trial 0 is the study's default
            stop.reserve = reserve(replace(study, trials=tuple(trials)), workers, timeout, stop.left)
        yield event


def check_success(study: StudyRecord) -> None:
    """Raises WorldError if every trial failed."""
    if study.trials and all(trial.state == "failed" for trial in study.trials):
        raise WorldError(f"study {study.name!r}: every trial failed, the last with: {study.trials[-1].reason}")


def find_study(
    argument: str | Mapping[str, Any],
    name: str | None,
    overrides: Mapping[str, Any],
    home: Home,
    first_file: Path | None = None,
    warm_start: str | None = None,
) -> tuple[Study, StudyRecord | None, Mapping[str, Any]]:
    """The study to tune, as its file says or as it was begun earlier; what is stored of it; and its resolved file
    without overrides.

    argument: a study file by name or path, its table, or the name of a study of the home. name: of the study, which
    may differ from the file's. first_file, warm_start: configurations to try first, after those of the file. Raises
    UserError. Writes nothing.
    """
    file: files.StudyFile | None
    if isinstance(argument, Mapping):
        file = files.from_table(argument, name)
        chosen = file.name
    else:
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
        file = file and files.with_former(file, stored)
        study, plain = files.reopen(file, stored, overrides), file.study(name=chosen).resolved if file else stored.file
    elif file is None:
        raise files.not_found(chosen, home)
    else:
        study, plain = file.study(overrides, name=chosen), file.study(name=chosen).resolved
    if first_file is not None:
        add_file(study, first_file, begun=stored is not None)
    if warm_start is not None and stored is not None:
        study.notes.append(f"--warm-start {warm_start}: changes nothing in a study that was begun already")
    elif warm_start is not None:
        add_best(study, read_study(home, files.study_name(warm_start)))
    return study, stored, plain


def add_file(study: Study, path: Path, *, begun: bool) -> None:
    """Adds the configurations of a file to those that the study tries first. Raises ConfigError, StudyError; for a
    study that was begun already, where it did not have them from the start.
    """
    count = len(study.known)
    for number, table in enumerate(files.read_first(path), 1):
        where = f"--first {path.name}" + f", table {number}" * (number > 1)
        try:
            study.add_known(table, f"file {path.name}")
        except ConfigError as error:
            raise error.at(where) from None
        if begun and len(study.known) > count:
            raise StudyError(f"{where}: study {study.name!r} was begun without this configuration; {files.AFRESH}")


def add_best(study: Study, old: StudyRecord) -> None:
    """Adds the best trials of an older study, as far as they fit the space; notes of the study list them. Raises
    StudyError if it has no complete trial.
    """
    best = old.ranked(twins=False)[:WARM_START]
    if not best:
        raise StudyError(f"--warm-start {old.name}: has no complete trial")
    tried: list[str] = []
    for trial in best:
        try:
            study.add_known(first.config(trial.config), f"trial {trial.number} of {old.name}", strict=True)
            tried.append(f"{trial.number} ({trial.value:.4f})")
        except ConfigError as error:
            study.notes.append(f"--warm-start {old.name}: trial {trial.number} does not fit: {error}")
    chosen = f"trials {', '.join(tried)} are tried first" if len(tried) != 1 else f"trial {tried[0]} is tried first"
    study.notes.append(f"--warm-start {old.name}: {chosen if tried else 'none of its best trials fits'}")


def prepare(
    study: Study, pool: WorkerPool, data_dir: Path | None, before: Prepared | None
) -> Generator[Phase, None, tuple[Study, Prepared, Sequence[str]]]:
    """Fetches and reads the data, looks for pretrained weights and tries out the user's models, in a worker, before
    anything is written; then takes all workers, and lets every other node do the same. Returns the study, with the
    `data.size` that was chosen for the images, if any; what was found of the data; and the workers' devices.

    before: what an earlier command found, and chose. Raises DataError, also where the data changed since; ModelError,
    CodeError, UserError, KeyboardInterrupt; WorldError, also for a CPU without the bfloat16 that was chosen.
    """
    payload = PrepareJob(
        study.data,
        tuple(study.transfers()),
        str(data_dir) if data_dir else None,
        custom=study.customs(),
        code=before.code if before else None,
        choose_size=not study.sized,
        input_models=study.input_models,
        architectures=study.architectures,
    )
    job = Job("prepare", None, PREPARE, payload.to_json(), label="preparing the data")
    yield Phase("starting a worker")
    with closing(pool.run_all([job])) as events:
        for event in events:
            match event:
                case Started():
                    yield Phase(f"reading {study.data['name']}")
                case Failed(reason=reason):
                    raise WorldError(f"{job.label}: {reason}")
                case Finished(result=values):
                    result = PrepareResult.from_json(values, "prepare")
    if before is not None and before.fingerprint != result.data.fingerprint:
        raise DataError(
            f"{study.data['name']}: the data have changed since study {study.name!r} was begun; "
            "put them back, or begin another study with --name"
        )
    yield Phase("starting the workers")
    devices = pool.engine.expand(result.devices)
    found = result.data if before is None else replace(result.data, bfloat16=before.bfloat16)
    if "cpu" in devices and not set(found.bfloat16) <= set(result.data.bfloat16):
        raise WorldError(
            f"study {study.name!r} trains {', '.join(found.bfloat16)} in bfloat16, and this CPU {NO_BFLOAT16}: "
            "go on where it is there, or begin another study with --name"
        )
    if result.size:
        study = study.with_size(result.size)
    expected = replace(
        payload,
        data=study.data,
        fingerprint=found.fingerprint,
        code=found.code,
        choose_size=False,
        bfloat16=found.bfloat16,
    )
    pool.engine.each(replace(job, payload=expected.to_json()))
    return study, found, devices


def train_payload(
    study: Study, data: Prepared, data_dir: Path | None, config: Mapping[str, Any], identity: str, threads: int | None
) -> dict[str, Any]:
    """The payload of a training job."""
    folder = str(data_dir) if data_dir else None
    seconds = study.search.checkpoint_seconds
    job = TrainJob(config, identity, folder, data.fingerprint, seconds, threads, data.code, data.bfloat16)
    return job.to_json()
