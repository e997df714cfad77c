"""`searchfm compare`: studies side by side, with paired tests of their differences and the cost of each."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from searchfm import figures, format
from searchfm.errors import StudyError
from searchfm.records import Predictions, StudyRecord
from searchfm.show import pages
from searchfm.show.report import accuracy
from searchfm.stats import holm, mcnemar

SUFFIXES = (".png", ".svg")
NOTES = {
    "test": "test: the final model on the test part, which no choice was based on; each reading of it is counted.",
    "validation": "validation: the search's best trial, optimistic; searchfm retrain measures fresh trainings.",
}
# Columns of the table, and whether they hold text.
QUALITY = {
    "study": True,
    "accuracy": False,
    "95% interval": False,
    "measured on": True,
    "to the best": False,
    "p": False,
}
COST = {"data": True, "s/epoch": False, "training": False, "parameters": False, "MFLOP": False, "trials": False}
COLUMNS = {**QUALITY, **COST}
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


def compare_studies(studies: Sequence[StudyRecord]) -> list[Line]:
    """A line for each study, in order. Raises StudyError for a study without a complete trial, or named twice.

    Tested are differences to the best among studies of equal data fingerprint whose models predicted the same images,
    the test part for those that are retrained, the validation part for others.
    """
    for study in studies:
        if sum(other.name == study.name for other in studies) > 1:
            raise StudyError(f"study {study.name!r} is named twice; name each study once")
        if not study.ranked(twins=False):
            raise StudyError(f"study {study.name!r} has no complete trial to compare yet")
    lines = [_line(study) for study in studies]
    tests: dict[int, float] = {}
    for group in _comparable(studies):
        best = max(group, key=lambda index: (lines[index].accuracy, -index))
        for index, predictions in group.items():
            lines[index] = replace(lines[index], difference=lines[index].accuracy - lines[best].accuracy)
            if index != best:
                tests[index] = mcnemar(group[best].correct, predictions.correct)
    for index, p in zip(tests, holm(list(tests.values())), strict=True):
        lines[index] = replace(lines[index], p=p)
    return lines


def _line(study: StudyRecord) -> Line:
    final, best = study.final, study.ranked(twins=False)[0]
    common: dict[str, Any] = {
        "study": study.name,
        "difference": None,
        "p": None,
        "trials": len(study.trials),
        "search_seconds": sum(trial.seconds for trial in study.trials if trial.twin is None),
        "data": str(study.resolved["data"]["name"]),
    }
    if final is not None:
        measured = {key: getattr(final.test, key) for key in ("accuracy", "low", "high", "n", "reads")}
        cost = ("seconds_per_epoch", "training_seconds", "epochs", "parameters", "flops")
        return Line(split="test", **measured, **{key: getattr(final, key) for key in cost}, **common)
    assert best.value is not None
    assert best.result is not None
    low, high = accuracy(study, best).interval
    return Line(
        accuracy=best.value,
        low=low,
        high=high,
        split="validation",
        n=study.data.validation,
        reads=None,
        seconds_per_epoch=best.seconds_per_epoch,
        training_seconds=best.seconds,
        epochs=len(best.epochs),
        parameters=best.result.parameters,
        flops=best.result.flops,
        **common,
    )


def _comparable(studies: Sequence[StudyRecord]) -> list[dict[int, Predictions]]:
    """Studies by index, in groups of two or more with predictions of the same images."""
    groups: dict[tuple[str, str, bytes], dict[int, Predictions]] = defaultdict(dict)
    for index, study in enumerate(studies):
        final = study.final
        predictions = Predictions.read(study.folder / "final" if final else study.ranked(twins=False)[0].folder)
        if predictions is not None:
            part = final.test.fingerprint if final else "validation"
            groups[study.data.fingerprint, part, predictions.indices.tobytes()][index] = predictions
    return [group for group in groups.values() if len(group) > 1]


def describe_lines(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The comparison as plain values, for `--json` and MLflow."""
    return [asdict(line) for line in lines]


def comparison_tables(lines: Sequence[Line], width: int) -> list[Table]:
    """The comparison for a terminal of `width` characters: one table, or quality above cost."""
    return [_table(lines, c) for c in ((COLUMNS,) if width >= WIDE else (QUALITY, {"study": True, **COST}))]


def _table(lines: Sequence[Line], columns: Mapping[str, bool]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column, text in columns.items():
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for line in lines:
        cells = _cells(line)
        table.add_row(*[escape(cells[column]) for column in columns])
    return table


def comparison_markdown(lines: Sequence[Line]) -> str:
    """The comparison as Markdown, the note of its run in MLflow."""
    rows = [list(COLUMNS), ["---" if text else "---:" for text in COLUMNS.values()]]
    rows += [[format.escape(cells[column]) for column in COLUMNS] for cells in map(_cells, lines)]
    return "\n\n".join(["\n".join(f"| {' | '.join(row)} |" for row in rows), *comparison_notes(lines)])


def comparison_notes(lines: Sequence[Line]) -> list[str]:
    """How to read the table."""
    texts = [text for split, text in NOTES.items() if any(line.split == split for line in lines)]
    texts.append("Intervals are 95% (Wilson), for these trained models: another seed is not in them.")
    if any(line.p is not None for line in lines):
        texts.append("p: McNemar's mid-p test against the best on the same images, Holm-corrected.")
    if any(line.difference is None for line in lines) and len(lines) > 1:
        texts.append('"-": no other study was measured on the same images.')
    return texts


def comparison_picture(lines: Sequence[Line], suffix: str) -> bytes:
    """The accuracy-time front, a panel for each data set and split, as a file with that suffix (see `SUFFIXES`)."""
    return figures.png(_front(lines)) if suffix == ".png" else figures.svg(_front(lines), "front").encode()


def comparison_page(lines: Sequence[Line]) -> str:
    """The comparison as a self-contained page."""
    return pages.render(
        "compare.html.jinja",
        {},
        names=[line.study for line in lines],
        columns=COLUMNS,
        rows=[[cells[column] for column in COLUMNS] for cells in map(_cells, lines)],
        texts=[index for index, text in enumerate(COLUMNS.values()) if text],
        notes=comparison_notes(lines),
        front=pages.embed(_front(lines), "front"),
    )


def _cells(line: Line) -> dict[str, str]:
    difference = "-" if line.difference is None else "best" if line.p is None else f"{100 * line.difference:+.2f}"
    return {
        "study": line.study,
        "accuracy": f"{line.accuracy:.2%}",
        "95% interval": f"{100 * line.low:.2f}-{100 * line.high:.2f}%",
        "measured on": line.split + (f" (reading {line.reads})" if line.reads else ""),
        "to the best": difference,
        "p": "-" if line.p is None else format.p_value(line.p),
        "data": line.data,
        "s/epoch": f"{line.seconds_per_epoch:.2f}",
        "training": format.seconds(line.training_seconds),
        "parameters": f"{line.parameters:,}",
        "MFLOP": format.megaflop(line.flops),
        "trials": str(line.trials),
    }


def _front(lines: Sequence[Line]) -> Any:
    panels: dict[str, list[figures.Measured]] = {}
    for line in lines:
        point = figures.Measured(line.study, line.accuracy, line.low, line.high, max(line.training_seconds, 1e-3))
        panels.setdefault(f"{line.data}, {line.split} accuracy", []).append(point)
    return figures.front(panels)
