"""What a person sees of a final training: live progress, and in the end what is said of the model and how surely."""

import time
from collections.abc import Generator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from searchfm.job import Epoch
from searchfm.retrain import Final
from searchfm.retrain.batch import Errand, Step
from searchfm.show.terminal import seconds
from searchfm.tracking.registry import times

LESSER = ", not better than the champion on the same test part, which stays; --promote changes that"
LONG = 10.0  # seconds of an epoch that is worth a line of its own where there is no live picture
SHOWN = 20  # classes, of which the hardest are shown


class Watch:
    """Follows a final training: jobs done, those under way with their epochs, and what is said in between."""

    def __init__(self, console: Console, study: str) -> None:
        self.console, self.study = console, study
        self.planned: list[Errand] = []
        self.running: dict[str, tuple[Errand, list[Epoch]]] = {}
        self.trained = 0  # epochs, of jobs that are done
        self.began = time.monotonic()

    def follow(self, steps: Generator[Step, None, Final]) -> Final:
        """Shows the steps as they come; returns what comes of them."""
        if not self.console.is_terminal:
            return self._drain(steps)
        with Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=True):
            return self._drain(steps)

    def _drain(self, steps: Generator[Step, None, Final]) -> Final:
        while True:
            try:
                self.tell(next(steps))
            except StopIteration as end:
                final: Final = end.value
                return final

    def tell(self, step: Step) -> None:
        """Takes in what happened, and prints a line for the end of a job."""
        errand = step.errand
        if errand is None:
            self._line(f"{escape(self.study)}: {escape(step.text)}")
            return
        name = f"{errand.label:<24}"
        if step.kind == "planned":
            self.planned.append(errand)
        elif step.kind == "started":
            self.running[errand.label] = (errand, [])
        elif step.kind == "epoch" and step.epoch is not None:
            self.running[errand.label][1].append(step.epoch)
            if not self.console.is_terminal and step.epoch.seconds > LONG:
                self._line(f"{name} epoch {step.epoch.index}/{errand.epochs}  {seconds(step.epoch.seconds)}")
        elif step.kind == "lost":
            self._line(f"{name} [red]lost[/]: {escape(step.text)}; goes on from its last checkpoint")
        else:
            _, epochs = self.running.pop(errand.label, (errand, []))
            self.trained += errand.epochs * (errand in self.planned)
            result = step.result or {}
            value = result.get("value", result.get("accuracy"))
            figure = "      " if value is None else f"{value:.4f}"
            spent = f" {errand.epochs} epochs {seconds(sum(epoch.seconds for epoch in epochs)):>8}" if epochs else ""
            mark = {"done": "[green]done[/]  ", "found": "[dim]earlier[/]"}.get(step.kind, "[red]failed[/]")
            self._line(f"{name} {mark} {figure}{spent}  {escape(step.text)}".rstrip())

    def _line(self, markup: str) -> None:
        self.console.print(markup, highlight=False, soft_wrap=True)

    def _picture(self) -> RenderableType:
        if not self.running:
            return ""
        epochs = sum(errand.epochs for errand in self.planned)
        under_way = sum(len(trained) for _, trained in self.running.values())
        bar = Progress(TextColumn("epochs"), BarColumn(40), MofNCompleteColumn(), console=self.console)
        bar.add_task("", total=epochs, completed=min(self.trained + under_way, epochs))
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("job", "epoch", "accuracy"):
            table.add_column(column, no_wrap=True)
        for errand, trained in self.running.values():
            value = trained[-1].val_accuracy if trained else None
            done = f"{len(trained)}/{errand.epochs}" if errand.epochs else "-"
            table.add_row(errand.label, done, "-" if value is None else f"{value:.4f}")
        return Group(bar, table)


