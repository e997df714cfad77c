"""The pictures of a search: rows to figures for pages, drawn once and looked at long.

Whatever stands for one trial carries the gid `trial-FIGURE-NUMBER`, which `svg` keeps as an element's id: a page finds
the same trial in all its pictures by it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from searchfm.plots.front import Measured
from searchfm.plots.style import INK, MARK, QUIET, SOFT, VALIDATION, blank, percent, plain, short
from searchfm.search.history import TrialRow
from searchfm.search.space import Choice, Range

WORST_TO_BEST = LinearSegmentedColormap.from_list("trials", ["#d3dae2", "#8fb3d9", VALIDATION])
WIDE = 10.0  # inches, of a page's column
BELOW = -0.12  # where parallel coordinates pass a key that a trial does not have, below the axis from 0 to 1
FEW = 12  # values up to which a stepped range is drawn value by value


def history(rows: Sequence[TrialRow], best: int | None = None, band: tuple[float, float] | None = None) -> Figure:
    """Every trial's validation accuracy in the order of the search, the best so far as a line.

    Pruned trials stand at their last report; what is far below the rest stands at the lower edge. best: number of the
    trial that is marked, and `band` its interval, shaded.
    """
    figure = blank(WIDE, 3.2)
    axes = figure.add_axes((0.062, 0.15, 0.925, 0.76))
    plain(axes, "validation accuracy of each trial")
    complete = sorted((row for row in rows if row.value is not None), key=lambda row: row.number)
    shown = {row.number: row.value for row in complete}
    pruned = {row.number: list(row.reported.values())[-1] for row in rows if row.state == "pruned" and row.reported}
    floor = _limits(axes, [value for value in shown.values() if value is not None], pruned.values())
    if band is not None:
        axes.axhspan(*band, color=VALIDATION, alpha=0.07, linewidth=0)
    tops = np.maximum.accumulate([row.value or 0.0 for row in complete])
    axes.step([row.number for row in complete], tops, where="post", color=VALIDATION, linewidth=1.2, zorder=2)
    for number, value in pruned.items():
        _dot(axes, "history", number, number, value, floor, color="white", edge=QUIET)
    for row in complete:
        assert row.value is not None
        colour = MARK if row.number == best else VALIDATION
        _dot(axes, "history", row.number, row.number, row.value, floor, color=colour)
    for row in rows:
        if row.state == "failed":
            axes.plot([row.number], [floor], "x", color=INK, markersize=5, gid=f"trial-history-{row.number}")
    axes.set_xlabel("trial", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.02)
    legend = "● complete" + "   ○ pruned, at its last report" * bool(pruned)
    legend += "   × failed" * any(row.state == "failed" for row in rows)
    legend += "   ▾ below the scale" * any(value < floor for value in (*filter(None, shown.values()), *pruned.values()))
    axes.set_title(legend, loc="right", y=1.0, pad=4, color=SOFT, fontsize=8)
    return figure


def parallel(rows: Sequence[TrialRow], space: Mapping[str, Choice | Range], names: Mapping[str, str]) -> Figure:
    """Parallel coordinates (Inselberg 1985): a line a complete trial, an axis for each key of `space`, accuracy last.

    names: what an axis is called. A key that a trial does not have is passed below the axis.
    """
    complete = sorted((row for row in rows if row.value is not None), key=lambda row: (row.value or 0.0, -row.number))
    width = max(WIDE, 1.05 * (len(space) + 1))
    figure = blank(width, 3.7)
    axes = figure.add_axes((0.6 / width, 0.09, 1 - 1.2 / width, 0.79))
    axes.set_axis_off()
    axes.set_xlim(0, len(space))
    partial = any(key not in row.params for row in complete for key in space)
    axes.set_ylim(BELOW - 0.07 if partial else -0.05, 1.04)
    values = [row.value or 0.0 for row in complete]
    floor, top = _floor(values, values), max(values, default=1.0)
    places = []
    for x, (key, leaf) in enumerate(space.items()):
        ticks, place = _scale(leaf, [row.params[key] for row in complete if key in row.params])
        places.append(place)
        _upright(axes, x, names[key], ticks)
        if any(key not in row.params for row in complete):
            axes.plot([x - 0.03, x + 0.03], [BELOW, BELOW], color=QUIET, linewidth=2.5, zorder=2)
            axes.text(x, BELOW - 0.025, "not there", fontsize=7, color=QUIET, ha="center", va="top")
    span = max(top - floor, 1e-9)
    steps = [tick for tick in MaxNLocator(5).tick_values(floor, top) if floor <= tick <= top]
    _upright(axes, len(space), "accuracy", [((tick - floor) / span, percent(tick)) for tick in steps], side=1)
    for rank, row in enumerate(complete):
        shake = 0.025 * (2 * _spread(row.number) - 1)  # else trials of one choice would lie on each other
        heights = [
            place(row.params[key]) + (shake if isinstance(leaf, Choice) else 0.0) if key in row.params else BELOW
            for place, (key, leaf) in zip(places, space.items(), strict=True)
        ]
        heights.append((max(row.value or 0.0, floor) - floor) / span)
        last = rank == len(complete) - 1
        axes.plot(
            range(len(heights)),
            heights,
            color=MARK if last else WORST_TO_BEST(rank / max(len(complete) - 1, 1)),
            linewidth=2.0 if last else 1.1,
            solid_joinstyle="round",
            zorder=3 + rank / (len(complete) + 1),
            gid=f"trial-parallel-{row.number}",
        )
    return figure


def factor(
    rows: Sequence[TrialRow], key: str, leaf: Choice | Range, name: str, figure_name: str, best: int | None
) -> Figure:
    """Validation accuracy over one key of the space: a dot a complete trial, and the median of each of few values.

    A line joins the medians where the values are numbers. best: number of the trial that is marked.
    """
    figure = blank(3.3, 2.3)
    axes = figure.add_axes((0.165, 0.17, 0.815, 0.72))
    plain(axes, name)
    found = [row for row in rows if row.value is not None and key in row.params]
    floor = _limits(axes, [row.value for row in found if row.value is not None])
    options = _options(leaf)
    at: dict[int, list[float]] = {}
    for row in sorted(found, key=lambda row: row.number == best):
        assert row.value is not None
        x = row.params[key]
        if options:
            at.setdefault(_place(options, x), []).append(row.value)
            x = _place(options, x) + 0.5 * (_spread(row.number) - 0.5)
        mark = row.number == best
        _dot(axes, figure_name, row.number, x, row.value, floor, color=MARK if mark else VALIDATION, soft=not mark)
    if not options:
        assert isinstance(leaf, Range)
        if leaf.log:
            axes.set_xscale("log")
            axes.set_xlim(leaf.low / 1.2, leaf.high * 1.2)
            axes.xaxis.set_major_locator(LogLocator(subs=(1,) if leaf.high / leaf.low > 30 else (1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=leaf.whole))
        return figure
    present = sorted(at)
    heights = [max(float(np.median(at[place])), floor) for place in present]
    axes.hlines(heights, [i - 0.3 for i in present], [i + 0.3 for i in present], color=INK, linewidth=1.6, zorder=4)
    if _numbers(options):
        axes.plot(present, heights, color=INK, linewidth=0.8, alpha=0.6, zorder=2)
    crowded = sum(len(_word(option)) + 1 for option in options) > 30
    axes.set_xticks(range(len(options)), [_word(o) for o in options], parse_math=False)
    if crowded:
        axes.tick_params(axis="x", labelsize=7.5, labelrotation=25)
        axes.set_position((0.165, 0.24, 0.815, 0.65))
    axes.set_xlim(-0.5, len(options) - 0.5)
    return figure


def progress(rows: Sequence[TrialRow], top: Sequence[TrialRow]) -> Figure:
    """Validation accuracy by epoch: every trial faintly, a pruned one up to where it ended; `top` ones in colour."""
    figure = blank(5.5, 3.1)
    axes = figure.add_axes((0.115, 0.155, 0.855, 0.745))
    plain(axes, "validation accuracy by epoch")
    numbers = [row.number for row in top]
    ends = [max(row.reported.values()) for row in rows if row.reported]
    floor = _limits(axes, [value for row in rows for value in row.reported.values()], ends)
    axes.set_ylim(bottom=floor)
    for row in rows:
        if row.reported and row.number not in numbers and row.twin is None:
            line = axes.plot([*row.reported], [*row.reported.values()], color="#cbd2d9", linewidth=0.9, zorder=2)[0]
            line.set_gid(f"trial-progress-{row.number}")
            if row.state == "pruned":
                last, value = list(row.reported.items())[-1]
                axes.plot([last], [value], "o", color=QUIET, markersize=3, markerfacecolor="white", zorder=3)
    shades = [MARK, VALIDATION, "#3f7cc0", "#6d9fd3", "#8fb3d9"]
    for row, shade in reversed(list(zip(top, shades, strict=False))):
        axes.plot(
            [*row.reported],
            [*row.reported.values()],
            color=shade,
            marker="o",
            markersize=3,
            linewidth=1.5,
            zorder=4,
            label=f"trial {row.number}",
            gid=f"trial-progress-{row.number}",
        )
    axes.set_xlabel("epoch", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, labelcolor=INK, loc="best")
    return figure


def survival(rows: Sequence[TrialRow], epochs: int) -> Figure:
    """How many of the trained trials reached each epoch: what the pruner left, and (hatched) what it saved."""
    figure = blank(4.2, 3.1)
    axes = figure.add_axes((0.135, 0.155, 0.835, 0.745))
    plain(axes, "trials that trained each epoch")
    trained = [len(row.epochs) for row in rows if row.twin is None and row.epochs]
    reached = [sum(count >= epoch for count in trained) for epoch in range(1, epochs + 1)]
    saved = [len(trained) - count for count in reached]
    steps = range(1, epochs + 1)
    axes.bar(steps, reached, color=VALIDATION, width=0.82)
    axes.bar(steps, saved, bottom=reached, color="white", edgecolor=QUIET, hatch="////", width=0.82, linewidth=0)
    axes.set_xlabel("epoch", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def importance(shares: Mapping[str, float]) -> Figure:
    """Bars, the longest first. shares: name -> share of the differences in accuracy, 0 to 1."""
    height = 0.5 + 0.27 * len(shares)
    figure = blank(5.6, height)
    axes = figure.add_axes((0.32, 0.2 / height, 0.6, 1 - 0.3 / height))
    names = list(shares)
    axes.barh(range(len(names)), list(shares.values()), color=VALIDATION, height=0.66)
    for place, share in enumerate(shares.values()):
        axes.text(share + 0.006, place, f"{share:.0%}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(names)), names, fontsize=8.5, color=INK, parse_math=False)
    axes.set_xticks([])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * max(shares.values(), default=1.0))
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(QUIET)
    return figure


def ranking(measured: Sequence[Measured]) -> Figure:
    """Accuracies with their 95% intervals, the best on top; what cannot be told from it in colour."""
    height = 0.45 + 0.26 * len(measured)  # the pitch of a table's rows
    figure = blank(4.9, height)
    axes = figure.add_axes((0.16, 0.33 / height, 0.81, 1 - 0.36 / height))
    plain(axes, "")
    for place, one in enumerate(measured):
        colour = MARK if place == 0 else VALIDATION if one.tied else QUIET
        number = one.name.rpartition(" ")[2]
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([one.accuracy], [place], "o", color=colour, markersize=5, gid=f"trial-ranking-{number}")
    axes.set_yticks(range(len(measured)), [one.name for one in measured], fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    return figure


def _floor(values: Sequence[float], more: Iterable[float] = ()) -> float:
    """The least accuracy worth a scale: one failed training must not press all others into one line."""
    least = min((*values, *more), default=0.0)
    if not values:
        return least
    quarter, top = float(np.quantile(values, 0.25)), max(values)
    return max(least, quarter - 2 * (top - quarter) - 0.005)


def _limits(axes: Axes, values: Sequence[float], more: Iterable[float] = ()) -> float:
    """Scales the upright axis to accuracies, and returns where those below its range stand."""
    floor, top = _floor(values, more), max((*values, *more), default=1.0)
    margin = max(0.06 * (top - floor), 1e-3)
    axes.set_ylim(floor - margin, top + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    return floor


def _dot(
    axes: Axes,
    figure: str,
    number: int,
    x: float,
    y: float,
    floor: float,
    *,
    color: str,
    edge: str | None = None,
    soft: bool = False,
) -> None:
    axes.plot(
        [x],
        [max(y, floor)],
        "o" if y >= floor else "v",
        color=color,
        markeredgecolor=edge or "white",
        markeredgewidth=0.9 if edge else 0.5,
        markersize=5.5,
        alpha=0.75 if soft else 1.0,
        zorder=3,
        gid=f"trial-{figure}-{number}",
    )


def _scale(leaf: Choice | Range, values: Sequence[Any]) -> tuple[list[tuple[float, str]], Callable[[Any], float]]:
    """Ticks (height from 0 to 1, word) of an axis, and the height of a value on it."""
    if isinstance(leaf, Choice):
        options = _ordered(leaf)
        step = 1 / max(len(options) - 1, 1)
        return [(i * step, _word(option)) for i, option in enumerate(options)], lambda v: options.index(v) * step
    warp = math.log if leaf.log else float
    low, high = warp(leaf.low), warp(leaf.high)
    locator = LogLocator(numticks=6) if leaf.log else MaxNLocator(5, integer=leaf.whole)
    ticks = [tick for tick in locator.tick_values(leaf.low, leaf.high) if leaf.low <= tick <= leaf.high]

    def height(value: Any) -> float:
        return (warp(value) - low) / max(high - low, 1e-12)

    return [(height(tick), _number(tick)) for tick in ticks], height


def _upright(axes: Axes, x: float, name: str, ticks: Sequence[tuple[float, str]], side: int = -1) -> None:
    """One axis of many, its words on the left (side -1) or on the right (1)."""
    axes.plot([x, x], [0, 1], color=QUIET, linewidth=0.9, zorder=2, clip_on=False)
    axes.text(x, 1.09, name, fontsize=8.5, color=INK, ha="center", va="bottom", parse_math=False)
    style: dict[str, Any] = {"fontsize": 7.5, "color": SOFT, "va": "center", "zorder": 5, "parse_math": False}
    style |= {"ha": "right" if side < 0 else "left"}
    style |= {"bbox": {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}}
    for height, word in ticks:
        axes.plot([x, x + 0.02 * side], [height, height], color=QUIET, linewidth=0.9, zorder=2, clip_on=False)
        axes.text(x + 0.035 * side, height, word, **style)


def _options(leaf: Choice | Range) -> list[Any]:
    """The values to be drawn one by one; none for a leaf that is drawn as a scale."""
    if isinstance(leaf, Choice):
        return _ordered(leaf)
    options = leaf.options
    return list(options) if options is not None and len(options) <= FEW and not leaf.log else []


def _ordered(leaf: Choice) -> list[Any]:
    """The values as the study file has them; numbers by size."""
    return sorted(leaf.values) if _numbers(leaf.values) else list(leaf.values)


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _place(options: Sequence[Any], value: Any) -> int:
    """Where a value stands among the options; a stepped number may carry rounding noise."""
    if value in options:
        return options.index(value)
    return min(range(len(options)), key=lambda place: abs(options[place] - value))


def _spread(number: int) -> float:
    """A number from 0 to 1 for a trial, far from those of the trials before it (golden ratio), and always the same."""
    return number * 0.6180339887 % 1


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return short(_number(value) if isinstance(value, float) else str(value), 16)


def _number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
