"""A search on a simulated engine, clock and storage: every order of events, deaths, stops and slow or lost writes.

The coordinator, its pool, the study in memory, the repetition of lost storage calls and the toy trial are the real
ones. Simulated are workers (no process), time (nothing sleeps), the thread of proposals, and Optuna's tables (`Tables`,
in memory). The files of trials are real, in a folder that is best in memory: the pool moves and counts them.

`Search` is a search that a schedule drives; it checks what must hold (`Violation`). `Schedule` lets hypothesis choose.
"""

import contextlib
import copy
import functools
import hashlib
import json
import pkgutil
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from optuna.storages import get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial

from searchfm import coordinator as coordinator_module
from searchfm.coordinator import HOPELESS, Coordinator
from searchfm.errors import SearchfmError, Stopped, StorageError, WorldError, first_line
from searchfm.events import Note, SearchEvent, TrialRetried
from searchfm.home import Home
from searchfm.jobs import Context, EpochDone, Event, Failed, Finished, Interrupted, Job, Lost, Result
from searchfm.pool import WorkerPool
from searchfm.records import PREDICTIONS, WEIGHTS, Epoch, StudyRecord, read_epochs
from searchfm.search import database
from searchfm.search.rdb import NONCE, Content, ReconnectingStorage, RowStorage
from searchfm.search.storage import create_study, load_study
from searchfm.search.study import Study
from searchfm.tables import digest
from tests import driving, rows, toys

T = TypeVar("T")

TURN = Note("one turn of the coordinator's loop")
TURNS = 3000  # of a search of 8 trials that nothing disturbs: far more than it takes
SLOW_SECONDS = 7.0  # of a slow write: longer than between two checks of the lock


class Violation(AssertionError):  # noqa: N818  # a finding, not an error of a caller
    """What must hold does not."""


class Died(BaseException):
    """The coordinator was killed; not an Exception, so that nothing of ours catches it."""


