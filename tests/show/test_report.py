"""The report: its figures are checked against other computations, the page itself in a browser."""

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import searched
from optuna.trial import TrialState
from PIL import Image
from scipy.stats import binomtest
from searched import Ending

from searchfm import cli
from searchfm.config import DataConfig
from searchfm.errors import DataError, StudyError
from searchfm.format import final_sentences, saved_epochs
from searchfm.home import Home
from searchfm.learn.datasets import training_images
from searchfm.records import FinalistFigures, Predictions, StudyRecord
from searchfm.search import files
from searchfm.search.storage import load_study, open_storage
from searchfm.show import report
from searchfm.show.report import report_page
from searchfm.tracking.mirror import connect, run_links
from tests.commands import loaded, loaded_by, searchfm_here

HOSTILE = ["</script><script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">"]
BEST = range(10)  # indices that the best trial gets wrong


def many(count: int = 14) -> list[Ending]:
    """Trials of which the learning rate alone decides, a pruned one, a failed one and a twin."""
    complete = [
        Ending(
            wrong=range(5, 20 + 4 * i),
            params={
                "optimizer.lr": 1e-1 * 0.62**i,
                "optimizer.name": ["adamw", "sgd"][i % 2],
                "optimizer.sgd.momentum": 0.5,
                "model.mlp.layers": 1 + i % 3,
                "model.mlp.dropout": [0.0, 0.25][i // 2 % 2],
            },
        )
        for i in range(count)
    ]
    pruned = Ending(wrong=range(90), state=TrialState.PRUNED, epochs=1)
    return [*complete, pruned, Ending(state=TrialState.FAIL, epochs=1), Ending(wrong=range(5, 20), twin=0)]


# --- findings ---------------------------------------------------------------------------------------------------------


def test_trials_that_miss_other_images_are_a_tie_and_those_that_miss_more_are_not(home: Home) -> None:
    other, worse = range(40, 52), [*BEST, *range(60, 72)]
    study = searched.search(home, [Ending(BEST), Ending(other), Ending(worse)])
    best, second, third = report.ranks(study)
    assert (best.trial.number, best.p, best.tied) == (0, None, True)
    assert (second.trial.number, second.tied) == (1, True)  # 10 against 12: nothing
    assert (third.trial.number, third.tied) == (2, False)  # the same misses and 12 more
    # Mid-p: the exact test, less half of what is exactly as likely. Twice, for two trials are compared (Holm).
    exact, point = binomtest(0, 12).pvalue, 2 * 0.5**12
    assert third.p == pytest.approx(2 * (exact - point / 2))
    low, high = third.accuracy.interval
    assert low < third.accuracy.fraction < high


def test_a_paired_test_finds_differences_that_intervals_hide(home: Home) -> None:
    worse = range(17)
    paired = report.ranks(searched.search(home, [Ending(BEST), Ending(worse)]))
    alone = report.ranks(searched.search(home, [Ending(BEST), Ending(worse, kept=False)], "lost"))
    assert [rank.tied for rank in paired] == [True, False]
    assert [(rank.tied, rank.p) for rank in alone] == [(True, None), (True, None)]
    assert alone[1].accuracy.interval[1] > alone[0].accuracy.interval[0]


def test_twins_are_not_ranked(home: Home) -> None:
    study = searched.search(home, [Ending(BEST), Ending(BEST, twin=0)])
    assert [rank.trial.number for rank in report.ranks(study)] == [0]


def test_pruning_saved_what_pruned_trials_did_not_train(home: Home) -> None:
    pruned = Ending(state=TrialState.PRUNED, epochs=1)
    failed, twin = Ending(state=TrialState.FAIL, epochs=2), Ending(BEST, twin=0)
    saved = saved_epochs(searched.search(home, [Ending(BEST), pruned, failed, twin]))
    assert (saved.epochs, saved.full) == (3, 8)
    assert saved.seconds == pytest.approx(3 * 3.0)  # trial 1 took 3 s an epoch
    assert str(saved) == "3 of 8 epochs (38%), about 9.0 s of training"


def test_what_decides_is_the_most_important(home: Home) -> None:
    study = searched.search(home, many())
    importances = report.importances(study, open_storage(home))
    assert next(iter(importances)) == "optimizer.lr"
    assert sum(importances.values()) == pytest.approx(1)


def test_importance_needs_enough_trials_and_says_so(home: Home) -> None:
    study = searched.search(home, many(8))  # and a pruned one; the tenth is a twin
    assert report.importances(study, open_storage(home)) == {}
    page = report_page(study, open_storage(home), {}, None)
    assert "at least 10 trials that were completed or pruned; this study has 9" in page


def test_pruned_trials_count_towards_importance_by_how_far_they_came(home: Home) -> None:
    """As with asha, which leaves few complete trials. The learning rate alone decides how far a trial comes. After one
    epoch, trials of three layers were more accurate than any after three.
    """

    def ending(wrong: int, lr: float, layers: int, epochs: int, state: TrialState = TrialState.PRUNED) -> Ending:
        params = {"optimizer.name": "adamw", "optimizer.lr": lr, "model.mlp.layers": layers, "model.mlp.dropout": 0.0}
        return Ending(range(wrong), state, epochs, params=params)

    far = [ending(120, 0.09 - 0.01 * i, 1 + i % 2, 3) for i in range(1, 4)]
    early = [ending(180 - 175 * (i % 2), 1e-4 * 1.5**i, 3 if i % 2 else 1, 1) for i in range(10)]
    study = searched.search(home, [ending(110, 0.09, 1, 4, TrialState.COMPLETE), *far, *early])
    importances = report.importances(study, open_storage(home))
    assert next(iter(importances)) == "optimizer.lr"
    page = report_page(study, open_storage(home), {}, None)
    assert "on 14 trials; with so few it is a hint, not a finding" in page
    assert "Pruned ones count as worse than complete ones" in page
    for figure in ("history", "parallel", "f0", "f1"):  # f1: the layers, which one complete trial cannot show
        assert set(re.findall(rf'id="trial-{figure}-(\d+)"', page)) == {str(number) for number in range(14)}
    assert "A grey one is a pruned trial" in page
    assert "a ring is a pruned trial" in page


@pytest.mark.slow  # two processes
def test_importance_imports_no_scikit_learn_and_does_not_hide_it_from_others(home: Home) -> None:
    searched.search(home, many())
    assert not {"sklearn", "pandas"} & loaded_by("status", "toy", "--home", str(home.path))
    code = f"""
from pathlib import Path
from searchfm.home import Home
from searchfm.search.importance import importances
from searchfm.search.storage import load_study, open_storage
home = Home(Path({str(home.path)!r}))
storage = open_storage(home)
assert importances(load_study(storage, home, "toy"), storage)
import sys
assert "sklearn" not in sys.modules
import optuna
optuna.importance.FanovaImportanceEvaluator()  # raises without scikit-learn
"""
    assert "sklearn" in loaded(code)


def test_the_most_confused_come_first_with_their_most_probable_mistakes() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.array(
        [[0.4, 0.6, 0], [0.1, 0.9, 0], [0.9, 0.1, 0], [0.8, 0.2, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32
    )
    first, second = report.confused(Predictions(np.arange(6), labels, probabilities))
    assert (first.true, first.predicted, first.count, first.examples) == (0, 1, 2, (1, 0))
    assert first.fraction == pytest.approx(2 / 3)
    assert (second.true, second.predicted, second.examples) == (1, 0, (3,))


def test_images_are_those_of_the_data_and_of_no_other() -> None:
    fingerprint, indices, labels = searched.validation()
    config = DataConfig(name="digits")
    zero, one = (int(indices[np.flatnonzero(labels == digit)[0]]) for digit in (0, 1))
    shown = training_images(config, [one, zero], fingerprint, None)
    assert shown.shape == (2, 1, 8, 8)
    assert shown[0, 0, :, 3:5].sum() > shown[1, 0, :, 3:5].sum()  # a one is a stroke, a zero has a hole
    with pytest.raises(DataError, match="the data have changed since"):
        training_images(config, [one], "another", None)


# --- sentences --------------------------------------------------------------------------------------------------------


def test_a_search_alone_is_called_optimistic(home: Home) -> None:
    first, second = report.result_sentences(searched.search(home, [Ending(BEST), Ending(range(30))]))
    assert first.startswith("Trial 0: 95.28% of 212 validation images correct; 95% interval 91.54% to 97.42% (Wilson)")
    assert "best of 2 complete trials" in second
    assert len(report.result_sentences(searched.search(home, [Ending(BEST)], "one"))) == 1  # nothing was chosen


def test_a_final_model_is_described_by_its_test_and_the_readings_of_that_part(home: Home) -> None:
    study = searched.search(home, [Ending(BEST), Ending(range(30))])
    sentences = report.result_sentences(searched.retrained(home, study, range(30), winner=1, reads=3))
    assert sentences[0].startswith("90.00% of 300 test images correct; 95% interval 50.00% to 99.00% (Wilson)")
    assert "test part of these data had been read 3 times" in sentences[1]
    assert "configuration of trial 1" in sentences[2]
    assert "91.00% of the validation images correct in the search, 90.00% with 3 fresh seeds" in sentences[3]
    assert sentences[3].endswith(": the search was 1.00 points too optimistic.")
    assert "A further seed would give 88.00% to 92.00%" in sentences[4]
    assert "Trials 0, 1 cannot be distinguished" in sentences[5]


def test_the_tie_is_named_and_the_fastest_of_it(home: Home) -> None:
    study = searched.search(home, [Ending(range(60)), Ending(range(100, 112)), Ending(BEST)])
    text = report.tie(study, report.ranks(study))
    assert text.startswith(
        "As trained in the search, the top 2 are tied: 212 validation images cannot distinguish them"
    )
    assert "up to 0.94 points" in text
    assert "trial 1 trained fastest (12.0 s)" in text  # 3 s an epoch, trial 2 takes 4
    alone = searched.search(home, [Ending(BEST), Ending(range(60))], "alone")
    assert report.tie(alone, report.ranks(alone)).startswith("As trained in the search, the best trial differs")


def test_single_trainings_and_fresh_seeds_do_not_contradict_each_other(home: Home) -> None:
    """The winner is tied with a trial by fresh seeds, and differs from it as trained in the search."""
    study = searched.retrained(home, searched.search(home, [Ending(BEST), Ending(range(60))]), range(30))
    assert study.final is not None
    figures = [FinalistFigures(number, 0.9, (0.9, 0.91), 0.905, 1.0, (1, 2), 10, 10) for number in (0, 1)]
    study = replace(study, final=replace(study.final, finalists=tuple(figures)))
    text = report.tie(study, report.ranks(study))
    assert text.startswith("As trained in the search, the best trial differs from every other")
    assert text.endswith("with 3 fresh seeds, trials 0, 1 cannot be distinguished: that result counts more.")


@pytest.mark.parametrize(
    ("optimism", "seeds", "expected"),
    [
        (0.01, 3, ("too optimistic", "A further seed would give")),
        (-0.0247, 2, ("the search was 2.47 points too pessimistic", "2 seeds are too few for an interval")),
        (-0.00004, 3, ("with 3 fresh seeds: no difference.", "A further seed would give")),
    ],
)
def test_a_difference_that_rounds_away_and_an_interval_of_two_seeds_are_not_stated(
    home: Home, optimism: float, seeds: int, expected: tuple[str, str]
) -> None:
    final = searched.retrained(home, searched.search(home, [Ending(BEST)]), range(30)).final
    assert final is not None
    first, second, *_ = final_sentences(
        replace(final, optimism=optimism, plan=replace(final.plan, seeds=seeds), tie=())
    )["Validation"]
    assert expected[0] in first
    assert second.startswith(expected[1])


# --- the page ---------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """What a page fetches, and the pictures in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]


def rendered(home: Home, study: StudyRecord, folder: Path) -> tuple[str, Path]:
    text = report_page(study, open_storage(home), {"hardware": "2 x something"}, None)
    path = folder / "report.html"
    path.write_text(text, "utf-8")
    return text, path


@pytest.mark.slow
def test_the_page_opens_without_a_network_and_runs_no_foreign_script(home: Home, tmp_path: Path) -> None:
    classes = [*HOSTILE, "$\\bad{$", "日本", *searched.DIGITS[4:]]
    study = searched.search(home, many(), "hostile", question=f"Why? {HOSTILE[0]}", classes=classes)
    text, path = rendered(home, searched.retrained(home, study, range(30)), tmp_path)
    dom, console = searched.browse(path, tmp_path)
    assert console == []
    assert searched.cut(path, tmp_path, (360, 768, 1000)) == []
    assert "<title>hostile: report</title>" in dom  # no script changed it
    assert "&lt;img src=x onerror=" in text
    links = Elements(text).links
    assert [link for link in links if not link.startswith(("#", "data:image/png;base64,"))] == []
    shown = [link.partition(",")[2] for link in links if link.startswith("data:")]
    assert len(shown) > 10
    for picture in shown:
        Image.open(io.BytesIO(base64.b64decode(picture))).load()
    drawn = Image.open(tmp_path / "report.png").convert("RGB")
    blue = (np.abs(np.asarray(drawn).astype(int) - (31, 95, 168)) < 12).all(axis=2)
    assert blue.sum() > 5000  # bars, dots and lines of our own pictures


@pytest.mark.slow
def test_a_trial_under_the_pointer_is_highlighted_everywhere(home: Home, tmp_path: Path) -> None:
    text, path = rendered(home, searched.search(home, many()), tmp_path)
    moved = """<script>
        const { x, y, width, height } = document.getElementById("trial-ranking-0").getBoundingClientRect();
        const at = { clientX: x + width / 2, clientY: y + height / 2, bubbles: true };
        document.dispatchEvent(new PointerEvent("pointermove", at));
    </script></body>"""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(text)
    path.write_text(policy.sub("", text).replace("</body>", moved))
    dom, _ = searched.browse(path, tmp_path)
    lit = re.findall(r'<g id="(trial-[\w-]+)" class="lit"', dom)
    assert {"trial-history-0", "trial-ranking-0", "trial-parallel-0", "trial-progress-0"} <= set(lit)
    assert all(name.endswith("-0") for name in lit)
    assert len(re.findall(r'<tr data-trial="0" class="[^"]*lit', dom)) == 2
    tip = re.search(r'<div id="tip"[^>]*>([^<]*)</div>', dom)
    assert tip
    assert tip[1].startswith("trial 0: complete 92.92%\n")
    assert "lr = 0.1" in tip[1]


@pytest.mark.slow(seconds=2)
def test_a_final_models_errors_are_counted_on_the_test_part_but_shown_from_validation(home: Home) -> None:
    study = searched.retrained(home, searched.search(home, many()), range(30))
    text = report_page(study, open_storage(home), {}, None)
    assert "270 of 300 correct (90.00%)" in text
    assert "Predictions of the final model on the test part" in text
    assert "No test image is ever shown" in text
    assert text.count("<img ") == sum(len(pair.examples) for pair in held(study))


def held(study: StudyRecord) -> list[report.Confused]:
    predictions = Predictions.read(study.trials[0].folder)
    assert predictions is not None
    return report.confused(predictions)


def test_a_report_does_without_what_is_gone(home: Home) -> None:
    study = searched.search(home, [Ending(BEST, kept=False)], fingerprint="another")
    assert "no longer in its folder" in report_page(study, open_storage(home), {}, None)
    study = searched.search(home, [Ending(BEST)], "changed", fingerprint="another")
    text = report_page(study, open_storage(home), {}, None)
    assert "cannot be shown: data.name = &#34;digits&#34;: the data have changed" in text
    assert "predicted as" in text  # the pairs are listed all the same
    assert "<img" not in text


def test_a_sweep_of_one_key_is_named_as_one(home: Home) -> None:
    tables = {
        "model": {"name": "mlp", "mlp": {"layers": {"choice": [1, 2, 3]}}},
        "optimizer": {"name": "sgd"},
        "search": {"sampler": {"name": "grid"}, "pruner": {"name": "none"}},
    }
    endings = [Ending(range(10 * i), params={"model.mlp.layers": i}) for i in (1, 2, 3)]
    text = report_page(searched.search(home, endings, tables=tables), open_storage(home), {}, None)
    assert "Nothing else was searched" in text
    assert "All choices at once" not in text  # one axis is no picture
    assert "trial-f0-2" in text
    assert "No trial was pruned" in text


def test_the_files_it_shows_are_the_study_and_the_trial_again(home: Home, tmp_path: Path) -> None:
    study = searched.search(home, [Ending(BEST), Ending(range(30))])
    text = report_page(study, open_storage(home), {}, None)
    for index, summary in enumerate(("config.toml of trial 0", "study.toml, with overrides and defaults")):
        shown = text.partition(f"<summary>{summary}</summary>\n<pre>")[2].partition("</pre>")[0]
        path = tmp_path / f"{index}.toml"
        path.write_text(unescape(shown))
        again = files.read(path).study()
        if index:
            assert (again.name, again.resolved) == (study.name, study.resolved)
        else:
            assert again.example.to_table() == study.trials[0].config


def test_no_complete_trial_is_refused(home: Home) -> None:
    study = searched.search(home, [Ending(state=TrialState.PRUNED), Ending(state=TrialState.FAIL)])
    with pytest.raises(StudyError, match="'toy' has no complete trial to report on: 1 pruned, 1 failed, 0 running"):
        report_page(study, open_storage(home), {}, None)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "compare"])
def test_an_unknown_study_is_one_line(
    command: str, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searched.search(home, [Ending(BEST)])
    monkeypatch.setattr(sys, "argv", ["searchfm", command, "nobody", "--home", str(home.path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert printed.err == f"searchfm: study 'nobody' is not in {home.path}; there are toy\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, which SQLAlchemy warns of
def test_the_whole_story_on_digits(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    options = ("--home", str(home.path))
    searched.search(home, [Ending(BEST)])
    asked = ("--dataset", "digits", "--epochs", "3", "--trials", "6", "--workers", "2")
    done = searchfm_here("tune", "mlp", *asked, *options)
    assert done.returncode == 0, done.stderr
    away = searchfm_here("report", "mlp", *options, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert (away.returncode, away.stderr.count("\n")) == (1, 1)
    assert away.stdout.strip() == str(home.study("mlp") / "report.html")  # the page is there all the same
    done = searchfm_here("retrain", "mlp", "--top", "2", "--seeds", "2", *options)
    assert done.returncode == 0, done.stderr
    done = searchfm_here("report", "mlp", *options, "--output", str(tmp_path / "mlp.html"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'mlp.html'}\n", "")
    done = searchfm_here("compare", "mlp", "toy", "--json", *options)
    assert done.returncode == 0, done.stderr
    tested, searched_only = json.loads(done.stdout)
    assert (tested["split"], searched_only["split"]) == ("test", "validation")

    text = (tmp_path / "mlp.html").read_text("utf-8")
    assert f"{tested['accuracy']:.2%} of 384 test images correct" in text
    assert "<th>hardware</th>" in text  # what MLflow knows of the search
    assert "<img " in text
    dom, console = searched.browse(tmp_path / "mlp.html", tmp_path)
    assert console == []
    assert "What it gets wrong" in dom

    study = load_study(open_storage(home), home, "mlp")
    client, parent = connect(home), run_links(home, study).parent
    assert parent is not None
    (item,) = [item for item in client.list_artifacts(parent) if item.path == "report.html"]
    assert Path(client.download_artifacts(parent, item.path, str(tmp_path))).read_text("utf-8") == text

    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    for words in (
        ["report", "mlp"],
        ["compare", "mlp", "toy"],
        ["models"],
        ["predict", "mlp", str(tmp_path / "black.png")],
    ):
        modules = loaded_by(*words, *options)
        assert "searchfm.tracking.rows" in modules
        assert not {"mlflow", "pandas", "triton"} & modules, words


@pytest.mark.slow(seconds=2)
def test_of_many_trials_the_best_and_others_at_even_distances_are_shown(home: Home, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "DRAWN", 6)
    study = searched.search(home, many())
    shown = [trial.number for trial in report.drawn(study, study.trials[4])]
    assert len(shown) == 6
    assert {0, 1, 4} <= set(shown)  # the best third, and the chosen one
    assert max(shown) > 10
    text = report_page(study, open_storage(home), {}, None)
    assert "Figures and tables show 6 of the 17 trials" in text
    assert "6 of 17 trials" in text
    rows = re.findall(r'<tr data-trial="(\d+)"', text[text.index('id="trials"') :])
    assert len(rows) == 6
