"""From a finished search to one model: finalists with fresh seeds, the winner on all training data, the test part once.

Every job's folder records when it is done, so that the same command after a crash goes on. The result is kept as the
study's `final`, in HOME/studies/NAME/final/, and in MLflow's registry.
"""

import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from filelock import FileLock
from numpy.typing import NDArray

from searchfm import figures, stats
from searchfm.coordinator import TRIAL
from searchfm.engines import Engine
from searchfm.engines.local import LocalEngine
from searchfm.errors import NewerError, StorageError, StudyError, UserError, WorldError
from searchfm.events import JobEnded, JobEpoch, JobEvent, JobPlanned, JobRetried, JobStarted, Note, Phase, StudyFound
from searchfm.forecast import SEEDS, TOP, final_threads, fitting_contest
from searchfm.format import plural, seconds, state
from searchfm.home import Home, flush, write_json, write_whole
from searchfm.jobs import EpochDone, Failed, Finished, Job, Result, Retried, Started
from searchfm.pool import WorkerPool
from searchfm.records import (
    EPOCHS,
    EXPORTED,
    FINAL,
    FITTED,
    PROGRAM,
    READS,
    TESTED,
    TRAINED,
    WEIGHTS,
    Epoch,
    ExportJob,
    ExportResult,
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
    Validation,
    read_epochs,
    write_epochs,
)
from searchfm.search.files import reopen
from searchfm.search.lock import Lock
from searchfm.search.storage import locked_study, open_storage, write_record
from searchfm.search.study import Study
from searchfm.tracking.registry import Program, preload, publish
from searchfm.tuning import prepare, train_payload

FIT, TEST, EXPORT = (f"searchfm.learn.entries:{name}" for name in ("fit", "test", "export"))


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
    data_dir: Path | None = None
    allow_code: bool = False  # run the user's code that makes the models


def retrain(
    options: RetrainOptions, stopping: Callable[[], bool], engine: Callable[[], Engine] = LocalEngine
) -> Generator[StudyFound | Phase | Note | JobEvent, None, Final]:
    """Brings a study to its final model; yields progress, returns what is kept.

    Raises StudyError, DataError and other UserErrors before anything is begun, WorldError where every finalist or the
    final training fails, and KeyboardInterrupt once all jobs have left, if it is to stop.
    """
    began = time.monotonic()
    home = options.home
    with locked_study(home, options.name, stopping) as (study, lock):
        yield StudyFound(study.name, study.question, str(study.resolved["data"]["name"]), resumed=True)
        storage = open_storage(home, stopping=stopping, check_lock=lock.check)
        save = partial(write_record, storage, study.number)
        plan = make_plan(study, options)
        if (running := study.of("running")) and plan.trial is None:
            left = f"{plural(len(running), 'trial')} of a stopped search left out"
            yield Note(f"{left}; searchfm tune {study.name} continues the search")
        final = study.final
        if final is None or final.plan != plan or final.model is None:
            preload()
        exists = (study.final_folder / WEIGHTS).is_file()
        if final is None or final.plan != plan or not exists:
            if final is not None and exists:
                yield Note(_why_again(final, plan))
            search = reopen(None, study, {})
            search.check_code(options.allow_code)
            with _workers(engine, stopping, lock, search) as pool:
                _, _, devices = yield from prepare(search, pool, options.data_dir, study.data)
                yield Note(f"workers: {', '.join(f'{n} x {d}' for d, n in Counter(devices).items())}")
                work = _Retraining(home, study, search, plan, pool, len(devices), options.data_dir)
                final = yield from work.final((yield from work.select()))
                final = replace(final, seconds=round(time.monotonic() - began, 3))
                _keep(study, final, save)
                yield Phase("exporting the model")
                export(pool, study, final)
        if final.model is None or (options.promote and not final.model.champion):
            yield Phase("registering the model with MLflow")
            program = partial(_program, study, final, options, partial(_workers, engine, stopping, lock))
            model = publish(home, study, final, study.final_folder, program, promote=options.promote)
            final = replace(final, model=model)
            _keep(study, final, save)
            for name in (PROGRAM, EXPORTED):  # MLflow has it
                (study.final_folder / name).unlink(missing_ok=True)
    return final


