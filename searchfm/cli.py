"""The command line: parses, calls, prints. What a command needs is imported in the command, not before.

Exit codes: 0 done; 1 the world failed, the same command resumes; 2 the user's mistake; 130 and 143 interrupted,
resumable. Anything else is our bug and shows its traceback.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from searchfm import __version__
from searchfm.errors import DataError, SearchfmError, StorageError, StudyError, UserError, WorldError

if TYPE_CHECKING:
    from rich.console import Console

    from searchfm.home import Home
    from searchfm.search.history import StudyRow
    from searchfm.search.study import Study

app = typer.Typer(
    name="searchfm",
    help="Hyperparameter search for image classifiers: search, prune, track, retrain, test once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # in "rich", a bracket in a help text would be taken for a tag
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A study by name (its champion), models:/NAME@ALIAS or models:/NAME/VERSION, "
        "a file (.onnx, .safetensors), or a trial's folder.",
        metavar="MODEL",
    ),
]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Where a search leaves everything. [default: SEARCHFM_HOME or ./runs]")
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Where data sets are looked for first. [default: SEARCHFM_DATA]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]
StudyArgument = Annotated[str, typer.Argument(help="A study by name, or the path of a study file.", metavar="STUDY")]


def main() -> None:
    """The entry point of `searchfm` and of `python -m searchfm`."""
    try:
        app()
    except SearchfmError as error:
        sys.exit(_say(str(error), error.exit_code))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
            raise
        sys.exit(_say(f"{error.filename or 'disk'}: {error.strerror}; mend it, and the same command goes on", 1))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def tune(
    study: StudyArgument,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in total, those of earlier commands included.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. [default: cores, or GPUs]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dataset: Annotated[str | None, typer.Option(help="A data set by name, or a folder of images.")] = None,
    subset: Annotated[float | None, typer.Option(help="Share of the training part to search on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a trial.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key: optimizer.lr=0.01, or a range {low=…, high=…}."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name the study otherwise than its file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds, resumable.")] = None,
    engine: Annotated[str, typer.Option(help="Where workers run: local.")] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the space, train nothing.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Add a trial for each that failed.")] = False,
    home: HomeOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search a study: propose, train, prune and record trials. Asked again, it goes on where it stopped."""
    from searchfm.search import files

    if engine != "local":
        raise UserError(f"--engine {engine}: must be local")
    given = {
        "search.trials": trials,
        "search.seed": seed,
        "data.name": dataset,
        "data.subset": subset,
        "train.epochs": epochs,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    for text in set_ or []:
        key, value = files.parse_override(text)
        if key in overrides:
            raise UserError(f"--set {text}: {key} is given twice")
        overrides[key] = value
    from searchfm.engines.local import LocalEngine
    from searchfm.home import Home
    from searchfm.show import terminal
    from searchfm.tracking import Tracker
    from searchfm.tuning import Plan, Tuning

    where = Home.find(home)
    opened, stored, file = _open(study, name, overrides, where)
    console = _console(stderr=as_json)
    if dry_run:
        terminal.show_plan(console, opened, stored)
        return
    plan = Plan(opened, where, file, stored, device, workers, _data_dir(data_dir), retry_failed)
    began = time.monotonic()
    with _Stop(timeout) as stop:
        with Tuning(plan, LocalEngine, Tracker, stop.asked) as tuning:
            watch = terminal.Watch(console, tuning.result(), tuning.trials, tuning.devices)
            with watch.showing():
                for news in tuning.run():
                    watch.tell(news)
        result = tuning.result()
        if as_json:
            typer.echo(json.dumps({**_summary(result, where), "seconds": round(time.monotonic() - began, 3)}))
        terminal.show_end(console, result, tuning, time.monotonic() - began)
        stop.leave()
    if result.trials and all(row.state == "failed" for row in result.trials):
        raise WorldError(f"study {result.name!r}: every trial failed, the last with: {result.trials[-1].reason}")


@app.command()
def retrain(
    study: StudyArgument,
    top: Annotated[int | None, typer.Option(min=1, help="Finalists: the best so many trials. [default: 3]")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Fresh seeds of each finalist. [default: 3]")] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Choose this trial, without finalists.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the final training.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Train it all anew, with other seeds.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Make the model the champion, better or not.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. [default: cores, or GPUs]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    home: HomeOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the best trials with fresh seeds, the winner on all training data, test it once, and register it."""
    from searchfm import retrain as retraining
    from searchfm.engines.local import LocalEngine
    from searchfm.home import Home
    from searchfm.show import final as show

    name, console = _stem(study), _console(stderr=as_json)
    wish = retraining.Wish(
        Home.find(home), name, top, seeds, trial, epochs, again, promote, device, workers, _data_dir(data_dir)
    )
    with _Stop(None) as stop:
        final = show.Watch(console, name).follow(retraining.retrain(wish, LocalEngine, stop.asked))
        if as_json:
            typer.echo(json.dumps(show.describe(final)))
        else:
            show.show(console, final)
        stop.leave()


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="A study by name; all of them unless given.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what studies there are, how far they are, and what is best."""
    from searchfm.home import Home
    from searchfm.search.storage import load_study, open_storage, study_names
    from searchfm.show import terminal

    where = Home.find(home)
    rows = []
    if study is not None or where.begun:
        storage = open_storage(where)
        names = study_names(storage) if study is None else [_stem(study)]
        rows = [load_study(storage, where, name) for name in names]
    console = _console()
    if as_json:
        typer.echo(json.dumps([_summary(row, where) for row in rows]))
    elif study is not None:
        terminal.show_study(console, rows[0])
    elif rows:
        console.print(terminal.study_table(rows))
    else:
        console.print(f"{where.path} holds no study yet; begin with: searchfm tune mlp", highlight=False)


@app.command()
def studies(
    name: Annotated[str | None, typer.Argument(help="A study file that ships, or the path of one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the study files that ship, or show one: its question, its space, and what a trial costs."""
    from searchfm.config import DATASETS, image_shape
    from searchfm.search import files
    from searchfm.show import terminal

    console = _console()
    if name is None:
        found = {item: files.question((files.folder() / f"{item}.toml").read_text("utf-8")) for item in files.shipped()}
        if as_json:
            typer.echo(json.dumps([{"study": item, "question": text} for item, text in found.items()]))
        else:
            console.print(terminal.pair_table("study", "question", found))
        return
    path = files.find(name)
    if path is None:
        raise StudyError(f"study file {name!r} is not there; those that ship: {', '.join(files.shipped())}")
    study = files.read(path).study()
    shape, cost = image_shape(study.first.data), None
    if shape is not None:  # of a folder of images only reading it tells
        from searchfm.learn.models import costs  # imports torch, which nothing else here does

        cost = costs(study.samples(16), shape, DATASETS[study.first.data.name][1])
    if as_json:
        typer.echo(json.dumps(terminal.describe(study, cost)))
    else:
        terminal.show_plan(console, study, None, cost)


@app.command()
def data(
    name: Annotated[str | None, typer.Argument(help="The data set to fetch; all are listed unless given.")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where data sets come from and whether they are here, or fetch one."""
    from searchfm.config import DATASETS
    from searchfm.learn import datasets
    from searchfm.show import terminal

    where = _data_dir(data_dir)
    if name is not None:
        datasets.fetch(name, where)
    rows = [datasets.describe(item, where) for item in ([name] if name else DATASETS)]
    if as_json:
        typer.echo(json.dumps([terminal.describe_data(row) for row in rows]))
    else:
        _console().print(terminal.data_table(rows))


@app.command()
def dashboard(
    study: Annotated[str | None, typer.Argument(help="The study to open at; the latest unless given.")] = None,
    port: Annotated[int, typer.Option(help="Port of optuna-dashboard; MLflow has --mlflow-port.")] = 8080,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
    home: HomeOption = None,
) -> None:
    """Serve optuna-dashboard and the MLflow UI on loopback, until Ctrl-C."""
    from searchfm.home import Home
    from searchfm.search.storage import load_study, open_storage
    from searchfm.show import terminal
    from searchfm.show.dashboard import serve

    where = Home.find(home)
    row = load_study(open_storage(where), where, _stem(study)) if study else None
    console = _console()
    serve(where, row, ports=(port, mlflow_port), ready=lambda addresses: terminal.show_addresses(console, addresses))


@app.command()
def compare(
    studies: Annotated[list[str], typer.Argument(help="Studies by name.", metavar="STUDY...")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write the comparison as a page.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also write accuracy against time, as .png or .svg.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set studies side by side: accuracy with its interval, paired tests, time and size. Kept in MLflow too."""
    from searchfm import tracking
    from searchfm.home import Home
    from searchfm.search.storage import load_study, open_storage
    from searchfm.show import compare as side
    from searchfm.show import page, terminal

    if picture is not None and picture.suffix not in side.SUFFIXES:
        raise UserError(f"--picture {picture}: must end in {' or '.join(side.SUFFIXES)}")
    where = Home.find(home)
    storage = open_storage(where)
    lines = side.compare([load_study(storage, where, _stem(study)) for study in studies])
    made: dict[str, str | bytes] = {"comparison.html": side.html(lines), "front.png": side.picture(lines, ".png")}
    if html is not None:
        page.write(html, made["comparison.html"])
    if picture is not None:
        page.write(picture, side.picture(lines, picture.suffix))
    if as_json:
        typer.echo(json.dumps(side.describe(lines)))
    else:
        console = _console()
        terminal.show_comparison(console, side.tables(lines, console.width), side.notes(lines), [html, picture])
    tracking.log_comparison(where, side.describe(lines), side.markdown(lines), made)


@app.command()
def report(
    study: StudyArgument,
    output: Annotated[
        Path | None, typer.Option(help="Where to write it. [default: report.html in the study's folder]")
    ] = None,
    home: HomeOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Write a page that says what a study asked, what came of it and how sure one may be. Kept in MLflow too."""
    from searchfm import tracking
    from searchfm.home import Home
    from searchfm.search.storage import load_study, open_storage
    from searchfm.show import page
    from searchfm.show import report as paper

    where = Home.find(home)
    storage = open_storage(where)
    row = load_study(storage, where, _stem(study))
    path = output or row.folder / "report.html"
    try:
        environment = tracking.study_environment(where, row)
    except StorageError:  # what the trials themselves know must do; that MLflow is away is said below
        environment = {}
    page.write(path, paper.report(row, storage, environment, _data_dir(data_dir)))
    typer.echo(path)
    tracking.log_report(where, row, path)


@app.command()
def sync(
    study: StudyArgument,
    apply: Annotated[bool, typer.Option("--apply", help="Mend what is listed; without it nothing is written.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring MLflow in line with Optuna: list what is missing, doubled or different, and mend it with --apply."""
    from contextlib import nullcontext

    from searchfm import tracking
    from searchfm.home import Home
    from searchfm.search.storage import load_study, open_storage, study_lock
    from searchfm.show import terminal

    where = Home.find(home)
    name = _stem(study)
    load_study(open_storage(where), where, name)  # an unknown study is refused before its lock makes a folder
    with study_lock(where, name) if apply else nullcontext():
        row = load_study(open_storage(where), where, name)
        found = tracking.differences(where, row)
        if apply:
            tracking.apply(where, row, found)
    if as_json:
        typer.echo(json.dumps([{"trial": item.trial, "problem": str(item), "mended": apply} for item in found]))
    else:
        terminal.show_differences(_console(), row, found, mended=apply)


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[
        list[Path], typer.Argument(help="Image files of any size and mode, or folders of them.", metavar="IMAGE")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest classes to name.")] = 1,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV instead of a table; with FILE.csv after it, write it there.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Name the class of images, and how probable it is.

    Images are brought to the size and the channels that the model was trained with, and to nothing else: a model of
    Fashion-MNIST, say, knows white things on black, and a photograph on white paper is yours to invert. Files that
    cannot be read are named, and the rest goes on. No code of a model's file is run.
    """
    from searchfm.home import Home
    from searchfm.learn import export, predict
    from searchfm.show import models as show
    from searchfm.tracking import models

    files = [path for path in images if as_csv and path.suffix == ".csv"]
    if (as_csv and as_json) or len(files) > 1:
        raise UserError(f"--csv: must be without --json, and with one file at most (came {len(files)})")
    with models.find(Home.find(home), model) as found:
        predictor = export.load(found.path)
    top = min(top, len(predictor.classes))
    rows = list(predict.predict(predictor, [path for path in images if path not in files], top=top))
    bad = [row for row in rows if row.error]
    if as_json:
        typer.echo(json.dumps([show.describe_prediction(row, top) for row in rows]))
    elif as_csv:
        text = show.prediction_csv(rows, top)
        if files:
            files[0].write_text(text, "utf-8")
        else:
            typer.echo(text, nl=False)
    elif len(bad) < len(rows):
        _console().print(show.prediction_table(rows, top))
    if len(bad) == len(rows):
        some = "; ".join(f"{row.image}: {row.error}" for row in bad[:3]) or "none was given"
        raise DataError(f"no image could be read: {some}{'; ...' if len(bad) > 3 else ''}")


@app.command()
def export(
    model: ModelArgument,
    kind: Annotated[
        str | None, typer.Option("--format", help="onnx, pt2 or safetensors. [default: by --output's name, else onnx]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write, or the folder for it. [default: NAME.FORMAT, here]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as one file that takes raw images, uint8 (N, channels, height, width), and answers probabilities.

    What is written is run and compared with the model: it is kept if no probability differs by more than 0.00001. onnx
    is for other runtimes, and needs searchfm[onnx]; pt2 is torch.export's, for torch alone, which unpickles it, so load
    others' only if you trust them; safetensors is weights alone, with how to build the model as JSON in it and beside
    it. `searchfm predict` reads onnx and safetensors.
    """
    from searchfm.home import Home
    from searchfm.learn import export
    from searchfm.show import models as show
    from searchfm.tracking import models

    place = output or Path()
    suffix = "" if place.is_dir() else place.suffix
    format_ = export.format_of(kind or suffix.removeprefix(".") or "onnx")
    if not place.is_dir() and suffix != f".{format_}":
        raise UserError(f"--output {place}: must be a folder, or end in .{format_}")
    with models.find(Home.find(home), model) as found:
        network, spec = export.load_model(found.path)
    path = place / f"{found.name}.{format_}" if place.is_dir() else place
    done = export.export(network, spec, format_, path, force=force)
    if as_json:
        typer.echo(json.dumps({"model": model, **show.describe_export(done)}))
    else:
        show.show_export(_console(), done)


def _open(
    argument: str, name: str | None, overrides: Mapping[str, Any], home: "Home"
) -> "tuple[Study, StudyRow | None, Mapping[str, Any]]":
    """The study that the command line means, what is stored of it, and its file as it is now."""
    from searchfm.search import files
    from searchfm.tuning import open_study

    path = files.find(argument)
    if path is None and argument.endswith(".toml"):
        raise StudyError(f"{argument}: no such file")
    file = files.read(path) if path else None
    wanted = name or (file.name if file else _stem(argument))
    study, stored = open_study(home, file, wanted, overrides)
    plain = file.study(name=wanted).resolved if file else stored.file if stored else {}
    return study, stored, plain


def _stem(study: str) -> str:
    """`reports/a8-vit-layers` is the study `a8-vit-layers`, and `some/vit.toml` what that file says."""
    from searchfm.search import files

    path = files.find(study) if study.endswith(".toml") else None
    return files.read(path).name if path else study.removesuffix(".toml").rpartition("/")[2]


def _summary(study: "StudyRow", home: "Home") -> dict[str, Any]:
    """What `--json` says of a study."""
    best = study.best
    return {
        "study": study.name,
        "trials": {
            **{state: len(study.of(state)) for state in ("complete", "pruned", "failed")},
            "total": len(study.trials),
        },
        "best": {"trial": best.number, "value": best.value, "params": dict(best.params)} if best else None,
        "seconds": round(study.seconds, 3),
        "home": str(home.path),
    }


def _data_dir(given: Path | None) -> Path | None:
    chosen = given or (Path(os.environ["SEARCHFM_DATA"]) if os.environ.get("SEARCHFM_DATA") else None)
    return chosen.expanduser().absolute() if chosen else None


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


class _Stop:
    """Ctrl-C, SIGTERM and --timeout: the first asks everything to leave in order, a second Ctrl-C leaves at once."""

    def __init__(self, timeout: float | None) -> None:
        self.signal = 0
        self._deadline = time.monotonic() + timeout if timeout is not None else None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether the search should stop."""
        return bool(self.signal) or (self._deadline is not None and time.monotonic() > self._deadline)

    def leave(self) -> None:
        """Ends the command as a signal would have, if one came."""
        if self.signal:
            raise typer.Exit(128 + self.signal)

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            self.leave()

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        print("\nsearchfm: stopping; running trials are kept and go on with the same command", file=sys.stderr)


def _say(message: str, code: int) -> int:
    print(f"searchfm: {message}", file=sys.stderr)
    return code
