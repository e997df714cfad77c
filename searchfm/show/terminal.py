"""The terminal: live progress, plain lines where there is no terminal, and tables."""

import csv
import io
import time
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from searchfm.format import megaflop, plural, seconds, short, show_params, state, states, times
from searchfm.home import Home
from searchfm.records import Epoch, Final, State, StudyRecord, Trial
from searchfm.search.space import Choice, Range, leaves
from searchfm.search.study import Study

if TYPE_CHECKING:
    from searchfm import coordinator, retraining
    from searchfm.jobs import JobSpec
    from searchfm.learn.datasets import Described
    from searchfm.learn.export import Exported, Prediction
    from searchfm.tracking import Difference

Costs = Mapping[str, tuple[float, float]]  # minimum and maximum of a trial's `parameters` and `mflop`
STYLES: Mapping[State, str] = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}
NOT_CHAMPION = ", not better than the champion on the same test part, which stays; --promote changes that"
LONG = 10.0  # seconds of an epoch that gets a line of its own where there is no live table
SHOWN = 20  # classes, those with the lowest recall

# --- progress ---------------------------------------------------------------------------------------------------------


class TuneView:
    """Live progress of a search: trials done, trials running, the best so far and the time left."""

    def __init__(self, console: Console, study: StudyRecord, trials: int, workers: Sequence[str]) -> None:
        self.console, self.study, self.trials = console, study, trials
        self.counts: Counter[State] = Counter(trial.state for trial in study.trials if trial.state != "running")
        self.before = self.counts.total()
        self.best = study.best
        self.running: dict[int, tuple[Trial, list[Epoch]]] = {}
        self.began = time.monotonic()
        devices = ", ".join(f"{n} x {device}" if n > 1 else device for device, n in Counter(workers).items())
        _line(
            console,
            f"[bold]{escape(study.name)}[/]: {trials} trials on {escape(str(study.resolved['data']['name']))}"
            f" ({study.data.train:,} images to train on, {study.data.validation:,} to validate),"
            f" workers: {devices or 'none needed'}",
        )

    def follow(self, steps: "Iterable[coordinator.Progress]") -> None:
        """Shows the progress until the search ends; without a terminal, only the lines of `update`."""
        with _live(self.console, self._render):
            for progress in steps:
                self.update(progress)

    def update(self, progress: "coordinator.Progress") -> None:
        """Updates the table, and prints a line for the end of a trial."""
        trial = progress.record
        if progress.kind in ("started", "adopted") and trial is not None:
            self.running[trial.number] = (trial, list(trial.epochs))
            if progress.kind == "adopted":
                _line(self.console, f"trial {trial.number:>4} resumes after epoch {len(trial.reported)}")
        elif progress.kind == "epoch" and progress.epoch is not None and progress.trial in self.running:
            self.running[progress.trial][1].append(progress.epoch)
        elif progress.kind == "retried":
            _line(self.console, f"trial {progress.trial:>4} [red]lost[/]: {escape(progress.text)}")
        elif progress.kind == "ended" and trial is not None:
            self.running.pop(trial.number, None)
            self.counts[trial.state] += 1
            better = trial.value is not None and (self.best is None or trial.value > (self.best.value or 0.0))
            if better:
                self.best = trial
            _line(self.console, self._ended(trial, better))

    def _ended(self, trial: Trial, better: bool) -> str:
        note = f"twin of {trial.twin}" if trial.twin is not None else escape(trial.reason or show_params(trial.params))
        return (
            f"[dim]{self.counts.total():>4}/{self.trials}[/] trial {trial.number:>4}"
            f" [{STYLES[trial.state]}]{trial.state:<8}[/] {_digits(trial.accuracy):>6}"
            f" epoch {len(trial.reported) or len(trial.epochs)}/{trial.planned_epochs or '?'}"
            f" {seconds(trial.seconds):>7}  {note}{'  [bold green]best so far[/]' * better}"
        )

    def _render(self) -> RenderableType:
        done = self.counts.total()
        texts = [f"{n} {state}" for state in ("complete", "pruned", "failed") if (n := self.counts[state])]
        if done > self.before and done < self.trials:
            pace = (time.monotonic() - self.began) / (done - self.before)
            texts.append(f"about {seconds(pace * (self.trials - done))} left")
        shown = table("trial", "epoch", "accuracy", "params", live=True)
        for number, (trial, epochs) in sorted(self.running.items()):
            shown.add_row(str(number), *_pace(epochs, trial.planned_epochs), escape(show_params(trial.params)))
        parts: list[RenderableType] = [_bar(self.console, "trials", done, self.trials, ", ".join(texts)), shown]
        if self.best is not None:
            best = f"best: trial {self.best.number} with {self.best.value:.4f}, {show_params(self.best.params)}"
            parts.append(Text(best, "green"))
        return Group(*parts)


