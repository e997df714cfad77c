"""From a finished search to one model: finalists with fresh seeds, the winner on all training data, the test part once.

Every job's folder records when it is done, so that the same command after a crash goes on. The result is kept as the
study's `final`, in HOME/studies/NAME/final/, and in MLflow's registry.
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w
from filelock import FileLock
from numpy.typing import NDArray

from searchfm import figures, stats
from searchfm.coordinator import TRIAL, drop_weights
from searchfm.engines import Engine
from searchfm.engines.local import LocalEngine
from searchfm.errors import StudyError, UserError, WorldError
from searchfm.home import Home, write_whole
from searchfm.jobs import EpochDone, Failed, Finished, JobSpec, Result, Retried, Started
from searchfm.pool import WorkerPool
from searchfm.records import (
    EPOCHS,
    WEIGHTS,
    Epoch,
    Final,
    FinalistFigures,
    FinalPlan,
    JobRecord,
    Predictions,
    StudyRecord,
    TestFigures,
    TestJob,
    TestRead,
    TestReads,
    TestResult,
    TrainResult,
    Trial,
    Validation,
    read_epochs,
    write_epochs,
)
from searchfm.search.files import reopen
from searchfm.search.storage import locked_study, open_storage, write_final
from searchfm.search.study import Study
from searchfm.tracking import publish
from searchfm.tuning import prepare, train_payload

FIT, TEST = "searchfm.learn.entries:fit", "searchfm.learn.entries:test"
TOP, SEEDS = 3, 3  # finalists, and fresh seeds of each, by default
FOLDER, READS = "final", "test-reads.json"
TRAINED, FITTED, TESTED = "result.json", "fit.json", "test.json"  # records in the folders of jobs


@dataclass(frozen=True)
class RetrainOptions:
    """Options of `retrain`; None means "as last time", else the default."""

    home: Home
    name: str
    top: int | None = None
    seeds: int | None = None
    trial: int | None = None
    epochs: int | None = None
    again: bool = False  # train everything again, with seeds that were never used
    promote: bool = False  # make the model the champion whatever the comparison says
    device: str = "auto"
    workers: int | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class Progress:
    """A progress event for the terminal."""

    kind: Literal["planned", "started", "epoch", "finished", "found", "failed", "retried", "note"]
    job: JobSpec | None = None
    epoch: Epoch | None = None
    value: float | None = None  # accuracy of a job that finished, or had finished before
    text: str = ""


Steps = Generator[Progress, None, Any]


def retrain(
    options: RetrainOptions, stopping: Callable[[], bool], engine: Callable[[Sequence[str]], Engine] = LocalEngine
) -> Generator[Progress, None, Final]:
    """Brings a study to its final model; yields progress, returns what is kept.

    Raises StudyError, DataError and other UserErrors before anything is begun, WorldError where every finalist or the
    final training fails, and KeyboardInterrupt once all jobs have left, if it is to stop.
    """
    began = time.monotonic()
    home = options.home
    with locked_study(home, options.name) as (study, check_lock):
        plan = make_plan(study, options)
        final = study.final
        exists = (study.folder / FOLDER / WEIGHTS).is_file()
        if final is None or final.plan != plan or not exists:
            if final is not None and exists:
                yield Progress("note", text=_why_again(final, plan))
            search = reopen(None, study, {})
            pool = WorkerPool(engine(["cpu"]), retries=search.search.retries, stopping=stopping, check_lock=check_lock)
            with closing(pool):
                _, devices = prepare(search, pool, options.data_dir, options.device, options.workers, study.data)
                pool.resize(devices)
                yield Progress("note", text=f"workers: {', '.join(f'{n} x {d}' for d, n in Counter(devices).items())}")
                work = _Retraining(home, study, search, plan, pool, len(devices), options.data_dir)
                selection = (yield from work.finalists()) if plan.contested else None
                final = yield from work.final(selection)
            final = replace(final, seconds=round(time.monotonic() - began, 3))
            _keep(home, study, final)
        if final.model is None or (options.promote and not final.model.champion):
            yield Progress("note", text="registering the model with MLflow")
            model = publish(home, study, final, study.folder / FOLDER, promote=options.promote)
            final = replace(final, model=model)
            _keep(home, study, final)
    return final


# --- what is trained --------------------------------------------------------------------------------------------------


def make_plan(study: StudyRecord, options: RetrainOptions) -> FinalPlan:
    """What is to be trained for a study as it stands. Raises StudyError, UserError."""
    contest = options.top is not None or options.seeds is not None
    if options.trial is not None and contest:
        raise UserError(f"--trial {options.trial}: names the winner; --top and --seeds are for finalists")
    before = study.final.plan if study.final else FinalPlan((), TOP, SEEDS, None, None, 0)
    trial = options.trial if options.trial is not None or contest else before.trial
    top, seeds = options.top or before.top, options.seeds or before.seeds
    ranked = study.ranked(twins=False)
    if not ranked:
        raise StudyError(f"study {study.name!r}: has no complete trial; go on with `searchfm tune {study.name}`")
    if trial is not None:
        complete = sorted(each.number for each in ranked)
        if trial not in complete:
            raise StudyError(f"study {study.name!r}: trial {trial} is {_state(study, trial)}; may be {_some(complete)}")
        trials: tuple[int, ...] = (trial,)
    elif running := study.of("running"):
        raise StudyError(
            f"study {study.name!r}: is unfinished, {len(running)} of its trials still run; "
            f"go on with `searchfm tune {study.name}`, or choose a trial with --trial"
        )
    else:
        trials = tuple(each.number for each in ranked[:top])
    epochs = options.epochs if options.epochs is not None else before.epochs
    return FinalPlan(trials, top, seeds, trial, epochs, before.round + options.again)


def _why_again(final: Final, plan: FinalPlan) -> str:
    """Why an earlier final model does not stand."""
    before = final.plan
    if plan.round != before.round:
        return "everything is trained again, with seeds that were not used before"
    if plan.trials != before.trials and plan.trial is None and before.trial is None:
        return f"the finalists are trials {_some(plan.trials)} now, and were {_some(before.trials)}"
    return f"trial {final.winner} won under other settings; what they change is trained again"


def _state(study: StudyRecord, number: int) -> str:
    for trial in study.trials:
        if trial.number == number:
            return f"a twin of trial {trial.twin}" if trial.twin is not None else trial.state
    return "unknown"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "")


# --- which finalist wins ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Finalist:
    """A trial of the search, trained again with fresh seeds on the search's own data and epochs."""

    trial: int
    value: float  # as searched
    seeds: tuple[int, ...]
    correct: NDArray[np.bool_]  # (S, N): whether each seed is correct on each image of the validation part
    parameters: int
    flops: int  # of one image's forward pass
    seconds: float  # of a training, on average

    @property
    def mean(self) -> float:
        """The mean accuracy over the seeds."""
        return float(self.correct.mean())

    @property
    def figures(self) -> FinalistFigures:
        """What is kept of it."""
        values = tuple(float(value) for value in self.correct.mean(axis=1))
        return FinalistFigures(
            self.trial, self.value, values, self.mean, self.seconds, self.seeds, self.parameters, self.flops
        )