class Clock:
    """Simulated seconds. Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    monotonic = time = __call__

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# --- workers ----------------------------------------------------------------------------------------------------------


def trial(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """The toy trial, whose result names an artifact."""
    result = yield from toys.trial(payload, context)
    if "value" not in result:
        return result
    assert context.folder is not None
    content = json.dumps(result).encode()
    (context.folder / PREDICTIONS).write_bytes(content)
    return {**result, "files": {PREDICTIONS: hashlib.sha256(content).hexdigest()}}


class Attempt:
    """A job on a worker: what `engines/worker.py` does in a process, a message at a time."""

    def __init__(self, job: Job, clock: Clock, messages: Sequence[Event] = ()) -> None:
        self.job, self.clock, self.at = job, clock, clock.now
        self.sent = deque((clock.now, event) for event in messages)  # in a pipe; with the seconds of the clock
        self.stopping = self.terminated = self.began = False
        self.ended = bool(messages)
        folder = job.folder / f"attempt-{job.attempt}" if job.folder else None
        paths = [folder.with_name(f"attempt-{n}") for n in range(job.attempt - 1, 0, -1)] if folder else []
        self.folder, earlier = folder, tuple(path for path in paths if path.is_dir())
        if folder is not None and not messages:  # else no worker runs it
            folder.mkdir(parents=True, exist_ok=True)
        self._epochs = pkgutil.resolve_name(job.entry)(job.payload, Context(folder, earlier, "cpu", self._tick))

    def _tick(self) -> None:
        if self.stopping or self.terminated:
            raise Stopped

    def advance(self) -> None:
        """Runs the job up to its next message, on a clock of its own."""
        if self.ended:
            return
        now, self.clock.now = self.clock.now, max(self.clock.now, self.at)
        event = self._run()
        self.at, self.clock.now = self.clock.now, now
        self.ended = not isinstance(event, EpochDone)
        if event is not None:
            self.sent.append((self.at, event))

    def _run(self) -> Event | None:
        about = self.job.id, self.job.attempt
        try:
            if self.began:
                self._tick()
            self.began = True
            return EpochDone(*about, next(self._epochs))
        except StopIteration as end:
            return Finished(*about, end.value)
        except Stopped:
            return Interrupted(*about)
        except FileNotFoundError:
            if self.folder is None or self.folder.is_dir():
                raise
            return None  # given up, and its folder was removed: it ends with nobody who reads it
        except (Exception, SystemExit) as error:
            text = first_line(error)
            reason = text if isinstance(error, SearchfmError) else f"{type(error).__name__}: {text}"
            return Failed(*about, type(error).__name__, reason)

    def die(self, event: Event, *, checkpoint: bool = True) -> None:
        """Ends without a word of its own, after what it sent. checkpoint: whether it had written one."""
        self.ended = True
        self.sent.append((max(self.at, self.clock.now), event))
        if self.folder is not None and not checkpoint:
            (self.folder / "done").unlink(missing_ok=True)


@dataclass
class Worker:
    """A worker, which may be away with its node."""

    attempt: Attempt | None = None
    away: bool = False


class SimulatedEngine:
    """An `Engine` of simulated workers. Whoever chooses sets `chosen`: the attempt whose next message is received.

    fair: whether the earliest message is received where none was chosen. orphans: attempts that were given up, by this
    coordinator or an earlier one, and go on.
    """

    def __init__(self, workers: int, clock: Clock, orphans: Collection[Attempt] = ()) -> None:
        self.workers, self.clock = [Worker() for _ in range(workers)], clock
        self.orphans = list(orphans)
        self.chosen: Attempt | None = None
        self.fair = True
        self.lost: Counter[str] = Counter()  # losses that were received, by job
        self.watch: Callable[[Job], None] = lambda job: None

    @property
    def free(self) -> int:
        return sum(worker.attempt is None and not worker.away for worker in self.workers)

    @property
    def busy(self) -> bool:
        return any(worker.attempt for worker in self.workers)

    def expand(self, accelerators: Mapping[str, int]) -> Sequence[str]:
        return ["cpu"] * len(self.workers)

    def each(self, job: Job) -> None:
        pass

    def pack(self, memory: float) -> str:
        return ""

    def submit(self, job: Job) -> None:
        self.watch(job)
        worker = next(worker for worker in self.workers if worker.attempt is None and not worker.away)
        worker.attempt = Attempt(job, self.clock)

    def stop(self, job: str) -> None:
        for worker in self.workers:
            if worker.attempt is not None and worker.attempt.job.id == job:
                worker.attempt.stopping = True

    def next_event(self, timeout: float) -> Event | None:
        attempt, self.chosen = self.chosen, None
        if attempt is None and self.fair:
            attempt = self._earliest()
            if attempt is not None and attempt.sent[0][0] > self.clock.now + timeout:
                attempt = None
        if attempt is None or not attempt.sent:
            self.clock.now += timeout
            return None
        at, event = attempt.sent.popleft()
        self.clock.now = max(self.clock.now, at)
        self.lost[event.job] += isinstance(event, Lost)
        for worker in self.workers:
            if worker.attempt is attempt and not isinstance(event, EpochDone):
                worker.attempt = None
        return event

    def _earliest(self) -> Attempt | None:
        attempts = [worker.attempt for worker in self.workers if worker.attempt is not None]
        for attempt in attempts:
            if not attempt.sent:
                attempt.advance()
        return min((each for each in attempts if each.sent), key=lambda each: each.sent[0][0], default=None)

    def close(self) -> None:
        for worker in self.workers:
            worker.attempt = None

    # --- what happens to workers --------------------------------------------------------------------------------------

    def kill(self, worker: Worker, *, checkpoint: bool) -> None:
        """SIGKILL. What it sent before comes before its death."""
        if (attempt := worker.attempt) is not None and not attempt.ended:
            attempt.die(Lost(attempt.job.id, attempt.job.attempt, "its worker died"), checkpoint=checkpoint)

    def terminate(self, worker: Worker) -> None:
        """SIGTERM: the job leaves at its next tick."""
        if worker.attempt is not None:
            worker.attempt.terminated = True

    def cut(self, worker: Worker, event: type[Lost] | type[Interrupted]) -> None:
        """The engine gives up a job, as lost or handed back; its worker goes on, and may yet send."""
        if (attempt := worker.attempt) is not None:
            about = attempt.job.id, attempt.job.attempt
            given_up = Lost(*about, "node is lost") if event is Lost else Interrupted(*about)
            worker.attempt = Attempt(attempt.job, self.clock, [given_up])
            self.orphans.append(attempt)

    def abandon(self) -> list[Attempt]:
        """The attempts that go on after the coordinator died."""
        return self.orphans + [worker.attempt for worker in self.workers if worker.attempt is not None]


# --- storage ----------------------------------------------------------------------------------------------------------

Fault = Literal["slow", "lost before", "lost after", "gone before", "gone after", "dies before", "dies after"]
FAULTS: tuple[Fault, ...] = (
    "slow",  # the write takes seconds
    "lost before",  # the connection is lost before the write, and there again at once
    "lost after",  # or after it was committed
    "gone before",  # the database does not answer any more: the search ends with StorageError
    "gone after",
    "dies before",  # the coordinator is killed before the write
    "dies after",  # or when it was committed
)


class Faults:
    """What goes wrong with writes. `writes` are let through before `kind` happens."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.kind, self.writes = clock, cast("Fault | None", None), 0
        self.gone = False

    def around(self, write: Callable[[], T]) -> T:
        if self.gone:
            raise ConnectionError("the database does not answer")
        kind = None if self.writes else self.kind
        self.writes = max(self.writes - 1, 0)
        if kind is None:
            return write()
        self.kind = None
        if kind == "slow":
            self.clock.sleep(SLOW_SECONDS)
        self._raise(kind, "before")
        result = write()
        self._raise(kind, "after")
        return result

    def _raise(self, kind: Fault, when: str) -> None:
        what, _, moment = kind.partition(" ")
        if moment == when:
            if what == "dies":
                raise Died
            self.gone = what == "gone"
            raise ConnectionError("the connection was lost")


