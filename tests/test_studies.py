"""The built-in study files: each has a question and a measurement, is in the table, and trains."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from searchfm import api, cli
from searchfm.home import Home, shipped, shipped_folder
from searchfm.learn.data import load
from searchfm.learn.train import Training
from searchfm.records import StudyRecord
from searchfm.search import files
from searchfm.search.space import leaves
from searchfm.tuning import Tuning
from tests.commands import searchfm_here
from tests.driving import let_go, local_engine
from tests.reports import page

SHIPPED = shipped()
SEARCHES = ["any", "cifar100-cnn", "cifar100-residual", "cnn", "mlp", "residual", "resnet", "vit"]
ROWS = [f"A{i}" for i in range(1, 11)] + [f"B{i}" for i in range(1, 8)]  # all that the two reports tried
# Every architecture, and a grid.
EACH_KIND = ["mlp", "cnn", "vit", "residual", pytest.param("resnet", marks=pytest.mark.slow), "reports/b1-mlp-tr1"]


def header(name: str) -> dict[str, str]:
    """The opening comment of a study file by keyword, continued lines joined."""
    path = files.find(name)
    assert path is not None
    return page.header(path)


def command(*arguments: str) -> str:
    """The output of `searchfm` with these arguments; it must succeed."""
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.stdout


# --- headers ----------------------------------------------------------------------------------------------------------


def test_all_the_searches_ship() -> None:
    assert [name for name in SHIPPED if not name.startswith("reports/")] == SEARCHES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_study_has_a_question_and_a_measurement(name: str) -> None:
    path = files.find(name)
    assert path is not None
    file, entries = files.read(path), header(name)
    study = file.study()
    assert study.name == path.stem
    assert (study.points is None) == (name in SEARCHES)
    assert file.question == entries["Question"]
    assert file.question.endswith("?")
    assert {"Run", "Measured"} <= set(entries) <= {"Question", "Run", "Reports", "Read as", "Measured", "Notes"}
    assert ("Reports" in entries) == name.startswith("reports/")
    assert re.search(r"\d\d\d\d-\d\d-\d\d|not yet measured: needs ", entries["Measured"]), "when, or why not"
    assert re.fullmatch(rf"searchfm tune {name}( --trials \d+)?", entries["Run"])


def test_names_are_unique() -> None:
    names = [Path(name).name for name in SHIPPED]
    assert len(set(names)) == len(names)


def table() -> dict[str, str]:
    """The rows of studies/README.md's table by their first cell."""
    text = (shipped_folder() / "README.md").read_text("utf-8")
    lines = re.findall(r"^\| *([AB]\d+[^|]*?) *\|(.*)\|$", text, re.MULTILINE)
    assert len({cell for cell, _ in lines}) == len(lines)
    return dict(lines)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_reports_has_a_study(row: str) -> None:
    lines = [line for cell, line in table().items() if cell.split()[0].rstrip(",") == row]
    assert lines
    for line in lines:
        study, theirs, ours, _, pictures = (cell.strip() for cell in line.split("|"))
        assert set(re.findall(r"reports/[\w-]+", study)) & set(SHIPPED), study
        assert theirs
        assert re.search(r"\d\.\d|not yet measured", ours), ours
        assert all((shipped_folder() / link).is_file() for link in re.findall(r"\]\((.+?)\)", pictures)), pictures


def test_the_table_names_all_studies_and_no_others() -> None:
    text = (shipped_folder() / "README.md").read_text("utf-8")
    assert set(re.findall(r"`(?:searchfm tune )?(reports/[\w-]+)`", text)) == set(SHIPPED) - set(SEARCHES)
    assert set(SEARCHES) <= set(re.findall(r"`([\w-]+)`", text))


@pytest.mark.parametrize("name", EACH_KIND)
def test_a_study_shows_its_space_and_what_a_trial_costs(name: str, tmp_path: Path) -> None:
    path = files.find(name)
    assert path is not None
    study = files.read(path).study()
    shown = command("studies", name)
    assert header(name)["Question"] in shown
    assert all(key in shown for key, _ in leaves(study.tree))
    points = "infinite" if name in SEARCHES else len(study.points or ())
    assert f"points: {points}; trials: {study.trials}" in shown
    assert re.search(r"cost of a trial: \d\S* .*parameters, \d\S* .*MFLOP a sample", shown)
    program, tune, argument, *flags = header(name)["Run"].split()
    trials = int(flags[1]) if flags else None
    assert (program, tune, flags[:1]) in (("searchfm", "tune", []), ("searchfm", "tune", ["--trials"]))
    assert api.find_plan(argument, Home(tmp_path), trials=trials)[0].name == study.name


