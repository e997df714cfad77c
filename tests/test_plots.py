import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rows
from numpy.testing import assert_array_equal
from PIL import Image

from searchfm import plots
from searchfm.job import Epoch
from searchfm.search.history import TrialRow, write_epochs


def trial(folder: Path, *, state: str = "complete", count: int = 4) -> TrialRow:
    """A trial's row over a folder that holds what a trial leaves."""
    folder.mkdir(exist_ok=True)
    trained = tuple(rows.epochs(0, count))
    write_epochs(folder / "epochs.csv", trained)
    rows.write_predictions(folder / "predictions.npz")
    return TrialRow(
        number=0,
        state=state,  # type: ignore[arg-type]
        value=None,
        params={},
        config={},
        digest="",
        twin=None,
        reason=None,
        attempts=1,
        reported={},
        epochs=trained,
        result={},
        started=0.0,
        ended=1.0,
        folder=folder,
    )


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_curves_show_every_epoch_and_mark_the_best() -> None:
    trained = rows.epochs(1, 6)
    left, right = plots.curves(trained).axes
    assert_array_equal(left.lines[0].get_ydata(), [epoch.train_loss for epoch in trained])
    assert_array_equal(left.lines[1].get_ydata(), [epoch.val_loss for epoch in trained])
    assert_array_equal(right.lines[1].get_xdata(), range(1, 7))
    best = max(trained, key=lambda epoch: epoch.val_accuracy or 0.0)
    assert right.get_title(loc="right") == f"best {best.val_accuracy:.2%} in epoch {best.index}"


def test_curves_are_drawn_of_what_is_not_finite_or_not_there() -> None:
    ends = [
        Epoch(1, 1.0, 0.5, None, None, 0.1, 1.0, 1.0, 0.0),
        Epoch(2, float("nan"), 0.5, None, None, 0.1, 1.0, 1.0, 1.0),
    ]
    assert plots.png(plots.curves(ends)).startswith(b"\x89PNG")


def test_confusion_counts_in_words_for_few_classes() -> None:
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]
    (axes,) = plots.confusion(labels, predictions, ["a", "b", "c"]).axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "2", (1, 0): "1", (1, 1): "2", (0, 2): "1"}  # (predicted, true)
    assert axes.get_title(loc="left") == "4 of 6 right (66.67%)"


def test_confusion_of_a_hundred_classes_can_be_read() -> None:
    content = plots.png(plots.confusion(range(100), range(100), [f"class {i}" for i in range(100)]))
    assert pixels(content).shape[0] > 100 * 9  # a name needs some nine pixels to be read
    assert len(content) < 500_000


@pytest.mark.parametrize("name", ["$\\frac{", "a" * 600, "\x00\n\t", "<b>&amp;", "ズボン", "../../x", ""])
def test_a_class_may_have_any_name(name: str) -> None:
    content = plots.png(plots.confusion([0, 1], [0, 1], [name, "plain"]))
    assert max(pixels(content).shape) < 1000


def test_pictures_are_small_and_not_blank() -> None:
    for figure in (plots.curves(rows.epochs(0, 10)), plots.confusion([0, 1, 1], [0, 1, 0], ["a", "b"])):
        content = plots.png(figure)
        assert len(content) < 100_000
        assert len(np.unique(pixels(content).reshape(-1, 3), axis=0)) > 20


def test_a_trial_is_drawn_once(tmp_path: Path) -> None:
    row = trial(tmp_path / "0000")
    drawn = plots.draw(row, rows.CLASSES)
    assert [path.name for path in drawn] == ["curves.png", "confusion.png"]
    before = [path.stat().st_mtime_ns for path in drawn]
    assert plots.draw(row, rows.CLASSES) == drawn
    assert [path.stat().st_mtime_ns for path in drawn] == before
    write_epochs(row.folder / "epochs.csv", row.epochs)  # it went on
    plots.draw(row, rows.CLASSES)
    assert drawn[0].stat().st_mtime_ns > before[0]
    assert drawn[1].stat().st_mtime_ns == before[1]
    assert not list(row.folder.glob("*.tmp"))


def test_only_complete_trials_have_a_confusion_matrix(tmp_path: Path) -> None:
    assert [path.name for path in plots.draw(trial(tmp_path / "0000", state="pruned"), rows.CLASSES)] == ["curves.png"]


def test_predictions_are_read_without_pickles(tmp_path: Path) -> None:
    row = trial(tmp_path / "0000")
    np.savez(row.folder / "predictions.npz", labels=np.array([object()]), probabilities=[], indices=[])
    with pytest.raises(ValueError, match="allow_pickle=False"):
        plots.read_predictions(row)


def test_pyplot_stays_out() -> None:
    code = "import sys, searchfm.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
