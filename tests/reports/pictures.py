"""Pictures of a row's results, as SVG: curves of its runs, accuracy over a grid, confusion matrices."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from searchfm import figures
from searchfm.records import Predictions
from tests.reports.results import Result, Run, label
from tests.reports.rows import ROWS

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#52606d")  # of the points of a grid
CROWDED = 45  # characters of all tick labels together above which they are turned


def draw(result: Result) -> dict[str, str]:
    """The pictures of a row as SVG, by file name."""
    grid = len({run.key[1] for run in result.runs}) > 1
    drawn = {f"{result.row}.svg": _grid(result.runs) if grid else _curves(result.runs)}
    if result.retrained:
        drawn[f"{result.row}-confusion.svg"] = _confusion(result.retrained.confusion, result.retrained.classes)
    elif ROWS[result.row].best:
        best = max(result.runs, key=lambda run: run.value)
        drawn[f"{result.row}-best.svg"] = _curves([best])
        if best.confusion:
            drawn[f"{result.row}-confusion.svg"] = _confusion(best.confusion, best.classes)
    return {name: figures.svg(figure, name) + "\n" for name, figure in drawn.items()}


def _curves(runs: Sequence[Run]) -> Figure:
    """Loss and accuracy of training and validation by epoch, a line a run, as `searchfm.figures` draws one run."""
    figure = figures.curve_axes()
    for axes, name in zip(figure.axes, ("loss", "accuracy"), strict=True):
        for part, key, colour in (("training", "train", figures.TRAIN), ("validation", "val", figures.VALIDATION)):
            for index, run in enumerate(runs):
                values = run.epochs[f"{key}_{name}"]
                text = part if index == 0 else None
                axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.1, alpha=0.85, label=text)
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=figures.INK)
    return figure


def _grid(runs: Sequence[Run]) -> Figure:
    """Validation accuracy of each point, a dot a seed (left), and by epoch (right)."""
    figure = figures.curve_axes()
    points = list(dict.fromkeys(run.key[1] for run in runs))
    labels = [label(next(run.params for run in runs if run.key[1] == point)) for point in points]
    accuracy, curves = figure.axes
    figures.put_title(accuracy, "validation accuracy")
    figures.put_title(curves, "by epoch")
    accuracy.set_xlabel("")
    for index, point in enumerate(points):
        mine = [run for run in runs if run.key[1] == point]
        colour = COLOURS[index % len(COLOURS)]
        values = [run.value for run in mine]
        accuracy.plot([index] * len(values), values, "o", color=colour, markersize=5)
        for run in mine:
            line = run.epochs["val_accuracy"]
            curves.plot(range(1, len(line) + 1), line, color=colour, linewidth=1.1)
    accuracy.set_xlim(-0.5, len(points) - 0.5)
    crowded = sum(map(len, labels)) > CROWDED
    accuracy.set_xticks(range(len(points)), labels, parse_math=False)
    accuracy.tick_params(axis="x", labelsize=7 if crowded else 8, labelrotation=20 if crowded else 0)
    if crowded:
        figure.subplots_adjust(bottom=0.27)
    accuracy.yaxis.set_major_formatter(figures.percent)
    return figure


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    counts = np.asarray(matrix)
    true, predicted = (indices.repeat(counts.ravel()) for indices in map(np.ravel, np.indices(counts.shape)))
    probabilities = np.eye(len(classes), dtype=np.float32)[predicted]
    return figures.confusion(Predictions(np.arange(len(true)), true, probabilities), classes)
