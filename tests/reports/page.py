"""Writes what the results say: the tables of studies/README.md, `# Measured:` of studies, pictures, the table of
searches by the clock in README.md, and that of searches by equal time in BENCHMARKS.md.

python -m tests.reports.page; `python -m tests.reports` does it after each study.
"""

import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from searchfm import format
from searchfm.format import plural
from searchfm.home import write_whole
from searchfm.search import files
from tests.bench import deadline
from tests.reports import pictures
from tests.reports.hours import SEARCHES, Hour, kept
from tests.reports.results import Result, Run, label
from tests.reports.rows import RESULTS, ROWS, STUDIES, studies

README = STUDIES / "README.md"
FRONT = STUDIES.parent / "README.md"
BENCHMARKS = STUDIES.parent / ".github" / "BENCHMARKS.md"
HEAD = "| row | study | theirs | ours | budget | pictures |\n|---|---|---|---|---|---|\n"
WIDTH, INDENT = 120, "#           "
HOURS_HEAD = (
    "| command | test accuracy, 95% interval | best trial; fresh seeds | trials, pruned | final training | took | "
    "when, where |\n|---|---|---|---|---|---|---|\n"
)
FRONT_HEAD = "| command | test accuracy, 95% interval | trials | when, where |\n|---|---|---|---|\n"
Cells = tuple[str, str, list[str]]  # our figures, the budget, endings of the names of pictures
# Lines of the table that other rows' studies answer: row, its study, what the report has, where our figures are.
SHARED = {
    "A6 curves": ("a4-cnn-schedule", "loss and accuracy curves of the best convolutional net", "best"),
    "A9 comparison": ("a4-cnn-schedule", "92.68, 93.86, 80.44 and 42.78, 99.6, 1842 s an epoch", "compare"),
    "B3 interval, confusion": ("b2-mlp-tr1", "95% interval of the error 0.1024 to 0.1145; confusion matrix", "error"),
    "B7 confusion, curves": ("b6-cifar100-residual", "confusion matrix and curves of the best", "best"),
}
COMPARED = {"convolutional": "a4-cnn-schedule", "transfer": "a7-resnet-stages", "ViT": "a8-vit-best"}  # of A9


def path_of(study: str) -> Path:
    return STUDIES / "reports" / f"{study}.toml"


def points(row: str, settings: Mapping[str, Any]) -> int:
    """How many points the grid of a row's study has."""
    study = files.read(path_of(row)).study(settings)
    assert study.points is not None
    return len(study.points)


# --- text -------------------------------------------------------------------------------------------------------------


def percent(values: Sequence[float]) -> str:
    """The mean in percent, with the standard deviation over seeds where there are several."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def figures_of(result: Result) -> str:
    """Accuracies of each point: mean of its seeds."""
    groups: dict[str, list[Run]] = {}
    for run in result.runs:
        groups.setdefault(label(run.params), []).append(run)
    parts = []
    for name, runs in groups.items():
        last = {key: [run.epochs[key][-1] for run in runs] for key in runs[0].epochs}
        text = f"{percent([run.value for run in runs])} on validation, {percent(last['train_accuracy'])} on training"
        if len(groups) == 1:
            losses = (f"{statistics.mean(last[key]):.2f}" for key in ("train_loss", "val_loss"))
            text += "; loss {1} and {0}".format(*losses)
        parts.append(f"{name}: {text}" if name else f"accuracy {text}")
    return "; ".join(parts)


def budget_of(result: Result) -> str:
    """What a row was trained on, and for how long."""
    run, seeds = result.runs[0], len({run.study_seed for run in result.runs})
    size = run.config["data"]["size"]
    epochs = sorted({len(run.epochs["val_loss"]) for run in result.runs})
    lacking = len(ROWS[result.row].seeds) * points(result.row, result.settings) - len(result.runs)
    changed = ", ".join(f"{key} = {value}" for key, value in result.settings.items())
    texts = [
        f"{run.images[0]:,} images to train, {run.images[1]:,} to validate" + (f", {size}x{size}" if size else ""),
        f"{' or '.join(map(str, epochs))} epochs of {_span([run.seconds_per_epoch for run in result.runs])} s",
        changed,
        f"{seeds} seeds, ± their standard deviation" if seeds > 1 else "one seed",
        f"{plural(lacking, 'run')} missing" if lacking else "",
    ]
    return "; ".join(filter(None, texts))


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest of them, to three digits."""
    ends = dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values)))
    return " to ".join(ends)


