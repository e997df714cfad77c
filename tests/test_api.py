"""The Python API on real parts: digits, real workers, scripts and a notebook as people write them."""

import asyncio
import importlib.util
import inspect
import multiprocessing.spawn
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import searchfm
import searchfm.tuning  # a module beside the function `tune`
from searchfm.errors import ConfigError, DataError, OutOfTimeError, StudyError, UserError
from searchfm.home import Home
from searchfm.learn import export
from searchfm.records import TestFigures
from searchfm.show.report import FIGURES
from tests.driving import facts, without_following

FUNCTIONS = ("tune", "iter_tune", "retrain", "iter_retrain", "open_study", "load_model")
TINY: dict[str, Any] = {"dataset": "digits", "epochs": 1, "workers": 1, "device": "cpu"}
ROOT = Path(searchfm.__file__).parents[1]


@pytest.fixture(scope="module")
def tuned(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> searchfm.OpenStudy:
    """The study `mlp`, three trials on digits."""
    home = new_home(tmp_path_factory.mktemp("api") / "home")
    with without_following():
        return searchfm.tune("mlp", trials=3, home=home.path, progress=False, **TINY)


@pytest.fixture
def study(tuned: searchfm.OpenStudy) -> searchfm.OpenStudy:
    return tuned


# --- the package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_but_the_standard_library() -> None:
    code = "import sys, searchfm; dir(searchfm); print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
                            capture_output=True, text=True, check=True, timeout=300).stdout.split()  # fmt: skip
    ours = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert ours == {"searchfm"}


def test_every_public_name_is_there_and_documented() -> None:
    for name in searchfm.__all__:
        value = getattr(searchfm, name)
        document = value.__doc__ if callable(value) else "an alias of types"
        assert not (document or f"{name}(").startswith(f"{name}("), name  # as of a dataclass without one
    assert set(searchfm.__all__) <= set(dir(searchfm))
    with pytest.raises(AttributeError, match="module 'searchfm' has no attribute 'load'"):
        searchfm.load  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_module_has_the_name_of_a_public_function(name: str) -> None:
    assert importlib.util.find_spec(f"searchfm.{name}") is None
    assert inspect.isfunction(getattr(searchfm, name))


# --- a search ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_tune_twice_in_a_row_trains_once_also_in_an_event_loop(
    study: searchfm.OpenStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async def main() -> searchfm.OpenStudy:
        return searchfm.tune("mlp", trials=3, home=study.home, **TINY)

    again = asyncio.run(main())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert facts(again.record) == facts(study.record)
    assert again.ended is not None
    assert (again.ended.trials, again.ended.missing, again.ended.stopped) == (3, 0, "")
    assert "mlp: 3 trials on digits" in capfd.readouterr().out
    assert facts(searchfm.open_study("mlp", home=study.home).record) == facts(study.record)


def test_the_study_is_at_hand(study: searchfm.OpenStudy) -> None:
    best = max(study.trials, key=lambda trial: trial.value or 0.0)
    assert (study.best.number, study.best.value, study.best.params) == (best.number, best.value, best.params)
    assert repr(study) == f"<searchfm study 'mlp': 3 trials (3 complete), best {best.value:.4f} (trial {best.number})>"
    assert "<table" in study._repr_html_()
    assert study.optuna.best_trial.number == best.number
    assert (study.name, study.final, study.folder) == ("mlp", None, study.home / "studies" / "mlp")
    assert study.refresh() is study


def test_the_trials_are_a_table_with_a_column_a_key(study: searchfm.OpenStudy) -> None:
    table = study.trials_dataframe()
    assert list(table.index) == [0, 1, 2]
    assert list(table["value"]) == [trial.value for trial in study.trials]
    assert list(table["optimizer.lr"]) == [trial.params["optimizer.lr"] for trial in study.trials]
    assert str(table["started"].dtype).startswith("datetime64")
    assert (table["seconds"] > 0).all()


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_are_those_of_the_report(study: searchfm.OpenStudy, kind: Any) -> None:
    if kind in ("importance", "survival"):  # of ten trials, and of pruned ones
        with pytest.raises(StudyError, match="its trials do not suffice"):
            study.figure(kind)
    else:
        assert study.figure(kind).axes


