"""Studies and their trials on the terminal: `status`, `trial`, the end of `tune`."""

import math
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from searchfm.errors import UserError
from searchfm.format import (
    forecast_sentence,
    interrupted,
    param_texts,
    plural,
    saved_epochs,
    seconds,
    short,
    short_names,
    sparkline,
    state,
    states,
)
from searchfm.home import Home
from searchfm.records import SPEC, WEIGHTS, StudyRecord, Trial, searched_keys
from searchfm.search.lock import holder
from searchfm.show.terminal import STYLES, digits, fitting, labelled, table
from searchfm.tables import below, flatten

BEST = 5  # trials at the end of `tune`
LOG_LINES = 10  # of a trial's log
LISTED = 10  # trials that `status NAME` shows in full, and numbers of trials in a sentence
HEADING = 4  # lines of a column's name
CURVE = 60  # most blocks of a curve
SORTS = ("value", "number", "epochs", "seconds", "parameters")

# --- studies ----------------------------------------------------------------------------------------------------------


def study_table(studies: Iterable[StudyRecord], width: int) -> Table:
    """A row per study: the number of trials in each state, and the best value. A long name is wrapped at its signs; the
    data set is left out where the terminal is narrow.
    """
    studies = list(studies)
    rows = [
        [f"{len(study.trials)}/{study.planned}", *(str(len(study.of(state))) for state in STYLES)] for study in studies
    ]
    names = ("study", "trials", *STYLES, "best", "data")
    data = [str(study.resolved["data"]["name"]) for study in studies]
    widest = max((len(row[0]) for row in rows), default=0)
    room = width - sum(len(name) + 2 for name in names[1:-1]) - max(widest - len("trials"), 0) - 2
    longest, side = max((len(study.name) for study in studies), default=0), max(map(len, data), default=0) + 2
    both = longest + side <= room
    shown = table(*names[: None if both else -1])
    for study, counts, name in zip(studies, rows, data, strict=True):
        wrapped = "\n".join(textwrap.wrap(study.name, max(room, 20)))
        best = digits(study.best.value if study.best else None)
        shown.add_row(wrapped, *counts, best, *([escape(name)] if both else []))
    return shown


def study_line(study: StudyRecord) -> str:
    """A study on one line, for where there is no terminal to redraw."""
    best = f"; best {digits(study.best.value)} (trial {study.best.number})" if study.best else ""
    return f"{study.name}: {states(study, zeros=False) or 'no trial'} of {study.planned}{best}"


def study_page(
    study: StudyRecord, coordinator: str | None, width: int, importance: Mapping[str, float]
) -> RenderableType:
    """One study: its question, the states of its trials, the best, why others failed, and which run.

    coordinator: the process that holds its lock. importance: of keys, in descending order; empty if unknown.
    """
    parts: list[RenderableType] = [Text(study.question)] if study.question else []
    parts += [study_table([study], width), "", *_best(study, BEST, width, importance)]
    if (final := study.final) is not None:
        text = f"trial {final.winner}, {final.test.accuracy:.2%} of {final.test.n:,} test images correct"
        parts.append(labelled("final", text if final.model is None else f"{text}; {final.model.uri}"))
    if importance:
        names = short_names(importance)
        texts = [f"{names[key]} {fraction:.0%}" for key, fraction in list(importance.items())[:BEST]]
        parts.append(labelled("importance", ", ".join(texts), indent=12))
    if failed := study.of("failed"):
        parts.append(labelled("failed", *_reasons(failed), style="red"))
    if not coordinator and (undrawn := len(study.undrawn)):
        which = "trial's pictures are" if undrawn == 1 else "trials' pictures are"
        text = f"{undrawn:,} {which} not drawn yet; searchfm dashboard or searchfm sync {study.name} --apply draws them"
        parts.append(Text(text))
    if running := study.of("running"):
        if active := [trial for trial in running if trial.paused is None]:
            parts.append(_running_table(active, width))
        if study.paused:
            parts.append(Text(f"{plural(len(study.paused), 'trial')} paused, to be continued if among the best"))
        held = f"held by {coordinator}" if coordinator else f"no process runs it; searchfm tune {study.name} resumes it"
        parts.append(Text(held))
    elif coordinator:
        parts.append(Text(f"held by {coordinator}"))
    return Group(*parts)


