"""The terminal: tables and sentences."""

import csv
import io
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from searchfm.format import (
    final_sentences,
    megaflop,
    param_texts,
    plural,
    saved_epochs,
    seconds,
    short,
    show_params,
    state,
    states,
)
from searchfm.home import Home
from searchfm.records import Final, State, StudyRecord, Trial
from searchfm.search.space import Choice, Range, leaves
from searchfm.search.study import Study

if TYPE_CHECKING:
    from searchfm.learn.datasets import Described
    from searchfm.learn.export import Prediction
    from searchfm.tracking.mirror import Difference

Costs = Mapping[str, tuple[float, float]]  # minimum and maximum of a trial's `parameters` and `mflop`
STYLES: Mapping[State, str] = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}
SHOWN = 20  # classes, those with the lowest recall

# --- studies ----------------------------------------------------------------------------------------------------------


def study_table(studies: Iterable[StudyRecord]) -> Table:
    """A row per study: the number of trials in each state, and the best value."""
    shown = table("study", "trials", *STYLES, "best", "data")
    for study in studies:
        counts = [f"{len(study.trials)}/{study.planned}", *(str(len(study.of(state))) for state in STYLES)]
        best = digits(study.best.value if study.best else None)
        shown.add_row(study.name, *counts, best, str(study.resolved["data"]["name"]))
    return shown


def trial_table(trials: Sequence[Trial], title: str) -> Table:
    """A row per trial, with its params."""
    shown = table("trial", "state", "value", "epochs", "s/epoch", "parameters", "params", title=title)
    for trial in trials:
        shown.add_row(
            str(trial.number),
            Text(state(trial), STYLES[trial.state]),
            digits(trial.value),
            str(len(trial.epochs)),
            f"{trial.seconds_per_epoch:.2f}" if trial.epochs else "-",
            f"{trial.result.parameters:,}" if trial.result else "-",
            escape(show_params(trial.params)),
        )
    return shown


def show_plan(console: Console, study: Study, stored: StudyRecord | None, cost: Costs | None = None) -> None:
    """What a study would search: its question, its data and space, and the cost of a trial."""
    plan, data = describe_plan(study, cost), study.data
    console.print(f"[bold]{escape(study.name)}[/]  {escape(study.question)}")
    console.print(
        f"data: {escape(data['name'])}, subset {data['subset']:g}, validation {data['validation']:g};"
        f" {study.epochs} epochs; {plan['sampler']}, pruner {plan['pruner']}",
    )
    console.print(pair_table("key", "values", plan["space"]) if plan["space"] else "nothing is searched: one config")
    points = "infinite" if plan["points"] is None else f"{plan['points']:,}"
    earlier = f", {len(stored.trials)} of them exist already" if stored else ""
    console.print(f"points: {points}; trials: {study.trials}{earlier}")
    if cost is not None:
        parameters, mflop = _span(cost["parameters"]), _span(cost["mflop"])
        console.print(f"cost of a trial: {parameters} parameters, {mflop} MFLOP a sample (one forward pass)")


def describe_plan(study: Study, cost: Costs | None) -> dict[str, Any]:
    """A study file as plain values: what `studies NAME --json` prints."""
    return {
        "study": study.name,
        "question": study.question,
        "data": dict(study.data),
        "epochs": study.epochs,
        "sampler": study.search.sampler.tag,
        "pruner": study.search.pruner.tag,
        "trials": study.trials,
        "points": None if study.points is None else len(study.points),
        "space": {name: _leaf(leaf) for name, leaf in leaves(study.tree)},
        **(cost or {}),
    }


def _leaf(leaf: Choice | Range) -> str:
    if isinstance(leaf, Choice):
        return ", ".join(short(value) for value in leaf.options)
    scale = " (log)" if leaf.log else f" by {leaf.step:g}" if leaf.step not in (None, 1) else ""
    return f"{short(leaf.low)} to {short(leaf.high)}{scale}"


def _span(ends: tuple[float, float]) -> str:
    low, high = (f"{end:,.0f}" if end >= 10 else f"{end:.2g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def describe_study(study: StudyRecord, home: Home) -> dict[str, Any]:
    """A study as plain values: what `tune --json` and `status --json` print."""
    counts: dict[str, int] = {state: len(study.of(state)) for state in ("complete", "pruned", "failed")}
    best = study.best
    return {
        "study": study.name,
        "trials": {**counts, "total": len(study.trials)},
        "best": {"trial": best.number, "value": best.value, "params": dict(best.params)} if best else None,
        "seconds": round(study.seconds, 3),
        "home": str(home.path),
    }


def show_study(console: Console, study: StudyRecord) -> None:
    """One study: its question, the states of its trials, the best of them, and why others failed."""
    if study.question:
        console.print(escape(study.question))
    console.print(study_table([study]))
    _best(console, study)
    if failed := study.of("failed"):
        reasons = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in failed[:3])
        console.print(f"[red]failed:[/] {escape(reasons)}")
    console.print(str(study.folder), style="dim", markup=False)


