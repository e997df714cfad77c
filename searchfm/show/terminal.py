"""The terminal: tables and sentences."""

import re
import textwrap
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from searchfm.forecast import assumption
from searchfm.format import HALF, final_sentences, imbalanced, megaflop, param_texts, plural, seconds, short, size
from searchfm.records import Final, State, StudyRecord, Trial
from searchfm.search.notes import opened
from searchfm.search.space import Choice, Range, leaves
from searchfm.search.study import Study
from searchfm.show import schema

if TYPE_CHECKING:
    from searchfm.check import Checked
    from searchfm.disk import Cleaned
    from searchfm.learn.datasets import Described
    from searchfm.learn.export import Prediction
    from searchfm.learn.overview import Overview
    from searchfm.tracking.mirror import Difference
    from searchfm.tracking.registry import Version
    from searchfm.tuning import Forecasted

STYLES: Mapping[State, str] = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}
SHOWN = 20  # classes, those with the lowest recall

# --- study files, MLflow, pages ---------------------------------------------------------------------------------------


def show_plan(console: Console, study: Study, stored: StudyRecord | None, cost: schema.Costs | None = None) -> None:
    """What a study would search: its question, its data and space, and the cost of a trial."""
    data, searched = study.data, {name: _leaf(leaf) for name, leaf in leaves(study.tree)}
    console.print(f"[bold]{escape(study.name)}[/]  {escape(study.question)}", soft_wrap=False)
    console.print(
        f"data: {escape(data['name'])}, subset {data['subset']:g}, validation {data['validation']:g};"
        f" {plural(study.epochs, 'epoch')}; {study.search.sampler.tag}, pruner {study.search.pruner.tag}",
        soft_wrap=False,
    )
    console.print(pair_table("key", "values", searched) if searched else "nothing is searched: one config")
    points = "infinite" if study.points is None else f"{len(study.points):,}"
    earlier = f"; {len(stored.trials)} exist already" if stored else ""
    known = f"; tried first: {plural(len(study.known), 'known configuration')}" if study.known else ""
    console.print(f"points: {points}; trials: {study.trials}{earlier}{known}", soft_wrap=False)
    if cost is not None:
        parameters, mflop = _span(cost["parameters"]), _span(tuple(flops / 1e6 for flops in cost["flops"]))
        line = f"cost of a trial: {parameters} parameters, {mflop} MFLOP a sample (one forward pass)"
        console.print(line, soft_wrap=False)


def show_forecast(console: Console, timed: "Forecasted") -> None:
    """What a search would do, and what it takes on its workers."""
    show_plan(console, timed.study, timed.stored)
    data, forecast, assumed = timed.data, timed.forecast, assumption(timed.study.search)
    if data is None:
        console.print("no forecast: only workers of this machine are started for one")
        return
    workers = ", ".join(f"{n} x {device}" for device, n in Counter(timed.devices).items())
    console.print(f"images: {data.train:,} to train on, {data.validation:,} to validate; {len(data.classes)} classes")
    if forecast is None:
        console.print(f"no forecast on {workers}: no config could be timed")
        return
    console.print(f"forecast on {workers}, from {plural(forecast.configs, 'config')} timed for a few batches:")
    pruned = f"; with pruning {seconds(forecast.pruned)}, if {assumed}" if assumed else ""
    shown = {
        "search": f"{seconds(forecast.seconds)} for {plural(forecast.trials, 'trial')}{pruned}",
        "retrain": seconds(forecast.retrain),
        "memory": f"{size(forecast.memory)} a worker, {size(forecast.memory * forecast.workers)} in all",
        "disk": f"{size(forecast.disk)}, and up to {size(forecast.checkpoints)} of checkpoints while it searches",
    }
    for name, text in shown.items():
        console.print(labelled(name, text, indent=9), soft_wrap=False)


def show_studies(console: Console, questions: Mapping[str, str]) -> None:
    """The built-in study files: their questions; those in folders by name."""
    console.print(pair_table("study", "question", {name: text for name, text in questions.items() if "/" not in name}))
    groups: dict[str, list[str]] = {}
    for name in questions:
        folder, _, file = name.rpartition("/")
        if folder:
            groups.setdefault(folder, []).append(file)
    for folder, names in groups.items():
        console.print(
            f"\n[bold]{escape(folder)}[/]  {len(names)} more, such as searchfm tune {escape(folder)}/{names[0]}"
        )
        console.print(labelled("", " ".join(names)), soft_wrap=False)