class RetrainView:
    """Live progress of `retrain`: jobs done, jobs running with their epochs, and notes in between."""

    def __init__(self, console: Console, study: str) -> None:
        self.console, self.study = console, study
        self.planned: dict[str, int] = {}  # epochs by job
        self.running: dict[str, tuple[JobSpec, list[Epoch]]] = {}
        self.trained = 0  # epochs, of jobs that are done

    def follow(self, steps: "Generator[retraining.Progress, None, Final]") -> Final:
        """Shows the progress; returns the final record."""
        with _live(self.console, self._render):
            while True:
                try:
                    self.update(next(steps))
                except StopIteration as end:
                    final: Final = end.value
                    return final

    def update(self, progress: "retraining.Progress") -> None:
        """Updates the table, and prints a line for the end of a job."""
        job = progress.job
        if job is None:
            _line(self.console, f"{escape(self.study)}: {escape(progress.text)}")
            return
        name = f"{job.label:<24}"
        if progress.kind == "planned":
            self.planned[job.label] = job.epochs
        elif progress.kind == "started":
            self.running[job.label] = (job, [])
        elif progress.kind == "epoch" and progress.epoch is not None:
            epoch = progress.epoch
            self.running[job.label][1].append(epoch)
            if not self.console.is_terminal and epoch.seconds > LONG:
                _line(self.console, f"{name} epoch {epoch.index}/{job.epochs}  {seconds(epoch.seconds)}")
        elif progress.kind == "retried":
            text = escape(progress.text)
            _line(self.console, f"{name} [red]lost[/]: {text}; goes on from its last checkpoint")
        else:
            _, epochs = self.running.pop(job.label, (job, []))
            self.trained += self.planned.get(job.label, 0)
            value = "      " if progress.value is None else f"{progress.value:.4f}"
            spent = f" {job.epochs} epochs {seconds(sum(epoch.seconds for epoch in epochs)):>8}" if epochs else ""
            mark = {"finished": "[green]done[/]  ", "found": "[dim]earlier[/]"}.get(progress.kind, "[red]failed[/]")
            _line(self.console, f"{name} {mark} {value}{spent}  {escape(progress.text)}".rstrip())

    def _render(self) -> RenderableType:
        if not self.running:
            return ""
        total = sum(self.planned.values())
        done = self.trained + sum(len(epochs) for _, epochs in self.running.values())
        shown = table("job", "epoch", "accuracy", live=True)
        for job, epochs in self.running.values():
            shown.add_row(job.label, *_pace(epochs, job.epochs))
        return Group(_bar(self.console, "epochs", min(done, total), total), shown)


def _live(console: Console, render: Callable[[], RenderableType]) -> AbstractContextManager[object]:
    if not console.is_terminal:
        return nullcontext()
    return Live(get_renderable=render, console=console, refresh_per_second=4, transient=True)


def _bar(console: Console, name: str, done: int, total: int, text: str = "") -> ProgressBar:
    columns = (TextColumn(name), BarColumn(40), MofNCompleteColumn(), TextColumn("{task.description}"))
    bar = ProgressBar(*columns, console=console)
    bar.add_task(text, total=total, completed=done)
    return bar


def _pace(epochs: Sequence[Epoch], planned: int) -> tuple[str, str]:
    value = epochs[-1].val_accuracy if epochs else None
    return f"{len(epochs)}/{planned}" if planned else "-", _digits(value)


# --- studies ----------------------------------------------------------------------------------------------------------


def study_table(studies: Iterable[StudyRecord]) -> Table:
    """A line a study: the number of trials in each state, and the best value."""
    shown = table("study", "trials", *STYLES, "best", "data")
    for study in studies:
        counts = [f"{len(study.trials)}/{study.planned}", *(str(len(study.of(state))) for state in STYLES)]
        best = _digits(study.best.value if study.best else None)
        shown.add_row(study.name, *counts, best, str(study.resolved["data"]["name"]))
    return shown


def trial_table(trials: Sequence[Trial], title: str) -> Table:
    """A line a trial, with what the search chose for it."""
    shown = table("trial", "state", "value", "epochs", "s/epoch", "parameters", "params", title=title)
    for trial in trials:
        shown.add_row(
            str(trial.number),
            Text(state(trial), STYLES[trial.state]),
            _digits(trial.value),
            str(len(trial.epochs)),
            f"{trial.seconds_per_epoch:.2f}" if trial.epochs else "-",
            f"{trial.result.parameters:,}" if trial.result else "-",
            escape(show_params(trial.params)),
        )
    return shown


