"""Studies side by side: what is tested against what, and that terminal, page, JSON and MLflow agree."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import searched
from msgspec.structs import asdict, replace
from PIL import Image
from rich.console import Console
from searched import Ending

from searchfm import cli
from searchfm.errors import StudyError
from searchfm.home import STORAGE, Home
from searchfm.records import StudyRecord
from searchfm.show.compare import (
    compare_studies,
    comparison_markdown,
    comparison_notes,
    comparison_page,
    comparison_picture,
    comparison_tables,
)
from searchfm.stats import Accuracy, holm, mcnemar
from searchfm.tracking.mirror import connect
from tests.json_page import check

KEYS = ["study", "accuracy", "low", "high", "split", "difference", "p", "seconds_per_epoch", "parameters", "flops"]


def make_three(home: Home) -> list[StudyRecord]:
    """Three studies on the same images: the best, one tied with it, one that is not."""
    wrong = {"near": range(20, 32), "best": range(10), "far": range(40)}
    return [searched.search(home, [Ending(range(100)), Ending(indices)], name) for name, indices in wrong.items()]


@pytest.fixture(scope="module")
def read_only(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home for tests that do not write."""
    return new_home(tmp_path_factory.mktemp("compare") / "home")


@pytest.fixture(scope="module")
def three(read_only: Home) -> list[StudyRecord]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STORAGE, raising=False)
        return make_three(read_only)


def correct(wrong: range, n: int) -> np.ndarray:
    return ~np.isin(np.arange(n), wrong)


def test_studies_on_the_same_images_are_tested_against_the_best_of_them(three: list[StudyRecord]) -> None:
    near, best, far = compare_studies(three)
    assert [near.study, best.study, far.study] == ["near", "best", "far"]  # as they were named
    assert (best.difference, best.p) == (0.0, None)
    assert near.difference == pytest.approx(-2 / 212, abs=1e-6)
    top = correct(range(10), 212)
    alone = [mcnemar(top, correct(range(20, 32), 212)), mcnemar(top, correct(range(40), 212))]
    assert [near.p, far.p] == holm(alone)
    assert near.p is not None
    assert near.p > 0.5
    assert far.p is not None
    assert far.p < 1e-6


def test_a_search_is_represented_by_its_best_trial_on_validation(three: list[StudyRecord]) -> None:
    _, best, _ = compare_studies(three)
    assert (best.split, best.n, best.reads) == ("validation", 212, None)
    assert best.accuracy == pytest.approx(202 / 212, abs=1e-6)
    assert (best.low, best.high) == Accuracy(202, 212).interval
    assert (best.seconds_per_epoch, best.training_seconds, best.epochs) == (3.0, 12.0, 4)  # of trial 1
    assert (best.parameters, best.flops, best.trials, best.search_seconds) == (1001, 2_000_000, 2, 20.0)
    assert any(note.startswith("validation: the search's best trial, optimistic") for note in comparison_notes([best]))


def test_a_final_model_is_represented_by_its_test(home: Home) -> None:
    three = make_three(home)
    final = searched.retrained(home, three[0], range(30), winner=1, reads=4)
    other = searched.retrained(home, three[1], range(90), winner=1, reads=5)
    lines = compare_studies([final, other, three[2]])
    first, second, third = lines
    assert (first.split, first.accuracy, first.low, first.high) == ("test", 0.9, 0.5, 0.99)
    assert (first.parameters, first.seconds_per_epoch, first.reads) == (777, 5.0, 4)
    assert second.difference == pytest.approx(-0.2)
    assert second.p == mcnemar(correct(range(30), 300), correct(range(90), 300))
    assert (third.split, third.difference, third.p) == ("validation", None, None)  # other images
    assert "test (reading 4)" in comparison_markdown(lines).replace("\\", "")


@pytest.mark.parametrize("other", [{"fingerprint": "another"}, {"tables": {"data": {"name": "digits", "seed": 1}}}])
def test_what_was_measured_on_other_images_is_not_compared(home: Home, other: dict[str, object]) -> None:
    one = searched.search(home, [Ending(range(10))], "one")
    two = searched.search(home, [Ending(range(60))], "two", **other)  # type: ignore[arg-type]
    if "tables" in other:  # another split: other images in the folder
        _, indices, labels = searched.validation()
        searched.predict(two.trials[0].folder, range(60), indices[::-1], labels[::-1])
    for line in compare_studies([one, two]):
        assert (line.difference, line.p) == (None, None)
    assert '"-": no other study was measured on the same images.' in comparison_notes(compare_studies([one, two]))


def test_lost_predictions_are_not_compared(home: Home) -> None:
    one = searched.search(home, [Ending(range(10))], "one")
    two = searched.search(home, [Ending(range(60), kept=False)], "two")
    assert [line.p for line in compare_studies([one, two])] == [None, None]


def test_a_study_without_a_complete_trial_or_named_twice_is_refused(home: Home, three: list[StudyRecord]) -> None:
    empty = searched.search(home, [], "empty")
    with pytest.raises(StudyError, match="'empty' has no complete trial to compare yet"):
        compare_studies([three[0], empty])
    with pytest.raises(StudyError, match="'near' is named twice"):
        compare_studies([three[0], three[1], three[0]])


