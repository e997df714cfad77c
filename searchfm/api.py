"""The Python API: `tune`, `iter_tune`, `retrain`, `iter_retrain`, `open_study`, `load_model`. Commands call the same.

What a function needs is imported in it: `import searchfm` is quick, and a function shows what it is doing before it
imports torch, Optuna or MLflow. Functions may be called from scripts without `if __name__ == "__main__"`, from
notebooks and from threads; Ctrl-C reaches them in the main thread alone.

Every error that a user can meet is a `SearchfmError` whose text is one line: UserError for a mistake, WorldError for
what the same call may get over later.
"""

import html
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from searchfm import forkserver
from searchfm.errors import OutOfTimeError, StudyError
from searchfm.home import Home, data_folder
from searchfm.stopping import StopRequest, read_duration

if TYPE_CHECKING:
    import numpy as np
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image
    from rich.console import Console

    from searchfm.engines import Engine, EngineOptions
    from searchfm.events import Note, Phase, RetrainEvent, SearchEnded, TuneEvent
    from searchfm.learn.export import Predictor
    from searchfm.records import Final, StudyRecord, Trial
    from searchfm.search.study import Study
    from searchfm.tuning import Forecasted

    ImageLike: TypeAlias = str | Path | Image | NDArray[np.uint8]

FigureKind: TypeAlias = Literal[
    "history", "importance", "slice", "parallel", "progress", "ranking", "survival", "curves", "confusion"
]
# Optuna imports tqdm, which warns in a notebook without ipywidgets. Its bars are not used here.
warnings.filterwarnings("ignore", "IProgress not found")
TOP = 5  # trials that a notebook shows of a study


# --- search -----------------------------------------------------------------------------------------------------------


def tune(
    study: str | Path | Mapping[str, Any],
    *,
    trials: int | None = None,
    dataset: str | Path | None = None,
    subset: float | None = None,
    epochs: int | None = None,
    set: Mapping[str, Any] | Sequence[str] = (),
    name: str | None = None,
    seed: int | None = None,
    first: str | Path | None = None,
    warm_start: str | None = None,
    timeout: float | str | None = None,
    retrain: bool = False,
    retry_failed: bool = False,
    workers: int | None = None,
    device: str | None = None,
    workers_per_gpu: int | Literal["auto"] | None = None,
    engine: str | Path = "local",
    engine_options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    home: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: "bool | Console" = True,
    stopping: Callable[[], bool] | None = None,
) -> "OpenStudy":
    """Searches a study: proposes, trains, prunes and records trials. The same call again resumes it.

    study: the name of a built-in study file (`searchfm studies`), the path of a study file, the name of a study of the
        home, or the table of a study file as a dict, which needs `name`.
    trials: in total, those of earlier searches included.
    dataset: a data set by name (`searchfm data`), or a path: a folder of images or parquet files, an .npz file.
    subset: fraction of the training part to search on, 0 to 1.
    epochs: of a trial.
    set: other keys by dotted name, {"optimizer.lr": 0.01} or {"optimizer.lr": {"low": 1e-3, "high": 0.1, "log": True}};
        or a text as `--set` takes it, or several.
    name: of the study; default: the file's name.
    seed: of the search.
    first: a file of configurations to try first: its `[[first]]` tables, or the config.toml of a trial.
    warm_start: the name of an older study, whose best trials that fit are tried first.
    timeout: seconds from the call on, or a text such as "30m" or "1h30m", after which the search stops. With `retrain`
        it bounds the final training too, as far as that can be forecast.
    retrain: then train the final model, as `searchfm.retrain` does, with fewer finalists or seeds where a timeout asks
        for it. `final` of the study that is returned is its record; None without a complete trial.
    retry_failed: add a trial for each failed one.
    workers: processes that train; default: one a core or GPU. device: "auto", "cpu", "cuda", "cuda:1" or "mps".
    workers_per_gpu: workers that share a GPU; "auto": by the first trial's memory.
    engine: where workers run: "local", "listen", "slurm", "ray", or the path of a TOML file with a table [engine].
        engine_options: further options by dotted key, {"slurm.partition": "gpu"}.
    allow_code: run the code that [model.custom] names.
    home: folder of all studies; default: SEARCHFM_HOME, else ./runs. data_dir: folder to search for data first.
    progress: whether to show progress, on standard output; or a rich Console to show it on.
    stopping: a function, called often, that returns whether to stop.

    Ctrl-C stops the search, not the program: running trials keep their checkpoints, and the study is returned as it
    stands; a second Ctrl-C raises KeyboardInterrupt. SIGTERM ends the process after the same stop. With `stopping`,
    and in other threads than the main one, no signal is received.

    Raises UserError for a mistake, before anything is written; OutOfTimeError where `timeout` ends before the study is
    opened; WorldError where the database fails, or three trials failed and none succeeded, or the final training fails;
    KeyboardInterrupt for a Ctrl-C before the study is opened.
    """
    from searchfm.show import live

    stop = StopRequest.of(stopping)
    events = iter_tune(
        study,
        trials=trials,
        dataset=dataset,
        subset=subset,
        epochs=epochs,
        set=set,
        name=name,
        seed=seed,
        first=first,
        warm_start=warm_start,
        timeout=timeout,
        retrain=retrain,
        retry_failed=retry_failed,
        workers=workers,
        device=device,
        workers_per_gpu=workers_per_gpu,
        engine=engine,
        engine_options=engine_options,
        allow_code=allow_code,
        home=home,
        data_dir=data_dir,
        stopping=stop,
    )
    with stop if stopping is None else nullcontext():
        return live.follow(_console(progress), events, _tune_view)


