"""The command line: parses, calls, prints. What a command needs is imported in the command, not before.

Exit codes: 0 done; 1 a disk, database or network failed, the same command resumes; 2 the user's mistake; 130 and 143
interrupted, resumable. Anything else is a bug and shows its traceback.
"""

import atexit
import errno
import gc
import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from searchfm import __version__, shell
from searchfm.errors import OutOfTimeError, SearchfmError, StorageError, StudyError, UserError, one_of
from searchfm.home import Home, data_folder, shipped, shipped_folder, write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from searchfm.show.live import Status
    from searchfm.show.schema import Part

BEGAN = time.monotonic()  # of the command: its --timeout counts from here, imports included
app = typer.Typer(
    name="searchfm",
    help="Hyperparameter search for image classifiers: search, prune, track, retrain, test once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # in "rich", a bracket in a help text would be taken for a tag
)

DOING = {  # what commands show at once, before they import what they need
    "clean": "reading the home and the cache",
    "backup": "copying the home",
    "check": "checking the home",
    "compare": "comparing the studies",
    "dashboard": "starting the user interfaces",
    "data": "reading data sets",
    "export": "loading the model",
    "models": "reading the registry",
    "predict": "loading the model",
    "remove": "reading the study",
    "report": "writing the report",
    "status": "reading the studies",
    "stop": "reading the study",
    "studies": "reading study files",
    "sync": "reading Optuna and MLflow",
    "trial": "reading the study",
    "worker": "dialling the search",
}
MODEL = "A study (its champion), models:/NAME@ALIAS, models:/NAME/VERSION, an .onnx, a .safetensors, a trial's folder."
ModelArgument = Annotated[str, typer.Argument(help=MODEL, metavar="MODEL", autocompletion=shell.home_studies)]
HomeOption = Annotated[Path | None, typer.Option(help="Folder of all studies. [default: SEARCHFM_HOME or ./runs]")]