def _reasons(failed: Sequence[Trial]) -> list[str]:
    """Each reason once, with the trials that failed for it; the commonest first."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for trial in failed:
        numbers[" ".join((trial.reason or "no reason is kept").split())].append(trial.number)
    ordered = sorted(numbers.items(), key=lambda item: -len(item[1]))
    texts = [f"{_some_trials(found)}: {reason}" for reason, found in ordered[:3]]
    return [*texts, f"and {plural(len(ordered) - 3, 'other reason')}"] if len(ordered) > 3 else texts


def _some_trials(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:LISTED]))
    return f"trial{'s' * (len(numbers) > 1)} {shown}{' …' if len(numbers) > LISTED else ''}"


def _running_table(running: Sequence[Trial], width: int) -> Group:
    rows = [
        [str(trial.number), f"{len(trial.epochs)}/{trial.planned_epochs}", digits(trial.accuracy)]
        for trial in running[:LISTED]
    ]
    room = width - 28
    shown = table("running", "epoch", "accuracy", "params", compact=True)
    for row, trial in zip(rows, running, strict=False):
        shown.add_row(*row, escape(fitting(param_texts(trial.params), room)))
    more = [Text(f"and {len(running) - LISTED} more")] if len(running) > LISTED else []
    return Group(shown, *more)


def show_end(
    console: Console,
    study: StudyRecord,
    *,
    trials: int,
    reason: str,
    missing: int,
    elapsed: float,
    stopped: str = "",
    last: bool = True,
) -> None:
    """The end of `tune`: the result, and the next commands if nothing follows. reason: why there are fewer trials;
    missing: trials that MLflow lacks; stopped: as in `SearchEnded`.
    """
    console.print(Group(*_best(study, BEST, console.width)), soft_wrap=False)
    saved = saved_epochs(study)
    note = f"; pruning saved {saved}" if saved.epochs else ""
    ended = f"{states(study, zeros=False) or 'no trial'} of {trials} in {seconds(elapsed)}{note}"
    console.print(ended, soft_wrap=False)
    if forecast := forecast_sentence(study):
        console.print(forecast, soft_wrap=False)
    if len(study.trials) < trials and reason:
        console.print(reason, soft_wrap=False)
    if missing:
        console.print(f"[yellow]MLflow lacks {plural(missing, 'trial')}; later:[/] searchfm sync {study.name} --apply")
    if stopped == "timeout":
        rest = "" if last else ", with the rest for the final training"
        console.print(f"stopped after {seconds(elapsed)} (--timeout{rest}); the same command resumes", soft_wrap=False)
    elif study.of("running"):
        console.print(f"the same command resumes the {'running and paused' if study.paused else 'running'} trials")
    if last:
        console.print(f"[dim]next[/]  searchfm dashboard {study.name}")
    if last and study.best is not None:
        console.print(f"      searchfm retrain {study.name}")


def _best(
    study: StudyRecord, count: int, width: int, importance: Mapping[str, float] | None = None
) -> list[RenderableType]:
    """The best trial in full, and a row for each of the best."""
    if complete := study.ranked(twins=False)[:count]:
        best = complete[0]
        facts = f"trial {best.number} with {digits(best.value)}"
        facts += f", {plural(len(best.epochs), 'epoch')} in {seconds(best.seconds)}"
        if best.result:
            facts += f", {best.result.parameters:,} parameters"
        params = [" ".join(param_texts(best.params))] if best.params else []
        shown: list[RenderableType] = [labelled("best", facts, *params, style="bold green")]
        rest = complete[1:]
        return [*shown, "", trial_table(complete, width, "best trials", importance or {})] if rest else shown
    if pruned := sorted(study.of("pruned"), key=lambda trial: -max(trial.reported.values(), default=0))[:count]:
        return [trial_table(pruned, width, "no complete trial; pruned")]
    return []


def overview(
    home: Home,
    name: str | None,
    console: Console,
    studies: Sequence[StudyRecord],
    importance: Mapping[str, float] | None = None,
) -> RenderableType:
    """What `status` shows: of one study its page, else a row for each."""
    if name is None:
        return study_table(studies, console.width)
    return study_page(studies[0], holder(home, name), console.width, importance or {})


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table of trials."""

    name: str
    cells: Sequence[str]
    right: bool = True  # aligned to the right
    narrow: bool = False  # a name wider than the cells is broken after `_` and `.`, into few lines

    @property
    def heading(self) -> list[str]:
        """The lines of its name."""
        if not self.narrow:
            return [self.name]
        pieces = self.name.replace("_", "_ ").replace(".", ". ").split()
        width = max(map(cell_len, self.cells), default=0)
        while len(lines := _packed(pieces, width)) > min(HEADING, len(pieces)):
            width += 1
        return lines

    @property
    def width(self) -> int:
        """In characters."""
        return max(map(cell_len, [*self.heading, *self.cells]))