def test_a_figure_is_of_the_key_or_trial_that_is_named(study: searchfm.OpenStudy) -> None:
    assert study.figure("slice", key="optimizer.lr").axes[0].get_xscale() == "log"
    assert study.figure("curves", trial=1).axes
    for wrong in ({"kind": "pie"}, {"kind": "slice", "key": "lr"}, {"kind": "curves", "trial": 3}):
        with pytest.raises(UserError, match=str(list(wrong.values())[-1])):
            study.figure(**wrong)  # type: ignore[arg-type]


def test_a_table_is_a_study_of_its_own_name(study: searchfm.OpenStudy) -> None:
    table = {"model": {"name": "mlp"}, "optimizer": {"lr": {"low": 0.1, "high": 0.01}}}
    with pytest.raises(ConfigError, match="name is missing: a study that is a table needs one"):
        searchfm.tune(table, home=study.home, progress=False)
    with pytest.raises(ConfigError, match=r"^study 'own': optimizer.lr .* low must not be above high"):
        searchfm.tune(table, name="own", home=study.home, progress=False)
    assert not (study.home / "studies" / "own").exists()


@pytest.mark.parametrize("value", [{"optimizer.lr": 0.1}, ["optimizer.lr=0.1"], "optimizer.lr=0.1"])
def test_other_keys_come_as_a_dict_or_as_texts(study: searchfm.OpenStudy, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.1: study 'mlp' was begun with"):
        searchfm.tune("mlp", set=value, home=study.home, progress=False, **TINY)


@pytest.mark.usefixtures("unfollowed")
def test_events_come_in_order_and_a_closed_search_resumes(study: searchfm.OpenStudy) -> None:
    asked: dict[str, Any] = {"trials": 5, "home": study.home, **TINY}
    kinds = []
    with closing(searchfm.iter_tune("mlp", **asked)) as events:
        for event in events:
            kinds.append(event.kind)
            if isinstance(event, searchfm.TrialStarted):
                break
    assert kinds[:2] == ["phase", "study"], "something is said before anything heavy is imported"
    assert kinds[-2:] == ["opened", "started"]
    left = study.refresh().record.of("running")
    assert [trial.number for trial in left] == [3]

    events = [*searchfm.iter_tune("mlp", **asked)]
    started = [event for event in events if isinstance(event, searchfm.TrialStarted)]
    assert [(event.trial, event.kind) for event in started] == [(3, "adopted"), (4, "started")]
    end = events[-1]
    assert isinstance(end, searchfm.SearchEnded)
    assert [trial.state for trial in end.study.trials] == ["complete"] * 5
    assert (end.trials, end.exhausted, end.rule, end.stopped) == (5, False, "", "")
    assert {trial.planned_epochs for trial in end.study.trials} == {1}


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's own imports
def test_a_search_without_a_further_trial_keeps_its_final_model_whatever_the_timeout(study: searchfm.OpenStudy) -> None:
    asked: dict[str, Any] = {"trials": len(study.refresh().trials), "retrain": True, "home": study.home, **TINY}
    tuned = searchfm.tune("mlp", progress=False, **asked)
    assert tuned.final is not None
    assert [len(finalist.seeds) for finalist in tuned.final.finalists] == [3, 3, 3]
    assert searchfm.tune("mlp", progress=False, timeout=600, **asked).final == tuned.final


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_in_a_thread_a_function_that_says_stop_returns_the_study_as_it_stands(study: searchfm.OpenStudy) -> None:
    before = len(study.refresh().trials)
    reached = (study.folder / f"{before:04d}" / "epochs.csv").exists
    found: list[searchfm.OpenStudy] = []

    def search() -> None:
        found.append(searchfm.tune("mlp", trials=500, home=study.home, progress=False, stopping=reached, **TINY))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    (stopped,) = found
    assert stopped.ended is not None
    assert stopped.ended.stopped == "stopping"
    assert before < len(stopped.trials) < 500


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's own imports
def test_a_search_with_a_final_training_leaves_it_a_part_of_the_timeout(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = new_home(tmp_path / "home").path
    asked: dict[str, Any] = {"timeout": "20s", "retrain": True, "home": home, **TINY}
    events = [*searchfm.iter_tune("mlp", trials=500, **asked)]
    (end,) = [event for event in events if isinstance(event, searchfm.SearchEnded)]
    assert end.stopped == "timeout"
    after = [event for event in events[events.index(end) :] if isinstance(event, searchfm.Note)]
    left = re.match(r"([\d.]+) s left: .*; forecast \d", after[0].text)
    assert left, after[0].text
    assert float(left[1]) > 0
    assert isinstance(events[-1], searchfm.Retrained)
    final = events[-1].final
    assert (final.test.n, final.test.reads) == (384, 1)


def test_a_timeout_before_the_study_is_opened_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutOfTimeError, match="the timeout of 0 s was over before it was opened; nothing was begun"):
        searchfm.tune("mlp", timeout=0, home=tmp_path / "home", progress=False, **TINY)
    assert not (tmp_path / "home").exists()


def test_workers_are_not_sent_the_main_module_and_other_processes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    keys = {"init_main_from_name", "init_main_from_path"}
    assert not keys & multiprocessing.spawn.get_preparation_data("searchfm-cpu").keys()
    assert keys & multiprocessing.spawn.get_preparation_data("Process-1").keys()


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_predicts_arrays_files_and_pillow_images_alike(study: searchfm.OpenStudy, tmp_path: Path) -> None:
    model = searchfm.load_model(study.best.folder)
    assert (model.shape, model.classes) == ((1, 8, 8), tuple(map(str, range(10))))
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    expected = [row.top[0] for row in export.predict(export.load(study.best.folder), paths)]
    for given in (
        images,
        images[..., None],
        np.repeat(images[..., None], 3, axis=3),
        paths,
        [str(path) for path in paths],
        [Image.fromarray(image) for image in images],
        [paths[0], *images[1:]],
    ):
        classes, probabilities = predicted = model.predict(given)
        assert probabilities.dtype == np.float32
        assert probabilities.shape == (5, 10)
        assert list(zip(classes, probabilities.max(1), strict=True)) == expected
        assert [model.classes[label] for label in predicted.labels] == list(classes)
    assert model.predict(paths[0]).classes == (expected[0][0],), "one image is a batch of one"
    assert model.predict([]).probabilities.shape == (0, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8)), r"float64 \(8, 8\): must be uint8 \(H, W\) or \(H, W, C\)"),
        (np.zeros((8, 8), np.uint8), r"an array of \(8, 8\): must be \(N, H, W\) or \(N, H, W, C\)"),
        (np.zeros((2, 8, 8, 2), np.uint8), r"uint8 \(8, 8, 2\): must be"),
        ("no/such.png", "no/such.png: No such file"),
        ([None], "a NoneType: must be a path, a PIL image or an array"),
    ],
)
def test_what_is_no_image_is_named(study: searchfm.OpenStudy, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        searchfm.load_model(study.best.folder).predict(images)


def test_the_interval_of_the_test_part_is_a_pair() -> None:
    assert TestFigures(0.9, 0.85, 0.94, 100, 1, "").interval == (0.85, 0.94)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's own imports
def test_retraining_returns_the_record_and_its_model_predicts(study: searchfm.OpenStudy) -> None:
    final = searchfm.retrain(study, trial=0, workers=1, device="cpu", progress=False)
    assert final.test.interval[0] < final.test.accuracy < final.test.interval[1]
    assert study.refresh().final == final
    *_, last = searchfm.iter_retrain("mlp", home=study.home)
    assert last == searchfm.Retrained(final), "what is done is not done again"
    model = searchfm.load_model("mlp", home=study.home)
    assert model.predict(np.zeros((3, 8, 8), np.uint8)).probabilities.shape == (3, 10)
    assert repr(model) == "<searchfm model 'mlp': images 1x8x8, 10 classes>"


# --- scripts and notebooks --------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
import searchfm

print("this file runs")
home = Path(sys.argv[1])
def interrupt():  # once trials are complete: two workers train, and a fourth trial has an epoch
    while not (home / "studies" / "mlp" / "0003" / "epochs.csv").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
study = searchfm.tune("mlp", trials=500, dataset="digits", epochs=1, workers=2, home=home, progress=False)
print("stopped by", study.ended.stopped, "with", study.best.number >= 0 and len(study.trials) < 500)
study = searchfm.tune("mlp", trials=len(study.trials), home=home, workers=2, progress=False)
print("then", {trial.state for trial in study.trials} - {"pruned"})
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", pytest.param("stdin", marks=pytest.mark.nightly)])
def test_a_script_needs_no_guard_and_goes_on_after_ctrl_c(
    how: str, new_home: Callable[[Path], Home], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("figures", f"from {how}")
    home = new_home(tmp_path / "home").path
    (tmp_path / "script.py").write_text(SCRIPT)
    source = str(tmp_path / "script.py") if how == "file" else "-"
    text = SCRIPT if how == "stdin" else ""
    done = subprocess.run(
        [sys.executable, source, home], input=text, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["this file runs", "stopped by Ctrl-C with True", "then {'complete'}"]


@pytest.mark.slow
def test_the_notebook_runs(new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SEARCHFM_HOME", str(new_home(tmp_path / "home").path))
    notebook = nbformat.read(ROOT / "studies" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("trial 0" in output.get("text", "") for output in outputs), "progress is shown"
    assert any("image/png" in output.get("data", {}) for output in outputs), "and figures"


# --- the first line ---------------------------------------------------------------------------------------------------

UNTIL_HEAVY = """
import os, sys

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "optuna", "mlflow", "matplotlib", "sklearn"):
            os.write(1, b"<import>")
            os._exit(0)

sys.meta_path.insert(0, Heavy())
from searchfm.cli import main
sys.argv = ["searchfm", *sys.argv[1:]]
main()
"""
COMMANDS = {
    "compare": "mlp cnn",
    "dashboard": "",
    "export": "mlp",
    "models": "",
    "predict": "mlp image.png",
    "remove": "mlp",
    "report": "mlp",
    "retrain": "mlp",
    "status": "",
    "stop": "mlp",
    "studies": "mlp",
    "sync": "mlp",
    "trial": "mlp 0",
    "tune": "mlp",
}


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_something_before_it_imports_anything_heavy(command: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-c", UNTIL_HEAVY, command, *COMMANDS[command].split()]
    environment = {**os.environ, "TERM": "xterm", "SEARCHFM_HOME": str(tmp_path)}
    with subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while b"<import>" not in shown:
            try:
                shown += os.read(ours, 4096)
            except OSError:
                break
    os.close(ours)
    assert process.returncode == 0
    before, found, _ = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).partition("<import>")
    assert found
    assert re.search(r"\w+", before), f"{command}: nothing before {shown!r}"


@pytest.mark.parametrize(
    "command", ["status", "studies mlp", "trial mlp 0", pytest.param("tune mlp --json", marks=pytest.mark.slow)]
)
def test_where_a_program_reads_nothing_is_added(command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "SEARCHFM_HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", UNTIL_HEAVY, *command.split()]
    done = subprocess.run(arguments, env=environment, capture_output=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == (b"<import>", b"")