# --- that they train --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def like_a_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_trial_trains(name: str) -> None:
    """One short trial on 41 digits of what the study asks for."""
    overrides: dict[str, Any] = {
        "data.name": "digits",
        "data.subset": 0.03,
        "data.validation": 0.03,
        "train.epochs": 1,
        "train.batch_size": 64,
    }
    if "cifar100" in name:
        overrides["data.size"] = 32  # B5 halves images five times
    if name == "vit":
        overrides["model.vit.patch_size"] = 4  # a patch of 7 pixels does not divide 8
    if "resnet" in name:
        overrides["model.transfer.weights"] = "none"
    path = files.find(name)
    assert path is not None
    (config,) = files.read(path).study(overrides).samples(1)
    (epoch,) = Training(config, load(config.data))
    assert epoch.val_accuracy is not None
    assert math.isfinite(epoch.train_loss)


def tuned(name: str, home: Home, overrides: Mapping[str, Any], rename: str) -> StudyRecord:
    """The study, tuned with the overrides by a coordinator and its worker; without MLflow."""
    path = files.find(name)
    assert path is not None
    study = files.read(path).study(overrides, name=rename)
    tuning = Tuning(study, home, study.resolved, None, engine=local_engine(1), follow=False)
    for _ in tuning.run():
        pass
    record = tuning.result()
    let_go(tuning.storage)
    return record


def write_digits(root: Path) -> Path:
    """scikit-learn's digits as CLASS/NUMBER.png."""
    source = load_digits()
    for number, (image, label) in enumerate(zip(source.images, source.target, strict=True)):
        path = root / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(path)
    return root


@pytest.mark.nightly
def test_a_folder_of_digits_gives_what_digits_give(
    home: Home, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The images are the same, so the accuracy is the same except for their order in training."""
    overrides = {"search.trials": 1, "search.pruner": "none", "train.epochs": 6}
    named = tuned("cnn", home, {**overrides, "data.name": "digits", "data.subset": 1.0}, "digits")
    root = write_digits(tmp_path / "images")
    folder = tuned("cnn", home, {**overrides, "data.name": str(root), "data.subset": 1.0}, "folder")
    assert dataclasses.replace(named.data, fingerprint="") == dataclasses.replace(folder.data, fingerprint="")
    assert named.best is not None
    assert folder.best is not None
    assert min(named.best.value or 0, folder.best.value or 0) > 0.95
    assert abs((named.best.value or 0) - (folder.best.value or 0)) < 0.02
    record_property("figures", f"{named.best.value:.4f} of the data set, {folder.best.value:.4f} of the folder")


def tune(home: Path, *arguments: str) -> dict[str, Any]:
    """`searchfm tune`."""
    done = searchfm_here("tune", *arguments, "--json", "--home", str(home))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def resnet18_weights(path: Path) -> Path:
    """A file of weights for timm's ResNet-18, as a user may have trained them."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("resnet18").state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
@pytest.mark.parametrize(
    "name",
    ["vit", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("resnet=FILE", "residual", "any"))],
)
def test_an_architecture_is_tuned_on_fashion_mnist(
    name: str, new_home: Callable[[Path], Home], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    study, _, weights = name.partition("=")
    options = []
    if weights:
        path = resnet18_weights(tmp_path / "resnet18.safetensors")
        options = ["--set", "model.transfer.model=resnet18", "--set", f"model.transfer.weights={path}"]
    options += ["--subset", "0.015", "--set", "data.validation=0.01", "--set", "train.batch_size=16", "--epochs", "1"]
    result = tune(new_home(tmp_path / "home").path, study, "--trials", "2", *options)
    assert result["study"] == study
    assert (result["trials"]["total"], result["trials"]["failed"]) == (2, 0)
    assert result["best"]["value"] > 0.2, "ten classes: better than chance"
    record_property("figures", f"best of two trials of an epoch: {result['best']['value']:.3f}")
