"""Records to figures, without pyplot's global state: curves, confusion matrices, pictures of searches.

Each function takes records or arrays and returns a `Figure`; `png` encodes it as a file, `svg` as an element of a page.
The mark of a trial has the gid `trial-FIGURE-NUMBER`, which `svg` keeps as an element's id: by it the script of a page
finds the same trial in all figures.

Every trial is drawn, so time counts: figures are laid out by hand, since `tight_layout`, `constrained_layout` and
titles that compute their own height (`y=None`) each cost as much as drawing.
"""

import functools
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Path2D
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox, IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from searchfm.format import short
from searchfm.home import write_whole
from searchfm.records import EPOCHS, PREDICTIONS, Epoch, Predictions, Trial, ranked, trained
from searchfm.search.space import Choice, Range
from searchfm.stats import Accuracy

Ticks = list[tuple[float, str]]  # height from 0 to 1, and text
DPI = 110

# Each colour has one meaning in all figures. A page gives each a second value for dark screens: see `svg`.
INK = "#1f2933"
SOFT = "#52606d"
QUIET = "#9aa5b1"
TRAIN = "#8fb3d9"
VALIDATION = "#1f5fa8"
MARK = "#d1495b"
PAPER = "#ffffff"
GRID = "#e4e7eb"
OTHER = "#cbd2d9"  # trials that are not among the best
VARIABLES = {INK: "ink", SOFT: "soft", QUIET: "quiet", VALIDATION: "blue", MARK: "mark", PAPER: "paper", GRID: "line"}
VARIABLES[OTHER] = "other"
LIGHT = "#fefefe"  # text on dark cells, also on dark screens

WIDE = 10.0  # inches, of a page's column
COUNTED = 24  # classes up to which a confusion matrix holds its counts as text
BELOW = -0.12  # where parallel coordinates pass a key that a trial does not have, below the axis from 0 to 1
SUPPORT = 3  # trials of a value that a median needs
FEW = 12  # values up to which a stepped range is drawn value by value
RING: Mapping[str, Any] = {"color": PAPER, "markeredgecolor": QUIET, "markeredgewidth": 0.9}  # of a pruned trial


@dataclass(frozen=True)
class Measured:
    """An accuracy with its 95% interval, 0 to 1, and what it cost."""

    name: str
    accuracy: float
    low: float
    high: float
    seconds: float


class Drawing(Figure):
    """A figure that a notebook shows although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        return png(self)


def _blank(width: float, height: float) -> Figure:
    """A white figure, in inches, that needs no pyplot."""
    figure = Drawing(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _panel(width: float, height: float, title: str, bounds: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure, in inches, with plain axes; bounds: their left, bottom, width and height, 0 to 1 of the figure."""
    figure = _blank(width, height)
    return figure, _plain(figure.add_axes(bounds), title)


def _plain(axes: Axes, title: str, grid: Literal["x", "y"] = "y") -> Axes:
    """Axes with two spines and a grid, the title at the upper left."""
    put_title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def put_title(
    axes: Axes, text: str, loc: Literal["left", "right"] = "left", color: str = INK, size: float = 10
) -> Text:
    """The text above the axes, as it stands: a dollar sign begins no formula."""
    return axes.set_title(text, loc=loc, y=1.0, pad=4, color=color, fontsize=size, parse_math=False)