class FaultyRows(RowStorage):
    """Rows whose writes fail as `faults` say. `telling` sees each end before it is written."""

    faults: Faults
    telling: Callable[[int, Content, FrozenTrial], None]

    def write_trial(self, trial_id: int, content: Content, end: FrozenTrial | None = None) -> None:
        if end is not None:
            self.telling(trial_id, content, end)
        self.faults.around(lambda: super(FaultyRows, self).write_trial(trial_id, content, end))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        return self.faults.around(lambda: super(FaultyRows, self)._create_new_trial(study_id, template_trial))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a database gives back."""
    copied: dict[str, Any] = json.loads(json.dumps(values))
    return copied


class Tables(RowStorage):
    """One study in memory, in place of the rows of a database. Trials that it returned do not change."""

    def __init__(self) -> None:
        self.user: dict[str, Any] = {}
        self.system: dict[str, Any] = {}
        self.name: str | None = None
        self.trials: list[FrozenTrial] = []

    def create_new_study(self, directions: Sequence[Any], study_name: str | None = None) -> int:
        self.name = study_name
        return 1

    def get_study_id_from_name(self, study_name: str) -> int:
        return 1

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return dict(self.user)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return dict(self.system)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self.user |= plain({key: value})

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.system |= plain({key: value})

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self.trials[trial_id - 1]

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        return [t for t in self.trials if t._trial_id > trial_id_greater_than or t._trial_id in included_trial_ids]

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        trial = copy.copy(template_trial or create_trial(state=TrialState.RUNNING))
        nonce = trial.system_attrs.get(NONCE)
        for other in self.trials:
            if nonce is not None and other.system_attrs.get(NONCE) == nonce:
                return other
        trial.number, trial._trial_id = len(self.trials), len(self.trials) + 1
        trial.user_attrs, trial.system_attrs = plain(trial.user_attrs), plain(trial.system_attrs)
        trial.params, trial.intermediate_values = dict(trial.params), dict(trial.intermediate_values)
        self.trials.append(trial)
        return trial

    def write_trial(self, trial_id: int, content: Content, end: FrozenTrial | None = None) -> None:
        trial = copy.copy(self.trials[trial_id - 1])
        self.check_trial_is_updatable(trial_id, trial.state)
        trial.params = {**trial.params, **content.params}
        trial.distributions = {**trial.distributions, **content.distributions}
        trial.user_attrs = {**trial.user_attrs, **plain(content.user_attrs)}
        trial.system_attrs = {**trial.system_attrs, **plain(content.system_attrs)}
        trial.intermediate_values = {**trial.intermediate_values, **content.reports}
        if end is not None:
            trial.state, trial.values, trial.datetime_complete = end.state, end.values, end.datetime_complete
        self.trials[trial_id - 1] = trial


class InMemory(ReconnectingStorage, FaultyRows, Tables):
    """Tables in memory behind the real repetition of lost calls."""

    def __init__(self, stopping: Callable[[], bool], check_lock: Callable[[], None]) -> None:
        Tables.__init__(self)
        self._where, self._stopping, self._check_lock = "simulated", stopping, check_lock
        self._asked = set()

    # `ReconnectingStorage` names the methods of `RDBStorage` that it repeats. Reads do not fail here.
    create_new_study = Tables.create_new_study
    get_study_id_from_name = Tables.get_study_id_from_name
    get_study_user_attrs = Tables.get_study_user_attrs
    get_study_system_attrs = Tables.get_study_system_attrs
    set_study_user_attr = Tables.set_study_user_attr
    set_study_system_attr = Tables.set_study_system_attr
    get_trial = Tables.get_trial
    _get_trials = Tables._get_trials


class InSqlite(ReconnectingStorage, FaultyRows):
    """The same on real tables: the database is in memory."""

    def __init__(self, stopping: Callable[[], bool], check_lock: Callable[[], None]) -> None:
        RowStorage.__init__(self, "sqlite:///:memory:", {})
        self._where, self._stopping, self._check_lock = "simulated", stopping, check_lock
        self._asked = set()


# --- proposals --------------------------------------------------------------------------------------------------------


class Proposals:
    """In place of the thread that asks: `late` proposals are not ready when they are waited for first."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.late = clock, 0
        self._calls: dict[Future[Any], Callable[[], Any]] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls[future] = functools.partial(call, *arguments)
        return future

    def wait(self, futures: Sequence[Future[Any]], timeout: float | None) -> Any:
        """In place of `concurrent.futures.wait`."""
        (future,) = futures
        if self.late and timeout is not None:
            self.late -= 1
            self.clock.sleep(timeout)
        elif future in self._calls:
            future.set_result(self._calls.pop(future)())
        return SimpleNamespace(done={future} if future.done() else set())