def _packed(pieces: Sequence[str], width: int) -> list[str]:
    """Lines of so many characters, or of one longer piece."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return lines


def trial_table(
    trials: Sequence[Trial], width: int, title: str | None = None, importance: Mapping[str, float] | None = None
) -> RenderableType:
    """A row per trial. Keys whose values differ are columns, as many as fit, the most important first; what all trials
    share, and what is left out, stands beneath.
    """
    shared, differing = _keys(trials, importance or {})
    names = short_names(searched_keys(trials))
    columns, found = _fixed(trials), []
    for key in differing:
        cells = [short(trial.params[key]) if key in trial.params else "-" for trial in trials]
        found.append(
            Column(names[key], cells, all(isinstance(trial.params.get(key, 0), int | float) for trial in trials))
        )
    used, out = sum(column.width + 2 for column in columns), list[str]()
    if used + sum(column.width + 2 for column in found) - 2 > width:
        found = [replace(column, narrow=True) for column in found]
    for column in found:
        if used + column.width <= width:
            used += column.width + 2
            columns.append(column)
        else:
            out.append(column.name)
    parts: list[RenderableType] = [Text(title, "bold")] if title else []
    parts.append(_lines(columns, [STYLES[trial.state] for trial in trials]))
    if any(trial.twin is not None for trial in trials):
        parts.append(Text("=N: a twin of trial N, with the same config; it was not trained", "dim"))
    if shared and len(trials) > 1:
        parts.append(labelled("all", " ".join(param_texts({names[key]: trials[0].params[key] for key in shared}))))
    if out:
        kept = fitting(out, max(width - 20, 20))
        parts.append(labelled("also", f"differ: {kept}", style="dim"))
    return Group(*parts)


def _keys(trials: Sequence[Trial], importance: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Keys of one value in all trials, and keys that differ: by importance, then by the number of trials that have one,
    then by the number of its values. A key that chooses a table is as important as any key of that table.
    """
    every = searched_keys(trials)
    having = {key: [trial.params[key] for trial in trials if key in trial.params] for key in every}
    shared = [key for key in every if len(having[key]) == len(trials) and len(set(having[key])) == 1]
    others = [key for key in every if key not in shared]

    def weight(key: str) -> float:
        table = key.removesuffix("name") if key.endswith(".name") else None
        own = (part for other, part in importance.items() if other == key or (table and other.startswith(table)))
        return max(own, default=0.0)

    return shared, sorted(others, key=lambda key: (-weight(key), -len(having[key]), -len(set(having[key]))))


