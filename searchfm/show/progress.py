"""Live progress of `tune` and `retrain`; where the output is no terminal, plain lines."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from searchfm.events import (
    JobEnded,
    JobEpoch,
    JobPlanned,
    JobRetried,
    JobStarted,
    Note,
    RetrainEvent,
    SearchEnded,
    StudyFound,
    StudyOpened,
    TrialEnded,
    TrialEpoch,
    TrialPaused,
    TrialRetried,
    TrialStarted,
    TuneEvent,
)
from searchfm.format import data_lines, param_texts, plural, seconds
from searchfm.jobs import Job
from searchfm.records import Epoch, State, StudyRecord, Trial
from searchfm.show.live import View
from searchfm.show.summary import study_line
from searchfm.show.terminal import STYLES, digits, fitting, hanging, note, table

WATCH_SECONDS = 2.0  # between two looks at the studies
LONG = 10.0  # seconds of an epoch that gets a line of its own where there is no live table


def tune_view(console: Console, event: TuneEvent | RetrainEvent, view: View | None = None) -> View | None:
    """The view of an event of a search, and of the final training that may follow it; prints what is known of a study
    before it is opened.
    """
    match event:
        case StudyFound() if view is None:
            text = event.question or ("a study of this home" if event.resumed else "a new study")
            console.print(f"[bold]{escape(event.name)}[/] on {escape(event.dataset)}: {escape(text)}", soft_wrap=False)
        case Note(text) if view is None:
            console.print(escape(text), soft_wrap=False)
        case StudyOpened():
            return TuneView(console, event.study, event.trials, event.workers, event.left)
        case SearchEnded():
            return RetrainView(console, event.study.name)
    return view


def retrain_view(console: Console, event: RetrainEvent, view: View | None = None) -> View | None:
    """The view of an event of a final training."""
    return RetrainView(console, event.name) if isinstance(event, StudyFound) else view


def watch(
    console: Console,
    studies: Iterable[Sequence[StudyRecord]],
    shown: Callable[[Console, Sequence[StudyRecord]], RenderableType],
) -> None:
    """Shows studies as they stand every two seconds, until Ctrl-C; without a terminal, a line for each change."""
    steps, before = iter(studies), list[str]()
    with suppress(KeyboardInterrupt):
        if not console.is_terminal:
            while True:
                lines = [study_line(study) for study in next(steps)]
                for line in lines:
                    if line not in before:
                        console.print(line, markup=False)
                before = lines
                time.sleep(WATCH_SECONDS)
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                at = Text(f"{datetime.now():%H:%M:%S}; every {WATCH_SECONDS:g} s until Ctrl-C", "dim")
                live.update(Group(shown(console, next(steps)), at), refresh=True)
                time.sleep(WATCH_SECONDS)


class TuneView:
    """Progress of a search: trials done, trials running, the best so far and the time left.

    left: seconds to the end of the timeout; infinite without one.
    """

    def __init__(
        self, console: Console, study: StudyRecord, trials: int, workers: Sequence[str], left: float = math.inf
    ) -> None:
        self.console, self.trials, self.best = console, trials, study.best
        self.counts: Counter[State] = Counter(trial.state for trial in study.trials if trial.state != "running")
        self.paused = {trial.number for trial in study.paused}
        self.before = self._done
        self.running: dict[int, tuple[Trial, list[Epoch]]] = {}
        self.began = time.monotonic()
        self.deadline = self.began + left
        devices = ", ".join(f"{n} x {device}" if n > 1 else device for device, n in Counter(workers).items())
        console.print(
            f"[bold]{escape(study.name)}[/]: {plural(trials, 'trial')} on {escape(study.resolved['data']['name'])},"
            f" workers: {devices or 'none needed'}",
            soft_wrap=False,
        )
        for line in data_lines(study):
            console.print(hanging(line, console.width), markup=False)

    def update(self, event: TuneEvent) -> None:
        """Updates the table, and prints a line for the end of a trial."""
        match event:
            case TrialStarted(number, trial, kind):
                self.paused.discard(number)
                self.running[number] = (trial, list(trial.epochs))
                if kind == "adopted":
                    where = f"after epoch {len(trial.reported)}" if trial.reported else "from its start"
                    self.console.print(f"{self._name(number)} resumes {where}")
            case TrialEpoch(number, epoch) if number in self.running:
                self.running[number][1].append(epoch)
            case TrialRetried(number, text):
                self.console.print(f"{self._name(number)} [red]lost[/]: {escape(text)}", soft_wrap=False)
            case Note(text):
                self.console.print(escape(text), soft_wrap=False)
            case TrialPaused(number, trial):
                self.running.pop(number, None)
                self.paused.add(number)
                self.console.print(self._ended(trial), no_wrap=True, soft_wrap=False)
            case TrialEnded(number, trial) if number in self.paused:  # its row is there
                self.paused.remove(number)
                self.counts[trial.state] += 1
            case TrialEnded(number, trial):
                self.running.pop(number, None)
                self.counts[trial.state] += 1
                better = trial.value is not None and (self.best is None or trial.value > (self.best.value or 0.0))
                if better:
                    self.best = trial
                self.console.print(self._ended(trial, better), no_wrap=True, soft_wrap=False)

    @property
    def _done(self) -> int:
        """Trials that ended, or are paused: few of those go on."""
        return self.counts.total() + len(self.paused)

    def _name(self, number: int) -> str:
        return f"trial {number:>{len(str(self.trials - 1))}}"

    def _ended(self, trial: Trial, better: bool = False) -> Text:
        """One row: the params that fit, or why the trial ended."""
        done = f"{self._done:>{len(str(self.trials))}}/{self.trials}"
        state = trial.state if trial.paused is None else "paused"
        planned = str(trial.planned_epochs or "?")
        epochs = f"{len(trial.reported) or len(trial.epochs):>{len(planned)}}/{planned}"
        row = Text.from_markup(
            f"[dim]{done}[/] {self._name(trial.number)} [{STYLES[trial.state]}]{state:<8}[/]"
            f" {digits(trial.accuracy):>6} {'[bold green]best[/]' if better else '    '}"
            f" epoch {epochs} {seconds(trial.seconds):>7}  "
        )
        row.append(note(trial, self.console.width - row.cell_len))
        row.truncate(self.console.width, overflow="ellipsis")
        return row

    def render(self) -> RenderableType:
        """A bar over the trials, the running ones, and the best."""
        done = self._done
        counts = [*((self.counts[state], str(state)) for state in STYLES), (len(self.paused), "paused")]
        texts = [f"{count} {state}" for count, state in counts if count]
        if text := self._left(done):
            texts.append(text)
        shown = table("trial", "epoch", "accuracy", "params", compact=True)
        for number, (trial, epochs) in sorted(self.running.items()):
            params = fitting(param_texts(trial.params), self.console.width - 26)  # the other columns
            shown.add_row(str(number), *_pace(epochs, trial.planned_epochs), escape(params))
        best = "no complete trial yet"
        if self.best is not None:
            best = f"best: trial {self.best.number} with {self.best.value:.4f}"
            if self.best.params:
                best += ", " + fitting(param_texts(self.best.params), self.console.width - len(best) - 2)
        line = Text(best, "green", overflow="ellipsis", no_wrap=True)
        return Group(_bar(self.console, "trials", done, self.trials, ", ".join(texts)), shown, line)

    def _left(self, done: int) -> str:
        """The time left: of the trials at the pace of this search, or of the timeout where that is shorter."""
        now = time.monotonic()
        if done >= self.trials:
            return ""
        expected = math.inf  # no pace is known yet
        if done > self.before:
            expected = (now - self.began) / (done - self.before) * (self.trials - done)
        left = max(self.deadline - now, 0.0)
        if expected <= left:
            return f"about {seconds(expected)} left" if expected < math.inf else ""
        return f"timeout in {seconds(left)}"


class RetrainView:
    """Progress of `retrain`: jobs done, jobs running with their epochs, and notes in between."""

    def __init__(self, console: Console, study: str) -> None:
        self.console, self.study = console, study
        self.planned: dict[str, int] = {}  # epochs by job
        self.running: dict[str, tuple[Job, list[Epoch]]] = {}
        self.trained = 0  # epochs, of jobs that are done

    def update(self, event: RetrainEvent) -> None:
        """Updates the table, and prints a line for the end of a job."""
        match event:
            case Note(text):
                self.console.print(f"{escape(self.study)}: {escape(text)}", soft_wrap=False)
            case JobPlanned(job):
                self.planned[job.label] = job.epochs
            case JobStarted(job):
                self.running[job.label] = (job, [])
            case JobEpoch(job, epoch):
                self.running[job.label][1].append(epoch)
                if not self.console.is_terminal and epoch.seconds > LONG:
                    self.console.print(f"{job.label:<24} epoch {epoch.index}/{job.epochs}  {seconds(epoch.seconds)}")
            case JobRetried(job, text):
                self.console.print(
                    f"{job.label:<24} [red]lost[/]: {escape(text)}; goes on from its last checkpoint", soft_wrap=False
                )
            case JobEnded():
                self.console.print(self._ended(event), soft_wrap=False)

    def _ended(self, event: JobEnded) -> str:
        job = event.job
        _, epochs = self.running.pop(job.label, (job, []))
        self.trained += self.planned.get(job.label, 0)
        value = "      " if event.value is None else f"{event.value:.4f}"
        spent = f" {plural(job.epochs, 'epoch')} {seconds(sum(epoch.seconds for epoch in epochs)):>8}" if epochs else ""
        mark = {"finished": "[green]done[/]  ", "found": "[dim]earlier[/]", "failed": "[red]failed[/]"}[event.kind]
        return f"{job.label:<24} {mark} {value}{spent}  {escape(event.text)}".rstrip()

    def render(self) -> RenderableType:
        """A bar over the epochs of all jobs, and the running jobs."""
        running = list(self.running.values())  # `update` may change it meanwhile: this runs in a thread of `Live`
        if not running:
            return ""
        total = sum(self.planned.values())
        done = self.trained + sum(len(epochs) for _, epochs in running)
        shown = table("job", "epoch", "accuracy", compact=True)
        for job, epochs in running:
            shown.add_row(job.label, *_pace(epochs, job.epochs))
        return Group(_bar(self.console, "epochs", min(done, total), total), shown)


def _bar(console: Console, name: str, done: int, total: int, text: str = "") -> ProgressBar:
    columns = (
        TextColumn(name),
        BarColumn(min(40, max(10, console.width - 64))),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    bar = ProgressBar(*columns, console=console)
    bar.add_task(text, total=total, completed=done)
    return bar


def _pace(epochs: Sequence[Epoch], planned: int) -> tuple[str, str]:
    value = epochs[-1].val_accuracy if epochs else None
    return f"{len(epochs)}/{planned}" if planned else "-", digits(value)
