"""The rows of the two reports: what is kept of them, and the pages that are generated from it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from searchfm.search import files, first
from tests.bench import deadline
from tests.reports import hours, page, pictures
from tests.reports.results import Result, Run
from tests.reports.rows import RESULTS, ROWS, STUDIES, studies

ROOT = Path(__file__).parents[1]
KEPT = sorted(path.stem for path in RESULTS.glob("*.json"))


def result(row: str) -> Result:
    loaded = Result.load(row)
    assert loaded is not None
    return loaded


def test_rows_name_studies() -> None:
    assert set(KEPT) <= set(ROWS) <= set(studies())


def test_headers_table_and_pictures_say_what_the_results_say() -> None:
    """`python -m tests.reports.page` writes them. Pictures are compared by their texts: paths depend on matplotlib."""
    stale = [path.name for path, text in page.pages() if path.suffix != ".svg" and path.read_text("utf-8") != text]
    assert stale == []
    drawn = {path: text for path, text in page.pages() if path.suffix == ".svg"}
    assert set(RESULTS.glob("*.svg")) == set(drawn)
    for path, text in drawn.items():
        assert page.texts(path.read_text("utf-8")) == page.texts(text), path.name


@pytest.mark.parametrize("row", KEPT)
def test_a_row_was_trained_as_its_study_says(row: str) -> None:
    kept = result(row)
    assert kept.settings == ROWS[row].settings
    assert {run.study_seed for run in kept.runs} <= set(ROWS[row].seeds)
    study = files.read(STUDIES / "reports" / f"{row}.toml").study(kept.settings)
    for run in kept.runs:
        config = study.config(run.params).to_table()
        del run.config["train"]["seed"]
        assert config == run.config, run.key
        epochs = run.config["train"]["epochs"]
        assert {len(curve) for curve in run.epochs.values()} == {epochs}
        assert run.value == run.epochs["val_accuracy"][-1]


def test_the_figures_of_a_row_are_those_of_its_runs() -> None:
    """By hand: three seeds of one point, and a grid of two."""
    some = next(run for row in KEPT for run in result(row).runs)

    def run(seed: int, value: float, **params: int) -> Run:
        curves = {"train_loss": [0.9, 0.25], "train_accuracy": [0.5, 0.9], "val_loss": [0.8, 0.5]}
        curves["val_accuracy"] = [value, value]
        return Run(**{**some.__dict__, "study_seed": seed, "value": value, "params": params, "epochs": curves})

    seeds = Result("b1-mlp-tr1", {}, [run(seed, value) for seed, value in enumerate((0.88, 0.89, 0.90))])
    assert page.figures_of(seeds) == (
        "accuracy 89.00 ± 1.00 on validation, 90.00 ± 0.00 on training; loss 0.50 and 0.25"
    )
    grid = Result("b1-mlp-tr1", {}, [run(0, 0.5, **{"train.batch_size": 32}), run(0, 0.75, **{"train.batch_size": 64})])
    assert page.figures_of(grid) == (
        "batch_size 32: 50.00 on validation, 90.00 on training; batch_size 64: 75.00 on validation, 90.00 on training"
    )
    assert {"batch_size 32", "batch_size 64"} <= set(page.texts(pictures.draw(grid)["b1-mlp-tr1.svg"]))


@pytest.mark.parametrize("kept", list(hours.kept()), ids=lambda hour: f"{hour.name}-{hour.seed}")
def test_a_search_by_the_clock_found_what_its_study_holds(
    kept: hours.Hour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = hours.SEARCHES[kept.name]
    assert kept.seed in search.seeds
    monkeypatch.chdir(tmp_path)
    for name in hours.FILES:
        Path(name).touch()  # a study's file must be there; its content is not looked at
    study = files.read(STUDIES / f"{search.study}.toml").study(search.settings)
    text = json.dumps(kept.config)
    for name in hours.FILES:  # a study has a file's whole path
        text = text.replace(json.dumps(name), json.dumps(str(Path(name).absolute())))
    study.add_known(first.config(json.loads(text)), kept.name, strict=True)  # raises ConfigError for another value


def test_the_front_page_has_a_line_for_all_seeds_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    some = next(hours.kept())

    def hour(name: str, seed: int, test: float, date: str) -> hours.Hour:
        command = f"searchfm tune {name} --retrain" + (f" --seed {seed}" if seed else "")
        changes = {"name": name, "seed": seed, "test": test, "low": 0.9, "high": 0.96, "trials": 7 + seed, "date": date}
        return hours.Hour(**{**some.__dict__, **changes, "command": command, "hardware": "2 cores"})

    found = [hour("cnn", 0, 0.94, "2026-01-01"), hour("cnn", 1, 0.95, "2026-01-02"), hour("mlp", 0, 0.91, "2026-01-02")]
    monkeypatch.setattr(page, "kept", lambda: found)
    torch = some.versions["torch"].partition("+")[0]
    assert list(page.front_lines()) == [
        "| `searchfm tune cnn --retrain` | **94.00** (90.00-96.00), **95.00** (90.00-96.00) | 7, 8 | "
        f"2026-01-01 and 2026-01-02, 2 cores, torch {torch} |",
        f"| `searchfm tune mlp --retrain` | **91.00** (90.00-96.00) | 7 | 2026-01-02, 2 cores, torch {torch} |",
    ]


SMALL = """
SMALL = {"data.name": "digits", "train.epochs": 2}
ROWS = {"b2-mlp-tr3-tr4": Row((0, 1), SMALL, retrain=True)}
"""


@pytest.mark.slow
def test_rows_are_trained_once_and_kept(tmp_path: Path) -> None:
    """In a copy, on digits: two seeds of a grid of two points, and a final model; then nothing is trained again."""
    for name in ("tests", "studies", ".github"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    with (tmp_path / "tests" / "reports" / "rows.py").open("a") as file:
        file.write(SMALL)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)

    def train() -> str:
        command = [sys.executable, "-m", "tests.reports"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert train().count("begins") == 2
    folder = tmp_path / "studies" / "reports" / "results"
    kept = json.loads((folder / "b2-mlp-tr3-tr4.json").read_text())
    grid = [(seed, {"train.batch_size": size}) for seed in (0, 1) for size in (32, 64)]
    assert [(run["study_seed"], run["params"]) for run in kept["runs"]] == grid
    images, tested = kept["runs"][0]["images"], sum(map(sum, kept["retrained"]["confusion"]))
    assert sum(images) + tested == 1797
    shown = (tmp_path / "studies" / "README.md").read_text()
    assert f"{images[0]:,} images to train, {images[1]} to validate; 2 epochs" in shown
    assert {path.name for path in folder.glob("*.svg")} == {"b2-mlp-tr3-tr4.svg", "b2-mlp-tr3-tr4-confusion.svg"}
    assert train() == ""


def test_the_table_of_equal_times_has_a_line_a_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "KEPT", tmp_path / "results" / "deadline.json")
    ours = "searchfm, final training"
    assert deadline.kept() == []
    assert list(deadline.lines([])) == ["| not yet measured | | | | | | |"]

    def keep(side: str, seed: int, test: float, trials: int, minutes: float = 10, hardware: str = "2 cores") -> None:
        finish = deadline.Finish(test, 0.9, trials, 601.2)
        deadline.keep(deadline.Measured(side, minutes, seed, finish, "abc", f"2026-01-0{seed + 1}", hardware))

    keep("Optuna", 0, 0.91, 7)
    keep(ours, 1, 0.94, 30)
    keep(ours, 0, 0.90, 20)
    keep(ours, 0, 0.92, 21)  # measured again
    keep(ours, 0, 0.95, 90, minutes=30)
    keep(ours, 0, 0.96, 99, hardware="8 cores")
    assert list(deadline.lines(deadline.kept())) == [
        "| 10, searchfm, final training | **93.00** | 92.00, 94.00 | 90.00 | 21, 30 | 601 | 2026-01-02, 2 cores |",
        "| 10, Optuna | **91.00** | 91.00 | 90.00 | 7 | 601 | 2026-01-01, 2 cores |",
        "| 10, searchfm, final training | **96.00** | 96.00 | 90.00 | 99 | 601 | 2026-01-01, 8 cores |",
        "| 30, searchfm, final training | **95.00** | 95.00 | 90.00 | 90 | 601 | 2026-01-01, 2 cores |",
    ]