def _count(axes: Axes, name: str, most: int = 10) -> None:
    """A horizontal axis of whole numbers."""
    axes.set_xlabel(name, color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def _short(name: str, most: int = 24) -> str:
    """Any name on one line of at most `most` characters."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= most else name[: most - 1] + "…"


def percent(fraction: float, _: object = None) -> str:
    """The text of a tick."""
    return f"{100 * fraction:.4g}%"


def png(figure: Figure) -> bytes:
    """The figure as a PNG. Little compression: a trial's pictures are small, and time is what they cost."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands for it
        figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def svg(figure: Figure, salt: str) -> str:
    """The figure as an element of a page, its texts as text. salt: unique in the page; it goes into the inner ids.

    Of the ids that artists were given (`gid`), those that begin with `trial-` stay. Our colours become variables of CSS
    which a page may set; elsewhere they have their values.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none of them
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser has other fonts
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    # Groups are numbered from 1 in every figure, and nothing refers to them.
    text = re.sub(r' id="(?!trial-)[a-z][\w.]*_\d+"', "", text)
    text = re.sub(
        r'fill="(#[0-9a-f]{6})"', r'style="fill: \1"', text
    )  # of hatched areas; an attribute takes no variable
    return re.sub(r'(?<=: )#[0-9a-f]{6}(?=[;"])', lambda found: _variable(found[0]), text)


def _variable(colour: str) -> str:
    return f"var(--{VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour


# --- one trial --------------------------------------------------------------------------------------------------------


def curves(epochs: Sequence[Epoch], width: float = 7.6) -> Figure:
    """Loss (left) and accuracy (right) over the epochs, training and validation, the best validation accuracy marked.

    What is None or not finite leaves a gap. width: in inches.
    """
    return _plot_curves(curve_axes(width), epochs)


def curve_axes(width: float = 7.6) -> Figure:
    """Two axes, of loss and of accuracy by epoch, without curves."""
    figure = _blank(width, 2.9)
    for axes, title in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        _plain(axes, title)
        _count(axes, "epoch", 7)
        axes.yaxis.set_major_locator(MaxNLocator(5))  # a tick costs as much as a line
    axes.yaxis.set_major_formatter(percent)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.165, top=0.88, wspace=0.2)
    return figure


def _plot_curves(figure: Figure, epochs: Sequence[Epoch]) -> Figure:
    """Draws a trial into axes that may hold another one."""
    loss, accuracy = figure.axes
    for axes in figure.axes:
        for line in list(axes.lines):
            line.remove()
        axes.relim()
    steps = [epoch.index for epoch in epochs]
    values = np.array([[e.train_loss, e.val_loss, e.train_accuracy, e.val_accuracy] for e in epochs], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan  # as None is already
    best = int(np.nanargmax(values[:, 3])) if np.isfinite(values[:, 3]).any() else None
    for axes, train, validation in ((loss, *values.T[:2]), (accuracy, *values.T[2:])):
        axes.plot(steps, train, color=TRAIN, marker="o", markersize=3, label="training")
        if np.isfinite(validation).any():
            axes.plot(steps, validation, color=VALIDATION, marker="o", markersize=3, label="validation")
        if best is not None:
            axes.axvline(steps[best], color=MARK, linewidth=0.8, linestyle=":")
    text = ""
    if best is not None:
        accuracy.plot(steps[best], values[best, 3], "o", color=MARK, markersize=6, markerfacecolor="none")
        text = f"best {values[best, 3]:.2%} in epoch {steps[best]}"
    put_title(accuracy, text, "right", color=MARK, size=9)
    loss.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    return figure


def confusion(predictions: Predictions, names: Sequence[str]) -> Figure:
    """The confusion matrix: row = true class, column = predicted class, shade = root of the fraction of the true class.

    names: of the K classes. Up to 24 classes every cell holds its count.
    """
    figure = _confusion_axes(tuple(names))
    (axes,) = figure.axes
    counts, fractions, _ = _shade(axes, predictions)
    if len(names) <= COUNTED:
        for row, column in np.argwhere(counts):
            colour = LIGHT if fractions[row, column] > 0.25 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7.5, color=colour)
    return figure


def _confusion_axes(names: tuple[str, ...]) -> Figure:
    """What the confusion matrices of all trials have in common."""
    classes, counted = len(names), len(names) <= COUNTED
    shown = [_short(name) for name in names]

    # Inches of the matrix itself, and points of the names.
    side, size = (max(3.2, 0.44 * classes), 8.0) if counted else (max(8.0, 0.115 * classes), 6.0)
    margin = 0.5 + size / 72 * 0.62 * max(map(len, shown), default=1)
    width, height = side + margin + 0.25, side + margin + 0.45
    figure = _blank(width, height)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    axes.imshow(np.zeros((classes, classes, 4)), interpolation="nearest", aspect="auto")
    # parse_math: a class name may contain $.
    axes.set_xticks(range(classes), shown, rotation=90, fontsize=size, color=INK, parse_math=False)
    axes.set_yticks(range(classes), shown, fontsize=size, color=INK, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    axes.spines[:].set_color(QUIET)
    return figure


def _shade(axes: Axes, predictions: Predictions) -> tuple[NDArray[np.int64], NDArray[np.float64], Text]:
    """Shades the cells; returns counts and fractions of the true class, (K, K) both, and the title."""
    counts = predictions.confusion
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root makes rare confusions visible, and those matter most. Its shade is an opacity, for dark screens.
    shades = np.empty((*counts.shape, 4))
    shades[..., :3], shades[..., 3] = to_rgb(VALIDATION), np.sqrt(fractions)
    axes.images[0].set_data(shades)
    correct, total = int(np.trace(counts)), int(counts.sum())
    title = put_title(axes, f"{correct:,} of {total:,} correct ({correct / max(total, 1):.2%})", size=9)
    return counts, fractions, title


class _Pictures:
    """The pictures of one trial after another on two canvases. names: of the classes.

    Curves take 85 ms of CPU instead of 135, a matrix of 10 classes 46 instead of 218, of 100 classes 190 instead of 890
    (10 epochs, medians of 7, Xeon at 2.5 GHz).
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._curves, self._confusion, self._counted = curve_axes(), _confusion_axes(names), len(names) <= COUNTED
        canvas: Any = self._confusion.canvas  # Agg's
        self._canvas = canvas
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            self._canvas.draw()
        self._background = canvas.copy_from_bbox(self._confusion.bbox)
        # Digits as outlines around the middle of their line: all counts of a colour are one path.
        self._digits = [TextPath((0, 0), digit, 7.5 * DPI / 72, prop=FontProperties()) for digit in "0123456789"]
        self._width = max(path.get_extents().x1 for path in self._digits) * 1.12
        self._height = self._digits[0].get_extents().height

    def curves(self, epochs: Sequence[Epoch]) -> bytes:
        """As a PNG."""
        return png(_plot_curves(self._curves, epochs))

    def confusion(self, predictions: Predictions) -> bytes:
        """As a PNG. Names, ticks and frame are drawn once."""
        (axes,) = self._confusion.axes
        self._canvas.restore_region(self._background)
        counts, fractions, title = _shade(axes, predictions)
        drawn: list[Artist] = [axes.images[0], title]
        if self._counted:
            drawn += [
                self._numbers(axes, counts, fractions > 0.25, LIGHT),
                self._numbers(axes, counts, fractions <= 0.25, INK),
            ]
        for artist in [*drawn, *axes.spines.values()]:
            axes.draw_artist(artist)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).save(buffer, "PNG", compress_level=3, dpi=(DPI, DPI))
        return buffer.getvalue()

    def _numbers(self, axes: Axes, counts: NDArray[np.int64], chosen: NDArray[np.bool_], colour: str) -> Artist:
        """The counts of some cells that are not 0."""
        paths = []
        for row, column in np.argwhere(chosen & (counts > 0)):
            text = str(counts[row, column])
            x, y = axes.transData.transform((column, row))
            left, low = x - self._width * len(text) / 2, round(y - self._height / 2)
            for index, digit in enumerate(text):
                path = self._digits[int(digit)]
                paths.append(Path2D(np.add(path.vertices, (round(left + index * self._width), low)), path.codes))
        patch = PathPatch(Path2D.make_compound_path(*paths), color=colour, linewidth=0, transform=IdentityTransform())
        patch.set_figure(axes.figure)
        return patch