# --- a search that a schedule drives ----------------------------------------------------------------------------------

SPACES: dict[str, dict[str, Any]] = {
    "two": {"model": {"mlp": {"layers": 1, "width": {"choice": [4, 16]}}}, "optimizer": {}},
    "six": {"model": {"mlp": {"layers": {"choice": [1, 2]}, "width": {"choice": [4, 8, 16]}}}, "optimizer": {}},
    "infinite": {},
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "random": {"name": "random"},
    "grid": {"name": "grid"},
    "tpe": {"name": "tpe", "startup_trials": 2, "candidates": 4},
}
PRUNERS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "promote": {"name": "asha", "reduction": 2, "promote": True},
    "asha": {"name": "asha", "reduction": 2},
    "hyperband": {"name": "hyperband", "reduction": 2},
}


@dataclass(frozen=True)
class Options:
    """A study, and how it is searched."""

    trials: int
    epochs: int
    workers: int
    space: str = "six"
    sampler: str = "random"
    pruner: str = "none"
    keep: int = 1
    retries: int = 1
    seed: int = 0
    fail: tuple[int, ...] = ()  # trials that raise
    nan: tuple[int, ...] = ()  # trials whose value is NaN
    target: float | None = None
    stop_after: int | None = None
    chance: bool = False  # whether images are counted, so that trials at chance are pruned

    @functools.cache  # noqa: B019  # few, and a study takes 10 ms
    def study(self) -> Study:
        search = {
            "trials": self.trials,
            "sampler": SAMPLERS[self.sampler],
            "pruner": PRUNERS[self.pruner],
            "keep": self.keep,
            "retries": self.retries,
            "seed": self.seed,
        }
        rules = {"target": self.target, "stop_after": self.stop_after}
        search |= {name: value for name, value in rules.items() if value is not None}
        return driving.toy(search=search, train={"epochs": self.epochs}, **SPACES[self.space])


class Turns(Coordinator):
    """The coordinator, which yields before each turn of its loop: it reads one answer of the engine in each."""

    def _ask(self) -> Iterator[SearchEvent]:
        yield TURN
        yield from super()._ask()


