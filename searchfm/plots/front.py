"""Accuracy against time: several studies in one picture."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from searchfm.plots.style import DPI, INK, QUIET, VALIDATION, blank, percent, plain


@dataclass(frozen=True)
class Measured:
    """An accuracy with its 95% interval, 0 to 1, and what it cost."""

    name: str
    accuracy: float
    low: float
    high: float
    seconds: float = 0.0
    tied: bool = False  # cannot be told from the best


def front(panels: Mapping[str, Sequence[Measured]]) -> Figure:
    """Accuracy over seconds of training, a panel for what may be compared; a line joins those that none beats in both.

    panels: title -> what stands in it. A bar is an accuracy's 95% interval.
    """
    count = max(len(panels), 1)
    width = max(6.4, 4.6 * count)
    figure = blank(width, 3.9)
    share = 1 / count
    for place, (title, measured) in enumerate(panels.items()):
        margin = 0.62 / width
        axes = figure.add_axes((place * share + margin, 0.135, share - margin - 0.15 / width, 0.775))
        plain(axes, title)
        _front(axes, measured)
    return figure


def _front(axes: Axes, measured: Sequence[Measured]) -> None:
    unbeaten: list[Measured] = []
    for one in sorted(measured, key=lambda one: (one.seconds, -one.accuracy)):
        if not unbeaten or one.accuracy > unbeaten[-1].accuracy:
            unbeaten.append(one)
    axes.step(
        [one.seconds for one in unbeaten],
        [one.accuracy for one in unbeaten],
        where="post",
        color=VALIDATION,
        linewidth=1.0,
        linestyle="--",
        zorder=2,
    )
    for one in measured:
        colour = VALIDATION if one in unbeaten else QUIET
        axes.plot([one.seconds, one.seconds], [one.low, one.high], color=colour, linewidth=1.4, zorder=3)
        axes.plot([one.seconds], [one.accuracy], "o", color=colour, markersize=6, zorder=4)
    times = [one.seconds for one in measured]
    low, high = min(times), max(times)
    axes.set_xscale("log")
    axes.set_xlim(low / max(2.0, (high / low) ** 0.2), high * max(3.0, (high / low) ** 0.3))  # room for names
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 8 * low else (1, 2, 5), numticks=10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g} s"))
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_xlabel("training time", color=INK, fontsize=9)
    _name(axes, measured)


def _name(axes: Axes, measured: Sequence[Measured]) -> None:
    """Writes names beside their points, each at the first of four places where no other name and no point is."""
    places = [axes.transData.transform((one.seconds, one.accuracy)) for one in measured]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    em, line = 0.62 * 8.5 / 72 * DPI, 1.25 * 8.5 / 72 * DPI  # of a letter, pixels
    for one, (x, y) in zip(measured, places, strict=True):
        width = em * len(one.name)
        for side, dy in itertools.product((1, -1), (0.15 * line, -1.15 * line)):
            left = x + 9 if side > 0 else x - 9 - width
            box = (left, y + dy, left + width, y + dy + line)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        left, bottom = axes.transData.inverted().transform(box[:2])
        axes.text(left, bottom, one.name, fontsize=8.5, color=INK, va="bottom", parse_math=False, zorder=5)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
