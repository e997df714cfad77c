"""The report: what it says is checked against figures made in another way, the page itself in a browser."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import searched
from optuna.trial import TrialState
from PIL import Image
from scipy.stats import binomtest
from searched import Told
from sklearn.metrics import precision_recall_fscore_support

from searchfm import cli
from searchfm.config import DataConfig
from searchfm.errors import DataError, StudyError
from searchfm.home import Home
from searchfm.learn.datasets import training_images
from searchfm.search import files
from searchfm.search.history import StudyRow
from searchfm.search.storage import load_study, open_storage
from searchfm.show import findings, page, words
from searchfm.show.report import report
from searchfm.tracking import run_links
from searchfm.tracking.client import connect

HOSTILE = ["</script><script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">"]
BEST = range(10)  # places that the best trial gets wrong


def many(count: int = 14) -> list[Told]:
    """Trials of which the learning rate alone decides, a pruned one, a failed one and a twin."""
    told = [
        Told(
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
    pruned = Told(wrong=range(90), state=TrialState.PRUNED, epochs=1)
    return [*told, pruned, Told(state=TrialState.FAIL, epochs=1), Told(wrong=range(5, 20), twin=0)]


# --- findings ---------------------------------------------------------------------------------------------------------


def test_trials_that_miss_other_images_are_a_tie_and_those_that_miss_more_are_not(home: Home) -> None:
    other, worse = range(40, 52), [*BEST, *range(60, 72)]
    study = searched.search(home, [Told(BEST), Told(other), Told(worse)])
    best, second, third = findings.ranks(study)
    assert (best.row.number, best.p, best.tied) == (0, None, True)
    assert (second.row.number, second.tied) == (1, True)  # 10 against 12: nothing
    assert (third.row.number, third.tied) == (2, False)  # the same misses and 12 more
    # Mid-p: the exact test, less half of what is exactly as likely. Twice, for two trials are compared (Holm).
    exact, point = binomtest(0, 12).pvalue, 2 * 0.5**12
    assert third.p == pytest.approx(2 * (exact - point / 2))
    assert third.low < third.row.value < third.high  # type: ignore[operator]


def test_pairing_tells_apart_what_intervals_cannot(home: Home) -> None:
    worse = range(17)
    paired = findings.ranks(searched.search(home, [Told(BEST), Told(worse)]))
    alone = findings.ranks(searched.search(home, [Told(BEST), Told(worse, kept=False)], "lost"))
    assert [rank.tied for rank in paired] == [True, False]
    assert [(rank.tied, rank.p) for rank in alone] == [(True, None), (True, None)]
    assert alone[1].high > alone[0].low


def test_twins_take_no_part_in_the_ranking(home: Home) -> None:
    study = searched.search(home, [Told(BEST), Told(BEST, twin=0)])
    assert [rank.row.number for rank in findings.ranks(study)] == [0]


def test_pruning_saved_what_pruned_trials_did_not_train(home: Home) -> None:
    pruned = Told(state=TrialState.PRUNED, epochs=1)
    failed, twin = Told(state=TrialState.FAIL, epochs=2), Told(BEST, twin=0)
    saved = findings.saved(searched.search(home, [Told(BEST), pruned, failed, twin]))
    assert (saved.epochs, saved.full) == (3, 8)
    assert saved.seconds == pytest.approx(3 * 3.0)  # trial 1 took 3 s an epoch
    assert saved.share == pytest.approx(3 / 8)


def test_what_decides_is_the_most_important(home: Home) -> None:
    study = searched.search(home, many())
    found = findings.importances(study, open_storage(home))
    assert next(iter(found)) == "optimizer.lr"
    assert sum(found.values()) == pytest.approx(1)


def test_importance_needs_enough_trials_and_says_so(home: Home) -> None:
    study = searched.search(home, many(9))  # the tenth complete one is a twin
    assert findings.importances(study, open_storage(home)) == {}
    assert "at least 10 complete trials; this study has 9" in words.importance(study, known=False)


def test_per_class_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 4, 200), rng.random((200, 6), dtype=np.float32)
    found = findings.per_class(findings.Predictions(labels, probabilities, np.arange(200)))
    columns = precision_recall_fscore_support(labels, probabilities.argmax(1), labels=range(6), zero_division=0)
    assert [one.precision for one in found] == pytest.approx(columns[0])
    assert [one.recall for one in found] == pytest.approx(columns[1])
    assert [one.n for one in found] == list(columns[3])


def test_the_most_confused_come_first_and_the_surest_mistakes_of_them() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.array(
        [[0.4, 0.6, 0], [0.1, 0.9, 0], [0.9, 0.1, 0], [0.8, 0.2, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32
    )
    first, second = findings.confused(findings.Predictions(labels, probabilities, np.arange(6)))
    assert (first.true, first.predicted, first.count, first.examples) == (0, 1, 2, (1, 0))
    assert first.share == pytest.approx(2 / 3)
    assert (second.true, second.predicted, second.examples) == (1, 0, (3,))


def test_images_are_those_of_the_data_and_of_no_other() -> None:
    fingerprint, indices, labels = searched.validation()
    config = DataConfig(name="digits")
    zero, one = (int(indices[np.flatnonzero(labels == digit)[0]]) for digit in (0, 1))
    found = training_images(config, [one, zero], fingerprint)
    assert found.shape == (2, 1, 8, 8)
    assert found[0, 0, :, 3:5].sum() > found[1, 0, :, 3:5].sum()  # a one is a stroke, a nought is a hole
    with pytest.raises(DataError, match="the data have changed since"):
        training_images(config, [one], "another")


# --- sentences --------------------------------------------------------------------------------------------------------


def test_a_search_alone_promises_nothing(home: Home) -> None:
    first, second = words.verdict(searched.search(home, [Told(BEST), Told(range(30))]))
    assert first.startswith("Trial 0 gets 95.28% of 212 validation images right (95% interval 91.54% to 97.42%")
    assert "best of 2 complete trials" in second
    assert len(words.verdict(searched.search(home, [Told(BEST)], "one"))) == 1  # nothing was chosen


def test_a_final_model_speaks_of_the_test_part_and_of_how_often_it_was_read(home: Home) -> None:
    study = searched.search(home, [Told(BEST), Told(range(30))])
    told = words.verdict(searched.retrained(home, study, range(30), winner=1, reads=3))
    assert told[0].startswith("The final model gets 90.00% of 300 test images right")
    assert "configuration of trial 1" in told[1]
    assert "read 3 times" in told[1]
    assert "88.00% to 92.00%" in told[2]
    assert "had said 91.00%, 1.00 points too much" in told[2]
    assert "Trials 0, 1 could not be told apart" in told[3]


def test_the_noise_floor_names_the_tie_and_the_cheapest_of_it(home: Home) -> None:
    study = searched.search(home, [Told(range(60)), Told(range(100, 112)), Told(BEST)])
    text = words.tie(study, findings.ranks(study))
    assert text.startswith("The top 2 are a tie: 212 validation images cannot tell them apart")
    assert "up to 0.94 points" in text
    assert "trial 1 trained fastest (12.0 s)" in text  # 3 s an epoch, trial 2 takes 4
    alone = searched.search(home, [Told(BEST), Told(range(60))], "alone")
    assert words.tie(alone, findings.ranks(alone)).startswith("The best trial stands alone")


# --- the page ---------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """What a page fetches, and the pictures in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]