def conditions_of(result: Result) -> str:
    """Where and when a row was trained."""
    run = result.runs[0]
    beside = f"{run.beside} trainings side by side, " if run.beside > 1 else ""
    torch = run.versions["torch"].partition("+")[0]
    return f"{beside}{run.hardware}, {run.precision}, torch {torch}, {max(run.date for run in result.runs)}"


def error_of(result: Result) -> str:
    """The interval of a final model's error."""
    final = result.retrained
    assert final is not None
    images = sum(map(sum, final.confusion))
    return (
        f"{1 - final.high:.4f} to {1 - final.low:.4f}: accuracy {100 * final.accuracy:.2f} on the test part of "
        f"{images:,} images (reading {final.reads}), after {final.epochs} epochs on all training data ({final.date})"
    )


def compared() -> str:
    """A9: accuracies, and seconds an epoch."""
    results = {name: Result.load(row) for name, row in COMPARED.items()}
    parts = []
    for name, result in results.items():
        best = max(result.runs, key=lambda run: run.value) if result else None
        text = f"{100 * best.value:.2f}, {best.seconds_per_epoch:.3g} s" if best else "not yet measured"
        parts.append(f"{name} {text}")
    return "; ".join(parts) + ". `searchfm compare a4-cnn-schedule a7-resnet-stages a8-vit-best` prints the table"


# --- headers and table ------------------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, str]:
    """The opening comment of a study file by keyword, continued lines joined."""
    entries: dict[str, str] = {}
    key = ""
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("# "):
            break
        if begun := re.fullmatch(r"# ([A-Z]\w+(?: as)?): +(\S.*)", line):
            key, entries[begun[1]] = begun[1], begun[2]
        else:
            assert key, f"{path.name}: {line}"
            assert line.startswith("#   "), f"{path.name}: a continued line is indented, or is lost: {line}"
            entries[key] += " " + line[1:].strip()
    return entries


def with_measured(text: str, measured: str) -> str:
    """A study file with another measurement in its header."""
    lines = textwrap.wrap(measured, WIDTH - len(INDENT), break_long_words=False, break_on_hyphens=False)
    block = "# Measured: " + f"\n{INDENT}".join(lines) + "\n"
    replaced, count = re.subn(r"^# Measured: .*\n(?:#  .*\n)*", lambda _: block, text, count=1, flags=re.MULTILINE)
    assert count == 1
    return replaced


def measured(result: Result) -> str:
    """What the header of a row's study says under `Measured`."""
    return f"{figures_of(result)}; {budget_of(result)}; {conditions_of(result)}"


def _own(study: str) -> Cells:
    """Our figures of a study, with its notes, its budget, and the endings of its pictures' names."""
    entries = header(path_of(study))
    if result := Result.load(study):
        return ". ".join([figures_of(result), *filter(None, [entries.get("Notes")])]), budget_of(result), [""]
    return entries["Measured"], "", []


def _shared(study: str, kind: str) -> Cells:
    """The same of a line that shares its study with another."""
    result = Result.load(study)
    if kind == "compare":
        return compared(), "", []
    if result is None or (kind == "error" and not result.retrained):
        return f"not yet measured: see {study}", "", []
    if kind == "error":
        return error_of(result), "", ["-confusion"]
    best = max(result.runs, key=lambda run: run.value)
    return f"those of the best trial, {100 * best.value:.2f} on validation", budget_of(result), ["-best", "-confusion"]