@functools.lru_cache(maxsize=1)
def _pictures(names: tuple[str, ...]) -> _Pictures:
    return _Pictures(names)


def samples(rows: Mapping[str, Sequence[NDArray[np.uint8]]]) -> Figure:
    """Images (3, S, S) uint8 of each class in a row."""
    columns, side = max(map(len, rows.values())), max(len(image[0]) for row in rows.values() for image in row)
    step, gap = side + 4, np.full((3, side + 4, side + 4), 255, np.uint8)
    mosaic = np.full((3, step * len(rows), step * columns), 255, np.uint8)
    for top, row in enumerate(rows.values()):
        for left, image in enumerate(row):
            cell = gap.copy()
            cell[:, 2 : 2 + image.shape[1], 2 : 2 + image.shape[2]] = image
            mosaic[:, top * step : (top + 1) * step, left * step : (left + 1) * step] = cell
    names = [_short(name) for name in rows]
    margin = 0.25 + 9 / 72 * 0.62 * max(map(len, names))
    width, height = margin + columns * step / DPI, len(rows) * step / DPI
    figure = _blank(width, height)
    axes = figure.add_axes((margin / width, 0, 1 - margin / width, 1))
    axes.imshow(mosaic.transpose(1, 2, 0), interpolation="nearest", aspect="auto")
    axes.set_yticks([(i + 0.5) * step for i in range(len(rows))], names, fontsize=9, color=INK, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def draw(trial: Trial, names: Sequence[str]) -> list[Path]:
    """Draws a trial into its folder: `curves.png` from its epochs, `confusion.png` from the predictions of a complete
    trial. A picture newer than its source is not drawn again. names: of the classes. For one thread at a time.
    Raises StorageError.
    """
    predictions = Predictions.read(trial.folder) if trial.state == "complete" else None
    canvas, pictures = _pictures(tuple(names)), list[tuple[Path, str, Callable[[], bytes]]]()
    if trial.epochs:
        pictures.append((trial.folder / "curves.png", EPOCHS, lambda: canvas.curves(trial.epochs)))
    if predictions is not None:
        pictures.append((trial.folder / "confusion.png", PREDICTIONS, lambda: canvas.confusion(predictions)))
    for path, source, make in pictures:
        origin = trial.folder / source
        if not (path.exists() and origin.exists() and path.stat().st_mtime_ns >= origin.stat().st_mtime_ns):
            write_whole(path, make())
    return [path for path, _, _ in pictures]


# --- a search ---------------------------------------------------------------------------------------------------------


def history(
    trials: Sequence[Trial], best: int, band: tuple[float, float], drawn: Container[int] | None = None
) -> Figure:
    """Each trial's validation accuracy in the order of the search, the best so far as a line.

    A pruned trial is drawn at its last report, an accuracy far below the rest at the lower edge. best: number of the
    trial that is marked, and `band` its interval, shaded. drawn: the trials that have a mark, None for all; the line
    and the scale are of all.
    """
    figure, axes = _panel(WIDE, 3.2, "validation accuracy of each trial", (0.062, 0.15, 0.925, 0.76))
    values = {trial.number: trial.value for trial in trials if trial.value is not None}
    pruned = _pruned(trials)
    failed = [trial.number for trial in trials if trial.state == "failed"]
    floor = _limits(axes, [*values.values(), *pruned.values()])
    axes.axhspan(*band, color=VALIDATION, alpha=0.07, linewidth=0)
    tops = np.maximum.accumulate(list(values.values()))
    axes.step(list(values), tops, where="post", color=VALIDATION, linewidth=1.2, zorder=2)
    for number, value in pruned.items():
        if drawn is None or number in drawn:
            _dot(axes, "history", number, (number, value), floor, **RING)
    for number, value in values.items():
        if drawn is None or number in drawn:
            _dot(axes, "history", number, (number, value), floor, color=MARK if number == best else VALIDATION)
    for number in [number for number in failed if drawn is None or number in drawn]:
        axes.plot([number], [floor], "x", color=INK, markersize=5, gid=f"trial-history-{number}")
    _count(axes, "trial")
    axes.margins(x=0.02)
    legend = "● complete" + "   ○ pruned, at its last report" * bool(pruned)
    legend += "   × failed" * bool(failed)
    legend += "   ▾ below the scale" * any(value < floor for value in (*values.values(), *pruned.values()))
    put_title(axes, legend, "right", color=SOFT, size=8)
    return figure


def parallel(trials: Sequence[Trial], space: Mapping[str, Choice | Range], names: Mapping[str, str]) -> Figure:
    """Parallel coordinates (Inselberg 1985): a line per complete or pruned trial, an axis per key of `space`, accuracy
    last.

    A pruned trial is grey and ends at its last report. names: of the axes. The line of a trial without a key passes
    below that axis.
    """
    complete, pruned = ranked(trials)[::-1], _pruned(trials)
    shown = [*(trial for trial in trials if trial.number in pruned), *complete]
    width = max(WIDE, 1.05 * (len(space) + 1))
    figure = _blank(width, 3.7)
    axes = figure.add_axes((0.6 / width, 0.09, 1 - 1.2 / width, 0.79))
    axes.set_axis_off()
    partial = {key for key in space if any(key not in trial.params for trial in shown)}
    axes.set(xlim=(0, len(space)), ylim=(BELOW - 0.07 if partial else -0.05, 1.04))
    scales = {key: _scale(leaf) for key, leaf in space.items()}
    for x, (key, (ticks, _)) in enumerate(scales.items()):
        _vertical(axes, x, names[key], ticks)
        if key in partial:
            axes.plot([x - 0.03, x + 0.03], [BELOW, BELOW], color=QUIET, linewidth=2.5, zorder=2)
            axes.text(x, BELOW - 0.025, "no value", fontsize=7, color=QUIET, ha="center", va="top")
    values = [*(trial.value or 0.0 for trial in complete), *pruned.values()]
    accuracy = Range(_floor(values), max(values, default=1.0), log=False, step=None)
    ticks, accuracy_height = _scale(accuracy, percent)
    _vertical(axes, len(space), "accuracy", ticks, side=1)
    for rank, trial in enumerate(shown, -len(pruned)):
        jitter = 0.025 * (2 * _spread(trial.number) - 1)  # else trials of one choice would overlap
        heights = [
            height(trial.params[key]) + jitter * isinstance(space[key], Choice) if key in trial.params else BELOW
            for key, (_, height) in scales.items()
        ]
        heights.append(accuracy_height(trial.accuracy))
        style: dict[str, Any] = {"color": VALIDATION, "linewidth": 1.1, "zorder": 3 + rank / len(shown)}
        if rank < 0:
            style |= {"color": OTHER, "linewidth": 0.9, "alpha": 0.6}
        elif trial is complete[-1]:
            style |= {"color": MARK, "linewidth": 2.0}
        else:
            style["alpha"] = 0.12 + 0.88 * ((rank + 1) / len(complete)) ** 2
        axes.plot(range(len(heights)), heights, gid=f"trial-parallel-{trial.number}", **style)
    return figure


def factor(
    trials: Sequence[Trial],
    key: str,
    leaf: Choice | Range,
    name: str,
    figure_name: str,
    best: int,
    drawn: Container[int] | None = None,
) -> Figure:
    """Validation accuracy over one key of the space: a dot per complete trial, a ring per pruned one at its last
    report, and the median of each value that three complete trials or more have, where values are few.

    A line joins the medians where the values are numbers. trials: also those without the key, since all keys of a study
    have one scale. name: of the key; figure_name: for the dots' ids; best: number of the trial that is marked. drawn:
    the trials that have a dot, None for all; medians are of all.
    """
    figure, axes = _panel(3.3, 2.3, name, (0.165, 0.17, 0.8, 0.72))
    pruned = _pruned(trials)
    accuracies = pruned | {row.number: row.value for row in trials if row.value is not None}
    floor = _limits(axes, [*accuracies.values()])
    options = _options(leaf)
    points = [(row.number, row.params[key]) for row in trials if row.number in accuracies and key in row.params]
    points.sort(key=lambda point: (point[0] not in pruned, point[0] == best))  # the marked one on top
    by_option: dict[int, list[float]] = {}  # values of complete trials by the option's index
    for number, x in points:
        value = accuracies[number]
        if options:
            index = _index(options, x)
            if number not in pruned:
                by_option.setdefault(index, []).append(value)
            x = index + 0.5 * (_spread(number) - 0.5)
        if drawn is not None and number not in drawn:
            continue
        style: Mapping[str, Any] = {"color": MARK} if number == best else {"color": VALIDATION, "alpha": 0.75}
        _dot(axes, figure_name, number, (x, value), floor, **(RING if number in pruned else style))
    if isinstance(leaf, Choice) or options:
        supported = [index for index in sorted(by_option) if len(by_option[index]) >= SUPPORT]
        _medians(axes, options, {index: max(float(np.median(by_option[index])), floor) for index in supported})
    elif leaf.log:
        axes.set(xscale="log", xlim=(leaf.low / 1.2, leaf.high * 1.2))
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if leaf.high / leaf.low > 30 else (1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=leaf.whole))
    return figure


