"""The command line: real training on digits, one line for every mistake."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from searchfm import __version__, api, cli, tuning
from searchfm.engines import DEFAULTS, EngineOptions
from searchfm.home import Home
from searchfm.search.lock import study_lock
from searchfm.search.storage import load_study, open_storage, read_study
from searchfm.search.study import Study
from searchfm.tables import flatten, walk
from tests.commands import searchfm, searchfm_here

TINY = ("--dataset", "digits", "--epochs", "2", "--workers", "1")


def tune(home: Path, *arguments: str) -> dict[str, Any]:
    done = searchfm_here("tune", *arguments, "--json", "--home", str(home))
    assert done.returncode == 0, done.stderr
    output: dict[str, Any] = json.loads(done.stdout)
    return output


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A home that `tune` made, with the study `mlp`: four trials on digits; and what the command printed."""
    path = tmp_path_factory.mktemp("cli") / "home"
    done = searchfm("tune", "mlp", "--trials", "4", *TINY, "--home", str(path))
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.fixture(scope="module")
def home(begun: tuple[Path, str]) -> Path:
    return begun[0]


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Runs the command in this process, checks for exit code 2 and one line, and returns the line."""
    monkeypatch.setattr(sys, "argv", ["searchfm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert message.count("\n") == 1
    return message


def test_without_a_terminal_output_is_plain_lines_with_the_next_commands(begun: tuple[Path, str]) -> None:
    output = begun[1]
    assert "4/4 trial" in output
    assert "best trials" in output
    assert re.search(r"^forecast \d.* on \d+ workers?; took \d", output, re.M)
    assert "searchfm dashboard mlp" in output
    assert "\x1b" not in output


def test_a_search_reports_its_trials_and_the_best(home: Path) -> None:
    (study,) = json.loads(searchfm("status", "--json", "--home", str(home)).stdout)
    assert study["study"] == "mlp"
    assert {"schema", "study", "trials", "running", "planned", "best", "seconds", "home", "data"} <= set(study)
    assert set(study["trials"]) == {"complete", "pruned", "failed", "total"}
    assert sum(study["trials"][state] for state in ("complete", "pruned", "failed")) == study["trials"]["total"] == 4
    assert study["best"]["value"] > 0.15, "ten classes: better than chance"
    assert "optimizer.lr" in study["best"]["params"]
    assert study["home"] == str(home)


@pytest.mark.slow
def test_status_lists_all_trials_by_a_key_and_follows_until_ctrl_c(home: Path) -> None:
    rows = searchfm_here("status", "mlp", "--all", "--sort", "number", "--home", str(home)).stdout
    assert [int(number) for number in re.findall(r"^ *(\d+) +(?:complete|pruned) ", rows, re.M)] == [0, 1, 2, 3]
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` turns it off
    code = f"{heeds}; from searchfm.cli import main; main()"
    command = [sys.executable, "-c", code, "status", "mlp", "--watch", "--home", str(home)]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        assert re.match(r"mlp: \d complete.* of 4; best 0\.\d+ ", watching.stdout.readline())
        watching.send_signal(signal.SIGINT)
        assert watching.wait(300) == 0
    finally:
        watching.kill()
        watching.communicate()


def test_every_key_of_an_engine_file_has_a_flag() -> None:
    command: Any = typer.main.get_command(cli.app)
    flags = [
        *("--engine", "slurm", "--workers", "3", "--workers-per-gpu", "2", "--device", "cuda", "--listen", "host:1"),
        *("--tls-cert", "/cert.pem", "--tls-key", "/key.pem", "--allow-code", "--partition", "gpu", "--gres", "gpu:2"),
        *("--time", "4:00:00", "--slurm-args", "--qos=low --mem=2G"),
    ]
    given: dict[str, Any] = {}
    for arguments in (flags, ["--engine", "ray", "--gpus-per-worker", "0.25", "--cpus-per-worker", "2"]):
        values = command.commands["retrain"].make_context("retrain", ["mlp", *arguments]).params
        named = cli._engine_options(
            **{name: values[name] for name in inspect.signature(cli._engine_options).parameters}
        )
        options = api._engine_options(more=named.pop("engine_options"), data_dir=Path("/data"), **named)
        given |= {
            key: value
            for key, value in flatten(options.to_table())
            if value != dict(flatten(DEFAULTS.to_table())).get(key)
        }
    assert given.pop("name") == "ray"
    assert given == {
        "workers": 3,
        "workers_per_gpu": 2,
        "device": "cuda",
        "listen": "host:1",
        "tls_cert": "/cert.pem",
        "tls_key": "/key.pem",
        "data_dir": "/data",
        "allow_code": True,
        "slurm.partition": "gpu",
        "slurm.gres": "gpu:2",
        "slurm.time": "4:00:00",
        "slurm.args": ["--qos=low", "--mem=2G"],
        "ray.gpus_per_worker": 0.25,
        "ray.cpus_per_worker": 2.0,
    }
    assert {f"engine.{key}" for key in given} | {"engine.name"} == {key for key, *_ in walk(EngineOptions, "engine.")}


def test_a_new_study_has_a_forecast_from_the_configs_of_its_first_trials(home: Path) -> None:
    record = read_study(Home(home), "mlp")
    assert record.forecast is not None
    assert record.forecast.trials == 4
    assert 0 < record.forecast.pruned <= record.forecast.seconds
    samples = Study("mlp", record.resolved).samples(4)
    assert [config.digest() for config in samples] == [trial.digest for trial in record.trials]


def test_a_trial_leaves_its_folder(home: Path) -> None:
    row = load_study(open_storage(Home(home)), Home(home), "mlp").best
    assert row is not None
    names = {path.name for path in row.folder.iterdir()}
    assert {"config.toml", "epochs.csv", "log.txt", "predictions.npz", "weights.safetensors", "model.json"} <= names
    assert not list(home.rglob("attempt-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_more_trials_leave_the_earlier_as_they_are(home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "studies").rglob("epochs.csv")}
    assert tune(home, "mlp", "--trials", "6", "--workers", "1")["trials"]["total"] == 6
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (home / "studies").rglob("epochs.csv")}.items()
    row = load_study(open_storage(Home(home)), Home(home), "mlp").trials[5]
    assert row.config["data"]["name"] == "digits", "overrides not given again are taken from the study"


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_the_same_command_trains_nothing(home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "studies").rglob("epochs.csv")}
    assert tune(home, "mlp", "--trials", "4", "--retry-failed", *TINY)["trials"]["total"] == len(before)
    assert {path: path.stat().st_mtime_ns for path in (home / "studies").rglob("epochs.csv")} == before


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_known_configurations_of_the_study_a_file_and_an_older_study_are_tried_first(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = read_study(Home(home), "mlp").ranked()
    best = next(trial for trial in ranked if trial.first is None)  # an equal configuration is not tried twice
    own = tmp_path / "own.toml"
    own.write_text("[[first]]\noptimizer.lr = 0.004\n")
    known = ("--first", str(own), "--warm-start", "mlp", "--name", "next", "--trials", "4", *TINY)
    done = searchfm_here("tune", "mlp", *known, "--home", str(home))
    assert done.returncode == 0, done.stderr
    numbers = ", ".join(rf"{trial.number} \({trial.value:.4f}\)" for trial in ranked)
    assert re.search(rf"^--warm-start mlp: trials {numbers} are tried first$", done.stdout, re.M)
    trials = read_study(Home(home), "next").trials
    origins = [trial.first for trial in trials]
    assert origins[:4] == ["study file", "study file", "file own.toml", f"trial {best.number} of mlp"]
    assert trials[2].config["optimizer"]["lr"] == 0.004
    assert trials[3].params == best.params
    page = searchfm_here("trial", "next", "2", "--home", str(home)).stdout
    assert "a known configuration (file own.toml)" in " ".join(page.split())
    own.write_text("[[first]]\noptimizer.lr = 0.005\n")
    message = refused(capsys, monkeypatch, "tune", "mlp", *known, "--home", str(home))
    assert "--first own.toml: study 'next' was begun without this configuration" in message
    other = ("tune", "mlp", "--name", "x", "--warm-start", "mpl", "--home", str(home))
    assert "did you mean" in refused(capsys, monkeypatch, *other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "3"), "train.epochs = 3: study 'mlp' was begun with 2"),
        (("--subset", "0.5"), "data.subset = 0.5: study 'mlp' was begun with 1.0"),
        (("--set", "optimizer.lr=0.1"), "optimizer.lr = 0.1: study 'mlp' was begun with { low = "),
        (("--dataset", "fashion-mnist"), "data.name = "),
    ],
)
def test_a_started_study_is_not_changed(
    home: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert message in refused(capsys, monkeypatch, "tune", "mlp", *arguments, "--home", str(home))


BROKEN = {
    "toml": ("[search\n", "is not TOML"),
    "unknown": ("[train]\nepoch = 3\n", "train.epoch is unknown here; may be one of: epochs"),
    "type": ('[optimizer]\nlr = "fast"\n', 'optimizer.lr = "fast": must be a number > 0'),
    "low": ("[optimizer]\nlr = { low = 0.1, high = 0.01 }\n", "low must not be above high"),
    "pair": (
        '[model]\nname = "vit"\n[model.vit]\nhidden_dim = 16\nheads = 3\n',
        "heads = 3 must divide hidden_dim = 16",
    ),
    "patch": ('[model]\nname = "vit"\n[model.vit]\npatch_size = 5\n', "patch_size = 5 must divide"),
    "sampler": ('[search]\nsampler = "magic"\n', 'must be one of "tpe", "random", "grid", "cmaes", "gp", "qmc"'),
    "grid": ('[search]\nsampler = "grid"\n[optimizer]\nlr = { low = 0.1, high = 1.0 }\n', "has no step"),
    "name": ('name = "../../x"\n', "study name"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_study_file_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = BROKEN[case]
    (tmp_path / "broken.toml").write_text(text)
    line = refused(capsys, monkeypatch, "tune", str(tmp_path / "broken.toml"), "--home", str(tmp_path / "home"))
    assert "broken.toml" in line
    assert message in line
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "nix"), "study 'nix': no such study file"),
        (("tune", "nix.toml"), "nix.toml: no such file"),
        (("tune", "mlp", "--set", "lr"), "must be KEY=VALUE"),
        (("tune", "mlp", "--set", "model.vit.heads=2"), "in a table that no trial of this study enters"),
        (("tune", "mlp", "--engine", "mist"), "--engine mist: must be"),
        (("tune", "mlp", "--name", "a/b"), "study name"),
        (("status", "mlp"), "holds no study yet"),
        (("sync", "mlp"), "holds no study yet"),
        (("dashboard",), "no study"),
        (("studies", "nix"), "study 'nix': no such study file; built-in are any, "),
        (("studies", "cn"), "did you mean cnn?"),
        (("tune", "cn"), "did you mean cnn?"),
        (("tune", "resnet18"), "for a timm model: searchfm tune resnet --set model.transfer.model=resnet18"),
        (("tune", "mlp", "--dataset", "digit", "--dry-run"), 'data.name = "digit": must be one of fashion-mnist'),
        (("tune", "mlp", "--dataset", "/no/such", "--dry-run"), 'data.name = "/no/such": must be one of'),
        (("tune", "mlp", "--set", "search.sampler=tpee"), 'command line: search.sampler.name = "tpee": must be'),
        (("tune", "mlp", "--set", "lr=0.1"), "did you mean optimizer.lr?"),
        (("data", "nix"), "must be one of fashion-mnist"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEARCHFM_HOME", str(tmp_path / "home"))
    assert message in refused(capsys, monkeypatch, *arguments)
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot write the home folder" in refused(capsys, monkeypatch, "tune", "mlp", "--home", "/proc/nowhere")


@pytest.mark.slow
def test_unreachable_data_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    done = searchfm(
        *("tune", "mlp", "--dataset", "mnist", "--home", str(tmp_path / "home")),
        SEARCHFM_CACHE=str(tmp_path / "cache"),
        SEARCHFM_MIRROR="http://127.0.0.1:9",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "mnist" in done.stderr
    assert not (tmp_path / "home").exists()


def test_an_unknown_data_set_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(capsys, monkeypatch, "tune", "mlp", "--dataset", "nix", "--home", str(tmp_path / "home"))
    assert 'data.name = "nix": must be one of fashion-mnist' in line
    assert not (tmp_path / "home").exists()


def test_a_study_held_by_another_is_refused_by_pid(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with study_lock(Home(home), "mlp"):
        line = refused(capsys, monkeypatch, "tune", "mlp", "--trials", "99", "--home", str(home))
    assert f"held by process {os.getpid()}" in line


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_config_toml_trains_the_same_trial_again(new_home: Callable[[Path], Home], home: Path, tmp_path: Path) -> None:
    row = load_study(open_storage(Home(home)), Home(home), "mlp").best
    assert row is not None
    output = tune(new_home(tmp_path / "new").path, str(row.folder / "config.toml"), "--workers", "1")
    assert output["study"] == f"mlp-{row.number:04d}"
    assert output["best"]["value"] == row.value


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_promotion_trains_the_best_to_their_ends_as_a_search_without_pauses_does(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = new_home(tmp_path / "home").path
    search = ("mlp", "--dataset", "digits", "--epochs", "3", "--trials", "8", "--workers", "2")
    settings = ("sampler=random", "pruner.name=asha", "pruner.promote=true", "pruner.reduction=2")
    plain = ("sampler=random", "pruner=none")
    paused, whole = (
        {trial["number"]: trial for trial in tune(home, *search, "--name", name, *options)["trial_list"]}
        for name, keys in (("paused", settings), ("whole", plain))
        for options in [[part for key in keys for part in ("--set", f"search.{key}")]]
    )
    assert {trial["state"] for trial in paused.values()} == {"complete", "pruned"}
    assert paused[0]["state"] == "complete", "the default of the study"
    others = [trial for trial in paused.values() if trial["state"] == "complete" and trial["number"]]
    assert others
    assert all(trial["attempts"] == 3 for trial in others)
    assert all(trial["value"] == whole[number]["value"] for number, trial in paused.items() if trial["value"])
    assert not list(home.glob("studies/paused/*/attempt-*"))


@pytest.mark.slow
def test_nothing_is_reported_at_the_end_of_a_process_that_counted_operations(tmp_path: Path) -> None:
    """Their counter imports triton, whose nanobind reports what the interpreter does not collect."""
    done = searchfm("studies", "mlp", SEARCHFM_CACHE=str(tmp_path))
    assert "MFLOP a sample" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_a_dry_run_forecasts_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DRY_RUN_SECONDS", 1.0)
    done = searchfm_here("tune", "cnn", "--dataset", "digits", "--dry-run", "--home", str(tmp_path / "home"))
    assert done.returncode == 0
    assert "model.cnn.filters.1" in done.stdout
    for line in (
        r"search +\d.* for 50 trials; with pruning \d",
        r"retrain +\d",
        r"memory +\d+ MB a worker",
        r"disk +\d",
    ):
        assert re.search(f"^{line}", done.stdout, re.M), line
    assert not (tmp_path / "home").exists()


def test_module_and_command_are_one() -> None:
    assert searchfm("--version").stdout.strip() == __version__


@pytest.mark.slow
def test_a_timeout_ends_the_command_with_0_before_all_trials(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    home = ("--home", str(new_home(tmp_path / "home").path))
    done = searchfm("tune", "mlp", "--trials", "500", *TINY, "--timeout", "20", *home)  # the clock is the process's
    assert done.returncode == 0, done.stderr
    assert "(--timeout); the same command resumes" in done.stdout
    (row,) = json.loads(searchfm_here("status", "--json", *home).stdout)
    assert 0 < row["trials"]["total"] < 500


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_a_built_in_study_runs_and_resumes_on_images_that_some_values_do_not_fit(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20), np.uint8)).save(path)
    arguments = ("tune", "vit", "--dataset", str(tmp_path / "images"), "--epochs", "2", "--workers", "1")
    home = ("--home", str(new_home(tmp_path / "home").path))
    begun = searchfm_here(*arguments, "--trials", "1", *home)
    assert begun.returncode == 0, begun.stderr
    assert "patch_size = 7 must divide the images' side of 20 pixels (1, 2, 4, 5, 10, 20): left out" in begun.stdout
    assert searchfm_here(*arguments, "--trials", "2", *home).returncode == 0
    study = load_study(open_storage(Home(tmp_path / "home")), Home(tmp_path / "home"), "vit")
    assert [trial.state for trial in study.trials] == ["complete"] * 2
    assert study.resolved["model"]["vit"]["patch_size"] == 4