def show_plan(console: Console, study: Study, stored: StudyRecord | None, cost: Costs | None = None) -> None:
    """What a study would search: its question, its data and space, and the cost of a trial."""
    plan, data = describe_plan(study, cost), study.data
    _line(console, f"[bold]{escape(study.name)}[/]  {escape(study.question)}")
    _line(
        console,
        f"data: {escape(data['name'])}, subset {data['subset']:g}, validation {data['validation']:g};"
        f" {study.epochs} epochs; {plan['sampler']}, pruner {plan['pruner']}",
    )
    console.print(pair_table("key", "values", plan["space"]) if plan["space"] else "nothing is searched: one config")
    points = "infinite" if plan["points"] is None else f"{plan['points']:,}"
    earlier = f", {len(stored.trials)} of them exist already" if stored else ""
    _line(console, f"points: {points}; trials: {study.trials}{earlier}")
    if cost is not None:
        parameters, mflop = _span(cost["parameters"]), _span(cost["mflop"])
        _line(console, f"cost of a trial: {parameters} parameters, {mflop} MFLOP a sample (one forward pass)")


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
        return ", ".join(short(value) for value in leaf.values)
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
        _line(console, escape(study.question))
    console.print(study_table([study]))
    _best(console, study)
    if failed := study.of("failed"):
        reasons = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in failed[:3])
        console.print(f"[red]failed:[/] {escape(reasons)}", soft_wrap=True)
    console.print(f"{study.folder}", style="dim", highlight=False, soft_wrap=True)


def show_end(
    console: Console, study: StudyRecord, *, trials: int, exhausted: bool, missing: int, elapsed: float
) -> None:
    """The end of `tune`: the result, and the next commands. missing: trials that MLflow lacks."""
    _best(console, study)
    own = [trial for trial in study.trials if trial.twin is None]
    trained, full = sum(len(trial.epochs) for trial in own), sum(trial.planned_epochs for trial in own)
    saved = f"; pruning saved {1 - trained / full:.0%} of the epochs" if study.of("pruned") and full else ""
    _line(console, f"{states(study, zeros=False) or 'no trial'} of {trials} in {seconds(elapsed)}{saved}")
    if len(study.trials) < trials and exhausted:
        _line(console, "the space has no further point")
    if missing:
        _line(console, f"[yellow]MLflow lacks {plural(missing, 'trial')}; later:[/] searchfm sync {study.name} --apply")
    if study.of("running"):
        _line(console, "the same command resumes the running trials")
    _line(console, f"[dim]next[/]  searchfm dashboard {study.name}")
    if study.best is not None:
        _line(console, f"      searchfm retrain {study.name}")


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
        _line(console, f"{study.name}: MLflow holds all {len(study.trials)} trials as Optuna has them")
        return
    shown = table("trial", "in MLflow", "")
    for item in differences:
        shown.add_row("study" if item.trial is None else str(item.trial), item.text, "sent" if applied else "")
    console.print(shown)
    if not applied:
        _line(console, f"nothing was written; to send it: searchfm sync {study.name} --apply")


def show_comparison(
    console: Console, tables: Iterable[Table], notes: Iterable[str], files: Iterable[Path | None]
) -> None:
    """Studies side by side, how to read the tables, and the files that were written."""
    for part in tables:
        console.print(part)
        console.print()
    for note in notes:
        console.print(escape(note), style="dim", highlight=False, soft_wrap=True)
    for file in filter(None, files):
        console.print(str(file), highlight=False, soft_wrap=True, markup=False)


def show_addresses(console: Console, dashboard: str, mlflow: str) -> None:
    """The addresses of the two user interfaces."""
    _line(console, f"optuna-dashboard  {dashboard}\nMLflow            {mlflow}")
    console.print("Ctrl-C stops both", style="dim")


# --- the final model --------------------------------------------------------------------------------------------------


def show_final(console: Console, final: Final) -> None:
    """The end of `retrain`: finalists, winner, its accuracy with the uncertainty, and the next commands."""
    for part in (finalist_table(final), *final_sentences(final), class_table(final)):
        if part is not None:
            console.print(part, highlight=False, soft_wrap=True)
    name = final.study
    _line(console, f"[dim]next[/]  searchfm predict {name} IMAGE...\n      searchfm export {name}")
    _line(console, f"      searchfm compare {name} OTHER\n      searchfm report {name}")


def finalist_table(final: Final) -> Table | None:
    """A line a finalist: its value in the search, and its accuracy with fresh seeds."""
    if not final.finalists:
        return None
    shown = table("trial", "search", "fresh seeds", "mean", "parameters", "MFLOP", title="finalists, on validation")
    for finalist in sorted(final.finalists, key=lambda finalist: -finalist.mean):
        best = finalist.trial == final.winner
        shown.add_row(
            f"{finalist.trial}{' (wins)' if best else ''}",
            _digits(finalist.value),
            " ".join(map(_digits, finalist.values)),
            _digits(finalist.mean),
            f"{finalist.parameters:,}",
            megaflop(finalist.flops),
            style="green" if best else None,
        )
    return shown


