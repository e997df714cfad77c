"""`searchfm compare`: studies side by side, with what may be said of their differences and what each costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from searchfm import plots
from searchfm.errors import StudyError
from searchfm.search.history import StudyRow
from searchfm.search.notes import escape as as_markdown
from searchfm.show import findings, page
from searchfm.show.findings import Predictions, seconds_per_epoch
from searchfm.show.terminal import seconds
from searchfm.stats import holm, mcnemar, wilson

SUFFIXES = (".png", ".svg")
NOTES = {
    "test": "test: the final model on the test part, which no choice was made with; readings of it are counted.",
    "validation": "validation: of the search's best trial, which flatters it; searchfm retrain measures the real one.",
}

# Columns of the table, and whether they are words.
WELL: Mapping[str, bool] = {
    "study": True,
    "accuracy": False,
    "95% interval": False,
    "measured on": True,
    "to the best": False,
    "p": False,
}
COST: Mapping[str, bool] = {
    "data": True,
    "s/epoch": False,
    "training": False,
    "parameters": False,
    "MFLOP": False,
    "trials": False,
}
COLUMNS = {**WELL, **COST}
WIDE = 132  # characters of a terminal that holds all of them side by side


@dataclass(frozen=True)
class Line:
    """A study in a comparison. Seconds, parameters and FLOPs are those of the model whose accuracy it is."""

    study: str
    accuracy: float
    low: float  # 95% interval (Wilson) of this one model
    high: float
    split: Literal["test", "validation"]  # what the accuracy was measured on
    difference: float | None  # to the best study on the same images; 0 for that one, None where none is comparable
    p: float | None  # of McNemar's test that there is no difference, Holm-corrected for all tests of the comparison
    seconds_per_epoch: float
    parameters: int
    flops: int  # of one image's forward pass
    trials: int
    training_seconds: float  # over all epochs
    epochs: int
    n: int  # images that the accuracy was measured on
    reads: int | None  # how often this home's studies had read that test part by then; None for validation
    search_seconds: float  # training of all trials
    data: str


def compare(studies: Sequence[StudyRow]) -> list[Line]:
    """A line for each study, in order. Raises StudyError for a study without a complete trial, or named twice.

    Tested are differences to the best among studies of equal data fingerprint whose models were shown the same images,
    the test part for those that are retrained, the validation part for others.
    """
    for study in studies:
        if sum(other.name == study.name for other in studies) > 1:
            raise StudyError(f"study {study.name!r} is named twice; each must be another")
        if not study.ranked(twins=False):
            raise StudyError(f"study {study.name!r} has no complete trial to compare yet")
    lines = [_line(study) for study in studies]
    tests: dict[int, float] = {}
    for group in _comparable(studies):
        best = max(group, key=lambda place: (lines[place].accuracy, -place))
        for place, answers in group.items():
            lines[place] = replace(lines[place], difference=lines[place].accuracy - lines[best].accuracy)
            if place != best:
                tests[place] = mcnemar(group[best].right, answers.right)
    for place, p in zip(tests, holm(list(tests.values())), strict=True):
        lines[place] = replace(lines[place], p=p)
    return lines


def _line(study: StudyRow) -> Line:
    final, best = study.final, study.ranked(twins=False)[0]
    assert best.value is not None
    searched = sum(epoch.seconds for row in study.trials if row.twin is None for epoch in row.epochs)
    common: dict[str, Any] = {
        "study": study.name,
        "reads": None,
        "difference": None,
        "p": None,
        "trials": len(study.trials),
        "search_seconds": searched,
        "data": str(study.resolved["data"]["name"]),
    }
    if final is not None:
        test = final["test"]
        kept = ("seconds_per_epoch", "training_seconds", "epochs", "parameters", "flops")
        common |= {key: test[key] for key in ("accuracy", "low", "high", "n", "reads")} | {
            key: final[key] for key in kept
        }
        return Line(split="test", **common)
    n = int(study.data["validation"])
    low, high = wilson(round(best.value * n), n)
    return Line(
        accuracy=best.value,
        low=low,
        high=high,
        split="validation",
        n=n,
        seconds_per_epoch=seconds_per_epoch(best),
        training_seconds=sum(epoch.seconds for epoch in best.epochs),
        epochs=len(best.epochs),
        parameters=best.result["parameters"],
        flops=best.result["flops"],
        **common,
    )


def _comparable(studies: Sequence[StudyRow]) -> list[dict[int, Predictions]]:
    """Studies by place, in groups of two or more whose answers are to the same images."""
    groups: list[tuple[tuple[str, str], dict[int, Predictions]]] = []
    for place, study in enumerate(studies):
        final = study.final
        answers = findings.predictions(study.folder / "final" if final else study.ranked(twins=False)[0].folder)
        if answers is None:
            continue
        kind = (str(study.data["fingerprint"]), str(final["test"].get("fingerprint", "")) if final else "validation")
        for other, group in groups:
            first = next(iter(group.values()))
            if kind == other and np.array_equal(first.indices, answers.indices):
                group[place] = answers
                break
        else:
            groups.append((kind, {place: answers}))
    return [group for _, group in groups if len(group) > 1]


def describe(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The comparison as plain values: what `--json` prints and MLflow keeps."""
    return [asdict(line) for line in lines]