def iter_tune(
    study: str | Path | Mapping[str, Any],
    *,
    trials: int | None = None,
    dataset: str | Path | None = None,
    subset: float | None = None,
    epochs: int | None = None,
    set: Mapping[str, Any] | Sequence[str] = (),
    name: str | None = None,
    seed: int | None = None,
    first: str | Path | None = None,
    warm_start: str | None = None,
    timeout: float | str | None = None,
    retrain: bool = False,
    retry_failed: bool = False,
    workers: int | None = None,
    device: str | None = None,
    workers_per_gpu: int | Literal["auto"] | None = None,
    engine: str | Path = "local",
    engine_options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    home: str | Path | None = None,
    data_dir: str | Path | None = None,
    stopping: Callable[[], bool] | None = None,
) -> "Generator[TuneEvent | RetrainEvent, None, OpenStudy]":
    """As `tune`, but yields what happens, one event after the other (see `searchfm.events`); returns the study.

    Nothing runs before the first event is asked for, and trials are not judged while none is. `close()`, or leaving the
    loop by an exception such as Ctrl-C, stops the workers once their checkpoints are written: the same call resumes.
    It receives no signals itself. A loop that ends with `break` should close it:

        with contextlib.closing(searchfm.iter_tune("vit")) as events:
            for event in events:
                ...
    """
    limit, stop = None if timeout is None else read_duration(timeout), StopRequest.of(stopping)
    with forkserver.ahead(str(engine)):
        from searchfm.events import Phase, SearchEnded, StudyFound

        yield Phase("importing Optuna")
        from searchfm.search.lock import stop_requested
        from searchfm.search.storage import read_study
        from searchfm.tuning import Tuning, reserving

        where, folder = _home(home), data_folder(_path(data_dir))
        options = _engine_options(engine, workers, device, workers_per_gpu, engine_options, allow_code, folder)
        plan, stored, file = find_plan(
            study,
            where,
            name=name,
            trials=trials,
            dataset=dataset,
            subset=subset,
            epochs=epochs,
            set=set,
            seed=seed,
            first=first,
            warm_start=warm_start,
        )
        plan.check_code(options.allow_code)
        stop.watch(limit, partial(stop_requested, where, plan.name))
        yield StudyFound(plan.name, plan.question, str(plan.data["name"]), stored is not None)
        tuning = Tuning(plan, where, file, stored, folder, retry_failed, stop, _starter(options, where))
        events = tuning.run()
        try:
            yield from reserving(events, stop, limit) if retrain and limit is not None else events
        except KeyboardInterrupt:
            if not stop.reason or (stored is None and stop.reason != "timeout"):
                raise
            if stored is None:
                text = (
                    f"study {plan.name!r}: the timeout of {limit:g} s was over before it was opened; nothing was begun"
                )
                raise OutOfTimeError(text) from None
        record, seconds = read_study(where, plan.name), stop.elapsed
        ending, missing = plan.ended_by(record.trials), tuning.missing
        rule, reason = ending or ("", "the space has no further point" * tuning.exhausted)
        ended = SearchEnded(record, tuning.trials, tuning.exhausted, rule, reason, missing, seconds, stop.reason)
        yield ended
        if retrain and stop.reason in ("", "timeout"):
            before = len(stored.trials) - len(stored.of("running")) if stored else 0
            trained = len(record.trials) - len(record.of("running")) > before
            bound = limit if trained or record.final is None else None  # else what was kept stands
            yield from _final(record, where, options, folder, stop, bound, tuning.workers)
            record = read_study(where, plan.name)
        return OpenStudy(where, record, ended)


