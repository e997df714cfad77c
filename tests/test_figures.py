"""Figures: odd records are drawn too, names cannot break a page, and the same records give the same file."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rows
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from PIL import Image

from searchfm import figures
from searchfm.figures import Measured
from searchfm.records import EPOCHS, Epoch, Predictions, State, Trial, write_epochs
from searchfm.search.space import Choice, Range
from searchfm.stats import Accuracy

LR = Range(1e-4, 1e-1, log=True, step=None)
LAYERS = Range(1, 3, log=False, step=1)
SPACE = {"lr": LR, "layers": LAYERS, "optimizer": Choice(("sgd", "adamw"))}
NAMES = {key: key for key in SPACE}


def trial(number: int, value: float | None, state: State = "complete", **params: object) -> Trial:
    reported = {1: 0.2, 2: 0.3} if state == "pruned" else {1: 0.2, 2: 0.4, 3: value or 0.5}
    return rows.trial(number=number, state=state, value=value, params=params, reported=reported)


def left_in(folder: Path, *, state: State = "complete", count: int = 4) -> Trial:
    """A trial with the files that it leaves in its folder."""
    trained = tuple(rows.epochs(0, count))
    write_epochs(folder / EPOCHS, trained)
    rows.predictions().write(folder)
    return rows.trial(state=state, epochs=trained, folder=folder)


def pair(names: int = 2) -> Predictions:
    """Two images of the first two of some classes, both correct."""
    return Predictions(np.arange(2), np.arange(2), np.eye(names, dtype=np.float32)[:2])


def pixels(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def points(figure: Figure, name: str) -> dict[int, NDArray[np.float64]]:
    """The points (N, 2) of each trial's mark in a figure."""
    marks = [line for line in figure.axes[0].lines if str(line.get_gid()).startswith(f"trial-{name}-")]
    return {int(str(line.get_gid()).rpartition("-")[2]): np.asarray(line.get_xydata()) for line in marks}


# --- one trial --------------------------------------------------------------------------------------------------------


def test_curves_of_values_that_are_missing_or_not_finite_are_drawn() -> None:
    ends = [
        Epoch(1, 1.0, 0.5, None, None, 0.1, 1.0, 1.0, 0.0),
        Epoch(2, float("nan"), 0.5, None, None, 0.1, 1.0, 1.0, 1.0),
    ]
    left, _ = figures.curves(ends).axes
    assert np.isnan(left.lines[0].get_ydata()).tolist() == [False, True]
    assert figures.png(figures.curves(ends)).startswith(b"\x89PNG")


def test_confusion_counts_and_says_how_many_are_correct() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    predictions = Predictions(np.arange(6), labels, np.eye(3, dtype=np.float32)[predicted])
    (axes,) = figures.confusion(predictions, ["a", "b", "c"]).axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "2", (1, 0): "1", (1, 1): "2", (0, 2): "1"}  # (predicted, true)
    assert axes.get_title(loc="left") == "4 of 6 correct (66.67%)"