def final_sentences(final: Final) -> list[str]:
    """The result, a line each; every interval says what it is an interval of."""
    winner, validation, test, model = final.winner, final.validation, final.test, final.model
    lines = []
    if final.finalists:
        tied = (
            f"Trials {', '.join(map(str, final.tie))} cannot be distinguished (paired test, Holm): the lowest cost wins"
        )
        lines.append(f"{tied}, trial {winner}." if final.tie else f"Trial {winner} wins.")
        value = next(finalist.value for finalist in final.finalists if finalist.trial == winner)
        lines.append(
            f"Validation: {value:.2%} in the search, {validation.accuracy:.2%} with "
            f"{plural(len(final.finalists[0].values), 'fresh seed')}: "
            f"an optimism of {100 * (final.optimism or 0.0):+.2f} points."
        )
        if validation.low is not None and validation.high is not None and validation.spread is not None:
            lines.append(
                f"            a further seed would give {validation.low:.2%} to {validation.high:.2%} "
                f"(95% prediction interval, on the search's budget and the same {validation.n:,} images);"
                f" seeds vary by {100 * validation.spread:.2f} points (standard deviation)."
            )
    else:
        lines.append(f"Trial {winner}: {validation.accuracy:.2%} in the search, not confirmed with a fresh seed.")
    lines.append(
        f"Test:       [bold]{test.accuracy:.2%}[/] of {test.n:,} images correct, 95% interval {test.low:.2%} to "
        f"{test.high:.2%} (Wilson): of this one model, on images like these; other seeds are not in it."
    )
    lines.append(f"            The test part of these data has been read {times(test.reads)}, this time included.")
    lines.append(
        f"Model:      {final.parameters:,} parameters, {megaflop(final.flops)} MFLOP an image, "
        f"{plural(final.epochs, 'epoch')} of {seconds(final.seconds_per_epoch)}"
    )
    if model is not None:
        lines.append(f"            {escape(model.uri)}{', the champion' if model.champion else NOT_CHAMPION}")
    return lines


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


# --- data sets, predictions, files ------------------------------------------------------------------------------------


def describe_data(row: "Described") -> dict[str, Any]:
    """A data set as plain values: what `data --json` prints."""
    values = asdict(row)
    location = values.pop("location")
    return {**values, "found": str(location) if location else None}


def data_table(rows: "Iterable[Described]") -> Table:
    """A line a data set: its size, its location here, and its origin."""
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
    """A line an image: the most probable classes, each with its probability, or why there are none."""
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
    """A line an image: its class and the probability, then the next classes."""
    shown = table("image", "class", "probability", *(["then"] if top > 1 else []))
    for row in rows:
        if row.error:
            shown.add_row(escape(row.image), Text(f"cannot be read: {row.error}", "red"))
            continue
        (name, probability), *rest = row.top
        then = [escape(", ".join(f"{other} {part:.4f}" for other, part in rest))] if top > 1 else []
        shown.add_row(escape(row.image), escape(name), f"{probability:.4f}", *then)
    return shown


def describe_export(done: "Exported") -> dict[str, Any]:
    """An exported file as plain values: what `export --json` prints, the model's name apart."""
    return {"format": done.format, "path": str(done.path), "bytes": done.bytes, "difference": done.difference}


def show_export(console: Console, done: "Exported") -> None:
    """The file that `export` wrote, and its largest difference from the model."""
    difference = f"largest difference of a probability {done.difference:.1e}"
    _line(console, f"{escape(str(done.path))}: {done.bytes:,} bytes; {difference}")


# --- shared -----------------------------------------------------------------------------------------------------------


def pair_table(left: str, right: str, rows: Mapping[str, str]) -> Table:
    """Two columns."""
    shown = table(left, right)
    for name, text in rows.items():
        shown.add_row(escape(name), escape(text))
    return shown


def table(*columns: str, title: str | None = None, live: bool = False, numeric: Container[str] = ()) -> Table:
    """A table without rows. numeric: columns that are aligned to the right."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    shown.header_style = "dim" if live else "bold"
    for column in columns:
        shown.add_column(
            column,
            justify="right" if column in numeric else "left",
            no_wrap=live and column != "params",
            overflow="ellipsis" if live else "fold",
        )
    return shown


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _line(console: Console, markup: str) -> None:
    """Prints a line whole, for a terminal to wrap."""
    console.print(markup, highlight=False, soft_wrap=True)
