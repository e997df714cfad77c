"""What a person sees in the terminal: live progress, plain lines where there is no terminal, and tables."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from searchfm.coordinator import News
from searchfm.job import Epoch
from searchfm.search.history import State, StudyRow, TrialRow
from searchfm.search.space import Choice, Range, leaves
from searchfm.search.study import Study
from searchfm.tuning import Tuning

if TYPE_CHECKING:
    from searchfm.learn.datasets import Described
    from searchfm.show.dashboard import Addresses
    from searchfm.tracking import Difference

Costs = Mapping[str, tuple[float, float]]  # of a trial, from the cheapest to the dearest: parameters, mflop
STATE_STYLE: Mapping[State, str] = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}


class Watch:
    """Live progress of a study: trials done, those under way, the best so far and the time left."""

    def __init__(self, console: Console, study: StudyRow, trials: int, workers: Sequence[str]) -> None:
        self.console, self.study, self.trials = console, study, trials
        self.counts: Counter[State] = Counter(row.state for row in study.trials if row.state != "running")
        self.before = sum(self.counts.values())
        self.best = study.best
        self.running: dict[int, tuple[TrialRow, list[Epoch]]] = {}
        self.began = time.monotonic()
        devices = Counter(workers)
        where = ", ".join(f"{count} x {device}" if count > 1 else device for device, count in devices.items())
        data = study.data
        console.print(
            f"[bold]{escape(study.name)}[/]: {trials} trials on {escape(str(study.resolved['data']['name']))}"
            f" ({data['train']:,} images to train on, {data['validation']:,} to validate),"
            f" workers: {where or 'none needed'}",
            highlight=False,
        )

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Shows the live table while the body runs; without a terminal, nothing but `tell`'s lines."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=True):
            yield

    def tell(self, news: News) -> None:
        """Takes in what happened, and prints a line for the end of a trial."""
        row = news.row
        if news.kind in ("started", "adopted") and row is not None:
            self.running[row.number] = (row, list(row.epochs))
            if news.kind == "adopted":
                self._line(f"trial {row.number:>4} goes on after epoch {len(row.reported)}")
        elif news.kind == "epoch" and news.epoch is not None and news.trial in self.running:
            self.running[news.trial][1].append(news.epoch)
        elif news.kind == "lost":
            self._line(f"trial {news.trial:>4} [red]lost[/]: {escape(news.text)}")
        elif news.kind == "ended" and row is not None:
            self.running.pop(row.number, None)
            self.counts[row.state] += 1
            better = row.value is not None and (self.best is None or row.value > (self.best.value or 0.0))
            if better:
                self.best = row
            self._line(self._ended(row, better))

    def _line(self, markup: str) -> None:
        self.console.print(markup, highlight=False, soft_wrap=True)

    def _ended(self, row: TrialRow, better: bool) -> str:
        state = f"[{STATE_STYLE[row.state]}]{row.state:<8}[/]"
        total = row.config.get("train", {}).get("epochs", "?")
        value = row.value if row.value is not None else next(reversed(list(row.reported.values())), None)
        figure = f"{value:.4f}" if value is not None else "     -"
        done = sum(self.counts.values())
        why = f"twin of {row.twin}" if row.twin is not None else escape(row.reason or show_params(row.params))
        mark = "  [bold green]best so far[/]" if better else ""
        return (
            f"[dim]{done:>4}/{self.trials}[/] trial {row.number:>4} {state} {figure}"
            f" epoch {len(row.reported) or len(row.epochs)}/{total} {seconds(spent(row)):>7}  {why}{mark}"
        )

    def _picture(self) -> RenderableType:
        done = sum(self.counts.values())
        bar = Progress(
            TextColumn("trials"),
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        words = [f"{count} {state}" for state in ("complete", "pruned", "failed") if (count := self.counts[state])]
        fresh = done - self.before
        if fresh and done < self.trials:
            words.append(f"about {seconds((time.monotonic() - self.began) / fresh * (self.trials - done))} left")
        bar.add_task(", ".join(words), total=self.trials, completed=done)
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("trial", "epoch", "accuracy", "params"):
            table.add_column(column, no_wrap=column != "params", overflow="ellipsis")
        for number, (row, epochs) in sorted(self.running.items()):
            total = row.config["train"]["epochs"]
            value = epochs[-1].val_accuracy if epochs else None
            table.add_row(
                str(number),
                f"{len(epochs)}/{total}",
                "-" if value is None else f"{value:.4f}",
                escape(show_params(row.params)),
            )
        parts: list[RenderableType] = [bar, table]
        if self.best is not None:
            parts.append(
                Text(
                    f"best: trial {self.best.number} with {self.best.value:.4f}, {show_params(self.best.params)}",
                    "green",
                )
            )
        return Group(*parts)


def study_table(studies: Iterable[StudyRow]) -> Table:
    """A line a study: how far it is, and what is best."""
    table = _table("study", "trials", "complete", "pruned", "failed", "running", "best", "data")
    for study in studies:
        counts = [str(len(study.of(state))) for state in ("complete", "pruned", "failed", "running")]
        best = f"{study.best.value:.4f}" if study.best else "-"
        total = f"{len(study.trials)}/{study.planned}"
        table.add_row(study.name, total, *counts, best, str(study.resolved["data"]["name"]))
    return table


def trial_table(rows: Sequence[TrialRow], title: str) -> Table:
    """The trials given, a line each, with what the search chose for them."""
    table = _table("trial", "state", "value", "epochs", "s/epoch", "parameters", "params", title=title)
    for row in rows:
        per_epoch = [epoch.seconds for epoch in row.epochs]
        table.add_row(
            str(row.number),
            Text(row.state + (f" (twin of {row.twin})" if row.twin is not None else ""), STATE_STYLE[row.state]),
            f"{row.value:.4f}" if row.value is not None else "-",
            str(len(row.epochs)),
            f"{sum(per_epoch) / len(per_epoch):.2f}" if per_epoch else "-",
            f"{row.result['parameters']:,}" if "parameters" in row.result else "-",
            escape(show_params(row.params)),
        )
    return table


def show_plan(console: Console, study: Study, stored: StudyRow | None, cost: Costs | None = None) -> None:
    """What a study would search: its question, its data and space, and what a trial costs."""
    about = describe(study, cost)
    console.print(f"[bold]{escape(study.name)}[/]  {escape(study.question)}", highlight=False, soft_wrap=True)
    data = study.data
    console.print(
        f"data: {escape(data['name'])}, subset {data['subset']:g}, validation {data['validation']:g};"
        f" {study.epochs} epochs; {about['sampler']}, pruner {about['pruner']}",
        highlight=False,
    )
    console.print(pair_table("key", "may be", about["space"]) if about["space"] else "nothing is searched: one config")
    points = "endless" if about["points"] is None else f"{about['points']:,}"
    done = f", {len(stored.trials)} of them there already" if stored else ""
    console.print(f"points: {points}; trials: {study.trials}{done}", highlight=False)
    if cost is not None:
        console.print(
            f"cost of a trial: {_span(cost['parameters'])} parameters, {_span(cost['mflop'])} MFLOP a sample"
            " (one forward pass)",
            highlight=False,
        )


def describe(study: Study, cost: Costs | None) -> dict[str, Any]:
    """A study as plain values: what `studies NAME --json` prints."""
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
        return ", ".join(str(figure(value)) for value in leaf.values)
    how = " (log)" if leaf.log else f" by {leaf.step:g}" if leaf.step not in (None, 1) else ""
    return f"{figure(leaf.low)} to {figure(leaf.high)}{how}"


def _span(ends: tuple[float, float]) -> str:
    low, high = (f"{end:,.0f}" if end >= 10 else f"{end:.2g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def show_study(console: Console, study: StudyRow) -> None:
    """One study: its question, how far it is, its best trials, and what failed."""
    if study.question:
        console.print(escape(study.question), highlight=False, soft_wrap=True)
    console.print(study_table([study]))
    _best(console, study)
    failed = study.of("failed")
    if failed:
        console.print(
            f"[red]failed:[/] {escape('; '.join(f'trial {r.number}: {r.reason}' for r in failed[:3]))}", soft_wrap=True
        )
    console.print(f"{study.folder}", style="dim", highlight=False, soft_wrap=True)


def show_end(console: Console, study: StudyRow, tuning: Tuning, elapsed: float) -> None:
    """The end of `tune`: what came of it, and the commands to type next."""
    _best(console, study)
    counts = ", ".join(f"{len(study.of(state))} {state}" for state in STATE_STYLE if study.of(state))
    told = sum(len(row.epochs) for row in study.trials if row.twin is None)
    full = sum(row.config["train"]["epochs"] for row in study.trials if row.twin is None and row.config)
    saved = f"; pruning saved {1 - told / full:.0%} of the epochs" if study.of("pruned") and full else ""
    console.print(f"{counts or 'no trial'} of {tuning.trials} in {seconds(elapsed)}{saved}", highlight=False)
    if len(study.trials) < tuning.trials and tuning.coordinator.exhausted:
        console.print("the space has no further point", highlight=False)
    if tuning.missing:
        console.print(
            f"[yellow]MLflow lacks {tuning.missing} trials; later:[/] searchfm sync {study.name} --apply",
            highlight=False,
        )
    if study.of("running"):
        console.print("the running trials go on with the same command", highlight=False)
    console.print(f"[dim]next[/]  searchfm dashboard {study.name}", highlight=False)
    if study.best is not None:
        console.print(f"      searchfm retrain {study.name}", highlight=False)


def _best(console: Console, study: StudyRow, count: int = 5) -> None:
    rows = (
        study.ranked(twins=False)[:count]
        or sorted(study.of("pruned"), key=lambda row: -max(row.reported.values(), default=0))[:count]
    )
    if rows:
        console.print(trial_table(rows, "best trials" if rows[0].state == "complete" else "no complete trial; pruned"))


def pair_table(left: str, right: str, rows: Mapping[str, str]) -> Table:
    """Two columns."""
    table = _table(left, right)
    for name, text in rows.items():
        table.add_row(escape(name), escape(text))
    return table


def describe_data(row: "Described") -> dict[str, Any]:
    """A data set as plain values: what `data --json` prints."""
    return {
        "name": row.name,
        "shape": list(row.shape) if row.shape else None,
        "classes": row.classes,
        "train": row.train,
        "test": row.test,
        "origin": row.origin,
        "found": str(row.location) if row.location else None,
    }


def data_table(rows: "Iterable[Described]") -> Table:
    """A line a data set: what it is, and where it is or would come from."""
    table = _table("data set", "images", "classes", "training", "test", "here", "origin")
    for row in rows:
        size = "x".join(str(side) for side in row.shape) if row.shape else "-"
        test = "carved" if row.test is None else f"{row.test:,}"
        here = escape(str(row.location)) if row.location else "[yellow]no[/]"
        table.add_row(escape(row.name), size, str(row.classes), f"{row.train:,}", test, here, row.origin)
    return table


def show_addresses(console: Console, addresses: "Addresses") -> None:
    """Where the two user interfaces are."""
    console.print(f"optuna-dashboard  {addresses.dashboard}", highlight=False, soft_wrap=True)
    console.print(f"MLflow            {addresses.mlflow}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C ends both", style="dim")


def show_differences(console: Console, study: StudyRow, found: "Sequence[Difference]", *, mended: bool) -> None:
    """What `sync` found between Optuna and MLflow."""
    if not found:
        console.print(f"{study.name}: MLflow holds all {len(study.trials)} trials as Optuna has them", highlight=False)
        return
    table = _table("trial", "in MLflow", "")
    for item in found:
        table.add_row("study" if item.trial is None else str(item.trial), item.text, "mended" if mended else "")
    console.print(table)
    if not mended:
        console.print(f"nothing was written; to mend it: searchfm sync {study.name} --apply", highlight=False)


def show_comparison(
    console: Console, tables: Iterable[Table], notes: Iterable[str], files: Iterable[Path | None]
) -> None:
    """Studies side by side, what a reader must know, and what was written where."""
    for table in tables:
        console.print(table)
        console.print()
    for note in notes:
        console.print(escape(note), style="dim", highlight=False, soft_wrap=True)
    for file in filter(None, files):
        console.print(str(file), highlight=False, soft_wrap=True, markup=False)


def show_params(params: Mapping[str, Any]) -> str:
    """What a search chose, on one line, keys by their shortest endings: `lr=0.01 optimizer=sgd`."""
    return " ".join(f"{name}={figure(params[key])}" for key, name in short_names(params).items())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys by their shortest endings: `optimizer.lr` is `lr` where nothing else ends so."""
    keys = list(keys)
    names: dict[str, str] = {}
    for key in keys:
        parts = key.removesuffix(".name").split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not parts[-count].isdigit() and not any(k != key and f".{k}".endswith(f".{ending}") for k in keys):
                names[key] = ending
                break
        else:
            names[key] = key
    return names


def figure(value: Any) -> str:
    """A value as short as it can be told."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def seconds(count: float) -> str:
    """A duration for a person: 4.1 s, 3 min 20 s, 2 h 5 min."""
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def spent(row: TrialRow) -> float:
    """Seconds that training a trial took, over all its epochs."""
    return sum(epoch.seconds for epoch in row.epochs)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    for column in columns:
        table.add_column(column, justify="left", overflow="fold")
    return table