def _final(
    study: "StudyRecord",
    home: Home,
    options: "EngineOptions",
    data_dir: Path | None,
    stop: StopRequest,
    timeout: float | None,
    workers: int,
) -> "Generator[RetrainEvent, None, None]":
    """The final training after a search, if a trial is complete. timeout: of both; None: as `retrain` would do it."""
    from searchfm.events import Note, Phase, Retrained

    left = stop.left if timeout is not None else None
    stop.clear_timeout()  # what has begun runs to its end
    if study.best is None:
        yield Note("no trial is complete, so there is no final training; the same command resumes")
        return
    yield Phase("importing MLflow")
    from searchfm import retraining

    plan = retraining.RetrainOptions(home, study.name, data_dir=data_dir, allow_code=options.allow_code)
    starter = _starter(options, home)
    try:
        if left is None:
            final = yield from retraining.retrain(plan, stop, starter)
        else:
            final = yield from retraining.retrain_within(left, plan, study, workers, stop, starter)
    except KeyboardInterrupt:
        if not stop.reason:
            raise
        return
    yield Retrained(final)


def forecast(
    study: str | Path | Mapping[str, Any],
    *,
    progress: "bool | Console" = True,
    stopping: Callable[[], bool] | None = None,
    **arguments: Any,
) -> "Forecasted":
    """What `tune` would search with these arguments, and what that takes: `tune --dry-run`. arguments: as of `tune`.

    Prepares the study as a search does: reads its data, which it may fetch first, looks for weights, starts workers.
    Writes nothing into the home. Only workers of this machine are started: with other engines nothing is timed.
    """
    from searchfm.show import live

    stop = StopRequest.of(stopping)
    with stop if stopping is None else nullcontext():
        return live.follow(_console(progress), _forecast(study, stop, **arguments), _tune_view)


def _forecast(
    study: str | Path | Mapping[str, Any],
    stop: StopRequest,
    *,
    workers: int | None = None,
    device: str | None = None,
    workers_per_gpu: int | Literal["auto"] | None = None,
    engine: str | Path = "local",
    engine_options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    home: str | Path | None = None,
    data_dir: str | Path | None = None,
    **values: Any,
) -> "Generator[Phase | Note, None, Forecasted]":
    with forkserver.ahead(str(engine)):
        from searchfm.events import Phase

        yield Phase("importing Optuna")
        from searchfm.search.files import check_data_name
        from searchfm.tuning import Forecasted, Tuning

        where, folder = _home(home), data_folder(_path(data_dir))
        options = _engine_options(engine, workers, device, workers_per_gpu, engine_options, allow_code, folder)
        plan, stored, file = find_plan(study, where, **values)
        plan.check_code(options.allow_code)
        check_data_name(plan.data["name"])
        if options.name != "local":
            return Forecasted(plan, stored)
        tuning = Tuning(plan, where, file, stored, folder, stopping=stop, engine=_starter(options, where))
        return (yield from tuning.forecast())


def find_plan(
    study: str | Path | Mapping[str, Any],
    home: Home,
    *,
    name: str | None = None,
    trials: int | None = None,
    dataset: str | Path | None = None,
    subset: float | None = None,
    epochs: int | None = None,
    set: Mapping[str, Any] | Sequence[str] = (),
    seed: int | None = None,
    first: str | Path | None = None,
    warm_start: str | None = None,
) -> "tuple[Study, StudyRecord | None, Mapping[str, Any]]":
    """What `tune` would search with these arguments: see `searchfm.tuning.find_study`. Writes nothing."""
    from searchfm.search import files
    from searchfm.tuning import find_study

    values = {
        "search.trials": trials,
        "search.seed": seed,
        "data.name": None if dataset is None else str(dataset),
        "data.subset": subset,
        "train.epochs": epochs,
    }
    source = study if isinstance(study, Mapping) else str(study)
    return find_study(source, name, files.overrides(values, set), home, _path(first), warm_start)