def _leaf(leaf: Choice | Range) -> str:
    if isinstance(leaf, Choice):
        return ", ".join(short(value) for value in leaf.options)
    scale = " (log)" if leaf.log else f" by {leaf.step:g}" if leaf.step not in (None, 1) else ""
    return f"{short(leaf.low)} to {short(leaf.high)}{scale}"


def _span(ends: Iterable[float]) -> str:
    low, high = (f"{end:,.0f}" if end >= 10 else f"{end:.2g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def show_differences(
    console: Console, study: StudyRecord, differences: "Sequence[Difference]", *, applied: bool
) -> None:
    """The differences of `sync` between Optuna and MLflow."""
    if not differences:
        console.print(f"{study.name}: MLflow holds all {plural(len(study.trials), 'trial')} as Optuna has them")
        return
    shown = table("trial", "in MLflow", "")
    for item in differences:
        shown.add_row("study" if item.trial is None else str(item.trial), item.text, "sent" if applied else "")
    console.print(shown)
    if not applied:
        console.print(f"nothing was written; to send it: searchfm sync {study.name} --apply")


FLAGS = {"weights": "", "leftovers": "", "pictures": " --pictures", "downloads": " --downloads"}  # the others: --cache


def show_disk(console: Console, cleaned: "Cleaned", command: str) -> None:
    """What can be deleted, by kind, or was. command: the one that printed this, without --apply."""
    shown = table("kind", "files", "size", "deleted" if cleaned.applied else "deleted by", numeric={"files", "size"})
    for each in cleaned.kinds:
        flags = f"--apply{FLAGS.get(each.kind, ' --cache')}"
        mark = ("yes" if each.chosen and each.files else "") if cleaned.applied else flags
        shown.add_row(each.kind, f"{each.files:,}", size(each.bytes) if each.bytes else "-", mark)
    console.print(shown)
    for study, process in cleaned.held.items():
        console.print(f"skipped: study {study!r}, which {process or 'another process'} holds", markup=False)
    if cleaned.held and cleaned.study is None:
        console.print("not deleted while a study is held: the cache")
    if cleaned.problem:
        console.print(f"skipped: copies in MLflow: {cleaned.problem}", markup=False)
    if not any(each.chosen and each.files for each in cleaned.kinds):
        console.print("nothing to delete with these flags")
    elif cleaned.applied:
        owner = "home" if cleaned.study is None else "study"
        console.print(f"deleted: {size(cleaned.freed)}; the {owner} had {size(cleaned.total)}")
    else:
        console.print(f"nothing was deleted; to delete {size(cleaned.freed)}: {command} --apply", markup=False)


def show_findings(console: Console, checked: "Checked") -> None:
    """What `check` found, a line each, and what it read."""
    for item in checked.findings:
        where = "" if item.study is None else f"{item.study}: "
        todo = "repaired" if item.repaired else item.todo
        console.print(f"{where}{item.path} {item.problem}; {todo}", markup=False, highlight=False, soft_wrap=True)
    for study, process in checked.held.items():
        line = f"study {study!r} is held by {process}"
        console.print(f"{line}; files that it may be writing were not checked", markup=False, soft_wrap=True)
    read = (
        f"{plural(checked.studies, 'study')}, {plural(checked.trials, 'trial')}, {plural(checked.files, 'hashed file')}"
    )
    left = sum(not item.repaired for item in checked.findings)
    console.print(f"{read}: {plural(left, 'problem') if left else 'no problems found'}", markup=False, highlight=False)


def show_comparison(console: Console, tables: Iterable[Table], notes: Iterable[str], files: Iterable[Path]) -> None:
    """Studies side by side, how to read the tables, and the files that were written."""
    for part in tables:
        console.print(part)
        console.print()
    for note in notes:
        console.print(escape(note), style="dim", soft_wrap=False)
    for file in files:
        console.print(str(file), markup=False)


def show_page(console: Console, server: str | None, path: str) -> None:
    """The address of a page of MLflow. server: of MLflow; None: `searchfm dashboard` serves it at its usual port."""
    address = f"{server}{path}" if server else f"http://127.0.0.1:5000{opened(path)}"
    console.print(f"MLflow  {address}{'' if server else '  (while searchfm dashboard runs)'}", markup=False)


def show_addresses(console: Console, as_json: bool, optuna: str | None = None, mlflow: str | None = None) -> None:
    """The addresses of the user interfaces: of both, or of one that runs as a service."""
    optuna, mlflow = (address and _login(console, address) for address in (optuna, mlflow))
    if as_json:
        console.print(schema.dump(schema.Addresses(optuna=optuna, mlflow=mlflow)), markup=False)
    elif optuna and mlflow:
        console.print(f"optuna-dashboard  {optuna}\nMLflow            {mlflow}", markup=False)
        console.print("Ctrl-C stops both", style="dim")
    else:
        console.print(f"serving at {optuna or mlflow}", markup=False)