@dataclass(frozen=True)
class Selection:
    """The winner, and how certain that is."""

    finalists: tuple[Finalist, ...]
    winner: Finalist
    tie: tuple[int, ...]  # trials that cannot be distinguished from the best mean, it included; empty if all can
    validation: Validation

    @property
    def optimism(self) -> float:
        """The winner's value as searched, less its mean over fresh seeds."""
        return self.winner.value - self.winner.mean


def choose(finalists: Sequence[Finalist]) -> Selection:
    """The best mean wins; where others cannot be distinguished from it, the one of minimum cost.

    Distinguished by `stats.paired` on the validation part's images, each against the best mean, corrected for their
    number (Holm). Cost means FLOPs, then parameters.
    """
    best = min(finalists, key=lambda one: (-one.mean, one.flops, one.parameters, one.trial))
    others = [one for one in finalists if one is not best]
    dispersion = stats.dispersion([one.correct for one in finalists])
    chances = stats.holm([stats.paired(best.correct, one.correct, dispersion) for one in others])
    equal = [best, *(one for one, p in zip(others, chances, strict=True) if p > 1 - stats.LEVEL)]
    winner = min(equal, key=lambda one: (one.flops, one.parameters, -one.mean, one.trial))
    low, high = stats.further_seed(winner.correct, dispersion) if dispersion else (None, None)
    return Selection(
        finalists=tuple(finalists),
        winner=winner,
        tie=tuple(sorted(one.trial for one in equal)) if len(equal) > 1 else (),
        validation=Validation(
            accuracy=winner.mean,
            low=low,
            high=high,
            spread=math.sqrt(dispersion.factor * stats.flips(winner.correct)) if dispersion else None,
            n=winner.correct.shape[1],
        ),
    )


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A job of `retrain`, and where its result is kept."""

    spec: JobSpec
    identity: str  # equal identities are the same work
    record: str  # name of a file in the job's folder

    @property
    def folder(self) -> Path:
        """The job's folder."""
        assert self.spec.folder is not None
        return self.spec.folder

    def result(self) -> Result | None:
        """What the job returned, if it was done before."""
        path = self.folder / self.record
        try:
            record = JobRecord.from_json(json.loads(path.read_text()), str(path))
        except (OSError, ValueError):
            return None
        return record.result if record.identity == self.identity else None

    def finish(self, result: Result) -> None:
        """Keeps the result."""
        write_json(self.folder / self.record, JobRecord(self.identity, result).to_json())