# --- final training ---------------------------------------------------------------------------------------------------


def retrain(
    study: "str | Path | OpenStudy",
    *,
    top: int | None = None,
    seeds: int | None = None,
    trial: int | None = None,
    epochs: int | None = None,
    again: bool = False,
    promote: bool = False,
    workers: int | None = None,
    device: str | None = None,
    workers_per_gpu: int | Literal["auto"] | None = None,
    engine: str | Path = "local",
    engine_options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    home: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: "bool | Console" = True,
    stopping: Callable[[], bool] | None = None,
) -> "Final":
    """Trains the best trials with fresh seeds, the winner on all training data, tests it once, and registers it.

    What an earlier call has done is not done again: the same call after a crash goes on, and a finished one returns
    what was kept, without a further reading of the test part.

    study: a name, the path of a study file, or what `tune` and `open_study` return.
    top: number of finalists, the best trials; default: as last time, else 3. seeds: fresh seeds of each; likewise.
    trial: choose this trial, without finalists. epochs: of the final training; default: as last time, else the trial's.
    again: retrain from scratch with new seeds. promote: make the model the champion, better or not.
    workers ... stopping: see `tune`.

    `final.test.accuracy` and `final.test.interval` are of the final model on the test part; see `searchfm.Final`.

    Raises UserError, before anything is begun; WorldError where every finalist or the final training fails;
    KeyboardInterrupt where it is stopped: the same call goes on.
    """
    from searchfm.show import live

    stop = StopRequest.of(stopping)
    events = iter_retrain(
        study,
        top=top,
        seeds=seeds,
        trial=trial,
        epochs=epochs,
        again=again,
        promote=promote,
        workers=workers,
        device=device,
        workers_per_gpu=workers_per_gpu,
        engine=engine,
        engine_options=engine_options,
        allow_code=allow_code,
        home=home,
        data_dir=data_dir,
        stopping=stop,
    )
    with stop if stopping is None else nullcontext():
        return live.follow(_console(progress), events, _retrain_view)


def iter_retrain(
    study: "str | Path | OpenStudy",
    *,
    top: int | None = None,
    seeds: int | None = None,
    trial: int | None = None,
    epochs: int | None = None,
    again: bool = False,
    promote: bool = False,
    workers: int | None = None,
    device: str | None = None,
    workers_per_gpu: int | Literal["auto"] | None = None,
    engine: str | Path = "local",
    engine_options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    home: str | Path | None = None,
    data_dir: str | Path | None = None,
    stopping: Callable[[], bool] | None = None,
) -> "Generator[RetrainEvent, None, Final]":
    """As `retrain`, but yields what happens, one event after the other; returns the final record. See `iter_tune`."""
    with forkserver.ahead(str(engine)):
        from searchfm.events import Phase, Retrained

        yield Phase("importing Optuna")
        from searchfm import retraining
        from searchfm.search.files import study_name
        from searchfm.search.lock import stop_requested

        where, folder, stop = _home(home, study), data_folder(_path(data_dir)), StopRequest.of(stopping)
        name = study.name if isinstance(study, OpenStudy) else study_name(str(study))
        stop.watch(None, partial(stop_requested, where, name))
        options = _engine_options(engine, workers, device, workers_per_gpu, engine_options, allow_code, folder)
        allowed = options.allow_code
        plan = retraining.RetrainOptions(where, name, top, seeds, trial, epochs, again, promote, folder, allowed)
        final = yield from retraining.retrain(plan, stop, _starter(options, where))
        yield Retrained(final)
        return final


# --- a study ----------------------------------------------------------------------------------------------------------


def open_study(study: str | Path, *, home: str | Path | None = None) -> "OpenStudy":
    """A study of the home, by name or by the path of its file. Raises StudyError, with the known names."""
    from searchfm.search.files import study_name
    from searchfm.search.storage import read_study

    where = _home(home)
    return OpenStudy(where, read_study(where, study_name(str(study))))