def rendered(home: Home, study: StudyRow, folder: Path) -> tuple[str, Path]:
    text = report(study, open_storage(home), {"hardware": "2 x something"})
    path = folder / "report.html"
    page.write(path, text)
    return text, path


def test_the_page_opens_without_a_network_and_runs_no_foreign_script(home: Home, tmp_path: Path) -> None:
    classes = [*HOSTILE, "$\\bad{$", "日本", *searched.DIGITS[4:]]
    study = searched.search(home, many(), "hostile", question=f"Why? {HOSTILE[0]}", classes=classes)
    text, path = rendered(home, study, tmp_path)
    dom, console = searched.browse(path, tmp_path)
    assert console == []
    assert "<title>hostile: report</title>" in dom  # nobody else named it
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
def test_a_trial_under_the_pointer_is_lit_everywhere(home: Home, tmp_path: Path) -> None:
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


def test_a_final_models_errors_are_counted_on_the_test_part_but_shown_from_validation(home: Home) -> None:
    study = searched.retrained(home, searched.search(home, many()), range(30))
    text = report(study, open_storage(home), {})
    assert "270 of 300 right (90.00%)" in text
    assert "Answers of the final model on the test part" in text
    assert "No test image is ever shown" in text
    assert text.count("<img ") == sum(len(pair.examples) for pair in held(study))