def test_confusion_of_a_hundred_classes_can_be_read() -> None:
    content = figures.png(figures.confusion(pair(100), [f"class {i}" for i in range(100)]))
    assert pixels(content).shape[0] > 100 * 9  # a name needs about nine pixels
    assert len(content) < 500_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$\\frac{", "a" * 600, "\x00\n\t", "<b>&amp;", "ズボン", "../../x", ""])
def test_a_class_may_have_any_name(name: str) -> None:
    content = figures.png(figures.confusion(pair(), [name, "plain"]))
    assert max(pixels(content).shape) < 1000


def test_pictures_are_small_and_not_blank() -> None:
    for figure in (figures.curves(rows.epochs(0, 10)), figures.confusion(pair(), ["a", "b"])):
        content = figures.png(figure)
        assert len(content) < 100_000
        assert len(np.unique(pixels(content).reshape(-1, 3), axis=0)) > 20


def test_a_trial_is_drawn_once(tmp_path: Path) -> None:
    row = left_in(tmp_path)
    drawn = figures.draw(row, rows.CLASSES)
    assert [path.name for path in drawn] == ["curves.png", "confusion.png"]
    before = [path.stat().st_mtime_ns for path in drawn]
    assert figures.draw(row, rows.CLASSES) == drawn
    assert [path.stat().st_mtime_ns for path in drawn] == before
    write_epochs(tmp_path / EPOCHS, row.epochs)  # it went on
    figures.draw(row, rows.CLASSES)
    assert drawn[0].stat().st_mtime_ns > before[0]
    assert drawn[1].stat().st_mtime_ns == before[1]


def test_on_canvases_that_are_reused_a_trial_looks_as_on_its_own(tmp_path: Path) -> None:
    one, other = left_in(tmp_path / "one"), left_in(tmp_path / "other", count=9)
    labels = np.arange(10).repeat(3)
    Predictions(np.arange(30), labels, np.eye(10, dtype=np.float32)[labels[::-1]]).write(other.folder)
    figures.draw(one, rows.CLASSES)
    before = [path.read_bytes() for path in figures.draw(one, rows.CLASSES)]
    figures.draw(other, rows.CLASSES)
    for path in (tmp_path / "one").glob("*.png"):
        path.unlink()
    curves, confusion = (path.read_bytes() for path in figures.draw(one, rows.CLASSES))
    assert [curves, confusion] == before
    assert curves == figures.png(figures.curves(one.epochs))
    predictions = Predictions.read(one.folder)
    assert predictions is not None
    alone = pixels(figures.png(figures.confusion(predictions, rows.CLASSES)))
    drawn = pixels(confusion)
    assert drawn.shape == alone.shape
    assert np.abs(drawn.astype(int) - alone).mean() < 2, "the counts differ in the edges of their digits alone"


@pytest.mark.filterwarnings("error")
def test_a_matrix_without_counts_and_a_name_without_glyphs_are_drawn(tmp_path: Path) -> None:
    row = left_in(tmp_path)
    Predictions(np.arange(0), np.arange(0), np.zeros((0, 2), np.float32)).write(tmp_path)
    assert len(figures.draw(row, ["ズボン", "$\\frac{"])) == 2


def test_only_complete_trials_have_a_confusion_matrix(tmp_path: Path) -> None:
    drawn = figures.draw(left_in(tmp_path, state="pruned"), rows.CLASSES)
    assert [path.name for path in drawn] == ["curves.png"]


# --- a search ---------------------------------------------------------------------------------------------------------


def test_history_has_a_mark_for_every_trial_and_rises_with_the_best() -> None:
    trials = [trial(0, 0.7), trial(1, 0.9), trial(2, 0.8), trial(3, None, "pruned"), trial(4, None, "failed")]
    figure = figures.history(trials, best=1, band=(0.88, 0.92))
    assert set(points(figure, "history")) == {0, 1, 2, 3, 4}
    (best,) = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert_allclose(best.get_ydata(), [0.7, 0.9, 0.9])


def test_one_diverged_training_does_not_compress_the_others_to_a_line() -> None:
    trials = [*(trial(number, 0.90 + number / 1000) for number in range(10)), trial(10, 0.1)]
    figure = figures.history(trials, 9, (0.90, 0.91))
    low, high = figure.axes[0].get_ylim()
    assert high - low < 0.05
    assert points(figure, "history")[10][0, 1] > low
    assert "below the scale" in figure.axes[0].get_title(loc="right")


def test_a_trial_without_a_key_passes_below_its_axis() -> None:
    trials = [
        trial(0, 0.9, lr=1e-1, layers=3, optimizer="adamw"),
        trial(1, 0.8, lr=1e-4, layers=1, optimizer="sgd"),
        trial(2, 0.7, lr=10**-2.5, layers=2),
    ]
    heights = points(figures.parallel(trials, SPACE, NAMES), "parallel")
    assert_allclose(heights[0][:, 1], [1, 1, 1, 1], atol=0.03)  # choices are spread a little
    assert_allclose(heights[1][:, 1], [0, 0, 0, 0.5], atol=0.03)
    assert heights[2][2, 1] < 0


def test_numbers_to_choose_from_are_sorted_and_names_are_not() -> None:
    trials = [trial(0, 0.8, momentum=0.9, pool="none"), trial(1, 0.7, momentum=0.0, pool="max")]
    for key, values, order in (("momentum", (0.9, 0.0), [1, 0]), ("pool", ("none", "max"), [0, 1])):
        marks = points(figures.factor(trials, key, Choice(values), key, "f", best=0), "f")
        assert [round(float(marks[number][0, 0])) for number in (0, 1)] == order


def test_all_keys_have_one_scale_and_a_median_needs_three_trials() -> None:
    values = [0.5, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95]
    trials = [trial(i, value, momentum=[0.0, *[0.5] * 3, *[0.9] * 3][i]) for i, value in enumerate(values)]
    trials.append(trial(9, 0.96, lr=0.1))
    figure = figures.factor(trials, "momentum", Choice((0.0, 0.5, 0.9)), "momentum", "f", best=9)
    other = figures.factor(trials, "lr", LR, "lr", "f", best=9)
    assert figure.axes[0].get_ylim() == other.axes[0].get_ylim()
    (medians,) = figure.axes[0].collections
    assert [segment[0][1] for segment in medians.get_segments()] == pytest.approx([0.91, 0.94])  # type: ignore[attr-defined]
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() is None]
    assert_allclose(line.get_xdata(), [1, 2])


def test_pruned_trials_are_drawn_at_their_last_report_and_move_no_median() -> None:
    complete = [trial(i, 0.9 + i / 100, lr=1e-2, layers=2, optimizer="sgd") for i in range(3)]
    pruned = [trial(i, None, "pruned", lr=1e-3, layers=1, optimizer="sgd") for i in (3, 4)]
    trials = [*complete, *pruned, trial(5, None, "failed", lr=1e-3, layers=1, optimizer="sgd")]
    figure = figures.factor(trials, "optimizer", Choice(("sgd", "adamw")), "optimizer", "f", best=2)
    marks = points(figure, "f")
    assert {number: mark[0, 1] for number, mark in marks.items()} == pytest.approx(
        {0: 0.9, 1: 0.91, 2: 0.92, 3: 0.3, 4: 0.3}
    )
    (medians,) = figure.axes[0].collections
    assert [segment[0][1] for segment in medians.get_segments()] == [0.91]  # type: ignore[attr-defined]
    heights = points(figures.parallel(trials, SPACE, NAMES), "parallel")
    assert set(heights) == {0, 1, 2, 3, 4}
    assert (heights[2][-1, 1], heights[3][-1, 1]) == (1, 0)
    assert heights[3][1, 1] == 0, "one layer is the least"