class Search:
    """A search of one study by coordinators one after another, driven a turn at a time.

    Each turn checks what must hold at every moment, `finish` what must hold at the end. Raises Violation.
    """

    def __init__(self, options: Options, folder: Path, storage: Callable[..., ReconnectingStorage] = InMemory) -> None:
        self.options, self.home, self.study = options, Home(folder), options.study()
        self.trials, self.clock = options.trials, Clock()
        self.faults = Faults(self.clock)
        self.rows = cast(Any, storage(lambda: self.stopping, self._check_lock))
        self.rows.faults, self.rows.telling = self.faults, self._check_end
        self.tables = get_storage(self.rows)
        self.stopping = self.lock_lost = self.over = self.broken = False
        self.repeatable = options.workers == 1  # so far it must be the study that nothing disturbed
        self.events: Iterator[SearchEvent] | None = None
        self.engine = SimulatedEngine(options.workers, self.clock)
        self.engine.fair = False
        self.hopeless = False
        self.ended: dict[int, FrozenTrial] = {}
        self.judged: set[tuple[int, int]] = set()  # trial, epoch
        self.judged_now: set[tuple[int, int]] = set()  # by this coordinator
        self.trained: set[int] = set()  # trials that a worker had
        self.trained_now: set[int] = set()  # since this coordinator began
        self.lost: Counter[str] = Counter()  # losses that coordinators received, by job
        self.charged: Counter[int] = Counter()  # retries, by trial
        about = {"fingerprint": "toy"}
        counted: dict[str, Any] = {"validation": 1000, "validation_classes": (100,) * 10}
        header = rows.header(
            self.study.resolved,
            uuid_="u",
            digest=digest(self.study.resolved),
            planned=options.trials,
            **about,
            **(counted if options.chance else {}),
        )
        create_study(self.tables, "toy", header)

    @contextlib.contextmanager
    def _simulated(self) -> Iterator[None]:
        """Ours in place of time and threads."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toys, "time", self.clock)
            patch.setattr(database, "time", self.clock)
            patch.setattr(coordinator_module, "wait", self.proposals.wait)
            yield

    # --- coordinators -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.stopping = self.lock_lost = False
        self.faults.kind, self.faults.gone = None, False
        self.judged_now, self.trained_now = set(), set()
        self.tables = get_storage(self.rows)
        self.engine = SimulatedEngine(self.options.workers, self.clock, self.engine.orphans)
        self.engine.fair, self.engine.watch, self.engine.lost = False, self._check_submit, self.lost
        self.proposals = Proposals(self.clock)
        self.pool = WorkerPool(
            self.engine,
            retries=self.options.retries,
            stopping=lambda: self.stopping,
            check_lock=self._check_lock,
            clock=self.clock,
        )
        payload = {
            "fail": self.options.fail,
            "nan": self.options.nan,
            "seconds": 0.5,
        }
        turns = Turns(
            self.study,
            load_study(self.tables, self.home, "toy"),
            self.tables,
            self.pool,
            trials=self.trials,
            payload=lambda config, identity: {"config": config, "identity": identity, **payload},
            entry="tests.simulation:trial",
        )
        turns.asking.shutdown()
        turns.asking = cast(Any, self.proposals)
        pruner = cast(Any, turns.memory.optuna.pruner)
        pruner.prune = functools.partial(self._prune, pruner.prune)
        self.events = turns.run()

    def turn(self, chosen: Attempt | None = None) -> None:
        """One turn of the coordinator's loop, in which it receives the next message of an attempt. Starts a coordinator
        where there is none.
        """
        if self.over:
            return
        try:
            if self.events is None:
                self._start()
            assert self.events is not None
            self.engine.chosen = chosen
            with self._simulated():
                for event in self.events:
                    if event is TURN:
                        break
                    if isinstance(event, TrialRetried):
                        self.charged[event.trial] += 1
                else:
                    self._end()
        except Died:
            self._abandon()
            self.repeatable = False  # what was proposed, and not written, may be proposed otherwise
        except StorageError as error:
            self._require(self.faults.gone or self.lock_lost, f"no fault of the storage: {error}")
            self._abandon()
            self.repeatable = False
        except WorldError as error:
            self._require("none succeeded" in str(error), str(error))
            self._abandon()
            self.over = self.hopeless = True
        except Violation:
            self.broken = True
            raise
        except Exception as error:
            self.broken = True
            raise Violation(f"{type(error).__name__}: {error}") from error
        self._check()

    def _end(self) -> None:
        self.events = None
        self.over = not self.stopping
        self._require(not self.over or not self.engine.busy, "the search ended while a worker has a job")
        self.engine.close()

    def _abandon(self) -> None:
        """The coordinator is gone; its workers may go on."""
        if self.events is not None:
            self.events.close()  # type: ignore[attr-defined]
        self.events = None
        self.engine.orphans = self.engine.abandon()
        self.engine.close()

    def kill(self) -> None:
        """Kills the coordinator between two turns."""
        if self.events is not None:
            self._abandon()
            self.repeatable = False

    def close(self) -> None:
        """Closes the generator of events in the middle, as Ctrl-C in a program does: the pool stops all jobs, unless it
        was asked to stop before.
        """
        if self.events is not None:
            self.events.close()  # type: ignore[attr-defined]
            self.events, self.engine.fair = None, True
            with self._simulated():
                self.pool.__exit__(GeneratorExit, None, None)
            self._require(self.stopping or not self.engine.busy, "jobs were not stopped")
            self.engine.close()

    def more(self, trials: int) -> None:
        """The same command with a larger number of trials."""
        self.trials, self.over, self.repeatable, self.hopeless = self.trials + trials, False, False, False

    def finish(self) -> StudyRecord:
        """Runs it to its end with nothing that disturbs it, and checks the whole study."""
        for worker in self.engine.workers:
            worker.away = False
        self.faults.kind = None
        for _ in range(TURNS):
            if self.over:
                break
            self.engine.fair = True
            self.turn()
        else:
            raise Violation(f"the search does not end in {TURNS} turns")
        return self._check_study()

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _require(self, true: object, text: str) -> None:
        if not true:
            self.broken = True
            raise Violation(text)

    def _check_lock(self) -> None:
        if self.lock_lost:
            raise StorageError("the lock is lost")

    def _stored(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self.rows._get_trials(1, None, set(), 0)
        return trials

    def _prune(self, prune: Callable[..., bool], study: Any, trial: FrozenTrial) -> bool:
        key = trial.number, max(trial.intermediate_values)
        stored = self._stored()[trial.number].intermediate_values
        self._require(key[1] not in stored, f"trial {key[0]}: epoch {key[1]} is judged after its report was written")
        self._require(key not in self.judged_now, f"trial {key[0]}: epoch {key[1]} is judged twice")
        self.judged.add(key)
        self.judged_now.add(key)
        return prune(study, trial)

    def _check_submit(self, job: Job) -> None:
        """No trial is trained beside its twin, or after it."""
        number, stored = int(job.id), self._stored()
        trial = stored[number]
        self._require(not trial.state.is_finished(), f"trial {number} has ended, and is trained")
        for other in stored:
            if other.number == number or other.user_attrs["digest"] != trial.user_attrs["digest"]:
                continue
            useful = other.state in (TrialState.COMPLETE, TrialState.PRUNED) and "twin" not in other.user_attrs
            trains = other.state is TrialState.RUNNING and (
                other.number in self.trained_now or other.intermediate_values
            )
            self._require(not useful and not trains, f"trial {number} is trained, although {other.number} is its twin")
        self.trained.add(number)
        self.trained_now.add(number)

    def _check_end(self, trial_id: int, content: Content, end: FrozenTrial) -> None:
        """`tell` is the commit point: what a trial's result names is in its folder."""
        stored = self.rows.get_trial(trial_id)
        for name, sha256 in (content.user_attrs.get("result") or {}).get("files", {}).items():
            path = self.home.trial("toy", stored.number) / name
            there = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
            self._require(there, f"trial {stored.number} is told before {name} is in its folder")

    def _check(self) -> None:
        """What must hold at every moment."""
        stored = self._stored()
        self._require([t.number for t in stored] == list(range(len(stored))), "numbers are not contiguous")
        self._require(len(stored) <= self.trials, f"{len(stored)} trials of {self.trials}")
        for trial in stored:
            before = self.ended.get(trial.number)
            self._require(before is None or before == trial, f"trial {trial.number} changed after its end")
            if trial.state.is_finished():
                self.ended[trial.number] = trial
            lost = trial.user_attrs.get("lost", 0)
            self._require(lost <= min(self.options.retries, self.lost[str(trial.number)]), f"{lost} attempts lost")
            self._require(self.charged[trial.number] <= self.options.retries, f"trial {trial.number}: more retries")
            reports = sorted(trial.intermediate_values)
            self._require(reports == list(range(1, len(reports) + 1)), f"reports are not contiguous: {reports}")
        if self.events is not None or self.over:
            self._check_weights(stored)

    def _check_weights(self, stored: Sequence[FrozenTrial]) -> None:
        """The best `keep` of the trials that were trained have weights, and no other that ended."""
        ended = [t for t in stored if t.state.is_finished()]
        complete = [t for t in ended if t.state is TrialState.COMPLETE and "twin" not in t.user_attrs]
        best = sorted(complete, key=lambda t: (-(t.value or 0.0), t.number))[: self.options.keep]
        kept = [t.number for t in ended if (self.home.trial("toy", t.number) / WEIGHTS).exists()]
        self._require(kept == sorted(t.number for t in best), f"weights of {kept} are kept")

    def _check_study(self) -> StudyRecord:
        """What must hold at the end."""
        record = load_study(get_storage(self.rows), self.home, "toy")
        count, useful = len(record.trials), [row for row in record.trials if row.state in ("complete", "pruned")]
        self._require(not record.of("running"), f"{[row.number for row in record.of('running')]} are RUNNING")
        if self.hopeless:
            self._require(len(record.of("failed")) >= HOPELESS and not useful, "the study was not hopeless")
        elif count != self.trials:
            points = self.study.points
            exhausted = points is not None and len({row.digest for row in record.trials}) == len(points)
            rule = self.study.ended_by(record.trials)
            self._require(exhausted or rule, f"{count} trials of {self.trials}")
        for row in record.trials:
            self._check_trial(record, row.number)
        if (
            self.repeatable
            and not self.hopeless
            and not any((row.reason or "").endswith(" times") for row in record.trials)
        ):
            expected = reference(self.options)
            # Each coordinator counts failures from its own beginning, so a disturbed study may end later as hopeless.
            hopeless = all(state == "failed" for _, state, *_ in expected)
            self._require(hopeless or driving.facts(record) == expected, "the study differs from the undisturbed one")
        return record

    def _check_trial(self, record: StudyRecord, number: int) -> None:
        row = record.trials[number]
        name, epochs = f"trial {number}", row.config["train"]["epochs"]
        curve = {index: toys.curve(row.config, index) for index in range(1, len(row.epochs) + 1)}
        written = read_epochs(row.folder / "epochs.csv")
        self._require({e.index: e.val_accuracy for e in written} == curve, f"{name}: epochs.csv {written}")
        self._require(dict(row.reported) == curve, f"{name}: reports {row.reported}, not {curve}")
        left = sorted(path.name for path in row.folder.iterdir() if path.name.startswith(("attempt-", ".")))
        self._require(not left, f"{name}: {left} are left over")
        if row.state == "complete":
            self._require(len(curve) == epochs and row.value == curve[epochs], f"{name}: value {row.value}")
            self._require(number not in self.options.nan or row.twin is not None, f"{name}: its value is NaN")
        elif row.state == "pruned":
            self._require(len(curve) < epochs, f"{name}: pruned after its last epoch")
            self._require((row.reason or "").endswith(f" after epoch {len(curve)}"), f"{name}: {row.reason}")
        elif (row.reason or "").endswith(" times"):
            attempts = self.options.retries + 1
            self._require((row.reason or "").endswith(f", {attempts} times"), f"{name}: {row.reason}")
            self._require(self.lost[str(number)] >= attempts, f"{name}: lost {self.lost[str(number)]} times only")
        else:
            expected = {
                "ValueError: made to fail": number in self.options.fail,
                "its value is nan, not a finite number": number in self.options.nan,
            }
            self._require(expected.get(row.reason or ""), f"{name}: failed with {row.reason}")
        if row.twin is not None:
            twin = record.trials[row.twin]
            same = (row.state, row.value, row.reported, row.digest, row.reason)
            self._require(same == (twin.state, twin.value, twin.reported, twin.digest, twin.reason), f"{name}: {twin}")
            self._require(twin.twin is None and (twin.ended or 0) <= (row.ended or 0), f"{name}: its twin ended later")
            self._require(number not in self.trained, f"{name} is a twin, and was trained")
            return
        config = self.study.config(row.params)
        missing = [e for e in curve if self.study.judges(config, e) and (number, e) not in self.judged]
        self._require(not missing, f"{name}: epochs {missing} were not judged")


