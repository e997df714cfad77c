"""The pictures of one trial: its curves, and what it takes for what."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from searchfm.job import Epoch
from searchfm.plots.style import INK, MARK, QUIET, TRAIN, VALIDATION, blank, percent, plain, png, short
from searchfm.search.history import TrialRow

PREDICTIONS = "predictions.npz"
SHADES = LinearSegmentedColormap.from_list("searchfm", ["#ffffff", "#c6dbef", VALIDATION, "#0b2c52"])

COUNTED = 24  # classes up to which a confusion matrix says its counts in words, not in shades alone


def curves(epochs: Sequence[Epoch]) -> Figure:
    """Loss (left) and accuracy (right) over the epochs, training and validation, the best validation accuracy marked.

    What is None or not finite leaves a gap.
    """
    figure = blank(7.6, 2.9)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.165, top=0.88, wspace=0.2)
    steps = [epoch.index for epoch in epochs]
    sides = (
        (left, "loss", [e.train_loss for e in epochs], [e.val_loss for e in epochs]),
        (right, "accuracy", [e.train_accuracy for e in epochs], [e.val_accuracy for e in epochs]),
    )
    for axes, title, train, validation in sides:
        plain(axes, title)
        axes.plot(steps, _gaps(train), color=TRAIN, marker="o", markersize=3, label="training")
        if any(value is not None for value in validation):
            axes.plot(steps, _gaps(validation), color=VALIDATION, marker="o", markersize=3, label="validation")
        axes.set_xlabel("epoch", color=INK, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))  # a tick costs as much as a line
    right.yaxis.set_major_formatter(FuncFormatter(percent))
    held = [epoch for epoch in epochs if epoch.val_accuracy is not None and np.isfinite(epoch.val_accuracy)]
    if held:
        best = max(held, key=lambda epoch: (epoch.val_accuracy, -epoch.index))
        assert best.val_accuracy is not None
        for axes in (left, right):
            axes.axvline(best.index, color=MARK, linewidth=0.8, linestyle=":")
        right.plot([best.index], [best.val_accuracy], "o", color=MARK, markersize=6, markerfacecolor="none")
        right.set_title(
            f"best {best.val_accuracy:.2%} in epoch {best.index}", loc="right", y=1.0, pad=4, color=MARK, fontsize=9
        )
    left.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    return figure


def confusion(labels: ArrayLike, predictions: ArrayLike, names: Sequence[str]) -> Figure:
    """The confusion matrix: row = true class, column = predicted class, shade = root of the share of the true class.

    labels, predictions: (N,) integers in [0, len(names)). Up to 24 classes every cell holds its count.
    """
    classes = len(names)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels), np.asarray(predictions)), 1)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    counted = classes <= COUNTED
    shown = [short(name) for name in names]

    side = max(3.2, 0.44 * classes) if counted else max(8.0, 0.115 * classes)  # inches of the matrix itself
    size = 8.0 if counted else 6.0
    margin = 0.5 + size / 72 * 0.62 * max(map(len, shown), default=1)
    width, height = side + margin + 0.25, side + margin + 0.45
    figure = blank(width, height)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    # The square root lifts the rare confusions, which are what one looks for, off the white.
    axes.imshow(np.sqrt(shares), cmap=SHADES, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    # parse_math: a class may be named after money.
    axes.set_xticks(range(classes), shown, rotation=90, fontsize=size, color=INK, parse_math=False)
    axes.set_yticks(range(classes), shown, fontsize=size, color=INK, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    axes.spines[:].set_color(QUIET)
    right = int(np.trace(counts))
    total = int(counts.sum())
    axes.set_title(
        f"{right:,} of {total:,} right ({right / max(total, 1):.2%})", loc="left", y=1.0, pad=5, fontsize=9, color=INK
    )
    if counted:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.25 else INK
            count = int(counts[row, column])
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=colour)
    return figure


def draw(row: TrialRow, names: Sequence[str]) -> list[Path]:
    """Draws what a trial's folder allows for into that folder: `curves.png` from its epochs, `confusion.png` from the
    predictions of a complete trial. What was drawn from the same files before is left alone. names: of the classes.
    """
    drawn = []
    predictions = read_predictions(row)
    pictures: list[tuple[str, str, Callable[[], Figure]]] = []
    if row.epochs:
        pictures.append(("curves.png", "epochs.csv", lambda: curves(row.epochs)))
    if predictions is not None:
        labels, probabilities, _ = predictions
        pictures.append(("confusion.png", PREDICTIONS, lambda: confusion(labels, probabilities.argmax(axis=1), names)))
    for name, source, make in pictures:
        path, origin = row.folder / name, row.folder / source
        drawn.append(path)
        if path.exists() and origin.exists() and path.stat().st_mtime_ns >= origin.stat().st_mtime_ns:
            continue
        partial = path.with_suffix(".png.tmp")
        partial.write_bytes(png(make()))
        partial.replace(path)
    return drawn


def read_predictions(row: TrialRow) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]] | None:
    """labels (N,), probabilities (N, K) and indices (N,) of a complete trial's validation part, if they are there."""
    path = row.folder / PREDICTIONS
    if row.state != "complete" or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return file["labels"], file["probabilities"], file["indices"]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [value if value is not None and np.isfinite(value) else np.nan for value in values]
