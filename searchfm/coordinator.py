"""The bridge: study x engine x tracker. One process a study asks, prunes, tells and records; nobody else does.

`tell` is the commit point of a trial. What stands before it (checkpoints, reports, artifacts in the trial's folder) is
found again by the next coordinator, which adopts every trial that is RUNNING under its own number; what stands after
it (MLflow, the dashboard's notes) is a projection that can be made again at any time.
"""

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from searchfm import errors
from searchfm.config import Config
from searchfm.engines import Engine
from searchfm.errors import WorldError
from searchfm.job import Epoch, EpochDone, Event, Failed, Finished, Job, Left, Lost, Result
from searchfm.search.history import StudyRow, TrialRow, kept, read_epochs, trial_row, write_epochs
from searchfm.search.study import GridWalk, Study

TRIAL = "searchfm.learn.entries:trial"
LEAVE_SECONDS = 25.0  # what workers are given to leave their batch, before they are ended
HOPELESS = 3  # so many failed trials, and none that succeeded, end a search
LOCK_SECONDS = 5.0  # between two looks at the lock
WEIGHTS = ("weights.safetensors", "model.json")


class Tracker(Protocol):
    """Who follows what the coordinator decides. Every call but `close` returns at once."""

    def started(self, row: TrialRow) -> None: ...  # noqa: D102
    def epoch(self, number: int, epoch: Epoch) -> None: ...  # noqa: D102
    def ended(self, row: TrialRow) -> None: ...  # noqa: D102
    def reconcile(self, study: StudyRow) -> None: ...  # noqa: D102
    def keep(self, rows: Sequence[TrialRow]) -> None: ...  # noqa: D102
    def close(self, study: StudyRow, timeout: float) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class News:
    """Something a person who watches wants to know."""

    kind: Literal["started", "adopted", "epoch", "ended", "lost"]
    trial: int
    row: TrialRow | None = None  # of a trial that started or ended
    epoch: Epoch | None = None
    text: str = ""


@dataclass
class Live:
    """A trial on its way."""

    trial: optuna.Trial
    config: Config
    digest: str
    folder: Path
    attempt: int = 1
    lost: int = 0  # workers that died under it
    epochs: list[Epoch] = field(default_factory=list)
    reported: int = 0  # the last epoch that Optuna knows
    pruned: str = ""  # by whom and when, once that is decided; whatever the job still says is dropped