@functools.cache
def reference(options: Options) -> list[tuple[Any, ...]]:
    """The facts of the study that nothing disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        search = Search(options, Path(folder))
        search.repeatable = False
        return driving.facts(search.finish())


# --- schedules --------------------------------------------------------------------------------------------------------


def numbers(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """A few trials."""
    return st.lists(st.integers(0, 7), max_size=most, unique=True).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def options(draw: st.DrawFn) -> Options:
    """Small studies, most of a few points, so that twins are frequent."""
    space = draw(st.sampled_from(["six", "two", "infinite"]))
    sampler = draw(st.sampled_from(["random", "grid", "tpe"] if space != "infinite" else ["random", "tpe"]))
    pruners = [name for name in PRUNERS if (sampler, name) != ("grid", "promote")]
    return Options(
        trials=draw(st.integers(3, 8)),
        epochs=draw(st.integers(1, 4)),
        workers=draw(st.integers(1, 3)),
        space=space,
        sampler=sampler,
        pruner=draw(st.sampled_from(pruners)),
        keep=draw(st.integers(0, 2)),
        retries=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 7)),
        fail=draw(st.one_of(st.just(()), numbers(4))),
        nan=draw(st.one_of(st.just(()), numbers(2))),
        target=draw(st.sampled_from([None, None, None, 0.3])),
        stop_after=draw(st.sampled_from([None, None, None, 2])),
        chance=draw(st.booleans()),
    )


WORKERS, ORPHANS = st.integers(0, 2), st.integers(0, 3)
TURNS_AFTER = st.integers(0, 4)  # else the next rule seldom finds what this one has led to


class Schedule(RuleBasedStateMachine):
    """A random schedule of a random search. Its rules are what may happen; numbers of workers wrap."""

    search: Search

    @initialize(options=options())
    def begin(self, options: Options) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="schedule-"))
        self.search = Search(options, self.folder)
        self.search.turn()

    def teardown(self) -> None:
        if hasattr(self, "search"):
            try:
                if not self.search.broken:
                    self.search.finish()
            finally:
                shutil.rmtree(self.folder)

    def _worker(self, index: int) -> Worker:
        workers = self.search.engine.workers
        return workers[index % len(workers)]

    # --- messages -----------------------------------------------------------------------------------------------------

    @rule(turns=st.integers(1, 12))
    def run(self, turns: int) -> None:
        """Messages are received in the order of time."""
        self._run(turns)

    def _run(self, turns: int) -> None:
        for _ in range(turns):
            self.search.engine.fair = True
            self.search.turn()
        self.search.engine.fair = False

    @rule(worker=WORKERS)
    def work(self, worker: int) -> None:
        """A worker sends its next message, which is not received yet."""
        if (attempt := self._worker(worker).attempt) is not None:
            with self.search._simulated():
                attempt.advance()

    @rule(worker=WORKERS)
    def receive(self, worker: int) -> None:
        """The coordinator receives the next message of a worker, if there is one."""
        self.search.turn(self._worker(worker).attempt)

    @precondition(lambda self: self.search.engine.orphans)
    @rule(orphan=ORPHANS, messages=st.integers(1, 6))
    def receive_late(self, orphan: int, messages: int) -> None:
        """An attempt works on after the coordinator knows that it was given up, and what it sends is received."""
        engine = self.search.engine
        given_up = [each.attempt.job for each in engine.workers if each.attempt is not None]  # or trained
        orphans = [each for each in engine.orphans if each.job not in given_up]
        if not orphans:
            return
        attempt = orphans[orphan % len(orphans)]
        for _ in range(messages):
            if not attempt.sent:
                with self.search._simulated():
                    attempt.advance()
            self.search.turn(attempt)

    # --- workers ------------------------------------------------------------------------------------------------------

    @rule(worker=WORKERS, checkpoint=st.booleans(), turns=TURNS_AFTER)
    def kill_worker(self, worker: int, checkpoint: bool, turns: int) -> None:
        self.search.engine.kill(self._worker(worker), checkpoint=checkpoint)
        self._run(turns)

    @rule(worker=WORKERS)
    def terminate_worker(self, worker: int) -> None:
        self.search.engine.terminate(self._worker(worker))

    @rule(worker=WORKERS, lost=st.booleans(), turns=TURNS_AFTER)
    def cut_connection(self, worker: int, lost: bool, turns: int) -> None:
        self.search.engine.cut(self._worker(worker), Lost if lost else Interrupted)
        self._run(turns)

    @rule(worker=WORKERS)
    def leave(self, worker: int) -> None:
        """A node hands its job back and leaves."""
        self.search.engine.terminate(self._worker(worker))
        self._worker(worker).away = True

    @rule(worker=WORKERS)
    def come(self, worker: int) -> None:
        self._worker(worker).away = False

    # --- the coordinator ----------------------------------------------------------------------------------------------

    @rule()
    def stop(self) -> None:
        """Asks the search to stop; the next turn after its end resumes it."""
        self.search.stopping = self.search.events is not None

    @rule()
    def kill_coordinator(self) -> None:
        self.search.kill()

    @rule()
    def close(self) -> None:
        self.search.close()

    @rule(fault=st.sampled_from(FAULTS), writes=st.integers(0, 6))
    def fail_write(self, fault: Fault, writes: int) -> None:
        self.search.faults.kind, self.search.faults.writes = fault, writes

    @rule()
    def lose_lock(self) -> None:
        self.search.lock_lost = self.search.events is not None

    @rule(seconds=st.sampled_from([1.0, 6.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.search.clock.sleep(seconds)

    @rule(turns=st.integers(1, 5))
    def propose_late(self, turns: int) -> None:
        self.search.proposals.late = turns

    @precondition(lambda self: self.search.over and self.search.trials < 12)
    @rule(trials=st.integers(1, 3))
    def ask_for_more(self, trials: int) -> None:
        self.search._check_study()
        self.search.more(trials)