def lines() -> Iterator[str]:
    """The rows of the table."""
    entries: dict[str, tuple[str, str, Cells]] = {}
    for study in studies():
        number, _, rest = study.partition("-")
        entries[f"{number.upper()} {rest}"] = (study, header(path_of(study))["Reports"], _own(study))
    for line, (study, theirs, kind) in SHARED.items():
        entries[line] = (study, theirs, _shared(study, kind))
    for line in sorted(entries, key=lambda line: (line[0], int(line.split()[0][1:]), line)):
        study, theirs, (ours, budget, endings) = entries[line]
        links = ", ".join(f"[{end.strip('-') or 'plot'}](reports/results/{study}{end}.svg)" for end in endings)
        yield f"| {line} | `reports/{study}` | {theirs} | {ours} | {budget} | {links} |"


def tested(hour: Hour) -> str:
    """Test accuracy, with its interval."""
    return f"**{100 * hour.test:.2f}** ({100 * hour.low:.2f}-{100 * hour.high:.2f})"


def where(*hours: Hour) -> str:
    """Dates, then machines and versions of torch, each once."""
    machines = dict.fromkeys(f"{hour.hardware}, torch {hour.versions['torch'].partition('+')[0]}" for hour in hours)
    return f"{' and '.join(dict.fromkeys(hour.date for hour in hours))}, {'; '.join(machines)}"


def hour_lines() -> Iterator[str]:
    """The rows of the table of searches by the clock: those that ran, then the names of the others."""
    hours = list(kept())
    for hour in hours:
        fresh = "none" if hour.fresh is None else f"{100 * hour.fresh:.2f}"
        cells = (
            f"`{hour.command}`",
            tested(hour),
            f"{100 * hour.value:.2f}; {fresh}",
            f"{hour.trials}, {hour.pruned}",
            f"{hour.epochs} epochs in {format.seconds(hour.training_seconds)}, {hour.parameters:,} parameters",
            format.seconds(hour.seconds),
            where(hour),
        )
        yield f"| {' | '.join(cells)} |"
    for name in sorted(SEARCHES.keys() - {hour.name for hour in hours}):
        yield f"| {name} | not yet measured |" + " |" * 5


def front_lines() -> Iterator[str]:
    """The rows of the front page: a line for all seeds of a search."""
    for _, group in groupby(kept(), key=lambda hour: hour.name):
        hours = list(group)
        cells = (
            f"`{hours[0].command}`",
            ", ".join(map(tested, hours)),
            ", ".join(str(hour.trials) for hour in hours),
            where(*hours),
        )
        yield f"| {' | '.join(cells)} |"


def with_table(text: str, head: str, rows: Iterable[str]) -> str:
    """A page whose table with this head has these rows instead of its own."""
    before, found, rest = text.partition(head)
    assert found, f"there is no table {head}"
    return before + head + "".join(f"{line}\n" for line in rows) + re.sub(r"\A(?:\|.*\n)*", "", rest)


def readme() -> str:
    """studies/README.md with the tables of now."""
    return with_table(with_table(README.read_text("utf-8"), HEAD, lines()), HOURS_HEAD, hour_lines())


def texts(svg: str) -> list[str]:
    """The texts of a picture, in order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def pages() -> Iterator[tuple[Path, str]]:
    """All that is generated, with its path. Headers come before the table, which reads them."""
    for study in studies():
        if result := Result.load(study):
            path = path_of(study)
            yield path, with_measured(path.read_text("utf-8"), measured(result))
            yield from ((RESULTS / name, text) for name, text in pictures.draw(result).items())
    yield README, readme()
    yield FRONT, with_table(FRONT.read_text("utf-8"), FRONT_HEAD, front_lines())
    yield BENCHMARKS, with_table(BENCHMARKS.read_text("utf-8"), deadline.HEAD, deadline.lines(deadline.kept()))


def write() -> None:
    """Writes all that changed, and removes pictures that nothing draws any more."""
    generated = dict(pages())
    for path in set(RESULTS.glob("*.svg")) - set(generated):
        path.unlink()
    for path, text in generated.items():
        if not path.is_file() or path.read_text("utf-8") != text:
            write_whole(path, text.encode())


if __name__ == "__main__":
    write()