def show(console: Console, final: Final) -> None:
    """The end of `retrain`: finalists, winner, what is said of it and how surely, and what to type next."""
    for part in (finalist_table(final), *sentences(final), class_table(final)):
        if part is not None:
            console.print(part, highlight=False, soft_wrap=True)
    name = final["study"]
    console.print(f"[dim]next[/]  searchfm predict {name} IMAGE...\n      searchfm export {name}", highlight=False)
    console.print(f"      searchfm compare {name} OTHER\n      searchfm report {name}", highlight=False)


def finalist_table(final: Final) -> Table | None:
    """A line a finalist: what the search said, and what fresh seeds say."""
    if not final["finalists"]:
        return None
    table = _table("trial", "search", "fresh seeds", "mean", "parameters", "MFLOP", title="finalists, on validation")
    for one in sorted(final["finalists"], key=lambda each: -each["mean"]):
        best = one["trial"] == final["winner"]
        table.add_row(
            f"{one['trial']}{' (wins)' if best else ''}",
            f"{one['value']:.4f}",
            " ".join(f"{value:.4f}" for value in one["values"]),
            f"{one['mean']:.4f}",
            f"{one['parameters']:,}",
            f"{one['flops'] / 1e6:.3g}",
            style="green" if best else None,
        )
    return table


def sentences(final: Final) -> list[str]:
    """What came of it, a line each; every interval says what it is an interval of."""
    winner, validation, test = final["winner"], final["validation"], final["test"]
    said = []
    if final["finalists"]:
        if final["tie"]:
            tied = ", ".join(map(str, final["tie"]))
            said.append(f"Trials {tied} cannot be told apart (paired test, Holm): the cheapest wins, trial {winner}.")
        else:
            said.append(f"Trial {winner} wins.")
        value = next(one["value"] for one in final["finalists"] if one["trial"] == winner)
        count = len(final["finalists"][0]["values"])
        said.append(
            f"Validation: the search said {value:.2%} of it, {count} fresh seed{'s' * (count > 1)} say "
            f"{validation['accuracy']:.2%}: an optimism of {100 * final['optimism']:+.2f} points."
        )
        if validation["low"] is not None:
            said.append(
                f"            a further seed would give {validation['low']:.2%} to {validation['high']:.2%} "
                f"(95% prediction interval, on the search's budget and the same {validation['n']:,} images);"
                f" seeds vary by {100 * validation['spread']:.2f} points (standard deviation)."
            )
    else:
        said.append(f"Trial {winner}: the search said {validation['accuracy']:.2%}, which no fresh seed has confirmed.")
    said.append(
        f"Test:       [bold]{test['accuracy']:.2%}[/] of {test['n']:,} images right, 95% interval {test['low']:.2%} to "
        f"{test['high']:.2%} (Wilson): of this one model, on images like these; other seeds are not in it."
    )
    said.append(f"            The test part of these data has been read {times(test['reads'])}, this time included.")
    said.append(
        f"Model:      {final['parameters']:,} parameters, {final['flops'] / 1e6:.3g} MFLOP an image, "
        f"{final['epochs']} epochs of {seconds(final['seconds_per_epoch'])}"
    )
    model = final["model"]
    if model is not None:
        said.append(f"            {escape(model['uri'])}{', the champion' if model['champion'] else LESSER}")
    return said


def class_table(final: Final) -> Table:
    """Precision and recall on the test part, the classes that are missed most first."""
    rows = sorted(final["per_class"], key=lambda row: row["recall"])
    more = f", the hardest {SHOWN} of {len(rows)}" if len(rows) > SHOWN else ""
    table = _table("class", "precision", "recall", "images", title=f"classes, on test{more}")
    for row in rows[:SHOWN]:
        table.add_row(escape(row["class"]), f"{row['precision']:.4f}", f"{row['recall']:.4f}", f"{row['n']:,}")
    return table


def describe(final: Final) -> dict[str, object]:
    """What `retrain --json` prints."""
    keys = ("study", "finalists", "tie", "winner", "optimism", "validation", "test", "model", "seconds")
    return {key: final[key] for key in keys}


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