def run_tasks(
    pool: WorkerPool, tasks: Iterable[Task]
) -> Generator[Progress, None, tuple[dict[str, Result], dict[str, str]]]:
    """Brings tasks to their ends; those that are done are known again. Returns results and reasons of failures."""
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    waiting: dict[str, Task] = {}
    for task in tasks:
        result = task.result()
        if result is None:
            waiting[task.spec.id] = task
        else:
            results[task.spec.id] = result
        yield Progress("planned" if result is None else "found", task.spec, value=_accuracy(result))
    epochs: dict[str, list[Epoch]] = {job: [] for job in waiting}
    for event in pool.run_all([task.spec for task in waiting.values()]):
        task = waiting[event.job]
        match event:
            case Started():
                yield Progress("started", task.spec)
            case EpochDone(epoch=epoch):
                epochs[event.job].append(epoch)
                write_epochs(task.folder / EPOCHS, epochs[event.job])
                yield Progress("epoch", task.spec, epoch)
            case Retried(reason=reason) if reason:
                yield Progress("retried", task.spec, text=reason)
            case Failed(reason=reason):
                failures[event.job] = reason
                yield Progress("failed", task.spec, text=reason)
            case Finished(result=result):
                task.finish(result)
                results[event.job] = result
                yield Progress("finished", task.spec, value=_accuracy(result))
    return results, failures