def show_end(
    console: Console, study: StudyRecord, *, trials: int, exhausted: bool, missing: int, elapsed: float
) -> None:
    """The end of `tune`: the result, and the next commands. missing: trials that MLflow lacks."""
    _best(console, study)
    saved = saved_epochs(study)
    note = f"; pruning saved {saved}" if saved.epochs else ""
    console.print(f"{states(study, zeros=False) or 'no trial'} of {trials} in {seconds(elapsed)}{note}")
    if len(study.trials) < trials and exhausted:
        console.print("the space has no further point")
    if missing:
        console.print(f"[yellow]MLflow lacks {plural(missing, 'trial')}; later:[/] searchfm sync {study.name} --apply")
    if study.of("running"):
        console.print("the same command resumes the running trials")
    console.print(f"[dim]next[/]  searchfm dashboard {study.name}")
    if study.best is not None:
        console.print(f"      searchfm retrain {study.name}")


def _best(console: Console, study: StudyRecord, count: int = 5) -> None:
    if complete := study.ranked(twins=False)[:count]:
        console.print(trial_table(complete, "best trials"))
    elif pruned := sorted(study.of("pruned"), key=lambda trial: -max(trial.reported.values(), default=0))[:count]:
        console.print(trial_table(pruned, "no complete trial; pruned"))


def show_differences(
    console: Console, study: StudyRecord, differences: "Sequence[Difference]", *, applied: bool
) -> None:
    """The differences of `sync` between Optuna and MLflow."""
    if not differences:
        console.print(f"{study.name}: MLflow holds all {len(study.trials)} trials as Optuna has them")
        return
    shown = table("trial", "in MLflow", "")
    for item in differences:
        shown.add_row("study" if item.trial is None else str(item.trial), item.text, "sent" if applied else "")
    console.print(shown)
    if not applied:
        console.print(f"nothing was written; to send it: searchfm sync {study.name} --apply")


def show_comparison(console: Console, tables: Iterable[Table], notes: Iterable[str], files: Iterable[Path]) -> None:
    """Studies side by side, how to read the tables, and the files that were written."""
    for part in tables:
        console.print(part)
        console.print()
    for note in notes:
        console.print(escape(note), style="dim")
    for file in files:
        console.print(str(file), markup=False)


def show_addresses(console: Console, dashboard: str, mlflow: str) -> None:
    """The addresses of the two user interfaces."""
    console.print(f"optuna-dashboard  {_login(console, dashboard)}\nMLflow            {_login(console, mlflow)}")
    console.print("Ctrl-C stops both", style="dim")


def show_address(console: Console, address: str) -> None:
    """The address of one user interface, which runs as a service."""
    console.print(f"serving at {_login(console, address)}")


def _login(console: Console, address: str) -> str:
    """An address with its token only on a terminal: logs are kept, and read by others."""
    return address if console.is_terminal else re.sub(r"([?&]token=)[^&#]*", r"\1TOKEN", address)


# --- the final model --------------------------------------------------------------------------------------------------


def show_final(console: Console, final: Final) -> None:
    """The end of `retrain`: finalists, winner, its accuracy with the uncertainty, and the next commands."""
    if final.finalists:
        console.print(finalist_table(final))
    indent = "\n" + 12 * " "
    for subject, sentences in final_sentences(final).items():
        console.print(f"[bold]{subject:<12}[/]{escape(indent.join(sentences))}")
    console.print(class_table(final))
    name = final.study
    console.print(f"[dim]next[/]  searchfm predict {name} IMAGE...\n      searchfm export {name}")
    console.print(f"      searchfm compare {name} OTHER\n      searchfm report {name}")


def finalist_table(final: Final) -> Table:
    """A row per finalist: its value in the search, and its accuracy with fresh seeds."""
    shown = table("trial", "search", "fresh seeds", "mean", "parameters", "MFLOP", title="finalists, on validation")
    for finalist in sorted(final.finalists, key=lambda finalist: -finalist.mean):
        best = finalist.trial == final.winner
        shown.add_row(
            f"{finalist.trial}{' (wins)' if best else ''}",
            digits(finalist.value),
            " ".join(map(digits, finalist.values)),
            digits(finalist.mean),
            f"{finalist.parameters:,}",
            megaflop(finalist.flops),
            style="green" if best else None,
        )
    return shown