def retrain_within(
    left: float,
    options: RetrainOptions,
    study: StudyRecord,
    workers: int,
    stopping: Callable[[], bool],
    engine: Callable[[], Engine] = LocalEngine,
) -> Generator[StudyFound | Phase | Note | JobEvent, None, Final]:
    """As `retrain`, with as many finalists and fresh seeds as fit into the `left` seconds. Nothing is cut off: a note
    at the end reports a longer time. study: as the search left it. workers: that will train.
    """
    began, best = time.monotonic(), study.ranked(twins=False)[0].number
    contest = fitting_contest(study, workers, left)
    if contest.winner is None:
        options = replace(options, top=contest.top, seeds=contest.seeds)
        text = f"{plural(contest.top, 'finalist')} with {plural(contest.seeds, 'fresh seed')}"
    else:
        options = replace(options, trial=contest.winner)
        text = f"no finalists; trial {contest.winner} wins as the best of the search"
        if contest.winner != best:
            text += f" whose final training fits; that of trial {best} does not"
    yield Note(f"{seconds(max(left, 0.0))} left: {text}; forecast {seconds(contest.seconds)}")
    final = yield from retrain(options, stopping, engine)
    took = time.monotonic() - began
    if took > left:
        yield Note(
            f"{seconds(took - left)} over the timeout: the final training took {seconds(took)}, finalists included; "
            f"forecast {seconds(contest.seconds)}"
        )
    return final


# --- what is trained --------------------------------------------------------------------------------------------------


def make_plan(study: StudyRecord, options: RetrainOptions) -> FinalPlan:
    """What is to be trained for a study as it stands. Raises StudyError, UserError."""
    for name in ("top", "seeds", "epochs"):
        if (count := getattr(options, name)) is not None and count < 1:
            raise UserError(f"--{name} {count}: must be a whole number >= 1")
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
            actual = {each.number: state(each) for each in study.trials}.get(trial, "unknown")
            raise StudyError(f"study {study.name!r}: trial {trial} is {actual}; may be {_some(complete)}")
        trials: tuple[int, ...] = (trial,)
    else:  # no coordinator trains the running ones, since the lock is held here
        trials = tuple(each.number for each in ranked[:top])
        default = study.default
        if (top, seeds) != (1, 1) and default is not None and default not in trials:
            trials += (default,)  # a search that ends worse than its default reports it
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


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "")


# --- which finalist wins ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The winner, and how certain that is: fields of `Final`, with their defaults where no finalist is trained."""

    winner: int
    validation: Validation
    finalists: tuple[FinalistFigures, ...] = ()
    tie: tuple[int, ...] = ()
    optimism: float | None = None
    default: int | None = None


def choose(finalists: Sequence[FinalistFigures], correct: Mapping[int, NDArray[np.bool_]]) -> Selection:
    """The best mean wins; where others cannot be distinguished from it, the one of minimum cost.

    correct: (S, N) by trial: whether each seed is correct on each image of the validation part.
    Distinguished by `stats.paired` on these images, each against the best mean, corrected for their number (Holm). Cost
    means FLOPs, then parameters.
    """
    best = min(finalists, key=lambda one: (-one.mean, one.flops, one.parameters, one.trial))
    others = [one for one in finalists if one is not best]
    dispersion = stats.dispersion([correct[one.trial] for one in finalists])
    chances = stats.holm([stats.paired(correct[best.trial], correct[one.trial], dispersion) for one in others])
    equal = [best, *(one for one, p in zip(others, chances, strict=True) if p > 1 - stats.LEVEL)]
    winner = min(equal, key=lambda one: (one.flops, one.parameters, -one.mean, one.trial))
    mine = correct[winner.trial]
    low, high = stats.further_seed(mine, dispersion) if dispersion else (None, None)
    spread = math.sqrt(dispersion.factor * stats.flips(mine)) if dispersion else None
    return Selection(
        winner=winner.trial,
        validation=Validation(winner.mean, low, high, spread, mine.shape[1]),
        finalists=tuple(finalists),
        tie=tuple(sorted(one.trial for one in equal)) if len(equal) > 1 else (),
        optimism=None if winner.value is None else winner.value - winner.mean,
    )


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A job of `retrain`, and where its result is kept."""

    job: Job
    identity: str  # equal identities are the same work
    record: str  # name of a file in the job's folder

    @property
    def folder(self) -> Path:
        """The job's folder."""
        assert self.job.folder is not None
        return self.job.folder

    def result(self) -> Result | None:
        """What the job returned, if it was done before; a damaged record means that it was not. Raises NewerError."""
        try:
            record = JobRecord.read(self.folder / self.record)
        except NewerError:  # what a newer version wrote is not overwritten
            raise
        except (OSError, StorageError):
            return None
        return record.result if record.identity == self.identity else None