def test_a_number_with_rounding_noise_has_its_step() -> None:
    dropout = Range(0.0, 0.5, log=False, step=0.05)
    trials = [trial(0, 0.8, dropout=0.30000000000000004), trial(1, 0.9, dropout=0.35000000000000003)]
    marks = points(figures.factor(trials, "dropout", dropout, "dropout", "f", best=1), "f")
    assert [round(float(marks[number][0, 0])) for number in (0, 1)] == [6, 7]


def test_survivors_and_what_was_saved_add_up_to_all() -> None:
    trials = [replace(trial(i, 0.5), epochs=tuple(rows.epochs(i, count))) for i, count in enumerate((3, 3, 1, 2))]
    trials.append(replace(trials[2], state="failed"))  # not counted: nothing was pruned
    heights = [patch.get_height() for patch in figures.survival(trials, 3).axes[0].patches]
    assert heights == [4, 3, 2, 0, 1, 2]


@pytest.mark.parametrize("trials", [[], [trial(0, 0.5)], [trial(0, 0.5), trial(1, 0.5)], [trial(0, None, "failed")]])
def test_odd_searches_are_drawn_too(trials: list[Trial]) -> None:
    drawn = [
        figures.history(trials, 0, (0.4, 0.6)),
        figures.parallel(trials, SPACE, NAMES),
        figures.factor(trials, "lr", LR, "lr", "f", 0),
        figures.progress(trials, [trial for trial in trials if trial.value]),
        figures.survival(trials, 3),
        figures.ranking({trial.number: Accuracy(round(10 * (trial.value or 0)), 10) for trial in trials}, {0}),
    ]
    assert all(figures.svg(figure, str(i)).startswith("<svg") for i, figure in enumerate(drawn))


# --- several studies --------------------------------------------------------------------------------------------------


def test_the_front_leaves_out_a_study_that_another_beats_in_both() -> None:
    measured = [
        Measured("slow", 0.95, 0.94, 0.96, 100.0),
        Measured("worse", 0.90, 0.89, 0.91, 50.0),
        Measured("quick", 0.92, 0.91, 0.93, 10.0),
        Measured("twice as slow", 0.95, 0.94, 0.96, 200.0),
    ]
    (axes,) = figures.front({"digits, test accuracy": measured}).axes
    (step,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert_allclose(step.get_xydata(), [[10, 0.92], [100, 0.95]])


def test_names_on_the_front_do_not_cover_each_other() -> None:
    measured = [Measured(f"study-{i}", 0.9 + i / 1e4, 0.89, 0.91, 10.0 + i / 10) for i in range(4)]
    figure = figures.front({"panel": measured})
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_svg_is_an_element_of_a_page_and_no_more() -> None:
    names = {**NAMES, "lr": "<script>alert(1)</script> $\\bad{$ &"}
    text = figures.svg(figures.parallel([trial(0, 0.5, lr=0.1), trial(1, 0.6, lr=0.01)], SPACE, names), "one")
    tree = ElementTree.fromstring(text)
    texts = [element.text or "" for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("<script>") for text in texts)
    assert "<script" not in text
    assert "<style" not in text  # it would hold for the whole page
    assert re.findall(r' id="(trial-[^"]*)"', text) == ["trial-parallel-0", "trial-parallel-1"]


def test_inner_ids_differ_from_figure_to_figure_but_not_from_run_to_run() -> None:
    def drawn(salt: str) -> str:
        return figures.svg(figures.history([trial(0, 0.5)], 0, (0.4, 0.6)), salt)

    def inner(text: str) -> set[str]:
        return {name for name in re.findall(r' id="([^"]*)"', text) if not name.startswith("trial-")}

    assert drawn("one") == drawn("one")
    assert inner(drawn("one"))
    assert not inner(drawn("one")) & inner(drawn("two"))


def test_a_page_sets_the_colours_of_figures_and_elsewhere_they_have_their_own() -> None:
    trials = [replace(trial(i, 0.5), epochs=tuple(rows.epochs(i, count))) for i, count in enumerate((3, 1))]
    for figure in (figures.history(trials, 0, (0.4, 0.6)), figures.survival(trials, 3)):
        text = figures.svg(figure, "one")
        assert f"var(--ink, {figures.INK})" in text
        assert f"var(--paper, {figures.PAPER})" in text
        assert not re.search(f'[:"] ?{figures.PAPER}', text), "white would stay white on a dark screen"


def test_pyplot_stays_out() -> None:
    code = "import sys, searchfm.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
