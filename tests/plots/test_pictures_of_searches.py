"""Pictures of searches: that every trial is where it belongs, and that odd searches are drawn too."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from searchfm import plots
from searchfm.job import Epoch
from searchfm.plots import Measured
from searchfm.search.history import State, TrialRow
from searchfm.search.space import Choice, Range

LR = Range(1e-4, 1e-1, log=True, step=None)
LAYERS = Range(1, 3, log=False, step=1)
SPACE = {"lr": LR, "layers": LAYERS, "optimizer": Choice(("sgd", "adamw"))}
NAMES = {key: key for key in SPACE}


def trial(number: int, value: float | None, state: State = "complete", **params: object) -> TrialRow:
    return TrialRow(
        number=number,
        state=state,
        value=value,
        params=params,
        config={"train": {"epochs": 3}},
        digest="",
        twin=None,
        reason=None,
        attempts=1,
        reported={1: 0.2, 2: 0.3} if state == "pruned" else {1: 0.2, 2: 0.4, 3: value or 0.5},
        epochs=(),
        result={},
        started=None,
        ended=None,
        folder=Path("nowhere"),
    )


def points(figure: Figure, name: str) -> dict[int, NDArray[np.float64]]:
    """The points (N, 2) that stand for each trial in the one picture of a figure."""
    found = [line for line in figure.axes[0].lines if str(line.get_gid()).startswith(f"trial-{name}-")]
    return {int(str(line.get_gid()).rpartition("-")[2]): np.asarray(line.get_xydata()) for line in found}


def test_history_has_every_trial_at_its_accuracy_and_the_best_so_far_above() -> None:
    rows = [trial(0, 0.7), trial(1, 0.9), trial(2, 0.8), trial(3, None, "pruned"), trial(4, None, "failed")]
    figure = plots.history(rows, best=1, band=(0.88, 0.92))
    found = points(figure, "history")
    assert_allclose([found[number][0] for number in range(3)], [[0, 0.7], [1, 0.9], [2, 0.8]])
    low, high = figure.axes[0].get_ylim()
    assert set(found) == {0, 1, 2, 3, 4}
    assert all(low < found[number][0, 1] < high for number in found)  # whoever failed stands at the edge
    (best,) = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert_allclose(best.get_ydata(), [0.7, 0.9, 0.9])


def test_one_training_that_went_wrong_does_not_press_the_others_into_a_line() -> None:
    rows = [trial(number, 0.90 + number / 1000) for number in range(10)] + [trial(10, 0.1)]
    figure = plots.history(rows)
    low, high = figure.axes[0].get_ylim()
    assert high - low < 0.05
    assert points(figure, "history")[10][0, 1] > low
    assert "below the scale" in figure.axes[0].get_title(loc="right")


def test_parallel_coordinates_meet_each_axis_at_the_trials_value() -> None:
    rows = [
        trial(0, 0.9, lr=1e-1, layers=3, optimizer="adamw"),
        trial(1, 0.8, lr=1e-4, layers=1, optimizer="sgd"),
        trial(2, 0.7, lr=10**-2.5, layers=2),
    ]
    found = points(plots.parallel(rows, SPACE, NAMES), "parallel")
    assert_allclose(found[0][:, 1], [1, 1, 1, 1], atol=0.03)  # choices are spread a little
    assert_allclose(found[1][:, 1], [0, 0, 0, 0.5], atol=0.03)
    assert_allclose(found[2][:2, 1], [0.5, 0.5])
    assert found[2][2, 1] < 0  # has no optimizer: below the axis
    assert found[2][3, 1] == 0


def test_a_key_of_few_values_has_their_medians_joined_where_they_are_numbers() -> None:
    rows = [trial(i, value, layers=1 + i % 3) for i, value in enumerate((0.7, 0.8, 0.9, 0.6, 0.8, 0.8))]
    figure = plots.factor(rows, "layers", LAYERS, "layers", "f0", best=2)
    (joined,) = [line for line in figure.axes[0].lines if line.get_gid() is None]
    assert_allclose(joined.get_xydata(), [[0, 0.65], [1, 0.8], [2, 0.85]])
    rows = [replace(row, params={"optimizer": ["sgd", "adamw"][row.number % 2]}) for row in rows]
    figure = plots.factor(rows, "optimizer", SPACE["optimizer"], "optimizer", "f1", best=2)
    assert not [line for line in figure.axes[0].lines if line.get_gid() is None]  # words have no order


def test_numbers_to_choose_from_stand_by_size_and_words_as_they_are_given() -> None:
    rows = [trial(0, 0.8, momentum=0.9, pool="none"), trial(1, 0.7, momentum=0.0, pool="max")]
    for key, values, places in (("momentum", (0.9, 0.0), [1, 0]), ("pool", ("none", "max"), [0, 1])):
        found = points(plots.factor(rows, key, Choice(values), key, "f", best=0), "f")
        assert [round(float(found[number][0, 0])) for number in (0, 1)] == places


def test_a_stepped_number_is_found_in_spite_of_rounding_noise() -> None:
    dropout = Range(0.0, 0.5, log=False, step=0.05)
    rows = [trial(0, 0.8, dropout=0.30000000000000004), trial(1, 0.9, dropout=0.35000000000000003)]
    found = points(plots.factor(rows, "dropout", dropout, "dropout", "f", best=1), "f")
    assert [round(float(found[number][0, 0])) for number in (0, 1)] == [6, 7]


def test_a_range_is_drawn_to_its_scale() -> None:
    rows = [trial(0, 0.8, lr=1e-3), trial(1, 0.9, lr=3e-2)]
    figure = plots.factor(rows, "lr", LR, "lr", "f", best=1)
    assert figure.axes[0].get_xscale() == "log"
    assert_allclose(points(figure, "f")[1], [[3e-2, 0.9]])
    low, high = figure.axes[0].get_xlim()
    assert low < LR.low < LR.high < high


def test_survivors_and_what_was_saved_add_up_to_all() -> None:
    epoch = Epoch(1, 1.0, 0.5, 1.0, 0.5, 0.1, 1.0, 1.0, 0.0)
    rows = [replace(trial(i, 0.5), epochs=(epoch,) * count) for i, count in enumerate((3, 3, 1, 2))]
    heights = [patch.get_height() for patch in plots.survival(rows, 3).axes[0].patches]
    assert heights == [4, 3, 2, 0, 1, 2]


def test_the_front_leaves_out_whom_another_beats_in_both() -> None:
    measured = [
        Measured("slow", 0.95, 0.94, 0.96, 100.0),
        Measured("beaten", 0.90, 0.89, 0.91, 50.0),
        Measured("quick", 0.92, 0.91, 0.93, 10.0),
        Measured("twice as slow", 0.95, 0.94, 0.96, 200.0),
    ]
    (axes,) = plots.front({"digits, test accuracy": measured}).axes
    (step,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert_allclose(step.get_xydata(), [[10, 0.92], [100, 0.95]])


def test_names_on_the_front_do_not_cover_each_other() -> None:
    measured = [Measured(f"study-{i}", 0.9 + i / 1e4, 0.89, 0.91, 10.0 + i / 10) for i in range(4)]
    figure = plots.front({"panel": measured})
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize("rows", [[], [trial(0, 0.5)], [trial(0, 0.5), trial(1, 0.5)], [trial(0, None, "failed")]])
def test_odd_searches_are_drawn_too(rows: list[TrialRow]) -> None:
    pictures = [
        plots.history(rows, 0, (0.4, 0.6)),
        plots.parallel(rows, SPACE, NAMES),
        plots.factor(rows, "lr", LR, "lr", "f", 0),
        plots.progress(rows, [row for row in rows if row.value]),
        plots.survival(rows, 3),
        plots.ranking([Measured(f"trial {row.number}", row.value or 0, 0.0, 1.0) for row in rows]),
    ]
    assert all(plots.svg(figure, str(i)).startswith("<svg") for i, figure in enumerate(pictures))


def test_an_svg_is_a_part_of_a_page_and_no_more() -> None:
    names = {**NAMES, "lr": "<script>alert(1)</script> $\\bad{$ &"}
    text = plots.svg(plots.parallel([trial(0, 0.5, lr=0.1), trial(1, 0.6, lr=0.01)], SPACE, names), "one")
    tree = ElementTree.fromstring(text)
    told = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert any(word and word.startswith("<script>") for word in told)
    assert "<script" not in text
    assert "<style" not in text  # it would hold for the whole page
    assert re.findall(r' id="(trial-[^"]*)"', text) == ["trial-parallel-0", "trial-parallel-1"]


def test_inner_ids_differ_from_picture_to_picture_but_not_from_time_to_time() -> None:
    def drawn(salt: str) -> str:
        return plots.svg(plots.history([trial(0, 0.5)]), salt)

    def inner(text: str) -> set[str]:
        return {name for name in re.findall(r' id="([^"]*)"', text) if not name.startswith("trial-")}

    assert drawn("one") == drawn("one")
    assert inner(drawn("one"))
    assert not inner(drawn("one")) & inner(drawn("two"))