def _medians(axes: Axes, options: Sequence[Any], medians: Mapping[int, float]) -> None:
    """A bar at the median of each option by index, and a line through them where the options are numbers."""
    xs, heights = list(medians), list(medians.values())
    axes.hlines(heights, [x - 0.3 for x in xs], [x + 0.3 for x in xs], color=INK, linewidth=1.6, zorder=4)
    if _numbers(options):
        axes.plot(xs, heights, color=INK, linewidth=0.8, alpha=0.6, zorder=2)
    labels = [_text(option) for option in options]
    axes.set_xticks(range(len(options)), labels, parse_math=False)
    if sum(len(label) + 1 for label in labels) > 30:
        axes.tick_params(axis="x", labelsize=7.5, labelrotation=25)
        axes.set_position((0.165, 0.24, 0.815, 0.65))
    axes.set_xlim(-0.5, len(options) - 0.5)


def progress(trials: Sequence[Trial], top: Sequence[Trial]) -> Figure:
    """Validation accuracy by epoch: all trials in grey, a pruned one up to its last epoch; `top` in colour."""
    figure, axes = _panel(5.5, 3.1, "validation accuracy by epoch", (0.115, 0.155, 0.855, 0.745))
    floor = _limits(axes, [value for trial in trials for value in trial.reported.values()])
    axes.set_ylim(bottom=floor)
    for trial in trials:
        if trial.reported and trial not in top and trial.twin is None:
            xs, ys = list(trial.reported), list(trial.reported.values())
            axes.plot(xs, ys, color=OTHER, linewidth=0.9, zorder=2, gid=f"trial-progress-{trial.number}")
            if trial.state == "pruned":
                axes.plot(xs[-1:], ys[-1:], "o", color=QUIET, markersize=3, markerfacecolor=PAPER, zorder=3)
    style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.5, "zorder": 4}
    for trial, shade in reversed(list(zip(top, (MARK, VALIDATION, "#3f7cc0", "#6d9fd3", "#8fb3d9"), strict=False))):
        style |= {"color": shade, "label": f"trial {trial.number}", "gid": f"trial-progress-{trial.number}"}
        axes.plot(list(trial.reported), list(trial.reported.values()), **style)
    _count(axes, "epoch")
    if top:
        axes.legend(reverse=True, frameon=False, fontsize=8, labelcolor=INK, loc="best")
    return figure


