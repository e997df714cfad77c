"""Search: asks Optuna for trials, gives them to a pool of workers, judges every epoch once, tells Optuna their ends.

Sampler and pruner read a study in memory (`MemoryStudy`). A trial is created in the database when a worker can take it,
and written once an epoch. `tell` is the commit point of a trial. What precedes it (checkpoints, reports, files in the
trial's folder) is found by the next coordinator, which adopts every RUNNING trial under its own number. What follows it
(MLflow, the dashboard's notes) is a projection that can be made again at any time.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from searchfm.config import Config
from searchfm.errors import WorldError
from searchfm.events import Note, SearchEvent, TrialEnded, TrialEpoch, TrialPaused, TrialRetried, TrialStarted
from searchfm.forecast import TOP
from searchfm.home import write_whole
from searchfm.jobs import EpochDone, Event, Failed, Finished, Interrupted, Job, Paused, Result, Retried
from searchfm.pool import WorkerPool, gather
from searchfm.records import EPOCHS, SPEC, WEIGHTS, Epoch, StudyRecord, Trial, ranked, read_epochs, write_epochs
from searchfm.search import space
from searchfm.search.memory import MemoryStudy
from searchfm.search.storage import read_trial
from searchfm.search.study import Study, fixed_sampler

TRIAL = "searchfm.learn.entries:trial"
HOPELESS = 3  # failed trials, with none that succeeded, that end a search
ASK_SECONDS = 0.1  # to wait for a proposal before epochs are judged meanwhile
CHANCE, AT_CHANCE = "pruned at chance", 3  # reason; trials so pruned, with none above chance, that end this rule


@dataclass
class LiveTrial:
    """A trial that has not ended."""

    number: int  # Optuna's
    trial: optuna.Trial
    config: Config
    digest: str
    folder: Path
    job: Job
    epochs: list[Epoch] = field(default_factory=list)
    pruned: str = ""  # by what and when, once that is decided


class Coordinator:
    """The one process of a study that asks, prunes and tells.

    `entry` and `payload` say what a trial is: training, or the toy objective of a test. payload: makes the job's from
    a config's table and the trial's identity.
    """

    def __init__(
        self,
        study: Study,
        stored: StudyRecord,
        storage: BaseStorage,
        pool: WorkerPool,
        *,
        trials: int,
        payload: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
        entry: str = TRIAL,
        retry_failed: bool = False,
    ) -> None:
        self.study, self.stored, self.pool = study, stored, pool
        self.payload, self.entry = payload, entry
        self.trials, self.points = trials, space.points(study.tree, most=trials)  # None: more points than trials
        self.memory = MemoryStudy(storage, stored.number, study.name, study.pruner())
        self.running: dict[int, LiveTrial] = {}  # in the pool
        self.rungs = study.rungs()
        self.paused: dict[int, LiveTrial] = {}  # at a rung, without a worker
        self.waiting: dict[int, LiveTrial] = {}  # twins of a trial that is running or paused
        self.trained: dict[str, int] = {}  # digest -> the trial that was, or is being, trained for it
        self.seen: set[str] = set()  # digests
        self.asked = len(stored.trials)
        self.asking = ThreadPoolExecutor(1, "ask")
        self.next: Future[tuple[optuna.Trial, Config]] | None = None  # the proposal for trial `asked`, in memory alone
        self.failures: list[str] = []  # reasons since this coordinator began: the user may have fixed earlier ones
        self.useful = 0  # complete or pruned; one at chance too, since no error of every trial stops it
        self.complete = 0  # without twins
        self.chance, self.above, self.at_chance = study.chance(stored.data), False, 0  # trials above it, pruned at it
        self.kept: list[Trial] = []  # the best, whose weights are kept
        self.ended = {trial.number: trial for trial in stored.trials if trial.state != "running"}
        # The rule that ends the search; a running trial may yet be better.
        self.ending = study.ended_by(self.ended.values())
        for trial in stored.trials:
            self._compare(trial.reported.values())
            if trial.twin is None:
                self.rungs.add(trial.number, trial.reported)
            if trial.state != "running":
                self._count(trial)
                self.seen.add(trial.digest)
                if trial.state != "failed" and trial.twin is None:
                    self.trained.setdefault(trial.digest, trial.number)
        failed = {trial.digest: trial.params for trial in stored.of("failed") if trial.digest not in self.trained}
        self.again = deque(failed.values() if retry_failed else ())  # params to be asked for once more

    # --- the spine ----------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[SearchEvent]:
        """Runs the study to its number of trials, or until the pool is to stop.

        Raises WorldError for a hopeless study, and what every trial would meet: StorageError, DataError.
        """
        with self.asking:  # no ask outlives the search
            yield from self._adopt()
            while True:
                yield from self._ask()
                if self.pool.stopped:
                    return  # running and paused trials stay RUNNING, for the next coordinator to adopt
                if not (self.running or self._may_ask() or self._promotable() is not None):
                    yield from self._prune_paused()
                    return  # a proposal is dropped
                for event in self.pool.events():
                    yield from self._on(event)

    def _adopt(self) -> Iterator[SearchEvent]:
        """Takes over the trials of a coordinator that is gone, under their own numbers, from their last checkpoints."""
        for frozen in [trial for trial in self.memory.trials if not trial.state.is_finished()]:
            # A trial with its config has all its parameters, and some samplers count how often they are asked. Up to
            # 0.3.0 a trial was RUNNING before it had its config; no worker had it then.
            complete = "config" in frozen.user_attrs
            sampler = fixed_sampler(frozen.params) if complete else self.study.sampler(frozen.number)
            trial = self.memory.adopt(frozen.number, sampler)
            current = self._open(trial, self.study.sample(trial))
            current.pruned = frozen.user_attrs.get("pruned", "")
            # Epochs past the last reported one were never judged: they come again, from the checkpoint.
            current.epochs = list(self.stored.trials[current.number].epochs)
            if len(read_epochs(current.folder / EPOCHS)) > len(current.epochs):
                write_epochs(current.folder / EPOCHS, current.epochs)  # they may never come: its attempts may all fail
            attempt, lost = frozen.user_attrs.get("attempt", int(complete)), frozen.user_attrs.get("lost", 0)
            current.job = replace(current.job, attempt=attempt, lost=lost)
            yield from self._begin(current, adopted=complete)

    def _ask(self) -> Iterator[SearchEvent]:
        """Gives each free worker a trial: one that is to be promoted, else a new one while the study is not full; then
        asks for one more ahead.
        """
        while True:
            if self.pool.free and (number := self._promotable()) is not None:
                yield from self._promote(number)
                continue
            if not (self._may_ask() and (self.pool.free or self._ahead)):
                return
            if not (self.useful or self.rungs.highest) and len(self.failures) >= HOPELESS:
                if self.running:
                    return  # one of them may still succeed
                raise WorldError(
                    f"study {self.study.name!r}: {len(self.failures)} trials failed and none succeeded, "
                    f"the last with: {self.failures[-1]}"
                )
            if self.next is None:
                self.next = self.asking.submit(self._propose, self._sampler())
            if not self.pool.free:
                return
            if not wait([self.next], ASK_SECONDS if self.running else None).done:
                return  # epochs are judged meanwhile
            trial, config = self.next.result()
            assert trial.number == self.asked
            self.next = None
            self.asked += 1
            yield from self._begin(self._open(trial, config))

    def _sampler(self) -> BaseSampler:
        """That of the next trial. Repeated trials come after those that are fixed by their numbers, else they would
        take their places.
        """
        repeats = self.again and self.asked >= min(self.study.fixed, self.study.trials)
        return fixed_sampler(self.again.popleft()) if repeats else self.study.sampler(self.asked)

    def _propose(self, sampler: BaseSampler) -> tuple[optuna.Trial, Config]:
        """Asks for a trial and samples its parameters, in memory, in the thread of `asking`."""
        trial = self.memory.ask(sampler)
        return trial, self.study.sample(trial)

    @property
    def _ahead(self) -> bool:
        """Whether to ask although no worker is free. Not with one worker: its next proposal depends on the trial
        before.
        """
        return len(self.running) > 1 and not self.pool.stopping()

    def _on(self, event: Event) -> Iterator[SearchEvent]:
        current = self.running[int(event.job)]
        match event:
            case EpochDone(epoch=epoch):
                yield from self._judge(current, epoch)
            case Interrupted():
                yield from self._end(current, TrialState.PRUNED, reason=current.pruned)
            case Paused():
                self._pause(self.running.pop(current.number))
                yield TrialPaused(current.number, self._record(current.number))
            case Finished(result=result):
                yield from self._finish(current, result)
            case Failed(reason=reason):
                yield from self._end(current, TrialState.FAIL, reason=reason)
            case Retried(attempt=attempt, reason=reason, lost=lost):
                current.job = replace(current.job, attempt=attempt, lost=lost)
                current.trial.set_user_attr("attempt", attempt)
                if reason:  # else its worker was stopped, which is no fault of the trial
                    current.trial.set_user_attr("lost", lost)
                self.memory.write(current.number)
                if reason:
                    yield TrialRetried(current.number, f"{reason}; goes on from its last checkpoint")

    # --- one trial ----------------------------------------------------------------------------------------------------

    def _open(self, trial: optuna.Trial, config: Config) -> LiveTrial:
        """Completes the trial's config, and writes down what identifies it."""
        if config.train.seed is None:
            config = replace(config, train=replace(config.train, seed=self.study.seed(trial.number)))
        number, table = trial.number, config.to_table()
        folder = self.stored.folder / f"{number:04d}"
        job = Job(str(number), folder, self.entry, self.payload(table, f"{self.stored.uuid}/{number}"))
        current = LiveTrial(number, trial, config, config.digest(), folder, job)
        if "digest" not in trial.user_attrs:
            trial.set_user_attr("config", table)
            if number < len(self.study.known):
                trial.set_user_attr("first", self.study.known[number].origin)
            trial.set_user_attr("digest", current.digest)
        self.memory.write(number)
        write_whole(folder / "config.toml", self.study.replay(number, table).encode())
        return current

    def _begin(self, current: LiveTrial, adopted: bool = False) -> Iterator[SearchEvent]:
        """Submits the trial, unless an equal one makes that needless."""
        number = current.number
        self.seen.add(current.digest)
        first = self.trained.setdefault(current.digest, number)
        if first != number:
            if first in self.running or first in self.paused:
                self.waiting[number] = current
                if first in self.paused:
                    self.memory.pause(number, first)
            else:
                yield from self._follow(current, first)
        elif current.pruned:
            gather(current.folder, keep=False)
            yield from self._end(current, TrialState.PRUNED, reason=current.pruned)
        elif self._pauses(current):
            self._pause(current)
        else:
            yield from self._submit(current, "adopted" if adopted else "started")

    def _submit(self, current: LiveTrial, kind: Literal["started", "adopted", "promoted"]) -> Iterator[SearchEvent]:
        """Gives the trial to the pool, up to its next rung if it is paused there."""
        number, received = current.number, len(current.epochs)
        payload = {**current.job.payload, "weights_from": self._weights_from}
        job = replace(current.job, received=received, payload=payload)
        if (until := self.rungs.after(received)) is not None and not self._is_default(number):
            job = replace(job, payload={**job.payload, "until": until})
        self.running[number] = current
        attempt = self.pool.submit(job)
        if attempt > 1:
            current.trial.set_user_attr("attempt", attempt)
            self.memory.write(number)
        yield TrialStarted(number, self._record(number), kind)

    # --- trials at rungs ----------------------------------------------------------------------------------------------

    def _pauses(self, current: LiveTrial) -> bool:
        """Whether a trial is paused where it stands, by its reports alone: the attribute `paused` is for readers."""
        return len(current.epochs) in self.rungs.epochs and not self._is_default(current.number)

    def _pause(self, current: LiveTrial) -> None:
        """Keeps a trial that no worker has, and its twins, until it is promoted or the search ends."""
        assert self._pauses(current)
        self.paused[current.number] = current
        if self.memory.trial(current.number).user_attrs.get("paused") is None:  # promoted, but trained no epoch since
            current.trial.set_user_attr("paused", len(current.epochs))
            self.memory.write(current.number)
        for each in (current, *self._followers(current)):
            self.memory.pause(each.number, current.number)

    def _unpause(self, number: int) -> LiveTrial:
        """Takes a trial out of the paused ones."""
        current = self.paused.pop(number)
        for each in (current, *self._followers(current)):
            self.memory.unpause(each.number)
        return current

    def _promotable(self) -> int | None:
        """The paused trial that the next free worker continues; none once a rule has ended the search.

        After the last trial has begun, the best paused ones go on until as many are complete as `retrain` compares:
        of a few trials no rung promotes any.
        """
        if not self.paused or self.ending is not None:
            return None
        number = self.rungs.promotable(self.paused)
        if number is None and not self._may_ask() and self.complete + len(self.running) < TOP:
            return self.rungs.best(self.paused)
        return number

    def _promote(self, number: int) -> Iterator[SearchEvent]:
        current = self._unpause(number)
        current.trial.set_user_attr("paused", None)
        yield from self._submit(current, "promoted")

    def _prune_paused(self) -> Iterator[SearchEvent]:
        """Ends all paused trials, for good: the search is over."""
        for number in sorted(self.paused):
            current = self._unpause(number)
            gather(current.folder, keep=False)
            reason = f"{self._by_pruner} after epoch {len(current.epochs)}"
            yield from self._end(current, TrialState.PRUNED, reason=reason)

    # --- epochs and ends ----------------------------------------------------------------------------------------------

    def _judge(self, current: LiveTrial, epoch: Epoch) -> Iterator[SearchEvent]:
        """Takes an epoch down, and asks the pruner about it once."""
        current.epochs.append(epoch)
        write_epochs(current.folder / EPOCHS, current.epochs)
        if epoch.val_accuracy is not None:
            accuracy = round(epoch.val_accuracy, 6)
            current.trial.report(accuracy, epoch.index)
            if reason := self._prune(current, epoch.index, accuracy):
                current.pruned = f"{reason} after epoch {epoch.index}"
                current.trial.set_user_attr("pruned", current.pruned)  # its worker may take a while to stop
            elif self._pauses(current):
                current.trial.set_user_attr("paused", epoch.index)
            self.rungs.add(current.number, {epoch.index: accuracy})
            self.memory.write(current.number)
        yield TrialEpoch(current.number, epoch)
        if current.pruned:
            self.pool.stop(str(current.number))

    def _prune(self, current: LiveTrial, epoch: int, accuracy: float) -> str:
        """Why the trial is to be pruned; empty if it goes on.

        Once an epoch: successive halving marks its rung before it answers, so it would answer differently again. The
        study's default is never pruned, and no known configuration at chance.
        """
        halts = self.study.judges(current.config, epoch) and current.trial.should_prune()
        self._compare([accuracy])
        applies = self.above or self.at_chance < AT_CHANCE  # else the task may be hard, and takes all epochs
        if current.number < len(self.study.known):
            applies, halts = False, halts and not self._is_default(current.number)
        if applies and self.study.at_chance(current.config, epoch, accuracy, self.stored.data):
            return CHANCE
        return self._by_pruner if halts else ""

    @property
    def _by_pruner(self) -> str:
        return f"pruned by {self.study.search.pruner.tag}"

    def _is_default(self, number: int) -> bool:
        """Whether a trial is the study's default, which is neither pruned nor paused."""
        return self.study.default and number == 0

    def _compare(self, accuracies: Iterable[float]) -> None:
        """Notes whether a trial was above chance."""
        self.above = self.above or (self.chance is not None and any(value >= self.chance for value in accuracies))

    def _finish(self, current: LiveTrial, result: Result) -> Iterator[SearchEvent]:
        value = result.get("value")
        if not isinstance(value, float) or not math.isfinite(value):
            yield from self._end(current, TrialState.FAIL, reason=f"its value is {value}, not a finite number")
        else:
            yield from self._end(current, TrialState.COMPLETE, round(value, 6), result=result)
            if result.get("memory") and (text := self.pool.engine.pack(result["memory"])):
                yield Note(text)

    def _end(
        self, current: LiveTrial, state: TrialState, value: float | None = None, **attrs: Any
    ) -> Iterator[SearchEvent]:
        """`tell`, with attributes (reason, result, twin): the trial has ended."""
        number = current.number
        for name, attr in attrs.items():
            if attr is not None:
                current.trial.set_user_attr(name, attr)
        self.memory.tell(current.trial, value, state)
        self.running.pop(number, None)
        record = self._record(number)
        if state is TrialState.FAIL:
            self.failures.append(record.reason or "")
            del self.trained[current.digest]
        self._count(record)
        self.ended[number] = record
        self.ending = self.study.ended_by(self.ended.values())
        yield TrialEnded(number, record)
        if record.twin is None:
            for follower in self._followers(current):
                del self.waiting[follower.number]
                yield from self._begin(follower)

    def _followers(self, current: LiveTrial) -> list[LiveTrial]:
        """The twins that wait for a trial."""
        return [other for other in self.waiting.values() if other.digest == current.digest]

    def _follow(self, current: LiveTrial, first: int) -> Iterator[SearchEvent]:
        """Ends a trial as its twin ended: the same value, or the same reports and state, without training."""
        twin = self.ended[first]
        reported = self.memory.trial(current.number).intermediate_values
        for index in twin.reported.keys() - reported.keys():
            current.trial.report(twin.reported[index], index)
        write_epochs(current.folder / EPOCHS, twin.epochs)
        state = TrialState.COMPLETE if twin.state == "complete" else TrialState.PRUNED
        result = None if twin.result is None else replace(twin.result, files={}).to_json()
        yield from self._end(current, state, twin.value, reason=twin.reason, result=result, twin=first)

    # --- what is known of the study -----------------------------------------------------------------------------------

    def _record(self, number: int) -> Trial:
        return read_trial(self.memory.trial(number), self.stored.folder / f"{number:04d}")

    def _count(self, trial: Trial) -> None:
        """Counts a trial that ended, and drops the weights that are not among the best any more."""
        self.useful += trial.state in ("complete", "pruned")
        self.complete += trial.state == "complete" and trial.twin is None
        self.at_chance += trial.twin is None and (trial.reason or "").startswith(CHANCE)
        candidates = [*self.kept, trial]
        self.kept = ranked(candidates, twins=False)[: self.study.search.keep]
        for other in candidates:
            if other not in self.kept:  # a trial that fails, too: an earlier attempt may have come to its end
                drop_weights(other.folder)

    @property
    def _weights_from(self) -> float | None:
        """The least value of a trial that may come among the best, whose weights are kept; None: none are."""
        most = self.study.search.keep
        if len(self.kept) < most:
            return 0.0
        return self.kept[-1].value if most else None

    def _may_ask(self) -> bool:
        """Whether the study is not full; there may be no worker for it yet."""
        return self.ending is None and self.asked < self.trials and not (self.exhausted and not self.again)

    @property
    def exhausted(self) -> bool:
        """Whether every point of a finite space was asked for."""
        return self.points is not None and len(self.seen) >= len(self.points)


def drop_weights(folder: Path) -> None:
    """Removes the weights in a trial's folder."""
    for name in (WEIGHTS, SPEC):
        (folder / name).unlink(missing_ok=True)