def run_tasks(
    pool: WorkerPool, tasks: Collection[Task]
) -> Generator[JobEvent, None, tuple[dict[str, Result], dict[str, str]]]:
    """Brings tasks to their ends; those that are done are known again. Returns results and reasons of failures."""
    results = {task.job.id: result for task in tasks if (result := task.result()) is not None}
    failures: dict[str, str] = {}
    for task in tasks:
        result = results.get(task.job.id)
        yield JobPlanned(task.job) if result is None else JobEnded(task.job, "found", _accuracy(result))
    waiting = {task.job.id: task for task in tasks if task.job.id not in results}
    epochs: dict[str, list[Epoch]] = {job: [] for job in waiting}
    for event in pool.run_all([task.job for task in waiting.values()]):
        task = waiting[event.job]
        match event:
            case Started():
                yield JobStarted(task.job)
            case EpochDone(epoch=epoch):
                epochs[event.job].append(epoch)
                write_epochs(task.folder / EPOCHS, epochs[event.job])
                yield JobEpoch(task.job, epoch)
            case Retried(reason=reason) if reason:
                yield JobRetried(task.job, reason)
            case Failed(reason=reason):
                failures[event.job] = reason
                yield JobEnded(task.job, "failed", text=reason)
            case Finished(result=result):
                write_json(task.folder / task.record, JobRecord(task.identity, result).to_json())
                results[event.job] = result
                yield JobEnded(task.job, "finished", _accuracy(result))
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

    def select(self) -> Generator[JobEvent | Note, None, Selection]:
        """Trains every finalist with every fresh seed, and chooses the winner. A single one with a single seed, or a
        trial named by --trial, is not trained again before the final training.
        """
        plan = self.plan
        if plan.trial is not None or (plan.top, plan.seeds) == (1, 1):
            trial = self.study.trials[plan.trials[0]]
            searched = Validation(trial.value or 0.0, None, None, None, self.study.data.validation)
            if self.study.default not in (None, trial.number):
                yield Note(f"trial {trial.number} is not compared with the study's default, trial {self.study.default}")
            return Selection(winner=trial.number, validation=searched)
        tasks = {number: [self._finalist(number, k) for k in range(1, plan.seeds + 1)] for number in plan.trials}
        results, failures = yield from run_tasks(self.pool, [task for mine in tasks.values() for task in mine])
        finalists, answers, reason = [], {}, ""
        for number, mine in tasks.items():
            failed = [failures[task.job.id] for task in mine if task.job.id in failures]
            if failed:
                reason = failed[0]
                yield Note(f"trial {number} is no finalist: with a fresh seed, {reason}")
                continue
            trained = [TrainResult.from_json(results[task.job.id], str(task.folder)) for task in mine]
            predictions = [Predictions.read(task.folder) for task in mine]
            answers[number] = np.stack([each.correct for each in predictions if each is not None])
            finalists.append(
                FinalistFigures(
                    trial=number,
                    value=self.study.trials[number].value,
                    values=tuple(answers[number].mean(axis=1).tolist()),
                    mean=float(answers[number].mean()),
                    seconds=float(np.mean([result.seconds for result in trained])),
                    seeds=tuple(self._seed(number, k) for k in range(1, plan.seeds + 1)),
                    parameters=trained[0].parameters,
                    flops=trained[0].flops,
                )
            )
        if not finalists:
            raise WorldError(f"study {self.study.name!r}: every finalist failed, the last with: {reason}")
        default = self.study.default if self.study.default in answers else None
        return replace(choose(finalists, answers), default=default)

    def final(self, selection: Selection) -> Generator[JobEvent, None, Final]:
        """Trains the winner on all training data, then reads the test part with it, and writes everything down."""
        number, seed = selection.winner, self._seed(selection.winner, 0)
        config = _with_seed(self._chosen(number)[0], seed, self.plan.epochs)
        done, partial = self.study.final_folder, self.study.folder / f"{FINAL}-{number:04d}-{seed}"
        identity = f"{self.study.uuid}/{number}/final/{seed}/{config['train']['epochs']}"
        threads, known = self.workers, self.study.trials[number].result
        if known is not None:
            threads = final_threads(known, config["train"]["batch_size"], threads)
        fit = self._task("final training", identity, done, FIT, config, FITTED, threads)
        if fit.result() is None:
            fit = self._task("final training", identity, partial, FIT, config, FITTED, threads)
            text = (
                f"# The final training of study {self.study.name}, after its trial {number}: on all training and "
                f"validation data,\n# whatever `subset` and `validation` say here.\n{tomli_w.dumps(config)}"
            )
            write_whole(partial / "config.toml", text.encode())
        fitted = TrainResult.from_json((yield from self._one(fit)), str(fit.folder / FITTED))
        payload = TestJob(str(fit.folder), fitted.files, str(self.data_dir) if self.data_dir else None)
        job = Job("test", fit.folder, TEST, payload.to_json(), label="test")
        test = Task(job, f"{identity}/{fitted.files[WEIGHTS]}", TESTED)
        reads = count_read(self.home, self.study, number, test.identity)
        tested = TestResult.from_json((yield from self._one(test)), str(fit.folder / TESTED))
        epochs, predictions = read_epochs(fit.folder / EPOCHS), Predictions.read(fit.folder)
        assert predictions is not None
        confusion = figures.confusion(predictions, self.study.data.classes)
        write_whole(fit.folder / "curves.png", figures.png(figures.curves(epochs)))
        write_whole(fit.folder / "confusion.png", figures.png(confusion))
        if fit.folder == partial:
            _install(partial, done)
        return self._record(selection, epochs, fitted, tested, reads)

    def _record(
        self, selection: Selection, epochs: Sequence[Epoch], fitted: TrainResult, tested: TestResult, reads: int
    ) -> Final:
        """What is kept of the final training; `model` and `seconds` are still to come."""
        low, high = stats.Accuracy(tested.correct, tested.n).interval
        seconds = sum(epoch.seconds for epoch in epochs)
        return Final(
            **vars(selection),
            study=self.study.name,
            plan=self.plan,
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
            params=dict(self._chosen(selection.winner)[1]),
            weights=fitted.files[WEIGHTS],
            numerics=tuple(fitted.numerics),
        )

    def _one(self, task: Task) -> Generator[JobEvent, None, Result]:
        results, failures = yield from run_tasks(self.pool, [task])
        if failures:
            raise WorldError(f"study {self.study.name!r}: {task.job.label}: {failures[task.job.id]}")
        return results[task.job.id]

    def _finalist(self, number: int, k: int) -> Task:
        seed = self._seed(number, k)
        config = _with_seed(self._chosen(number)[0], seed)
        folder = self.study.folder / "finalists" / f"{number:04d}-{seed}"
        write_whole(folder / "config.toml", self.search.replay(number, config).encode())
        label, identity = f"trial {number}, seed {k} of {self.plan.seeds}", f"{self.study.uuid}/{number}/{seed}"
        return self._task(label, identity, folder, TRIAL, config, TRAINED)

    def _task(
        self,
        label: str,
        identity: str,
        folder: Path,
        entry: str,
        config: Mapping[str, Any],
        record: str,
        threads: int | None = None,
    ) -> Task:
        payload = train_payload(self.search, self.study.data, self.data_dir, config, identity, threads)
        if entry == TRIAL:
            payload["weights_from"] = None  # the predictions are all that is needed
        return Task(Job(label, folder, entry, payload, label, config["train"]["epochs"]), identity, record)

    def _chosen(self, number: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Config and params of a trial. Neither is kept of a default that was asked for, and that no worker had."""
        trial = self.study.trials[number]
        if trial.config:
            return trial.config, trial.params
        params = self.search.known[number].params
        return self.search.config(params).to_table(), params

    def _seed(self, number: int, k: int) -> int:
        """A 31-bit seed that the search did not use: fresh seed k of a finalist, from 1, or (0) of the final model."""
        return self.search.seed(f"{number}/fresh/{self.plan.round}/{k}")


def _accuracy(result: Result | None) -> float | None:
    return None if result is None else result.get("value", result.get("accuracy"))


def _with_seed(config: Mapping[str, Any], seed: int, epochs: int | None = None) -> dict[str, Any]:
    """A trial's config with another seed, and other epochs if there are some."""
    train = {**config["train"], "seed": seed}
    return {**config, "train": train | ({} if epochs is None else {"epochs": epochs})}


@contextmanager
def _workers(
    engine: Callable[[], Engine], stopping: Callable[[], bool], lock: Lock, search: Study
) -> Iterator[WorkerPool]:
    """Workers for the jobs of a study."""
    with (
        closing(engine()) as workers,
        WorkerPool(
            workers,
            retries=search.search.retries,
            hang_seconds=search.search.hang_seconds,
            stopping=stopping,
            check_lock=lock.check,
        ) as pool,
    ):
        yield pool


def export(pool: WorkerPool, study: StudyRecord, final: Final) -> None:
    """Writes the final model as a torch.export program, in a worker, since this process has no torch.

    Raises ModelError, WorldError; CodeError for the user's code that may not run.
    """
    task = _exporting(study, final)
    for event in pool.run_all([task.job]):
        match event:
            case Failed(reason=reason):
                raise WorldError(f"study {study.name!r}: {task.job.label}: {reason}")
            case Finished(result=result):
                write_json(task.folder / task.record, JobRecord(task.identity, result).to_json())


def _program(
    study: StudyRecord,
    final: Final,
    options: RetrainOptions,
    workers: Callable[[Study], AbstractContextManager[WorkerPool]],
) -> Program:
    """The program of the final model; written now where an earlier command was stopped before that."""
    if (program := exported(study, final)) is None:
        search = reopen(None, study, {})
        with workers(search) as pool:
            deque(prepare(search, pool, options.data_dir, study.data), maxlen=0)
            export(pool, study, final)
        program = exported(study, final)
        assert program is not None
    return program


def exported(study: StudyRecord, final: Final) -> Program | None:
    """The program of the final model, if it was written."""
    task = _exporting(study, final)
    result, path = task.result(), task.folder / PROGRAM
    if result is None or not path.is_file():
        return None
    return Program(path, ExportResult.from_json(result, str(path)).torch)


def _exporting(study: StudyRecord, final: Final) -> Task:
    folder = study.final_folder
    payload = ExportJob(str(folder), {WEIGHTS: final.weights})
    return Task(Job("export", folder, EXPORT, payload.to_json(), label="export"), final.weights, EXPORTED)


# --- what is kept -----------------------------------------------------------------------------------------------------


def count_read(home: Home, study: StudyRecord, winner: int, model: str) -> int:
    """Counts a reading of the test part before it happens; returns how many there have been, by all studies of the home
    on the same data. A model is counted once, however often a crash makes it read again.
    """
    path = home.path / READS
    with FileLock(path.with_suffix(".lock")):
        try:
            stored = TestReads.read(path)
        except FileNotFoundError:
            stored = TestReads()
        mine = stored.reads.get(study.data.fingerprint, ())
        if not any(read.model == model for read in mine):
            mine = (*mine, TestRead(study.name, winner, model, time.time()))
            write_json(path, TestReads({**stored.reads, study.data.fingerprint: mine}).to_json())
        return len(mine)


def _install(partial: Path, target: Path) -> None:
    """Puts a finished model in place of an earlier one, and removes what other plans began and left beside it."""
    old = target.with_name(f"{FINAL}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    flush(target.parent)  # before the study records it
    for path in target.parent.glob(f"{FINAL}-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _keep(study: StudyRecord, final: Final, save: Callable[[Final], None]) -> None:
    """Writes the record into the model's folder, then into the study, where it counts."""
    write_json(study.final_folder / "final.json", final.to_json())
    save(final)