@pytest.mark.parametrize("width", [80, 160])
def test_no_cell_is_folded_in_the_terminal(three: list[StudyRecord], width: int) -> None:
    lines = compare_studies(three)
    console = Console(width=width, record=True, file=sys.stderr)
    shown = comparison_tables(lines, width)
    for table in shown:
        console.print(table)
    text = console.export_text()
    assert len(shown) == (2 if width == 80 else 1)
    assert text.count("\n") == len(shown) * 4  # a heading and a line each
    assert "95.28%" in text
    assert "12.0 s" in text


def test_a_long_path_of_data_is_shortened_where_it_does_not_fit_and_whole_elsewhere(three: list[StudyRecord]) -> None:
    path = "/home/ada/photographs-of-the-summer/selected-and-cropped/birds"
    lines = [replace(line, data=path) for line in compare_studies(three)]
    for width in (80, 140, 1000):
        console = Console(width=width, record=True, file=sys.stderr)
        shown = comparison_tables(lines, width)
        for table in shown:
            console.print(table)
        text = console.export_text()
        assert text.count("\n") == len(shown) * 4, width
        assert text.count("/birds ") == 3
        assert (path in text) is (width == 1000)
    assert path in comparison_page(lines)


def test_only_of_imbalanced_data_a_comparison_notes_the_largest_class(three: list[StudyRecord]) -> None:
    line = compare_studies(three)[0]
    for largest, noted in ((0.11, 0), (0.2, 1)):
        notes = comparison_notes([replace(line, largest=largest)])
        assert sum("always answering the largest class is correct for 20.0%" in note for note in notes) == noted


@pytest.mark.slow
def test_the_page_has_the_table_and_opens_without_a_network(three: list[StudyRecord], tmp_path: Path) -> None:
    lines = compare_studies(three)
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(lines))
    dom, console = searched.browse(path, tmp_path)
    assert console == []
    assert searched.cut(path, tmp_path, (1000, 1200)) == []
    for text in ("near", "best", "far", "95.28%", "1,001", "digits, validation accuracy"):
        assert text in dom
    assert not [url for url in ("http://", "https://") if f'src="{url}' in dom or f'href="{url}' in dom]


def test_pictures_are_what_their_suffix_says(three: list[StudyRecord]) -> None:
    lines = compare_studies(three)
    assert min(Image.open(io.BytesIO(comparison_picture(lines, ".png"))).size) > 400
    assert comparison_picture(lines, ".svg").startswith(b"<svg")


# --- the command ------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["searchfm", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


# SQLAlchemy and pandas warn of how MLflow asks them.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy", "ignore:For backward compatibility, 'str'")
def test_json_files_and_mlflow_agree_and_mlflow_holds_it_once(
    read_only: Home,
    three: list[StudyRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["compare", "near", "best", "--home", str(read_only.path), "--json"]
    figure, side = tmp_path / "deep" / "front.svg", tmp_path / "side.html"
    assert command(monkeypatch, *arguments, "--picture", str(figure), "--html", str(side)) == 0
    output = capsys.readouterr().out
    check(arguments, output)
    printed = json.loads(output)
    assert printed == [asdict(line) for line in compare_studies(three[:2])]
    assert [line.pop("schema") for line in printed] == [2, 2]
    assert all(set(KEYS) < set(line) for line in printed)
    assert figure.read_bytes().startswith(b"<svg")
    assert "best" in side.read_text()
    assert command(monkeypatch, *arguments[:-1]) == 0  # once more
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MLflow")]

    client = connect(read_only)
    experiment = client.get_experiment_by_name("searchfm comparisons")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["role"] == "comparison"]
    assert parent.info.run_name == "near, best"
    assert parent.data.tags["mlflow.source.name"].startswith("searchfm compare near best --home ")
    key = line.partition("viewStateShareKey=")[2].split()[0]
    assert f"http://127.0.0.1:5000/open#/experiments/{experiment.experiment_id}/runs?" in line
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`accuracy`", False)
    flat = client.search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.info.run_name for run in flat} == {"near", "best"}, "the table has the studies, not folded"
    picture = f"![front](get-artifact?path=front.png&run_uuid={parent.info.run_id})"
    assert parent.data.tags["mlflow.note.content"].startswith(picture)
    assert "| near | 94.34% |" in parent.data.tags["mlflow.note.content"].replace("\\", "")
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "comparison.html",
        "comparison.json",
        "front.png",
    }
    below = {run.info.run_name: run for run in runs if run.data.tags["role"] == "compared"}
    assert set(below) == {"near", "best"}
    for line in printed:
        metrics, tags = below[line["study"]].data.metrics, below[line["study"]].data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["split"] == "validation"
        kept = {key: value for key, value in line.items() if isinstance(value, int | float)}
        assert metrics == pytest.approx(kept)


def test_another_kind_of_picture_is_refused_before_anything_is_done(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "compare", "a", "--picture", "front.gif", "--home", str(home.path)) == 2
    assert capsys.readouterr().err == "searchfm: --picture front.gif: must end in .png or .svg\n"
    assert not home.path.exists()


def test_a_study_alone_has_nothing_to_compare_with(three: list[StudyRecord]) -> None:
    (line,) = compare_studies(three[:1])
    assert (line.difference, line.p) == (None, None)
    assert '"-"' not in " ".join(comparison_notes([line]))