def class_table(final: Final) -> Table:
    """Precision and recall on the test part, the lowest recall first."""
    classes = sorted(final.per_class, key=lambda figures: figures.recall)
    more = f", the lowest {SHOWN} of {len(classes)}" if len(classes) > SHOWN else ""
    shown = table("class", "precision", "recall", "images", title=f"classes, on test{more}")
    for item in classes[:SHOWN]:
        shown.add_row(escape(item.name), f"{item.precision:.4f}", f"{item.recall:.4f}", f"{item.n:,}")
    return shown


def describe_final(final: Final) -> dict[str, Any]:
    """What `retrain --json` prints."""
    keys = ("study", "finalists", "tie", "winner", "optimism", "validation", "test", "model", "seconds")
    return {key: value for key, value in final.to_json().items() if key in keys}


# --- data sets, predictions -------------------------------------------------------------------------------------------


def describe_data(row: "Described") -> dict[str, Any]:
    """A data set as plain values: what `data --json` prints."""
    values = asdict(row)
    values["found"] = values.pop("location")
    return values


def data_table(rows: "Iterable[Described]") -> Table:
    """A row per data set: its size, its location here, and its origin."""
    shown = table("data set", "images", "classes", "training", "test", "here", "origin")
    for row in rows:
        size = "x".join(str(side) for side in row.shape) if row.shape else "-"
        test = "carved" if row.test is None else f"{row.test:,}"
        here = escape(str(row.location)) if row.location else "[yellow]no[/]"
        shown.add_row(escape(row.name), size, str(row.classes), f"{row.train:,}", test, here, row.origin)
    return shown


def describe_prediction(row: "Prediction", top: int) -> dict[str, Any]:
    """The prediction for an image as plain values: what `predict --json` prints."""
    if row.error:
        return {"image": row.image, "error": row.error}
    ranked = [{"class": name, "probability": round(probability, 6)} for name, probability in row.top]
    return {"image": row.image, **ranked[0], **({"top": ranked} if top > 1 else {})}


def prediction_csv(rows: "Sequence[Prediction]", top: int) -> str:
    """A line per image: the most probable classes, each with its probability, or the error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    suffixes = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    columns = [f"{name}{suffix}" for suffix in suffixes for name in ("class", "probability")]
    writer.writerow(["image", *columns, "error"])
    for row in rows:
        cells = [cell for name, probability in row.top for cell in (name, f"{probability:.6f}")]
        writer.writerow([row.image, *cells, *[""] * (2 * top - len(cells)), row.error])
    return text.getvalue()


def prediction_table(rows: "Sequence[Prediction]", top: int) -> Table:
    """A row per image: its class and the probability, then the next classes."""
    shown = table("image", "class", "probability", *(["then"] if top > 1 else []))
    for row in rows:
        if row.error:
            shown.add_row(escape(row.image), Text(f"cannot be read: {row.error}", "red"))
            continue
        (name, probability), *rest = row.top
        then = [escape(", ".join(f"{other} {part:.4f}" for other, part in rest))] if top > 1 else []
        shown.add_row(escape(row.image), escape(name), f"{probability:.4f}", *then)
    return shown


# --- shared -----------------------------------------------------------------------------------------------------------


def pair_table(first: str, second: str, rows: Mapping[str, str]) -> Table:
    """Two columns."""
    shown = table(first, second)
    for name, text in rows.items():
        shown.add_row(escape(name), escape(text))
    return shown


def table(*columns: str, title: str | None = None, compact: bool = False, numeric: Container[str] = ()) -> Table:
    """A table without rows. compact: cells are cut, not folded; numeric: columns that are aligned to the right."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    shown.header_style = "dim" if compact else "bold"
    overflow: Literal["ellipsis", "fold"] = "ellipsis" if compact else "fold"
    for column in columns:
        cut = compact and column != "params"
        shown.add_column(column, justify="right" if column in numeric else "left", no_wrap=cut, overflow=overflow)
    return shown


def fitting(parts: Sequence[str], width: int) -> str:
    """The first of the parts that fit into so many characters, with a space between them; then … if some do not."""
    text = ""
    for index, part in enumerate(parts):
        longer = f"{text} {part}" if text else part
        rest = 0 if index + 1 == len(parts) else 2  # for " …"
        if cell_len(longer) + rest > width:
            return f"{text} …" if text else "…"
        text = longer
    return text


def note(trial: Trial, width: int) -> str:
    """Why a trial ended as it did; of a complete one the params that fit into so many characters."""
    if trial.twin is not None:
        return f"twin of {trial.twin}"
    return " ".join(trial.reason.split()) if trial.reason else fitting(param_texts(trial.params), width)


def digits(value: float | None) -> str:
    """An accuracy."""
    return "-" if value is None else f"{value:.4f}"