class Coordinator:
    """Asks Optuna for trials, gives them to workers, judges every epoch once, and tells Optuna how they ended.

    `entry` and `payload` say what a trial is; a test's toy objective serves as well as training does.
    """

    def __init__(
        self,
        study: Study,
        stored: StudyRow,
        storage: BaseStorage,
        engine: Engine,
        tracker: Tracker,
        *,
        trials: int,
        retry_failed: bool = False,
        entry: str = TRIAL,
        payload: Mapping[str, Any] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:
        self.study, self.stored, self.storage = study, stored, storage
        self.engine, self.tracker, self.entry, self.payload = engine, tracker, entry, payload or {}
        self.stopping, self.check_lock = stopping, check_lock
        self.trials, self.size = trials, study.size(most=trials)
        self.optuna = optuna.load_study(study_name=study.name, storage=storage, pruner=study.pruner())
        self.live: dict[int, Live] = {}  # on a worker, or ready for one
        self.ready: deque[Live] = deque()
        self.waiting: dict[int, Live] = {}  # twins of a trial that is live
        self.trained: dict[str, int] = {}  # digest -> the trial that was, or is being, trained for it
        self.seen: set[str] = set()
        self.asked = 0
        self.failures: list[str] = []  # why, since this coordinator began: what was wrong before may be mended
        self.useful = 0  # complete or pruned
        self.complete: list[TrialRow] = []  # trials that may have weights in their folder
        for row in stored.trials:
            if row.state != "running":
                self._count(row)
                self.seen.add(row.digest)
                if row.state != "failed" and row.twin is None:
                    self.trained.setdefault(row.digest, row.number)
        failed = {row.digest: row.params for row in stored.of("failed") if row.digest not in self.trained}
        self.again = deque(failed.values() if retry_failed else ())  # configs to be asked for once more

    # --- the spine ----------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[News]:
        """Runs the study to its number of trials, or until told to stop.

        Raises WorldError where it is hopeless, and what every trial would meet: StorageError, DataError.
        """
        self._trim()
        yield from self._adopt()
        told: float | None = None  # when we asked everybody to leave
        looked = time.monotonic()
        while True:
            if not self.stopping():
                yield from self._ask()
            elif told is None:
                told = time.monotonic()
                for number in self.live:
                    self.engine.stop(str(number))
            if not self.live or (told and (not self.engine.busy or time.monotonic() > told + LEAVE_SECONDS)):
                return  # what is left is RUNNING, for the next coordinator to adopt
            event = self.engine.next_event(timeout=0.2)
            if event is not None:
                yield from self._on(event)
            if time.monotonic() > looked + LOCK_SECONDS:
                self.check_lock()
                looked = time.monotonic()

    def _adopt(self) -> Iterator[News]:
        """Takes over the trials of a coordinator that is gone, each under its own number, from its last checkpoint."""
        trials = self.optuna.get_trials(deepcopy=False)  # also what lets `optuna.Trial` suggest for an old trial
        self.asked = len(trials)
        for frozen in [trial for trial in trials if not trial.state.is_finished()]:
            # A trial with its config has all its parameters, and some samplers count how often they are asked.
            known = "config" in frozen.user_attrs
            self.optuna.sampler = GridWalk([frozen.params]) if known else self.study.sampler(frozen.number)
            live = self._open(optuna.Trial(self.optuna, frozen._trial_id))
            live.pruned = frozen.user_attrs.get("pruned", "")
            live.attempt = frozen.user_attrs.get("attempt", 1) + 1
            live.lost = frozen.user_attrs.get("lost", 0)
            live.reported = max(frozen.intermediate_values, default=0)
            # Epochs past the last reported one were never judged: they come again, from the checkpoint.
            live.epochs = [epoch for epoch in read_epochs(live.folder / "epochs.csv") if epoch.index <= live.reported]
            yield from self._begin(live, adopted=True)

    def _ask(self) -> Iterator[News]:
        """Gives the free workers what waits for one, then new trials, while the study is not full."""
        while self.engine.free > 0 and not self.stopping():
            if self.ready:
                self._submit(self.ready.popleft())
            elif self.asked >= self.trials or (self.exhausted and not self.again):
                return
            elif self.useful == 0 and len(self.failures) >= HOPELESS:
                if self.live:
                    return  # one of those under way may still succeed
                raise WorldError(
                    f"study {self.study.name!r}: {len(self.failures)} trials failed and none succeeded, "
                    f"the last with: {self.failures[-1]}"
                )
            else:
                again = GridWalk([self.again.popleft()]) if self.again else None
                self.optuna.sampler = again or self.study.sampler(self.asked)
                trial = self.optuna.ask()
                assert trial.number == self.asked, "somebody else asks in this study"
                self.asked += 1
                yield from self._begin(self._open(trial))

    def _on(self, event: Event) -> Iterator[News]:
        live = self.live.get(int(event.job))
        if live is None or live.attempt != event.attempt:
            return  # from an attempt that was given up
        match event:
            case EpochDone(epoch=epoch):
                yield from self._judge(live, epoch)
            case _ if live.pruned:
                yield from self._end(live, TrialState.PRUNED, reason=live.pruned)
            case Finished(result=result):
                yield from self._finish(live, result)
            case Failed(kind="DataError" | "StorageError" as kind, reason=reason):
                raise getattr(errors, kind)(reason)  # every other trial would meet it too; this one stays RUNNING
            case Failed(reason=reason):
                yield from self._end(live, TrialState.FAIL, reason=reason)
            case Left():
                self._again(live)  # its worker was told to go, which is no fault of the trial
            case Lost(reason=reason):
                yield from self._lose(live, reason)
            case _:
                raise AssertionError(event)

    # --- one trial ----------------------------------------------------------------------------------------------------

    def _open(self, trial: optuna.Trial) -> Live:
        """Reads the trial's config, and writes down what identifies it."""
        config = self.study.sample(trial)
        if config.train.seed is None:
            config = replace(config, train=replace(config.train, seed=self.study.seed(trial.number)))
        live = Live(trial, config, config.digest(), self.stored.folder / f"{trial.number:04d}")
        if "digest" not in trial.user_attrs:
            trial.set_user_attr("config", config.to_table())
            trial.set_user_attr("digest", live.digest)
        live.folder.mkdir(parents=True, exist_ok=True)
        (live.folder / "config.toml").write_text(self.study.replay(trial.number, config.to_table()))
        return live

    def _begin(self, live: Live, adopted: bool = False) -> Iterator[News]:
        """Gives the trial to a worker, unless an equal one makes that needless."""
        number = live.trial.number
        self.seen.add(live.digest)
        first = self.trained.setdefault(live.digest, number)
        if first != number:
            if first in self.live:
                self.waiting[number] = live
            else:
                yield from self._follow(live, first)
            return
        if live.pruned:
            yield from self._end(live, TrialState.PRUNED, reason=live.pruned)
            return
        self.tracker.started(self._row(number))
        yield News("adopted" if adopted else "started", number, self._row(number))
        self.live[number] = live
        self.ready.append(live)

    def _submit(self, live: Live) -> None:
        if live.attempt > 1:
            # Before the worker writes: an attempt's number is never used twice, by whichever coordinator.
            live.trial.set_user_attr("attempt", live.attempt)
        identity = f"{self.stored.uuid}/{live.trial.number}"
        payload = {"config": live.config.to_table(), "identity": identity, **self.payload}
        self.engine.submit(Job(str(live.trial.number), live.attempt, live.folder, self.entry, payload))

    def _judge(self, live: Live, epoch: Epoch) -> Iterator[News]:
        """Takes an epoch down once, however often it comes, and asks the pruner about it once."""
        number = live.trial.number
        if live.pruned or epoch.index <= len(live.epochs):
            return  # after the decision, or trained again after a checkpoint
        assert epoch.index == len(live.epochs) + 1, f"trial {number}: epoch {epoch.index} after {len(live.epochs)}"
        live.epochs.append(epoch)
        write_epochs(live.folder / "epochs.csv", live.epochs)
        if epoch.index > live.reported and epoch.val_accuracy is not None:
            live.trial.report(round(epoch.val_accuracy, 6), epoch.index)
            live.reported = epoch.index
            # Successive halving marks its rung before it answers: a step judged twice would answer differently.
            if epoch.index < live.config.train.epochs and live.trial.should_prune():
                live.pruned = f"pruned by {self.study.search.pruner.tag} after epoch {epoch.index}"
                live.trial.set_user_attr("pruned", live.pruned)  # it may take its worker a while to leave
        self.tracker.epoch(number, epoch)
        yield News("epoch", number, epoch=epoch)
        if live.pruned:
            self.engine.stop(str(number))

    def _finish(self, live: Live, result: Result) -> Iterator[News]:
        value = result.get("value")
        if not isinstance(value, float) or not math.isfinite(value):
            yield from self._end(live, TrialState.FAIL, reason=f"its value is {value}, not a finite number")
        else:
            yield from self._end(live, TrialState.COMPLETE, value=round(value, 6), result=result)

    def _lose(self, live: Live, reason: str) -> Iterator[News]:
        live.lost += 1
        live.trial.set_user_attr("lost", live.lost)
        if live.lost > self.study.search.retries:
            yield from self._end(live, TrialState.FAIL, reason=f"{reason}, {live.lost} times")
        else:
            yield News("lost", live.trial.number, text=f"{reason}; goes on from its last checkpoint")
            self._again(live)

    def _again(self, live: Live) -> None:
        """The same trial on another worker, from its last checkpoint."""
        live.attempt += 1
        self.ready.append(live)

    def _end(
        self,
        live: Live,
        state: TrialState,
        *,
        value: float | None = None,
        reason: str | None = None,
        result: Result | None = None,
        twin: int | None = None,
    ) -> Iterator[News]:
        """Artifacts, then attributes, then `tell`: the trial has ended. MLflow follows."""
        number = live.trial.number
        gather(live.folder, keep=state is TrialState.COMPLETE)
        for name, attr in (("reason", reason), ("result", result), ("twin", twin)):
            if attr is not None:
                live.trial.set_user_attr(name, attr)
        self.optuna.tell(live.trial, value, state)
        self.live.pop(number, None)
        row = self._row(number)
        self._count(row)
        if state is TrialState.FAIL:
            self.failures.append(reason or "")
            del self.trained[live.digest]
        self._trim()
        self.tracker.ended(row)
        yield News("ended", number, row, text=reason or "")
        if twin is None:
            for follower in [one for one in self.waiting.values() if one.digest == live.digest]:
                del self.waiting[follower.trial.number]
                yield from self._begin(follower)

    def _follow(self, live: Live, first: int) -> Iterator[News]:
        """Ends a trial as its twin ended: the same value, or the same reports and state, without training."""
        twin = self._row(first)
        self.tracker.started(self._row(live.trial.number))
        for index, value in twin.reported.items():
            if index > live.reported:
                live.trial.report(value, index)
        write_epochs(live.folder / "epochs.csv", twin.epochs)
        state = TrialState.COMPLETE if twin.state == "complete" else TrialState.PRUNED
        result = {name: entry for name, entry in twin.result.items() if name != "files"}
        yield from self._end(live, state, value=twin.value, reason=twin.reason, result=result, twin=first)

    # --- books --------------------------------------------------------------------------------------------------------

    def _row(self, number: int) -> TrialRow:
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.stored.number, number)
        return trial_row(self.storage.get_trial(trial_id), self.stored.folder / f"{number:04d}")

    def _count(self, row: TrialRow) -> None:
        self.useful += row.state in ("complete", "pruned")
        if row.state == "complete":
            self.complete.append(row)

    def _trim(self) -> None:
        """Drops the weights of all but the best trials."""
        best = kept(self.complete, self.study.search.keep)
        numbers = {row.number for row in best}
        for row in self.complete:
            for name in WEIGHTS if row.number not in numbers else ():
                (row.folder / name).unlink(missing_ok=True)
        self.complete = best

    @property
    def exhausted(self) -> bool:
        """Whether every point of a finite space was asked for."""
        return self.size is not None and len(self.seen) >= self.size


def gather(folder: Path, *, keep: bool) -> None:
    """Moves what the attempts wrote up into the trial's folder: all logs, and what the last attempt left if `keep`."""
    attempts = sorted(folder.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))
    with (folder / "log.txt").open("a") as log:
        for attempt in attempts:
            if (attempt / "log.txt").is_file():
                log.write((attempt / "log.txt").read_text(errors="replace"))
    for attempt in attempts[-1:]:
        for path in attempt.iterdir() if keep else ():
            if path.name != "log.txt" and path.is_file():
                path.replace(folder / path.name)
    for attempt in attempts:
        shutil.rmtree(attempt, ignore_errors=True)