def _fixed(trials: Sequence[Trial]) -> list[Column]:
    """The columns that each table of trials has."""
    columns = [Column("trial", [str(trial.number) for trial in trials])]
    if {trial.state for trial in trials} != {"complete"} or any(trial.twin is not None for trial in trials):
        ends = [
            ("paused" if trial.paused is not None else trial.state)
            + (f" ={trial.twin}" if trial.twin is not None else "")
            for trial in trials
        ]
        columns.append(Column("state", ends, right=False))
    value = "value" if len(columns) == 1 else "accuracy"  # of a trial that did not complete, the last one reported
    columns.append(Column(value, [digits(trial.accuracy) for trial in trials]))
    if len({len(trial.epochs) for trial in trials}) > 1:
        columns.append(Column("epochs", [str(len(trial.epochs)) for trial in trials]))
    columns.append(Column("s/epoch", [f"{trial.seconds_per_epoch:.2f}" if trial.epochs else "-" for trial in trials]))
    sizes = [f"{trial.result.parameters:,}" if trial.result else "-" for trial in trials]
    return [*columns, Column("parameters", sizes)] if any(trial.result for trial in trials) else columns


def _lines(columns: Sequence[Column], styles: Sequence[str]) -> Text:
    """The rows as text: rich's own tables take 3 s for 10,000."""
    headings = [column.heading for column in columns]
    height = max(map(len, headings))
    above = [[""] * (height - len(heading)) + heading for heading in headings]
    widths = [column.width for column in columns]

    def row(cells: Iterable[str]) -> str:
        padded = (
            " " * (size - cell_len(cell)) + cell if column.right else cell + " " * (size - cell_len(cell))
            for column, size, cell in zip(columns, widths, cells, strict=True)
        )
        return "  ".join(padded).rstrip()

    shown = Text("\n".join(row(cells) for cells in zip(*above, strict=True)), "bold", no_wrap=True, overflow="ignore")
    result = Text(no_wrap=True, overflow="ignore").append_text(shown)
    offset = next((widths[0] + 2 for column in columns if column.name == "state"), None)
    for cells, style in zip(zip(*(column.cells for column in columns), strict=True), styles, strict=True):
        text = row(cells)
        result.append("\n")
        if offset is None:
            result.append(text)
        else:
            result.append(text[:offset])
            result.append(text[offset : offset + widths[1]], style)
            result.append(text[offset + widths[1] :])
    return result


def sort_trials(trials: Sequence[Trial], by: str) -> tuple[list[Trial], str | None]:
    """The trials in order of `SORTS` or of a key of the search space, and that key. Raises UserError.

    Values come in descending order; running and failed trials without a value are last.
    """
    match by:
        case "value":
            order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
            return sorted(trials, key=lambda t: (order[t.state], -(t.accuracy or 0.0), t.number)), None
        case "number":
            return sorted(trials, key=lambda t: t.number), None
        case "epochs":
            return sorted(trials, key=lambda t: (-len(t.epochs), t.number)), None
        case "seconds":
            return sorted(trials, key=lambda t: (-t.seconds, t.number)), None
        case "parameters":
            return sorted(trials, key=lambda t: (t.result is None, t.result.parameters if t.result else 0)), None
    names = short_names(searched_keys(trials))
    key = next((key for key, name in names.items() if by in (key, name)), None)
    if key is None:
        raise UserError(f"--sort {by}: must be one of {', '.join([*SORTS, *names.values()])}")

    def rank(trial: Trial) -> tuple[bool, bool, Any]:
        value = trial.params.get(key)
        number = isinstance(value, int | float)
        return (key not in trial.params, not number, value if number else str(value))

    return sorted(trials, key=rank), key


# --- one trial --------------------------------------------------------------------------------------------------------