FORMATS = ("onnx", "pt2", "safetensors")  # of exported models
PORTS = 65_535  # the last port of a host
MANY = 1000  # trials whose keys' importance takes more than half a second
WhereOption = partial(typer.Option, rich_help_panel="Where workers run")  # a panel of --help
WorkersOption = Annotated[str | None, typer.Option(metavar="N|auto", help="Workers. [default: auto: cores or GPUs]")]
PerGpuOption = Annotated[
    str | None,
    WhereOption(metavar="N|auto", help="Workers that share a GPU; auto: by the first trial's memory. [default: 1]"),
]
DeviceOption = Annotated[str | None, WhereOption(help="auto, cpu, cuda, cuda:1 or mps. [default: auto]")]
DataDirOption = Annotated[Path | None, typer.Option(help="Folder to search for data first. [default: SEARCHFM_DATA]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]
CodeOption = Annotated[bool, typer.Option("--allow-code", help="Run the model's own code, if it is [model.custom].")]
StudyArgument = Annotated[
    str,
    typer.Argument(
        help="A study by name, or the path of a study file.", metavar="STUDY", autocompletion=shell.home_studies
    ),
]


def _engine_options(
    engine: Annotated[
        str, WhereOption(help="local, listen, slurm, ray, or a TOML file with [engine].", autocompletion=shell.engines)
    ] = "local",
    workers: Annotated[
        str | None, WhereOption(metavar="N|auto", help="Workers. [default: auto: cores or GPUs; slurm: 1; ray: all]")
    ] = None,
    device: DeviceOption = None,
    workers_per_gpu: PerGpuOption = None,
    listen: Annotated[
        str | None, WhereOption(metavar="HOST:PORT", help="Address that workers of other machines dial.")
    ] = None,
    tls_cert: Annotated[Path | None, WhereOption(help="Certificate of --listen, as PEM; encrypts.")] = None,
    tls_key: Annotated[Path | None, WhereOption(help="Key of --listen, as PEM.")] = None,
    gpus_per_worker: Annotated[
        float | None, WhereOption(min=0, help="Ray: GPUs of a worker, such as 0.25. [default: 1 if there are any]")
    ] = None,
    cpus_per_worker: Annotated[float | None, WhereOption(min=0.01, help="Ray: cores of a worker. [default: 1]")] = None,
    partition: Annotated[str | None, WhereOption(help="SLURM: partition. [default: SLURM's]")] = None,
    gres: Annotated[str | None, WhereOption(help="SLURM: resources of a worker, such as gpu:1.")] = None,
    time_: Annotated[str | None, WhereOption("--time", help="SLURM: time limit of a worker, such as 4:00:00.")] = None,
    allow_code: Annotated[bool, WhereOption("--allow-code", help="Run the code that [model.custom] names.")] = False,
    slurm_args: Annotated[str | None, WhereOption(help="SLURM: further flags of sbatch, in one string.")] = None,
) -> dict[str, Any]:
    """The arguments of `api.tune` and `api.retrain`."""
    return {
        "engine": engine,
        "device": device,
        "workers": None if workers == "auto" else _number(workers),
        "workers_per_gpu": _number(workers_per_gpu),
        "allow_code": allow_code,
        "engine_options": {
            "listen": listen,
            "tls_cert": tls_cert and str(tls_cert.absolute()),
            "tls_key": tls_key and str(tls_key.absolute()),
            "ray.gpus_per_worker": gpus_per_worker,
            "ray.cpus_per_worker": cpus_per_worker,
            "slurm.partition": partition,
            "slurm.gres": gres,
            "slurm.time": time_,
            "slurm.args": _sbatch_flags(slurm_args or ""),
        },
    }


def _sbatch_flags(text: str) -> tuple[str, ...]:
    """The words of `--slurm-args`, as a shell has them. Raises UserError for a quotation without an end."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--slurm-args {text}: {str(error).lower()}; must be flags as a shell reads them") from None


def _number(text: str | None) -> int | str | None:
    """A whole number as such; any other text is left to the check of the options."""
    return int(text) if text is not None and text.isdecimal() else text


def _with_engine(command: Callable[..., None]) -> Callable[..., None]:
    """The command with all flags of `_engine_options` in place of its last parameter, `options`."""
    flags = dict(inspect.signature(_engine_options).parameters)
    own = {name: item for name, item in inspect.signature(command).parameters.items() if name != "options"}

    def wrapper(**values: Any) -> None:
        options = _engine_options(**{name: values[name] for name in flags})
        command(**{name: values[name] for name in own}, options=options)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = inspect.Signature([*own.values(), *flags.values()])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: item.annotation for name, item in (own | flags).items()}
    return wrapper


def _skip_last_collection() -> None:
    """Freezes all objects, so that the interpreter does not collect them at its end.

    Not where triton was imported: its nanobind would report them as leaked.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """Runs the command of `sys.argv`, and ends the process."""
    # Not every 700 objects: collections took a sixth of the CPU time of the imports of `retrain`.
    gc.set_threshold(50_000)
    atexit.register(_skip_last_collection)
    try:
        sys.exit(shell.run(app))
    except SearchfmError as error:
        print(f"searchfm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of a study, a file or a folder that was named
            limits = "a name may have 255 bytes, a path 4095"
            print(f"searchfm: {str(error.filename)[:200]}...: {error.strerror}; {limits}", file=sys.stderr)
            sys.exit(UserError.exit_code)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
            raise
        sys.exit(f"searchfm: {error.filename or 'disk'}: {error.strerror}; fix this and run the same command again")


def _version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")] = False,
) -> None:
    if context.invoked_subcommand not in ("tune", "retrain"):  # these show their own progress
        context.call_on_close(_doing(DOING.get(str(context.invoked_subcommand), "starting")).end)


def _doing(text: str) -> "Status":
    """Shows what is being done, until something is printed; nothing with --json or --csv, which programs read."""
    from searchfm.show import live

    return live.Status("" if {"--json", "--csv"} & set(sys.argv) else text)


@app.command()
@_with_engine
def tune(
    study: Annotated[
        str,
        typer.Argument(help="A study file by name or path, or a study of the home.", autocompletion=shell.all_studies),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in total, earlier ones included. [default: the file's]")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A data set by name, or a path: a folder of images or parquet files, an .npz file.",
            autocompletion=shell.data_sets,
        ),
    ] = None,
    subset: Annotated[
        float | None, typer.Option(help="Fraction of the training part. [default: the file's; 1 on other data]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a trial. [default: the file's]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key: optimizer.lr=0.01 or a range {low=…, high=…}.",
            autocompletion=shell.assignments,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Study name. [default: the file's name]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search. [default: the file's]")] = None,
    first: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Try first: [[first]] tables, or a trial's config.toml.")
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(metavar="STUDY", help="Try first: the best trials of a study.", autocompletion=shell.home_studies),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Stop this long after the command's start: 90 (seconds), 30m or 1h30m."),
    ] = None,
    retrain_: Annotated[
        bool, typer.Option("--retrain", help="Then retrain the best and test once; --timeout is for all of it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and forecast time, memory, disk.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Add a trial for each failed one.")] = False,
    home: HomeOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    *,
    options: dict[str, Any],
) -> None:
    """Search a study: propose, train, prune and record trials. The same command again resumes it."""
    from searchfm import api
    from searchfm.stopping import StopRequest

    console = _console(stderr=as_json)
    values: dict[str, Any] = {"name": name, "trials": trials, "dataset": dataset, "subset": subset, "epochs": epochs}
    values |= {"set": set_ or (), "seed": seed, "first": first, "warm_start": warm_start}
    if dry_run:
        values |= {"home": home, "data_dir": data_dir, **options}
        with StopRequest(exits=True) as stop:
            timed = api.forecast(study, progress=_console(stderr=True), stopping=stop, **values)
        from searchfm.show import schema, terminal

        shown = schema.describe_plan(timed.study, timed.stored, forecast=schema.describe_forecast(timed.forecast))
        _output(as_json, shown, lambda: terminal.show_forecast(console, timed))
        return
    unopened = _unopened(study, home, values, {"final": None} if retrain_ else {}) if as_json else nullcontext()
    with StopRequest(exits=True, began=BEGAN) as stop, unopened:
        tuned = api.tune(
            study,
            timeout=timeout,
            retrain=retrain_,
            retry_failed=retry_failed,
            home=home,
            data_dir=data_dir,
            progress=console,
            stopping=stop,
            **values,
            **options,
        )
        from searchfm import tuning
        from searchfm.show import schema, summary, terminal

        ended = tuned.ended
        assert ended is not None
        final = tuned.final if retrain_ else None
        if as_json:
            more: dict[str, Any] = {"elapsed": round(stop.elapsed, 3), "ended_by": ended.rule or None}
            if retrain_:
                more["final"] = final and schema.describe(schema.Retrained, final)
            described = schema.describe_study(tuned.record, Home(tuned.home), listed=True, **more)
            typer.echo(schema.dump(described))
        summary.show_end(
            console,
            tuned.record,
            trials=ended.trials,
            reason=ended.reason,
            missing=ended.missing,
            elapsed=ended.seconds,
            stopped=ended.stopped,
            last=final is None,
        )
        if final is not None:
            terminal.show_final(console, final)
    tuning.check_success(tuned.record)


@app.command()
@_with_engine
def retrain(
    study: StudyArgument,
    top: Annotated[
        int | None, typer.Option(min=1, help="Number of finalists, the best trials. [default: as before, else 3]")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Fresh seeds of each finalist. [default: as before, else 3]")
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Choose this trial, without finalists.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of the final training. [default: as before, else the trial's]")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Retrain from scratch with new seeds.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Make the model the champion, better or not.")] = False,
    home: HomeOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    *,
    options: dict[str, Any],
) -> None:
    """Train the best trials with fresh seeds, the winner on all training data, test it once, and register it."""
    from searchfm import api
    from searchfm.stopping import StopRequest

    console = _console(stderr=as_json)
    with StopRequest(exits=True) as stop:
        final = api.retrain(
            study,
            top=top,
            seeds=seeds,
            trial=trial,
            epochs=epochs,
            again=again,
            promote=promote,
            home=home,
            data_dir=data_dir,
            progress=console,
            stopping=stop,
            **options,
        )
        from searchfm.show import schema, terminal

        _output(as_json, schema.describe(schema.Retrained, final), lambda: terminal.show_final(console, final))


@app.command()
def worker(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Address that the search printed.")],
    workers: WorkersOption = None,
    device: DeviceOption = None,
    workers_per_gpu: PerGpuOption = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The listener's certificate, as PEM.")] = None,
    retry: Annotated[float, typer.Option(min=0, help="Seconds to dial while no search answers.")] = 60.0,
    allow_code: CodeOption = False,
    home: HomeOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Work for a search on another machine that was started with --engine listen, until it ends or Ctrl-C.

    Both machines mount the home folder, which holds the key; SEARCHFM_WORKER_KEY replaces it. A search that is stopped
    and started again is dialled again.
    """
    from searchfm.engines import agent
    from searchfm.engines.start import read_options
    from searchfm.show import live

    folder = data_folder(data_dir)
    flags = {
        "device": device,
        "workers": None if workers == "auto" else _number(workers),
        "workers_per_gpu": _number(workers_per_gpu),
        "tls_cert": tls_cert and str(tls_cert),
        "allow_code": allow_code or None,
        "data_dir": folder and str(folder),
    }
    agent.main(address, Home.find(home).path, read_options("listen", flags), retry, live.notify)


@app.command()
def stop(
    study: StudyArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop the search or final training of a study, from another terminal or machine, as SIGTERM does.

    Running trials are kept; the same command resumes them.
    """
    from searchfm import api
    from searchfm.search.lock import request_stop
    from searchfm.show import schema

    name = api.open_study(study, home=home).name
    asked = request_stop(Home.find(home), name) or "its coordinator"
    values = schema.StopRequested(study=name, coordinator=asked)
    _output(as_json, values, lambda: typer.echo(f"study {name!r}: asked {asked} to stop"))


@app.command()
def status(
    study: Annotated[
        str | None, typer.Argument(help="Study name. [default: all studies]", autocompletion=shell.home_studies)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List all trials of the study, not only the best.")] = False,
    sort: Annotated[
        str | None, typer.Option(metavar="KEY", help="List all by value, number, epochs, seconds, parameters or a key.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all trials as CSV, a column for each key.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Redraw every two seconds, until Ctrl-C.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the studies, how far they are, and their best trials."""
    from searchfm.search.files import study_name
    from searchfm.search.importance import importances
    from searchfm.search.lock import holder
    from searchfm.search.storage import load_study, open_storage, read_again, read_studies
    from searchfm.show import schema, summary

    where, console = Home.find(home), _console()
    name = None if study is None else study_name(study)
    every = every or as_csv or sort is not None
    if every and (name is None or watch):
        raise UserError("--all, --csv and --sort: need a study, and no --watch")
    if as_json and (as_csv or watch):
        raise UserError("--json: must be without --csv and --watch")
    if watch:
        from searchfm.show import progress

        progress.watch(console, read_again(where, name), partial(summary.overview, where, name))
        return
    storage = None if name is None else open_storage(where)
    records = read_studies(where) if name is None or storage is None else [load_study(storage, where, name)]
    if every:
        trials, key = summary.sort_trials(records[0].trials, sort or ("number" if as_csv else "value"))
    if as_json:
        held = ((record, holder(where, record.name)) for record in records)
        more = {} if name is None else {"undrawn": len(records[0].undrawn)}
        values = [
            schema.describe_study(record, where, listed=name is not None, coordinator=process, **more)
            for record, process in held
        ]
        typer.echo(schema.dump(values))
    elif as_csv:
        typer.echo(schema.trials_csv(records[0], trials), nl=False)
    elif every:
        console.print(summary.trial_table(trials, console.width, importance={key: 1.0} if key else None))
    elif not records:
        typer.echo(f"{where.path} holds no study yet; begin with: searchfm tune mlp")
    else:
        importance = importances(records[0], storage) if storage and len(records[0].trials) <= MANY else None
        console.print(summary.overview(where, name, console, records, importance), soft_wrap=False)
        if name is not None:
            console.print(str(records[0].folder), style="dim", markup=False)


@app.command()
def trial(
    study: StudyArgument,
    number: Annotated[int, typer.Argument(min=0, metavar="NUMBER", help="A trial of the study by its number.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one trial: its end, config, learning curve, log and files, and the commands that go on from it."""
    from searchfm import api
    from searchfm.show import schema, summary

    record = api.open_study(study, home=home).record
    if number >= len(record.trials):
        may_be = f"0 to {len(record.trials) - 1}" if record.trials else "none yet"
        raise UserError(f"study {record.name!r}: trial {number} is unknown; may be {may_be}")
    chosen = record.trials[number]
    if as_json:
        typer.echo(schema.dump(schema.describe_page(record, chosen)))
    else:
        summary.show_trial(_console(), record, chosen)


@app.command()
def studies(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Built-in study file, or a path. [default: list all]", autocompletion=shell.built_in_studies
        ),
    ] = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the built-in study files, or show one: its question, its space, the cost of a trial."""
    from searchfm.config import DATASETS, image_shape
    from searchfm.search import files
    from searchfm.show import live, schema, terminal

    console = _console()
    if name is None:
        questions = {i: files.question((shipped_folder() / f"{i}.toml").read_text("utf-8")) for i in shipped()}
        rows = [
            schema.StudyFile(study=item, question=text, group=item.rpartition("/")[0] or None)
            for item, text in questions.items()
        ]
        _output(as_json, rows, lambda: terminal.show_studies(console, questions))
        return
    path = files.find(name)
    if path is None:
        raise files.not_found(name)
    study = files.read(path).study()
    live.notify(*study.notes)
    shape, cost = image_shape(study.example.data), None
    configs, classes = study.samples(16), DATASETS[study.example.data.name][1] if shape else 0
    if shape is not None and not study.customs():  # else known only once the images are read
        from searchfm.learn.costs import kept_costs

        cost = kept_costs(configs, shape, classes)
    elif shape is not None and allow_code:
        from searchfm.learn.models import costs
        from searchfm.learn.models.custom import Code

        cost = costs(configs, shape, classes, Code(allow_code))
    _output(as_json, schema.describe_plan(study, cost=cost), lambda: terminal.show_plan(console, study, None, cost))


@app.command()
def keys(
    table: Annotated[
        str | None,
        typer.Argument(help="A table, such as optimizer, or a key. [default: all]", autocompletion=shell.tables),
    ] = None,
    as_schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON Schema of study files, for editors.")
    ] = False,
    as_page: Annotated[bool, typer.Option("--markdown", help="Print the reference page of all keys.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the keys of study files and engine files: default, meaning and values."""
    from searchfm.show import keys

    if as_schema or as_page:
        if table is not None or as_json or (as_schema and as_page):
            raise UserError("--schema, --markdown: are of all keys, each alone")
        typer.echo(json.dumps(keys.json_schema(), indent=1) if as_schema else keys.page(), nl=as_schema)
        return
    chosen = keys.sections(table)
    if as_json:
        from searchfm.show import schema

        typer.echo(schema.dump(schema.describe_keys(chosen)))
    else:
        keys.show_keys(_console(), chosen)


@app.command()
def data(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Data set to fetch and show, or a path. [default: list all]", autocompletion=shell.data_sets
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="File of a picture of samples, .png. [default: in the cache folder]")
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in data sets, or show one, or your own: classes, sizes, modes, the split, duplicates, samples."""
    from searchfm.config import DATASETS
    from searchfm.learn import datasets
    from searchfm.show import schema, terminal

    where = data_folder(data_dir)
    if name is None:
        if picture is not None:
            raise UserError(f"--picture {picture}: needs the name or path of a data set")
        rows = [datasets.describe(item, where) for item in DATASETS]
        _output(as_json, [schema.describe_data(row) for row in rows], lambda: terminal.show_data(_console(), rows))
        return
    if picture is not None and picture.suffix != ".png":
        raise UserError(f"--picture {picture}: must end in .png")
    from searchfm import figures
    from searchfm.learn.overview import overview

    datasets.fetch(name, where)
    row, seen = datasets.describe(name, where), overview(name, where)
    file = picture or datasets.picture_file(row.name)
    write_whole(file, figures.png(figures.samples(seen.samples)))
    values = [schema.describe_data(row, seen, file)]
    _output(as_json, values, lambda: terminal.show_overview(_console(), row, seen, file))


@app.command()
def dashboard(
    study: Annotated[
        str | None, typer.Argument(help="Study to open. [default: the latest]", autocompletion=shell.home_studies)
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=PORTS, help="Port of optuna-dashboard; MLflow has --mlflow-port.")
    ] = 8080,
    mlflow_port: Annotated[int, typer.Option(min=1, max=PORTS, help="Port of the MLflow UI.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to bind; beyond loopback a token is required.")] = "127.0.0.1",
    allow_host: Annotated[list[str] | None, typer.Option(help="Also answer to this host name; repeatable.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File of the token. [default: SEARCHFM_UI_TOKEN]")] = None,
    only: Annotated[Literal["optuna", "mlflow"] | None, typer.Option(help="Serve one of both, as a service.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve optuna-dashboard and the MLflow UI on loopback, until Ctrl-C."""
    from searchfm import api
    from searchfm.show import terminal
    from searchfm.show.dashboard import serve, serve_one
    from searchfm.show.guard import Access, read_token

    where, show = Home.find(home), partial(terminal.show_addresses, _console(), as_json)
    access = Access(host, tuple(allow_host or ()), read_token(token_file))
    if only is not None:
        if study is not None:
            raise UserError(f"{study}: --only serves all studies; leave out the name")
        return serve_one(where, only, access, (port, mlflow_port), lambda address: show(**{only: address}))
    record = api.open_study(study, home=home).record if study else None
    return serve(where, record, access, (port, mlflow_port), show)


@app.command()
def compare(
    context: typer.Context,
    studies: Annotated[
        list[str], typer.Argument(help="Studies by name.", metavar="STUDY", autocompletion=shell.home_studies)
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Also write the comparison as a page.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also write accuracy against time, as .png or .svg.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare studies: accuracy with its interval, paired tests, time and size. Also logged to MLflow."""
    from msgspec.structs import asdict

    from searchfm import api
    from searchfm.search.notes import web_address
    from searchfm.show import compare as comparing
    from searchfm.show import live, terminal
    from searchfm.tracking import mirror, registry

    if picture is not None and picture.suffix not in comparing.SUFFIXES:
        raise UserError(f"--picture {picture}: must end in {' or '.join(comparing.SUFFIXES)}")
    where, console = Home.find(home), _console()
    lines = comparing.compare_studies([api.open_study(study, home=home).record for study in studies])
    if html is not None:
        write_whole(html, comparing.comparison_page(lines).encode())
    if picture is not None:
        write_whole(picture, comparing.comparison_picture(lines, picture.suffix))
    tables, notes = comparing.comparison_tables(lines, console.width), comparing.comparison_notes(lines)
    written = [path for path in (html, picture) if path is not None]
    _output(as_json, lines, lambda: terminal.show_comparison(console, tables, notes, written))
    if not mirror.writable(where):
        live.notify(f"{where.path} cannot be written: the comparison is not logged to MLflow")
        return
    context.call_on_close(_doing("logging the comparison to MLflow").end)
    values = [{key: value for key, value in asdict(line).items() if key != "schema"} for line in lines]
    files = partial(comparing.comparison_files, lines)
    table = registry.log_comparison(where, values, comparing.comparison_markdown(lines), files)
    if not as_json:
        terminal.show_page(console, web_address(where.tracking_uri), table)


@app.command()
def report(
    context: typer.Context,
    study: StudyArgument,
    output: Annotated[Path | None, typer.Option(help="File to write. [default: report.html of the study]")] = None,
    home: HomeOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a report on one page: question, result, uncertainty, search space, errors. Also logged to MLflow."""
    from searchfm.format import plural
    from searchfm.search.files import study_name
    from searchfm.search.storage import load_study, open_storage
    from searchfm.show import live, schema
    from searchfm.show.report import report_page
    from searchfm.tracking import follow, mirror, registry

    where = Home.find(home)
    storage = open_storage(where)  # one, since it keeps the trials that it has read
    record = load_study(storage, where, study_name(study))
    path = output or record.folder / "report.html"
    try:
        environment = registry.study_environment(where, record)
    except StorageError:  # the page then has what the trials know; `log_report` raises the error again
        environment = {}
    write_whole(path, report_page(record, storage, environment, data_folder(data_dir)).encode())
    _output(as_json, schema.Report(study=record.name, report=str(path)), lambda: typer.echo(path))
    if not mirror.writable(where):
        live.notify(f"{where.path} cannot be written: the report is not logged to MLflow")
        return
    logged = _doing("logging the report to MLflow")
    context.call_on_close(logged.end)
    registry.log_report(where, record, path)
    logged.end()
    if undrawn := len(record.undrawn):  # 0.06 s for each trial
        context.call_on_close(_doing(f"drawing the pictures of {plural(undrawn, 'trial')}").end)
    follow.draw_missing(where, record)


@app.command()
def sync(
    study: StudyArgument,
    apply: Annotated[bool, typer.Option("--apply", help="Send what is listed; without it nothing is written.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Align MLflow with Optuna: list what is missing, doubled or different, and send it with --apply."""
    from searchfm.search.files import study_name
    from searchfm.search.storage import locked_study, read_study
    from searchfm.show import schema, terminal
    from searchfm.tracking import follow

    where, name = Home.find(home), study_name(study)
    with locked_study(where, name) if apply else nullcontext((read_study(where, name), None)) as (record, _):
        differences = follow.sync(where, record, apply=apply)
    values = schema.describe_differences(differences, applied=apply)
    _output(as_json, values, lambda: terminal.show_differences(_console(), record, differences, applied=apply))


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", metavar="IMAGE")],
    top: Annotated[int, typer.Option(min=1, help="Number of most probable classes to print.")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV; write it to FILE.csv if that follows.")] = False,
    allow_code: CodeOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the classes of images, with probabilities.

    Images are converted to the size and channels that the model was trained with, nothing more: Fashion-MNIST shows
    white clothes on black, so invert a photograph on white paper first. Unreadable files are named, the others are
    answered (exit code 0; 2 if none can be read). No code in a model's file is run.
    """
    from searchfm.learn import export
    from searchfm.show import schema, terminal
    from searchfm.tracking import registry

    files = [path for path in images if as_csv and path.suffix == ".csv"]
    if (as_csv and as_json) or len(files) > 1:
        raise UserError(f"--csv: must be without --json, and with one file at most (came {len(files)})")
    with registry.find_model(Home.find(home), model) as (_, source):
        predictor = export.load(source, allow_code=allow_code)
    top = min(top, len(predictor.classes))
    rows = list(export.predict(predictor, [path for path in images if path not in files], top=top))
    if as_json:
        typer.echo(schema.dump([schema.describe_prediction(row, top) for row in rows]))
    elif files:
        write_whole(files[0], schema.prediction_csv(rows, top).encode())
    elif as_csv:
        typer.echo(schema.prediction_csv(rows, top), nl=False)
    elif not all(row.error for row in rows):
        _console().print(terminal.prediction_table(rows, top))
        terminal.show_predicted(_console(), rows, predictor.classes)
    export.check_any(rows)


@app.command()
def export(
    model: ModelArgument,
    kind: Annotated[
        str | None, typer.Option("--format", help="onnx, pt2 or safetensors. [default: by --output's name, else onnx]")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="File to write, or its folder; a new one ends with /. [default: NAME.FORMAT]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    allow_code: CodeOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as one file that takes raw images, uint8 (N, channels, height, width), and answers probabilities.

    What is written is run and compared with the model: it is kept if no probability differs by more than 0.00001. onnx
    is for other runtimes, and needs searchfm[onnx]; pt2 is torch.export's, for torch alone, which unpickles it, so load
    others' only if you trust them; safetensors is weights alone, with how to build the model as JSON in it and beside
    it. `searchfm predict` reads onnx and safetensors.
    """
    path = _export_file(kind, output)
    from searchfm.learn import export  # imports torch
    from searchfm.show import schema
    from searchfm.tracking import registry

    with registry.find_model(Home.find(home), model) as (name, source):
        network, spec = export.load_model(source, allow_code=allow_code)
    done = export.export(network, spec, path(name), force=force)
    text = f"{done.path}: {done.bytes:,} bytes; largest difference of a probability {done.difference:.1e}"
    used = "" if done.format == "pt2" else f"\nnext  searchfm predict {shlex.quote(str(done.path))} IMAGE..."
    _output(as_json, schema.describe_export(model, done), lambda: typer.echo(text + used))


@app.command()
def models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the models that `retrain` registered: version, champion, study, trial, test accuracy."""
    from searchfm.show import schema, terminal
    from searchfm.tracking import registry

    rows = registry.models(Home.find(home))
    if not rows and not as_json:
        typer.echo("no model is registered yet; first: searchfm tune STUDY, then searchfm retrain STUDY")
        return
    values = [schema.describe(schema.Registered, row) for row in rows]
    _output(as_json, values, lambda: _console().print(terminal.model_table(rows)))


@app.command()
def remove(
    study: StudyArgument,
    with_models: Annotated[
        bool, typer.Option("--models", help="Also delete its versions in MLflow's registry.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a study: its trials in Optuna, its runs in MLflow, its folder.

    Its versions in MLflow's registry stay unless --models is given, also later. The record of test reads stays.
    """
    from searchfm import upkeep
    from searchfm.format import plural
    from searchfm.search.files import study_name
    from searchfm.search.storage import read_study
    from searchfm.show import schema

    where, name = Home.find(home), study_name(study)
    try:
        record = read_study(where, name)
        gone = f"{plural(len(record.trials), 'trial')} in Optuna and MLflow"
        gone += f", {upkeep.bytes_in(record.folder):,} bytes in {record.folder}"
        remove_it = partial(upkeep.remove, where, name, models=with_models)
    except StudyError:
        left = upkeep.left_models(where, name) if with_models else ()
        if not left:
            raise
        gone, remove_it = f"all that is left of it: {', '.join(left)}", partial(upkeep.remove_models, where, name)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"remove {name}: asks first, and there is no terminal to answer; --yes removes it")
        typer.confirm(f"Remove study {name!r} ({gone})?", abort=True, err=True)
    removed = remove_it()
    text = f"removed study {name!r}: {plural(removed.trials, 'trial')}, {removed.bytes:,} bytes"
    if removed.models:
        text += f"; removed from the registry: {', '.join(removed.models)}"
    if removed.kept:
        text += f"; kept in the registry: {', '.join(removed.kept)} (searchfm remove {name} --models removes them)"
    _output(as_json, schema.describe(schema.RemovedStudy, removed), lambda: typer.echo(text))


@app.command()
def clean(
    study: Annotated[
        str | None, typer.Argument(help="Study by name. [default: all]", autocompletion=shell.home_studies)
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Delete the files; without it only list them.")] = False,
    keep: Annotated[
        int | None,
        typer.Option(min=0, help="Number of best trials to keep the weights of. [default: the study's search.keep]"),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Add pictures of trials; report and sync --apply draw them again.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="Add the cache of all homes; searches compute it again.")
    ] = False,
    downloads: Annotated[bool, typer.Option("--downloads", help="Add downloaded data sets.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List files that can be deleted: weights of trials that are not among the best, leftovers of crashes.

    Delete them with --apply. Further flags add files that can be made again. Keep final models, registered models,
    predictions, records, and what running and paused trials need. Skip studies that another process holds.
    """
    from searchfm import disk
    from searchfm.search.files import study_name
    from searchfm.show import schema, terminal

    if study is not None and (cache or downloads):
        flag = "--cache" if cache else "--downloads"
        raise UserError(f"{flag}: the cache is of all studies; leave out {study}")
    where, name = Home.find(home), None if study is None else study_name(study)
    cleaned = disk.clean(where, name, keep=keep, pictures=pictures, cache=cache, downloads=downloads, apply=apply)
    command = shlex.join(["searchfm", *(word for word in sys.argv[1:] if word != "--apply")])
    values = schema.describe(schema.Cleaned, cleaned)
    _output(as_json, values, lambda: terminal.show_disk(_console(), cleaned, command))


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the copy.", metavar="FOLDER")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy studies, models and databases of the home into FOLDER, also while searches run.

    The copy is a home: use it with --home FOLDER. PostgreSQL's tables become a SQLite file in it; unset
    SEARCHFM_STORAGE to use that. The data of an MLflow server and worker.key are not copied.
    """
    from searchfm.backup import backup
    from searchfm.format import plural
    from searchfm.show import live, schema
    from searchfm.stopping import exit_at_second

    exit_at_second(lambda number, _: sys.exit(128 + number))  # a backup that is stopped leaves nothing
    done = backup(Home.find(home), folder.expanduser().absolute())
    text = f"{done.folder}: {plural(done.studies, 'study')}, {plural(done.trials, 'trial')}"
    text += f", {done.bytes:,} bytes\nnext  {done.command} status --home {shlex.quote(done.folder)}"
    _output(as_json, schema.describe(schema.BackedUp, done), lambda: typer.echo(text))
    if not done.mlflow:
        live.notify("the copy has no database of MLflow; `searchfm sync STUDY --apply` sends the runs to MLflow")
    if count := len(done.checked.findings):
        problems = f"{plural(count, 'problem')} in the copy, which the home may have too"
        live.notify(f"{problems}: {done.command} check --home {shlex.quote(done.folder)}")


@app.command()
def check(
    study: Annotated[
        str | None, typer.Argument(help="Study by name. [default: all]", autocompletion=shell.home_studies)
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete leftovers and weights that are not kept; write final.json again.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the home: SQLite databases, files of trials and final models against their records, leftovers.

    Exit with code 1 if a problem remains. `searchfm sync STUDY` compares MLflow with Optuna.
    """
    from searchfm.check import check
    from searchfm.search.files import study_name
    from searchfm.show import schema, terminal

    checked = check(Home.find(home), None if study is None else study_name(study), repair=repair)
    values = [schema.describe(schema.Finding, finding) for finding in checked.findings]
    _output(as_json, values, lambda: terminal.show_findings(_console(), checked))
    raise typer.Exit(0 if checked.ok else 1)


def _export_file(kind: str | None, output: str | None) -> Callable[[str], Path]:
    """The file for a model of a name, in the format that `--format` and `--output` name. A folder that ends with a
    slash is made. Raises UserError.
    """
    path = Path(output or "")
    made = bool(output) and str(output).endswith("/")
    folder = path.is_dir() or made
    kind = kind or ("" if folder else path.suffix.removeprefix(".")) or "onnx"
    if kind not in FORMATS:
        raise UserError(f"format {kind!r}: must be one of {one_of(kind, FORMATS)}")
    if not folder and path.suffix != f".{kind}":
        raise UserError(f"--output {path}: must be a folder (a new one ends with /), or end in .{kind}")
    if made and not (path.is_dir() or (path.parent.is_dir() and not path.exists())):
        raise UserError(f"--output {output}: cannot be made, there is no folder {path.parent}")

    def file(name: str) -> Path:
        if made:
            path.mkdir(exist_ok=True)
        return path / f"{name}.{kind}" if folder else path

    return file


@contextmanager
def _unopened(study: str, home: Path | None, values: Mapping[str, Any], more: Mapping[str, None]) -> Iterator[None]:
    """Prints the study without trials where the timeout ends before it is opened. values: of `api.find_plan`; more:
    further keys of the study.
    """
    try:
        yield
    except OutOfTimeError:
        from searchfm import api
        from searchfm.show import schema

        where = Home.find(home)
        plan, *_ = api.find_plan(study, where, **values)
        elapsed = round(time.monotonic() - BEGAN, 3)
        typer.echo(schema.dump(schema.describe_unopened(plan, where, elapsed=elapsed, ended_by=None, **more)))
        raise


def _console(*, stderr: bool = False) -> "Console":
    from searchfm.show.live import open_console

    return open_console(stderr=stderr)


def _output(as_json: bool, values: "Part | Sequence[Part]", show: Callable[[], object]) -> None:
    if as_json:
        from searchfm.show.schema import dump

        typer.echo(dump(values))
    else:
        show()