def held(study: StudyRow) -> list[findings.Confused]:
    answers = findings.predictions(study.trials[0].folder)
    assert answers is not None
    return findings.confused(answers)


def test_a_report_does_without_what_is_gone(home: Home) -> None:
    study = searched.search(home, [Told(BEST, kept=False)], fingerprint="another")
    assert "no longer in its folder" in report(study, open_storage(home), {})
    study = searched.search(home, [Told(BEST)], "changed", fingerprint="another")
    text = report(study, open_storage(home), {})
    assert "cannot be shown here: data.name = &#34;digits&#34;: the data have changed" in text
    assert "taken for" in text  # the pairs are told all the same
    assert "<img" not in text


def test_a_sweep_of_one_key_is_named_as_one(home: Home) -> None:
    tables = {
        "model": {"name": "mlp", "mlp": {"layers": {"choice": [1, 2, 3]}}},
        "optimizer": {"name": "sgd"},
        "search": {"sampler": {"name": "grid"}, "pruner": {"name": "none"}},
    }
    told = [Told(range(10 * i), params={"model.mlp.layers": i}) for i in (1, 2, 3)]
    text = report(searched.search(home, told, tables=tables), open_storage(home), {})
    assert "Nothing else was searched" in text
    assert "All choices at once" not in text  # one axis is no picture
    assert "trial-f0-2" in text
    assert "No trial was pruned" in text


def test_the_files_it_shows_are_the_study_and_the_trial_again(home: Home, tmp_path: Path) -> None:
    study = searched.search(home, [Told(BEST), Told(range(30))])
    text = report(study, open_storage(home), {})
    for place, summary in enumerate(("config.toml of trial 0", "study.toml, with overrides and defaults")):
        shown = text.partition(f"<summary>{summary}</summary>\n<pre>")[2].partition("</pre>")[0]
        path = tmp_path / f"{place}.toml"
        path.write_text(unescape(shown))
        again = files.read(path).study()
        if place:
            assert (again.name, again.digest) == (study.name, study.digest)
        else:
            assert again.first.to_table() == study.trials[0].config


def test_no_complete_trial_is_refused(home: Home) -> None:
    study = searched.search(home, [Told(state=TrialState.PRUNED), Told(state=TrialState.FAIL)])
    with pytest.raises(StudyError, match="'toy' has no complete trial to report on: 1 pruned, 1 failed, 0 running"):
        report(study, open_storage(home), {})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "compare"])
def test_an_unknown_study_is_one_line(
    command: str, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searched.search(home, [Told(BEST)])
    monkeypatch.setattr(sys, "argv", ["searchfm", command, "nobody", "--home", str(home.path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    assert said.err == f"searchfm: study 'nobody' is not in {home.path}; there are toy\n"


def searchfm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "searchfm", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160", **environment},
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, which SQLAlchemy warns of
def test_the_whole_story_on_digits(home: Home, tmp_path: Path) -> None:
    place = ("--home", str(home.path))
    for study, trials in (("mlp", "12"), ("cnn", "3")):
        tiny = ("--dataset", "digits", "--epochs", "3", "--trials", trials, "--workers", "2")
        done = searchfm("tune", study, *tiny, *place)
        assert done.returncode == 0, done.stderr
    away = searchfm("report", "mlp", *place, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert (away.returncode, away.stderr.count("\n")) == (1, 1)
    assert away.stdout.strip() == str(home.study("mlp") / "report.html")  # the page is there all the same
    done = searchfm("retrain", "mlp", "--top", "2", "--seeds", "2", *place)
    assert done.returncode == 0, done.stderr
    done = searchfm("report", "mlp", *place, "--output", str(tmp_path / "mlp.html"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'mlp.html'}\n", "")
    done = searchfm("compare", "mlp", "cnn", "--json", *place)
    assert done.returncode == 0, done.stderr
    tested, searched_only = json.loads(done.stdout)
    assert (tested["split"], searched_only["split"]) == ("test", "validation")

    text = (tmp_path / "mlp.html").read_text("utf-8")
    assert f"The final model gets {tested['accuracy']:.2%} of 384 test images right" in text
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