class OpenStudy:
    """A study with its trials, as it was when it was read; `refresh` reads it again.

    record: all that is stored of it (`searchfm.records.StudyRecord`). ended: the end of the search, from `tune` alone.
    """

    def __init__(self, home: Home, record: "StudyRecord", ended: "SearchEnded | None" = None) -> None:
        self._home, self.record, self.ended = home, record, ended

    @property
    def name(self) -> str:
        """The study's name."""
        return self.record.name

    @property
    def question(self) -> str:
        """The question in the header of the study file."""
        return self.record.question

    @property
    def home(self) -> Path:
        """The folder of all studies."""
        return self._home.path

    @property
    def folder(self) -> Path:
        """The study's folder; a trial has its own, `trial.folder`."""
        return self.record.folder

    @property
    def trials(self) -> "tuple[Trial, ...]":
        """All trials, by number: `state`, `value`, `params`, `config`, `epochs` and more."""
        return self.record.trials

    @property
    def best(self) -> "Trial":
        """The complete trial with the highest value, the earliest of equal ones. Raises StudyError without one."""
        if self.record.best is None:
            failed = self.record.of("failed")
            reason = f"; the last of {len(failed)} failed trials: {failed[-1].reason}" if failed else ""
            raise StudyError(f"study {self.name!r}: has no complete trial yet{reason}")
        return self.record.best

    @property
    def final(self) -> "Final | None":
        """What `retrain` kept; None before it."""
        return self.record.final

    @property
    def optuna(self) -> "optuna.Study":
        """The study as Optuna has it. To read: searchfm's own records and MLflow would not follow a change."""
        import optuna

        from searchfm.search.storage import open_storage

        return optuna.load_study(study_name=self.name, storage=open_storage(self._home))

    def refresh(self) -> "OpenStudy":
        """Reads the study again, such as while another process tunes it; returns itself."""
        from searchfm.search.storage import read_study

        self.record = read_study(self._home, self.name)
        return self

    def trials_dataframe(self) -> "pd.DataFrame":
        """A row a trial, by number; after what every trial has, a column for each key of the search space.

        value, accuracy: fractions, accuracy also of pruned trials; seconds: of training; started, ended: local time.
        """
        import pandas as pd

        rows = [
            {
                "number": trial.number,
                "state": trial.state,
                "value": trial.value,
                "accuracy": trial.accuracy,
                "epochs": len(trial.epochs),
                "seconds": trial.seconds,
                "parameters": trial.result.parameters if trial.result else None,
                "twin": trial.twin,
                "reason": trial.reason,
                "started": None if trial.started is None else pd.Timestamp.fromtimestamp(trial.started),
                "ended": None if trial.ended is None else pd.Timestamp.fromtimestamp(trial.ended),
                **trial.params,
            }
            for trial in self.trials
        ]
        table = pd.DataFrame(rows, columns=None if rows else ["number"]).set_index("number")
        whole = [name for name in ("parameters", "twin") if name in table]
        return table.astype(dict.fromkeys(whole, "Int64"))

    def figure(self, kind: FigureKind = "history", *, key: str | None = None, trial: int | None = None) -> "Figure":
        """A figure as the report has it.

        kind: of the search, "history", "importance" (from 10 trials on), "slice" (accuracy over one `key`;
        default: the most important one), "parallel", "progress" (accuracy by epoch), "ranking" (ties with the best) or
        "survival" (who was pruned when); of one trial (default: the best), "curves" or "confusion".
        Raises StudyError where the trials do not suffice for it, UserError for an unknown kind, key or trial.
        """
        from searchfm.search.storage import open_storage
        from searchfm.show.report import study_figure

        return study_figure(self.record, open_storage(self._home), kind, key=key, trial=trial)

    def __repr__(self) -> str:
        return f"<searchfm study {self.name!r}: {self._summary()}>"

    def _repr_html_(self) -> str:
        """For notebooks: the summary, and the best trials."""
        parts = [f"<b>{html.escape(self.name)}</b> {html.escape(self.question)}<br>{html.escape(self._summary())}"]
        if best := [trial.number for trial in self.record.ranked()[:TOP]]:
            table = self.trials_dataframe().loc[best].dropna(axis="columns", how="all")
            parts.append(table.drop(columns=["state", "accuracy", "started", "ended"]).to_html(float_format="%.4g"))
        return "\n".join(parts)

    def _summary(self) -> str:
        from searchfm.format import plural, states

        best = self.record.best
        found = f", best {best.value:.4f} (trial {best.number})" if best else ""
        return f"{plural(len(self.trials), 'trial')} ({states(self.record, zeros=False) or 'none ended'}){found}"