def show_trial(console: Console, study: StudyRecord, trial: Trial) -> None:
    """All of a trial: its end, its params and config, its curves, its log and files, and the next commands."""
    value = f", value {digits(trial.value)}" if trial.value is not None else ""
    rank = next((i for i, other in enumerate(study.ranked(), 1) if other.number == trial.number), None)
    place = f" ({rank} of {len(study.of('complete'))})" if rank else ""
    console.print(
        f"[bold]{escape(study.name)}, trial {trial.number}[/]: [{STYLES[trial.state]}]{state(trial)}[/]{value}{place}"
    )
    if trial.reason:
        console.print(escape(trial.reason), soft_wrap=False)
    parts: list[RenderableType] = []
    if trial.params:
        parts += ["", _pairs({key: short(value) for key, value in trial.params.items()})]
    config = flatten(trial.config, entries=True)
    rest = {key: value for key, value in config if not below(key, trial.params)}
    if rest:
        parts += ["", labelled("config", " ".join(f"{key}={short(value)}" for key, value in rest.items()))]
    times = _times(trial, again=trial.number in interrupted(study))
    parts += ["", *_curves(trial, console.width), labelled("time", times)]
    if log := trial.log(LOG_LINES):
        parts += ["", labelled("log", *log)]
    console.print(Group(*parts), soft_wrap=False)
    console.print(f"\n[bold]files[/]   {escape(str(trial.folder))}")
    console.print(labelled("", " ".join(trial.files()) or "none"), soft_wrap=False)
    for head, command in zip(["[dim]next[/]    ", *[8 * " "] * 9], _next(study, trial), strict=False):
        console.print(f"{head}{escape(command)}")


def _pairs(rows: Mapping[str, str]) -> Table:
    shown = Table.grid(padding=(0, 2, 0, 0))
    for key, text in rows.items():
        shown.add_row(escape(key), escape(text))
    return shown


def _curves(trial: Trial, width: int) -> list[RenderableType]:
    """Accuracy by epoch, of validation and training on one scale."""
    curves = {
        "validation": [epoch.val_accuracy for epoch in trial.epochs if epoch.val_accuracy is not None],
        "training": [epoch.train_accuracy for epoch in trial.epochs],
    }
    finite = [value for values in curves.values() for value in values if math.isfinite(value)]
    if not finite:
        return [Text("no epoch was trained")]
    low, high = min(finite), max(finite)
    shown = Table.grid(padding=(0, 2, 0, 0))
    for name, values in curves.items():
        if values:
            best = max(range(len(values)), key=lambda i: values[i])
            line = sparkline(values, low, high, min(CURVE, max(width - 55, 8)))
            shown.add_row(
                name, line, f"{values[0]:.4f} to {values[-1]:.4f}, best {values[best]:.4f} after epoch {best + 1}"
            )
    return [shown]


def _times(trial: Trial, again: bool) -> str:
    texts = [f"{plural(len(trial.epochs), 'epoch')} of {trial.planned_epochs}"]
    if trial.epochs:
        texts.append(f"{trial.seconds_per_epoch:.2f} s each, {seconds(trial.seconds)} in all")
    if trial.started is not None:
        texts.append(f"begun {datetime.fromtimestamp(trial.started):%Y-%m-%d %H:%M:%S}")
    if trial.ended is not None:
        texts.append(f"ended {datetime.fromtimestamp(trial.ended):%Y-%m-%d %H:%M:%S}")
    if trial.result and trial.result.device:
        texts.append(f"on {trial.result.device}" + ", in bfloat16" * (trial.result.precision == "bfloat16"))
    if again:
        texts.append(f"{trial.attempts} attempts")
    if trial.result and trial.result.numerics[0] != trial.result.numerics[-1]:
        texts.append(f"begun under numerics {trial.result.numerics[0]}, ended under {trial.result.numerics[-1]}")
    if trial.first is not None:
        texts.append(f"a known configuration ({trial.first})")
    return "; ".join(texts)


def _next(study: StudyRecord, trial: Trial) -> list[str]:
    """Commands that go on from a trial."""
    folder = shlex.quote(str(_near(trial.folder)))
    commands = []
    if trial.state == "complete" and trial.twin is None:
        commands.append(f"searchfm retrain {study.name} --trial {trial.number}")
    if all((trial.folder / name).is_file() for name in (WEIGHTS, SPEC)):
        commands.append(f"searchfm predict {folder} IMAGE...")
    if trial.twin is not None:
        commands.append(f"searchfm trial {study.name} {trial.twin}")
    if trial.state == "running":
        commands.append(f"searchfm status {study.name} --watch")
    return [*commands, f"searchfm tune {folder}/config.toml"]


def _near(path: Path) -> Path:
    """The path from here, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