def survival(trials: Sequence[Trial], epochs: int) -> Figure:
    """How many of the trained trials reached each epoch, and (hatched) how many were pruned before it."""
    figure, axes = _panel(4.2, 3.1, "trials that trained each epoch", (0.135, 0.155, 0.835, 0.745))
    counts = [len(trial.epochs) for trial in trained(trials)]
    steps = range(1, epochs + 1)
    reached = [sum(count >= epoch for count in counts) for epoch in steps]
    saved = [len(counts) - count for count in reached]
    axes.bar(steps, reached, color=VALIDATION, width=0.82)
    axes.bar(steps, saved, bottom=reached, color=PAPER, edgecolor=QUIET, hatch="////", width=0.82, linewidth=0)
    _count(axes, "epoch")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def importance(fractions: Mapping[str, float]) -> Figure:
    """Bars, the longest first. fractions: name -> fraction of the differences in accuracy, 0 to 1."""
    height = 0.3 + 0.27 * len(fractions)
    figure = _blank(WIDE, height)
    left = 0.02 + 0.0075 * max(map(len, fractions), default=0)
    axes = figure.add_axes((left, 0.1 / height, 0.985 - left, 1 - 0.2 / height))
    names = list(fractions)
    bars = axes.barh(range(len(names)), list(fractions.values()), color=VALIDATION, height=0.66)
    axes.bar_label(bars, fmt="{:.0%}", padding=2, fontsize=8, color=INK)
    axes.set_yticks(range(len(names)), names, fontsize=8.5, color=INK, parse_math=False)
    axes.set(xticks=[], xlim=(0, 1.06 * max(fractions.values())), ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(QUIET)
    return figure


def ranking(accuracies: Mapping[int, Accuracy], tied: Container[int]) -> Figure:
    """Accuracies by trial with their 95% intervals, the best first and on top; `tied` are those in colour."""
    height = 0.45 + 0.26 * len(accuracies)  # the pitch of a table's rows
    figure = _blank(4.7, height)
    axes = _plain(figure.add_axes((0.16, 0.33 / height, 0.81, 1 - 0.36 / height)), "", grid="x")
    for index, (number, accuracy) in enumerate(accuracies.items()):
        colour = MARK if index == 0 else VALIDATION if number in tied else QUIET
        axes.plot(accuracy.interval, [index, index], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(accuracy.fraction, index, "o", color=colour, markersize=5, gid=f"trial-ranking-{number}")
    axes.set_yticks(range(len(accuracies)), [f"trial {number}" for number in accuracies], fontsize=8, color=INK)
    axes.set_ylim(len(accuracies) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(percent)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    return figure


def _pruned(trials: Iterable[Trial]) -> dict[int, float]:
    """Last reports of the pruned trials by number."""
    return {row.number: row.accuracy for row in trials if row.state == "pruned" and row.accuracy is not None}


def _floor(values: Sequence[float]) -> float:
    """The lower end of a scale of accuracies: one diverged training must not compress all others to a line."""
    if not values:
        return 0.0
    quarter, top = float(np.quantile(values, 0.25)), max(values)
    return max(min(values), quarter - 2 * (top - quarter) - 0.005)


def _limits(axes: Axes, values: Sequence[float]) -> float:
    """Scales the vertical axis to accuracies; returns the height at which those below its range are drawn."""
    floor, top = _floor(values), max(values, default=1.0)
    margin = max(0.06 * (top - floor), 1e-3)
    axes.set_ylim(floor - margin, top + margin)
    axes.yaxis.set_major_formatter(percent)
    return floor


def _dot(axes: Axes, figure: str, trial: int, point: tuple[float, float], floor: float, **style: Any) -> None:
    """The mark of a trial; a triangle at the lower edge where the point is below the scale."""
    style = {"markeredgecolor": PAPER, "markeredgewidth": 0.5, "markersize": 5.5, "zorder": 3, **style}
    x, y = point
    axes.plot([x], [max(y, floor)], "o" if y >= floor else "v", gid=f"trial-{figure}-{trial}", **style)


def _text(value: Any) -> str:
    return _short(_number(value) if isinstance(value, float) else short(value), 16)


def _number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _scale(leaf: Choice | Range, text: Callable[[Any], str] = _text) -> tuple[Ticks, Callable[[Any], float]]:
    """The ticks of an axis, and the function from a value to its height. text: of a tick."""
    if isinstance(leaf, Choice):
        options = _options(leaf)
        step = 1 / max(len(options) - 1, 1)
        return [(i * step, text(option)) for i, option in enumerate(options)], lambda v: options.index(v) * step
    warp = math.log if leaf.log else float
    ends = (warp(leaf.low), warp(leaf.high))
    locator = LogLocator(numticks=6) if leaf.log else MaxNLocator(5, integer=leaf.whole)
    ticks = [tick for tick in locator.tick_values(leaf.low, leaf.high) if leaf.low <= tick <= leaf.high]

    def height(value: Any) -> float:
        return float(np.interp(warp(value), ends, (0, 1)))

    return [(height(tick), text(tick)) for tick in ticks], height


def _vertical(axes: Axes, x: float, name: str, ticks: Ticks, side: int = -1) -> None:
    """One axis of many, its texts on the left (side -1) or on the right (1)."""
    axes.plot([x, x], [0, 1], color=QUIET, linewidth=0.9, zorder=2, clip_on=False)
    axes.text(x, 1.09, name, fontsize=8.5, color=INK, ha="center", va="bottom", parse_math=False)
    box = {"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.6}
    for height, text in ticks:
        axes.plot([x, x + 0.02 * side], [height, height], color=QUIET, linewidth=0.9, zorder=2, clip_on=False)
        label = axes.text(x + 0.035 * side, height, text, fontsize=7.5, color=SOFT, va="center", zorder=5, bbox=box)
        label.set(ha="right" if side < 0 else "left", parse_math=False)


def _options(leaf: Choice | Range) -> list[Any]:
    """The values that are drawn one by one, numbers by size; none for a leaf that is drawn as a scale."""
    if isinstance(leaf, Choice):
        return sorted(leaf.options) if _numbers(leaf.options) else list(leaf.options)
    options = leaf.options
    return list(options) if options is not None and len(options) <= FEW and not leaf.log else []


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _index(options: Sequence[Any], value: Any) -> int:
    """The index of a value among the options; a stepped number may carry rounding noise."""
    return options.index(value) if value in options else min(range(len(options)), key=lambda i: abs(options[i] - value))


def _spread(number: int) -> float:
    """A number from 0 to 1 for a trial, far from those of the trials before it (golden ratio), always the same."""
    return number * 0.6180339887 % 1


# --- several studies --------------------------------------------------------------------------------------------------


def front(panels: Mapping[str, Sequence[Measured]]) -> Figure:
    """Accuracy over seconds of training, a panel for each group of comparable studies; a line joins the Pareto front.

    panels: title -> its points. A bar is an accuracy's 95% interval.
    """
    count = max(len(panels), 1)
    width = max(6.4, 4.6 * count)
    figure = _blank(width, 3.9)
    for index, (title, measured) in enumerate(panels.items()):
        left, right = index / count + 0.62 / width, (index + 1) / count - 0.15 / width
        _front(_plain(figure.add_axes((left, 0.135, right - left, 0.775)), title), measured)
    return figure


def _front(axes: Axes, measured: Sequence[Measured]) -> None:
    pareto: list[Measured] = []
    for item in sorted(measured, key=lambda item: (item.seconds, -item.accuracy)):
        if not pareto or item.accuracy > pareto[-1].accuracy:
            pareto.append(item)
    xs, ys = [item.seconds for item in pareto], [item.accuracy for item in pareto]
    axes.step(xs, ys, where="post", color=VALIDATION, linewidth=1.0, linestyle="--", zorder=2)
    for item in measured:
        colour = VALIDATION if item in pareto else QUIET
        axes.plot([item.seconds, item.seconds], [item.low, item.high], color=colour, linewidth=1.4, zorder=3)
        axes.plot([item.seconds], [item.accuracy], "o", color=colour, markersize=6, zorder=4)
    times = [item.seconds for item in measured]
    low, high = min(times), max(times)
    axes.set_xscale("log")
    axes.set_xlim(low / max(2.0, (high / low) ** 0.2), high * max(3.0, (high / low) ** 0.3))  # room for names
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 8 * low else (1, 2, 5), numticks=10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g} s")
    axes.yaxis.set_major_formatter(percent)
    axes.set_xlabel("training time", color=INK, fontsize=9)
    _name(axes, measured)


def _name(axes: Axes, measured: Sequence[Measured]) -> None:
    """Writes names beside their points, each at the first of four positions inside the axes without another name or
    point.
    """
    axes.get_ylim()  # scales the axis, which matplotlib else puts off until it draws
    points = axes.transData.transform([(item.seconds, item.accuracy) for item in measured])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "parse_math": False, "zorder": 5}
    for item in measured:
        label = axes.annotate(
            _short(item.name), (item.seconds, item.accuracy), (0, 0), textcoords="offset points", **style
        )
        for x, y in itertools.product((6, -6), (1.5, -1.5)):
            label.xyann = (x, y)
            label.set(ha="left" if x > 0 else "right", va="bottom" if y > 0 else "top")
            extent = label.get_window_extent()
            inside = axes.bbox.x0 <= extent.x0 and extent.x1 <= axes.bbox.x1
            if inside and not extent.count_overlaps(taken):
                break
        taken.append(label.get_window_extent())