# --- a model ----------------------------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    """The predictions for N images, K classes; unpacks as `classes, probabilities`."""

    classes: tuple[str, ...]  # N names, the most probable class of each image
    probabilities: "NDArray[np.float32]"  # (N, K), each row adding up to 1; columns as in `LoadedModel.classes`

    @property
    def labels(self) -> "NDArray[np.int64]":
        """(N,) the index of the most probable class."""
        labels: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return labels


class LoadedModel:
    """A model that predicts, on the CPU. `classes`: names of the K classes; `shape`: (channels, height, width)."""

    def __init__(self, name: str, predictor: "Predictor") -> None:
        self.name, self.classes, self.shape = name, predictor.classes, predictor.shape
        self._predictor = predictor

    def predict(self, images: "ImageLike | Iterable[ImageLike]") -> Predicted:
        """The class of each image, with the probabilities of all.

        images: an array (N, H, W) or (N, H, W, C) uint8 with 1, 3 or 4 channels, transparency last; or one or several
        paths, PIL images, or arrays of one image. Images of any size and mode are converted as those of the training:
        rotated by their EXIF data, resized to the model's own size (bilinear), to its number of channels.
        Raises DataError for an image that cannot be read or converted.
        """
        from searchfm.learn.export import predict_images

        probabilities = predict_images(self._predictor, images)
        return Predicted(tuple(self.classes[label] for label in probabilities.argmax(axis=1)), probabilities)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"<searchfm model {self.name!r}: images {size}, {len(self.classes)} classes>"


def load_model(model: str | Path, *, allow_code: bool = False, home: str | Path | None = None) -> LoadedModel:
    """A model by the name of its study (the champion), "models:/NAME@ALIAS", "models:/NAME/VERSION", the path of an
    .onnx or .safetensors file, or a trial's folder. No code in a model's file is run.

    allow_code: run the code that a model of [model.custom] names; an .onnx file needs none. home: folder of all
    studies; default: SEARCHFM_HOME, else ./runs.
    Raises CodeError without it, StudyError for a study that is unknown or was not retrained, ModelError for what is no
    model, StorageError where MLflow cannot be reached.
    """
    from searchfm.learn import export
    from searchfm.tracking.registry import find_model

    with find_model(_home(home), str(model)) as (name, source):
        return LoadedModel(name, export.load(source, allow_code=allow_code))


# --- shared -----------------------------------------------------------------------------------------------------------


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _home(home: str | Path | None, study: object = None) -> Home:
    """The home of an open study, else the one that is named, else the default."""
    return study._home if home is None and isinstance(study, OpenStudy) else Home.find(_path(home))


def _engine_options(
    engine: str | Path,
    workers: int | None,
    device: str | None,
    workers_per_gpu: int | Literal["auto"] | None,
    more: Mapping[str, Any] | None,
    allow_code: bool,
    data_dir: Path | None,
) -> "EngineOptions":
    from searchfm.engines.start import read_options

    own = {"workers": workers, "device": device, "workers_per_gpu": workers_per_gpu, "allow_code": allow_code or None}
    return read_options(str(engine), {**own, "data_dir": data_dir and str(data_dir), **(more or {})})


def _starter(options: "EngineOptions", home: Home) -> "Callable[[], Engine]":
    from searchfm.engines.start import start_engine
    from searchfm.show.live import notify

    return partial(start_engine, options, home.path, notify)


def _console(progress: "bool | Console") -> "Console | None":
    from searchfm.show.live import open_console

    return (open_console() if progress else None) if isinstance(progress, bool) else progress


def _tune_view(console: "Console", event: Any, view: Any) -> Any:
    from searchfm.show.progress import tune_view

    return tune_view(console, event, view)


def _retrain_view(console: "Console", event: Any, view: Any) -> Any:
    from searchfm.show.progress import retrain_view

    return retrain_view(console, event, view)
