"""`searchfm compare`: studies side by side, with paired tests of their differences and the cost of each."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace
from rich.markup import escape
from rich.table import Table

from searchfm import format
from searchfm.errors import StudyError
from searchfm.records import Predictions, StudyRecord
from searchfm.show.schema import Compared
from searchfm.show.terminal import table
from searchfm.stats import holm, mcnemar

SUFFIXES = (".png", ".svg")
NOTES = {
    "test": "test: the final model on the test part, which no choice was based on; each reading of it is counted.",
    "validation": "validation: the search's best trial, optimistic; searchfm retrain measures fresh trainings.",
}
PADDING, NARROW = 2, 16  # characters between two columns; of the path of data at least
WIDE = 132  # characters of a terminal that holds all columns side by side


def _difference(line: Compared) -> str:
    return "-" if line.difference is None else "best" if line.p is None else f"{100 * line.difference:+.2f}"


Columns = Mapping[str, Callable[[Compared], str]]  # of the table, and the cell of a line
QUALITY: Columns = {
    "study": lambda line: line.study,
    "accuracy": lambda line: f"{line.accuracy:.2%}",
    "95% interval": lambda line: f"{100 * line.low:.2f}-{100 * line.high:.2f}%",
    "measured on": lambda line: line.split + (f" (reading {line.reads})" if line.reads else ""),
    "to the best": _difference,
    "p": lambda line: "-" if line.p is None else format.p_value(line.p),
}
COST: Columns = {
    "data": lambda line: line.data,
    "s/epoch": lambda line: f"{line.seconds_per_epoch:.2f}",
    "training": lambda line: format.seconds(line.training_seconds),
    "parameters": lambda line: f"{line.parameters:,}",
    "MFLOP": lambda line: format.megaflop(line.flops),
    "trials": lambda line: str(line.trials),
}
COLUMNS: Columns = {**QUALITY, **COST}
TEXTS = {"study", "measured on", "data"}  # columns that hold text, aligned to the left


def compare_studies(studies: Sequence[StudyRecord]) -> list[Compared]:
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


def _line(study: StudyRecord) -> Compared:
    final, best = study.final, study.ranked(twins=False)[0]
    model = final or best.result
    assert model is not None
    if final is not None:
        measured: dict[str, Any] = {key: getattr(final.test, key) for key in ("accuracy", "low", "high", "n", "reads")}
    else:
        low, high = study.accuracy(best).interval
        measured = {"accuracy": best.value, "low": low, "high": high, "n": study.data.validation, "reads": None}
    return Compared(
        study=study.name,
        split="test" if final else "validation",
        difference=None,
        p=None,
        seconds_per_epoch=(final or best).seconds_per_epoch,
        parameters=model.parameters,
        flops=model.flops,
        trials=len(study.trials),
        training_seconds=final.training_seconds if final else best.seconds,
        epochs=final.epochs if final else len(best.epochs),
        search_seconds=sum(trial.seconds for trial in study.trials if trial.twin is None),
        data=str(study.resolved["data"]["name"]),
        classes=len(study.data.classes),
        largest=final.largest if final else study.data.largest,
        balanced=final.balanced if final else None,
        **measured,
    )


def _comparable(studies: Sequence[StudyRecord]) -> list[dict[int, Predictions]]:
    """Studies by index, in groups of two or more with predictions of the same images."""
    groups: dict[tuple[str, str, bytes], dict[int, Predictions]] = defaultdict(dict)
    for index, study in enumerate(studies):
        final = study.final
        predictions = Predictions.read(study.final_folder if final else study.ranked(twins=False)[0].folder)
        if predictions is not None:
            part = final.test.fingerprint if final else "validation"
            groups[study.data.fingerprint, part, predictions.indices.tobytes()][index] = predictions
    return [group for group in groups.values() if len(group) > 1]


def comparison_tables(lines: Sequence[Compared], width: int) -> list[Table]:
    """The comparison for a terminal of `width` characters: one table, or quality above cost. The path of data that does
    not fit is shortened.
    """
    parts = (COLUMNS,) if width >= WIDE else (QUALITY, {"study": QUALITY["study"], **COST})
    tables = []
    for columns in parts:
        shown = table(*columns, numeric=COLUMNS.keys() - TEXTS)
        rows = [dict(zip(columns, row, strict=True)) for row in _rows(lines, columns)]
        widths = [max(len(name), *(len(row[name]) for row in rows)) + PADDING for name in columns if name != "data"]
        for row in rows:
            if "data" in row:
                row["data"] = format.short_path(row["data"], max(width - sum(widths) - PADDING, NARROW))
            shown.add_row(*map(escape, row.values()))
        tables.append(shown)
    return tables


def _rows(lines: Sequence[Compared], columns: Columns = COLUMNS) -> list[list[str]]:
    return [[cell(line) for cell in columns.values()] for line in lines]


def comparison_markdown(lines: Sequence[Compared]) -> str:
    """The comparison as Markdown, the note of its run in MLflow."""
    rows = [list(COLUMNS), ["---" if column in TEXTS else "---:" for column in COLUMNS]]
    rows += [[format.escape(cell) for cell in row] for row in _rows(lines)]
    return "\n\n".join(["\n".join(f"| {' | '.join(row)} |" for row in rows), *comparison_notes(lines)])


def comparison_notes(lines: Sequence[Compared]) -> list[str]:
    """How to read the table."""
    texts = [text for split, text in NOTES.items() if any(line.split == split for line in lines)]
    texts.append("Intervals are 95% (Wilson), for these trained models: another seed is not in them.")
    if any(line.p is not None for line in lines):
        texts.append("p: McNemar's mid-p test against the best on the same images, Holm-corrected.")
    if any(line.difference is None for line in lines) and len(lines) > 1:
        texts.append('"-": no other study was measured on the same images.')
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)  # studies by data and sentence
    for line in lines:
        if line.largest is not None:
            balanced = "" if line.balanced is None else f" (balanced accuracy {line.balanced:.2%})"
            sentence = format.largest_sentence("the largest class", line.largest, line.classes, line.split)
            groups[line.data, sentence].append(line.study + balanced)
    return [*texts, *(f"{', '.join(names)}: {sentence}." for (_, sentence), names in groups.items() if sentence)]


def comparison_picture(lines: Sequence[Compared], suffix: str) -> bytes:
    """The accuracy-time front, a panel for each data set and split, as a file with that suffix (see `SUFFIXES`)."""
    from searchfm import figures

    return figures.png(_front(lines)) if suffix == ".png" else figures.svg(_front(lines), "front").encode()


def comparison_page(lines: Sequence[Compared]) -> str:
    """The comparison as a self-contained page."""
    from searchfm.show import pages

    return pages.render(
        "compare.html.jinja",
        names=[line.study for line in lines],
        columns=list(COLUMNS),
        texts=TEXTS,
        rows=[zip(COLUMNS, row, strict=True) for row in _rows(lines)],
        notes=comparison_notes(lines),
        front=_front(lines),
    )


def comparison_files(lines: Sequence[Compared]) -> dict[str, str | bytes]:
    """What MLflow keeps of a comparison: the page and the picture, by the names of files."""
    return {"comparison.html": comparison_page(lines), "front.png": comparison_picture(lines, ".png")}


def _front(lines: Sequence[Compared]) -> Any:
    from searchfm import figures  # not above: matplotlib takes 0.4 s of CPU, and the same comparison is drawn once

    panels: dict[str, list[figures.Measured]] = {}
    for line in lines:
        point = figures.Measured(line.study, line.accuracy, line.low, line.high, max(line.training_seconds, 1e-3))
        panels.setdefault(f"{line.data}, {line.split} accuracy", []).append(point)
    return figures.front(panels)