@dataclass(frozen=True)
class _Retraining:
    home: Home
    study: StudyRecord
    search: Study
    plan: FinalPlan
    pool: WorkerPool
    workers: int
    data_dir: Path | None

    def finalists(self) -> Generator[Progress, None, Selection]:
        """Trains every finalist with every fresh seed, and chooses the winner."""
        count = self.plan.seeds
        seeds = {number: [self._seed(number, k) for k in range(1, count + 1)] for number in self.plan.trials}
        tasks = {
            number: [self._finalist(number, seed, f"seed {k} of {count}") for k, seed in enumerate(mine, 1)]
            for number, mine in seeds.items()
        }
        results, failures = yield from run_tasks(self.pool, [task for mine in tasks.values() for task in mine])
        finalists, reason = [], ""
        for number, mine in tasks.items():
            for task in mine:
                drop_weights(task.folder)  # the predictions are all that is needed
            failed = [failures[task.spec.id] for task in mine if task.spec.id in failures]
            if failed:
                reason = failed[0]
                yield Progress("note", text=f"trial {number} is no finalist: with a fresh seed, {reason}")
                continue
            trained = [TrainResult.from_json(results[task.spec.id], str(task.folder)) for task in mine]
            predictions = [Predictions.read(task.folder) for task in mine]
            finalists.append(
                Finalist(
                    trial=number,
                    value=self._trial(number).value or 0.0,
                    seeds=tuple(seeds[number]),
                    correct=np.stack([each.correct for each in predictions if each is not None]),
                    parameters=trained[0].parameters,
                    flops=trained[0].flops,
                    seconds=float(np.mean([result.seconds for result in trained])),
                )
            )
        if not finalists:
            raise WorldError(f"study {self.study.name!r}: every finalist failed, the last with: {reason}")
        return choose(finalists)

    def final(self, selection: Selection | None) -> Generator[Progress, None, Final]:
        """Trains the winner on all training data, then reads the test part with it, and writes everything down."""
        number = self.plan.trials[0] if selection is None else selection.winner.trial
        trial, seed = self._trial(number), self._seed(number, 0)
        config = _with_seed(trial.config, seed, self.plan.epochs)
        done, partial = self.study.folder / FOLDER, self.study.folder / f"{FOLDER}-{number:04d}-{seed}"
        identity = f"{self.study.uuid}/{number}/final/{seed}/{config['train']['epochs']}"
        fit = self._task("final training", identity, done, FIT, config, FITTED)
        if fit.result() is None:
            fit = self._task("final training", identity, partial, FIT, config, FITTED)
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "config.toml").write_text(_header(self.study, number) + tomli_w.dumps(config))
        fitted = TrainResult.from_json((yield from self._one(fit)), str(fit.folder / FITTED))
        payload = TestJob(str(fit.folder), fitted.files, str(self.data_dir) if self.data_dir else None)
        test = Task(
            JobSpec("test", fit.folder, TEST, payload.to_json(), label="test"),
            f"{identity}/{fitted.files[WEIGHTS]}",
            TESTED,
        )
        reads = count_read(self.home, self.study, number, test.identity)
        tested = TestResult.from_json((yield from self._one(test)), str(fit.folder / TESTED))
        epochs = read_epochs(fit.folder / EPOCHS)
        _draw(fit.folder, epochs, self.study.data.classes)
        if fit.folder == partial:
            _install(partial, done)
        return self._record(trial, selection, epochs, fitted, tested, reads)

    def _record(
        self,
        trial: Trial,
        selection: Selection | None,
        epochs: Sequence[Epoch],
        fitted: TrainResult,
        tested: TestResult,
        reads: int,
    ) -> Final:
        """What is kept of the final training; `model` and `seconds` are still to come."""
        low, high = stats.Accuracy(tested.correct, tested.n).interval
        searched = Validation(trial.value or 0.0, None, None, None, self.study.data.validation)
        seconds = sum(epoch.seconds for epoch in epochs)
        return Final(
            study=self.study.name,
            plan=self.plan,
            finalists=tuple(one.figures for one in selection.finalists) if selection else (),
            tie=selection.tie if selection else (),
            winner=trial.number,
            optimism=selection.optimism if selection else None,
            validation=selection.validation if selection else searched,
            test=TestFigures(tested.accuracy, low, high, tested.n, reads, tested.fingerprint),
            per_class=tested.per_class,
            model=None,
            seconds=None,
            seconds_per_epoch=seconds / len(epochs),
            training_seconds=seconds,
            parameters=fitted.parameters,
            flops=fitted.flops,
            epochs=len(epochs),
            fingerprint=self.study.data.fingerprint,
            time=time.time(),
            params=dict(trial.params),
            weights=fitted.files[WEIGHTS],
        )

    def _one(self, task: Task) -> Generator[Progress, None, Result]:
        results, failures = yield from run_tasks(self.pool, [task])
        if failures:
            raise WorldError(f"study {self.study.name!r}: {task.spec.label}: {failures[task.spec.id]}")
        return results[task.spec.id]

    def _finalist(self, number: int, seed: int, which: str) -> Task:
        config = _with_seed(self._trial(number).config, seed)
        folder = self.study.folder / "finalists" / f"{number:04d}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(self.search.replay(number, config))
        identity = f"{self.study.uuid}/{number}/{seed}"
        return self._task(f"trial {number}, {which}", identity, folder, TRIAL, config, TRAINED)

    def _task(
        self, label: str, identity: str, folder: Path, entry: str, config: Mapping[str, Any], record: str
    ) -> Task:
        threads = self.workers if entry == FIT else None  # the final training runs alone
        payload = train_payload(self.study.data.fingerprint, self.search, self.data_dir, threads)(config, identity)
        return Task(JobSpec(label, folder, entry, payload, label, config["train"]["epochs"]), identity, record)

    def _trial(self, number: int) -> Trial:
        return next(trial for trial in self.study.trials if trial.number == number)

    def _seed(self, number: int, k: int) -> int:
        """A 31-bit seed that the search did not use: fresh seed k of a finalist, from 1, or (0) of the final model."""
        words = hashlib.sha256(f"{self.search.search.seed}/{number}/fresh/{self.plan.round}/{k}".encode()).digest()
        return int.from_bytes(words[:4], "big") >> 1