def _login(console: Console, address: str) -> str:
    """An address with its token only on a terminal: logs are kept, and read by others."""
    return address if console.is_terminal else re.sub(r"([?&]token=)[^&#]*", r"\1TOKEN", address)


# --- the final model --------------------------------------------------------------------------------------------------


def show_final(console: Console, final: Final) -> None:
    """The end of `retrain`: finalists, winner, its accuracy with the uncertainty, and the next commands."""
    if final.finalists:
        console.print(finalist_table(final))
    for subject, sentences in final_sentences(final).items():
        console.print(labelled(subject, *sentences, indent=12))
    console.print(class_table(final))
    name = final.study
    console.print(f"[dim]next[/]  searchfm predict {name} IMAGE...\n      searchfm export {name}")
    console.print(f"      searchfm compare {name} OTHER\n      searchfm report {name}")


def finalist_table(final: Final) -> Table:
    """A row per finalist: its value in the search, and its accuracy with fresh seeds."""
    shown = table("trial", "search", "fresh seeds", "mean", "parameters", "MFLOP", title="finalists, on validation")
    for finalist in sorted(final.finalists, key=lambda finalist: -finalist.mean):
        best = finalist.trial == final.winner
        marks = ", ".join(["default"] * (finalist.trial == final.default) + ["wins"] * best)
        shown.add_row(
            f"{finalist.trial} ({marks})" if marks else str(finalist.trial),
            "-" if finalist.value is None else digits(finalist.value),
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


def model_table(rows: "Iterable[Version]") -> Table:
    """A row per registered version, the newest of each model first."""
    shown = table("model", "study", "trial", "test", "registered")
    for row in rows:
        accuracy = "-" if row.test_accuracy is None else f"{row.test_accuracy:.4f}"
        when = datetime.fromtimestamp(row.created).strftime("%Y-%m-%d %H:%M")
        champion = "  [green]champion[/]" * row.champion
        shown.add_row(f"{escape(row.uri)}{champion}", escape(row.study), str(row.trial), accuracy, when)
    return shown


# --- data sets, predictions -------------------------------------------------------------------------------------------


def show_data(console: Console, rows: "Iterable[Described]") -> None:
    """A row per data set; then the origin of each, and its path if it is on this machine."""
    rows = list(rows)
    shown = table("data set", "images", "classes", "training", "test", "here")
    for row in rows:
        size = "x".join(str(side) for side in row.shape) if row.shape else "-"
        test = "carved" if row.test is None else f"{row.test:,}"
        here = "[green]yes[/]" if row.location else "[yellow]no[/]"
        shown.add_row(escape(row.name), size, str(row.classes), f"{row.train:,}", test, here)
    console.print(shown)
    indent = max((len(row.name) for row in rows), default=0) + 2
    for row in rows:
        console.print(labelled(row.name, row.origin, indent=min(indent, 30)), soft_wrap=False)
        if row.location is not None and str(row.location) != row.name:
            console.print(str(row.location), style="dim", markup=False)


def show_overview(console: Console, row: "Described", seen: "Overview", picture: Path | None) -> None:
    """A data set by class and part; then sizes, modes, duplicates and what is wrong with it."""
    shown = table("class", *seen.counts, numeric=set(seen.counts))
    order = sorted(range(len(seen.classes)), key=lambda label: -sum(counts[label] for counts in seen.counts.values()))
    for label in order[:SHOWN]:
        shown.add_row(escape(seen.classes[label]), *(f"{counts[label]:,}" for counts in seen.counts.values()))
    if len(order) > SHOWN:
        shown.add_row(f"and {len(order) - SHOWN} others", *("" for _ in seen.counts))
    console.print(shown)
    for subject, text in overview_lines(row, seen).items():
        console.print(labelled(subject, text, indent=12), soft_wrap=False)
    if picture is not None:
        console.print(f"[bold]picture[/]     {escape(str(picture))}")


def overview_lines(row: "Described", seen: "Overview") -> dict[str, str]:
    """What is known of a data set, beside its counts."""
    totals = {part: sum(counts) for part, counts in seen.counts.items()}
    if row.test is not None:
        totals["test"] = row.test
    tested = " (carved out by content)" if seen.carved else ""
    divided = ", ".join(f"{totals[part]:,} {part}" for part in ("test", "validation", "training") if part in totals)
    lines = {"data": f"{row.name}, {row.origin}"}
    lines["images"] = f"{sum(totals.values()):,}: {divided.replace(' test', f' test{tested}', 1)}"
    if seen.problem:
        lines["problem"] = seen.problem
    sides = {"height": seen.heights, "width": seen.widths}
    lines["pixels"] = ", ".join(
        f"{name} {low}" if low == high else f"{name} {low} to {high} (median {middle:g})"
        for name, (low, middle, high) in sides.items()
    )
    if seen.size:
        other = 64 if seen.size == 128 else 128
        lines["size"] = f"resized to {seen.size}x{seen.size} by a new study; another: --set data.size={other}"
    lines["modes"] = ", ".join(f"{count:,} {mode}" for mode, count in seen.modes.items())
    held = [sum(counts[label] for counts in seen.counts.values()) for label in range(len(seen.classes))]
    fraction = max(held) / sum(held)
    misleading = fraction > HALF and imbalanced(fraction, len(held))
    misleads = ": accuracy misleads; retrain prints balanced accuracy" if misleading else ""
    lines["largest"] = f'"{seen.classes[held.index(max(held))]}", {fraction:.1%} of the images{misleads}'
    copies = [f"{pair} share {plural(count, 'image')}" for pair, count in seen.shared.items()]
    if seen.repeated:
        verb = "repeats" if seen.repeated == 1 else "repeat"
        copies.append(f"{plural(seen.repeated, 'image')} {verb} an earlier one of the class")
    if seen.contradicting:
        copies.append(f"{seen.contradicting:,} in two classes: {'; '.join(seen.contradictions)}")
    if seen.compared:
        lines["duplicates"] = "; ".join(copies) or "none"
    if seen.unreadable:
        lines["unreadable"] = f"{len(seen.unreadable)}: {'; '.join(seen.unreadable[:3])}"
    return lines


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


def show_predicted(console: Console, rows: "Sequence[Prediction]", classes: Container[str]) -> None:
    """How many files cannot be read; of several images, how many are of each class, and, where all folders are named
    after classes, how many have their folder's.
    """
    answered = [row for row in rows if not row.error]
    if len(answered) < len(rows):
        console.print(f"[red]{len(rows) - len(answered):,} of {plural(len(rows), 'file')} cannot be read[/]")
    if len(answered) < 2:
        return
    counts = Counter(row.top[0][0] for row in answered).most_common()
    named = ", ".join(f"{escape(name)} {number:,}" for name, number in counts)
    console.print(f"{plural(len(answered), 'image')}: {named}")
    pairs = [(Path(row.image).parent.name, row.top[0][0]) for row in answered]
    if all(folder in classes for folder, _ in pairs):
        correct = sum(folder == name for folder, name in pairs)
        console.print(
            f"{correct / len(pairs):.2%} correct by the names of their folders: {correct:,} of {len(pairs):,}"
        )


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


@dataclass(frozen=True)
class Labelled:
    """Lines beside a label. Each is wrapped between words, without the spaces to the right that a table has."""

    label: str
    lines: Sequence[str]
    indent: int = 8
    style: str = "bold"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wrapped = Text("\n".join(self.lines)).wrap(console, max(options.max_width - self.indent, 20))
        for index, line in enumerate(wrapped):
            head = self.label if index == 0 else ""
            line.rstrip()
            yield Text(f"{head:<{self.indent}}", self.style, end="") if line else Text(head, end="")
            yield Text("", end="").append_text(line).append("\n")


def labelled(label: str, *lines: str, indent: int = 8, style: str = "bold") -> Labelled:
    """`Labelled` with its lines as arguments."""
    return Labelled(label, lines, indent, style)


def hanging(text: str, width: int) -> str:
    """A line wrapped between words, with an indent from its second row on."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


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
    """The text beside a trial's state: why it failed, what pruned it, the params that fit into so many characters."""
    if trial.twin is not None:
        return f"twin of {trial.twin}"
    params, reason = param_texts(trial.params), " ".join((trial.reason or "").split())
    if pruned := re.fullmatch(r"pruned (.+) after epoch \d+", reason):
        return fitting([f"{pruned[1].removeprefix('by ')} ", *params], width)
    if len(reason) > width:
        reason = re.sub(r"^model\.custom\.factory = \S+: raises ", "", reason)  # what the user's code raised, first
    return reason or fitting(params, width)


def digits(value: float | None) -> str:
    """An accuracy."""
    return "-" if value is None else f"{value:.4f}"