def tables(lines: Sequence[Line], width: int) -> list[Table]:
    """The comparison for a terminal of so many characters: one table, or how well above at what cost."""
    if width >= WIDE:
        return [_table(lines, COLUMNS)]
    return [_table(lines, WELL), _table(lines, {"study": True, **COST})]


def _table(lines: Sequence[Line], columns: Mapping[str, bool]) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column, left in columns.items():
        made.add_column(column, justify="left" if left else "right", overflow="fold")
    for line in lines:
        cells = _cells(line)
        made.add_row(*[escape(cells[column]) for column in columns])
    return made


def markdown(lines: Sequence[Line]) -> str:
    """The comparison as Markdown, which MLflow shows with its run."""
    rows = [list(COLUMNS), ["---" if left else "---:" for left in COLUMNS.values()]]
    rows += [[as_markdown(cells[column]) for column in COLUMNS] for cells in map(_cells, lines)]
    return "\n\n".join(["\n".join(f"| {' | '.join(row)} |" for row in rows), *notes(lines)])


def notes(lines: Sequence[Line]) -> list[str]:
    """What a reader of the table must know."""
    told = [text for split, text in NOTES.items() if any(line.split == split for line in lines)]
    told.append("Intervals are 95% (Wilson), for these trained models: another seed is not in them.")
    if any(line.p is not None for line in lines):
        told.append("p: McNemar's mid-p test against the best on the same images, Holm-corrected.")
    if any(line.difference is None for line in lines) and len(lines) > 1:
        told.append('"-": no other study was measured on the same images.')
    return told


def picture(lines: Sequence[Line], suffix: str) -> bytes:
    """The accuracy-time front, a panel for each data set and split, as a file with that suffix (see `SUFFIXES`)."""
    figure = plots.front(_panels(lines))
    return plots.png(figure) if suffix == ".png" else plots.svg(figure, "front").encode()


def html(lines: Sequence[Line]) -> str:
    """The comparison as a self-contained page."""
    drawn = page.drawn(picture(lines, ".svg").decode())
    rows = [[cells[column] for column in COLUMNS] for cells in map(_cells, lines)]
    return page.render(
        "compare.html.jinja",
        {},
        names=[line.study for line in lines],
        columns=COLUMNS,
        rows=rows,
        words=[place for place, left in enumerate(COLUMNS.values()) if left],
        notes=notes(lines),
        front=drawn,
    )


def _cells(line: Line) -> dict[str, str]:
    return {
        "study": line.study,
        "accuracy": f"{line.accuracy:.2%}",
        "95% interval": f"{100 * line.low:.2f}-{100 * line.high:.2f}%",
        "measured on": line.split + (f" (reading {line.reads})" if line.reads else ""),
        "to the best": "-"
        if line.difference is None
        else "best"
        if line.p is None
        else f"{100 * line.difference:+.2f}",
        "p": "-" if line.p is None else findings.p_value(line.p),
        "data": line.data,
        "s/epoch": f"{line.seconds_per_epoch:.2f}",
        "training": seconds(line.training_seconds),
        "parameters": f"{line.parameters:,}",
        "MFLOP": f"{line.flops / 1e6:,.3g}",
        "trials": str(line.trials),
    }


def _panels(lines: Sequence[Line]) -> dict[str, list[plots.Measured]]:
    panels: dict[str, list[plots.Measured]] = {}
    for line in lines:
        one = plots.Measured(line.study, line.accuracy, line.low, line.high, max(line.training_seconds, 1e-3))
        panels.setdefault(f"{line.data}, {line.split} accuracy", []).append(one)
    return panels