def _accuracy(result: Result | None) -> float | None:
    return None if result is None else result.get("value", result.get("accuracy"))


def _with_seed(config: Mapping[str, Any], seed: int, epochs: int | None = None) -> dict[str, Any]:
    """A trial's config with another seed, and other epochs if there are some."""
    train = {**config["train"], "seed": seed}
    return {**config, "train": train | ({} if epochs is None else {"epochs": epochs})}


def _header(study: StudyRecord, number: int) -> str:
    return (
        f"# The final training of study {study.name}, after its trial {number}: on all training and validation data,\n"
        "# whatever `subset` and `validation` say here.\n"
    )


# --- what is kept -----------------------------------------------------------------------------------------------------


def count_read(home: Home, study: StudyRecord, winner: int, model: str) -> int:
    """Counts a reading of the test part before it happens; returns how many there have been, by all studies of the home
    on the same data. A model is counted once, however often a crash makes it read again.
    """
    path = home.path / READS
    with FileLock(path.with_suffix(".lock")):
        try:
            stored = TestReads.from_json(json.loads(path.read_text()), str(path))
        except FileNotFoundError:
            stored = TestReads()
        mine = stored.reads.get(study.data.fingerprint, ())
        if not any(read.model == model for read in mine):
            mine = (*mine, TestRead(study.name, winner, model, time.time()))
            write_json(path, TestReads({**stored.reads, study.data.fingerprint: mine}).to_json())
        return len(mine)


def _draw(folder: Path, epochs: Sequence[Epoch], names: Sequence[str]) -> None:
    """Draws the final model's curves, and its confusion matrix on the test part, into its folder."""
    predictions = Predictions.read(folder)
    assert predictions is not None
    write_whole(folder / "curves.png", figures.png(figures.curves(epochs)))
    write_whole(folder / "confusion.png", figures.png(figures.confusion(predictions, names)))


def _install(partial: Path, target: Path) -> None:
    """Puts a finished model in place of an earlier one, and removes what other plans began and left beside it."""
    old = target.with_name(f"{FOLDER}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    for path in target.parent.glob(f"{FOLDER}-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _keep(home: Home, study: StudyRecord, final: Final) -> None:
    """Writes the record into the model's folder, then into the study, where it counts."""
    write_json(study.folder / FOLDER / "final.json", final.to_json())
    write_final(open_storage(home), study.number, final)


def write_json(path: Path, values: Any) -> None:
    """Writes plain values as JSON, whole or not at all. Raises StorageError."""
    write_whole(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
