"""A study from open to close, and the checks before anything is written. Real training on digits."""

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import tomli_w

from searchfm.engines import EngineOptions
from searchfm.engines.local import LocalEngine, choose_devices, default_workers
from searchfm.errors import ConfigError, DataError, LockedError, StudyError, UserError
from searchfm.events import StudyOpened, TrialEnded
from searchfm.forecast import reserve
from searchfm.home import Home
from searchfm.records import DEFAULT, ORIGIN, StudyHeader, StudyRecord
from searchfm.search.lock import study_lock
from searchfm.search.storage import open_storage, write_record
from searchfm.stopping import StopRequest
from searchfm.tables import digest
from searchfm.tuning import Tuning, find_study, reserving
from tests import rows
from tests.driving import facts, let_go, stored
from tests.learn.test_images import noise, small, write

pytestmark = pytest.mark.usefixtures("own_forkserver")

TABLE: dict[str, Any] = {
    "search": {"trials": 2, "pruner": "none"},
    "data": {"name": "digits", "subset": 0.2},
    "model": {"mlp": {"layers": 1, "width": {"choice": [8, 16, 32]}}},
    "optimizer": {"lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    "train": {"epochs": 2},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "tuning-cache"))


class Engines:
    """Makes local engines, and lists them."""

    def __init__(self, **options: Any) -> None:
        self.options = EngineOptions.from_table({"device": "cpu", "workers": 1, **options})
        self.started: list[LocalEngine] = []

    def __call__(self) -> LocalEngine:
        self.started.append(LocalEngine(options=self.options))
        return self.started[-1]


def file_of(home: Home) -> str:
    """The study file, beside the home."""
    path = home.path.with_name("toy.toml")
    path.write_text(f"# Question: which width?\n{tomli_w.dumps(TABLE)}")
    return str(path)


def tune(
    home: Home,
    overrides: Mapping[str, Any] | None = None,
    *,
    file: bool = True,
    engines: Engines | None = None,
    stopping: Any = lambda: False,
    **plan: Any,
) -> tuple[StudyRecord, list[Any]]:
    study, before, plain = find_study(file_of(home) if file else "toy", None, overrides or {}, home)
    options = {"stopping": stopping, "engine": engines or Engines(), "follow": False, **plan}
    tuning = Tuning(study, home, plain, before, **options)
    progress = [event for event in tuning.run() if event.kind not in ("phase", "opened")]
    result = tuning.result()
    let_go(tuning.storage)
    return result, progress


def test_a_study_starts_resumes_and_completes(home: Home) -> None:
    study, progress = tune(home, {"train.epochs": 1})
    check_trained(study, 2)
    assert study.data.shape == (1, 8, 8)
    assert study.question == "which width?"
    assert (study.resolved["train"]["epochs"], study.file["train"]["epochs"]) == (1, 2)
    assert [item.kind for item in progress] == ["started", "epoch", "ended"] * 2

    engines = Engines()
    again, progress = tune(home, engines=engines)
    assert facts(again) == facts(study)
    assert progress == []
    assert engines.started == []

    more, _ = tune(home, {"search.trials": 3}, file=False)  # a stored study needs no file
    check_trained(more, 3)
    assert facts(more)[:2] == facts(study)
    assert (more.uuid, more.planned, more.resolved["train"]["epochs"]) == (study.uuid, 3, 1)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with the study of TABLE, complete."""
    home = Home(tmp_path_factory.mktemp("begun") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "tuning-cache"))
        tune(home)
    return home


@pytest.fixture
def copied(begun: Home, home: Home) -> StudyRecord:
    """The study of `begun`, its home copied to `home`."""
    shutil.copytree(begun.path, home.path)
    return stored(home, "toy")


def check_trained(study: StudyRecord, trials: int) -> None:
    assert [(row.number, row.state) for row in study.trials] == [(i, "complete") for i in range(trials)]
    for row in study.trials:
        assert row.value == round(row.epochs[-1].val_accuracy or 0.0, 6)
        assert not list(row.folder.glob("attempt-*"))


@pytest.mark.slow
def test_a_dead_coordinators_trial_is_adopted_before_others_are_asked_for(home: Home) -> None:
    study, _ = tune(home, {"search.trials": 1})
    storage = open_storage(home)
    optuna.load_study(study_name="toy", storage=storage).ask()  # a coordinator that died right after
    let_go(storage)
    study, progress = tune(home, {"search.trials": 3})
    check_trained(study, 3)
    assert [(item.kind, item.trial) for item in progress if item.kind != "epoch"] == [
        *[("started", 1), ("ended", 1)],  # no worker had it
        *[("started", 2), ("ended", 2)],
    ]


def test_data_that_changed_since_are_refused_and_the_study_stays_as_it_was(copied: StudyRecord, home: Home) -> None:
    before = copied
    storage = open_storage(home)
    data = dataclasses.replace(before.data, fingerprint="another")
    header = StudyHeader.from_json(storage.get_study_system_attrs(before.number)["searchfm"])
    write_record(storage, before.number, dataclasses.replace(header, data=data))
    let_go(storage)
    with pytest.raises(DataError, match="digits: the data have changed since study 'toy' was begun; put them back"):
        tune(home, {"search.trials": 5})
    assert facts(stored(home, "toy")) == facts(before)
    assert stored(home, "toy").planned == 2


@pytest.mark.parametrize(
    ("overrides", "plan", "error", "message"),
    [
        ({"data.name": "no/such/folder"}, {}, ConfigError, "no/such/folder"),
        # Until then the tracking process has imported MLflow.
        ({}, {"engines": Engines(device="cuda:7"), "follow": True}, UserError, "--device cuda:7"),
        ({"model.name": "transfer", "model.transfer.model": "resnet0"}, {}, UserError, "resnet0"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    home: Home, overrides: dict[str, Any], plan: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tune(home, overrides, **plan)
    assert "\n" not in str(caught.value)
    assert not home.path.exists()
    commands = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [command for command in commands if "searchfm.tracking" in command]


@pytest.mark.slow
def test_images_of_different_sizes_get_one_size_that_the_study_keeps(home: Home, tmp_path: Path) -> None:
    root = small(tmp_path / "pets", count=20, side=20)
    write(root / "train" / "cat" / "wide.png", noise(0, 60, 90))
    overrides = {"data.name": str(root), "search.trials": 1, "train.epochs": 1}
    study, _ = tune(home, overrides)
    assert (study.resolved["data"]["size"], study.file["data"]["size"], study.data.shape) == (16, 0, (1, 16, 16))
    assert study.data.sides == (20, 90)
    assert study.digest == digest(study.resolved)
    assert study.trials[0].config["data"]["size"] == 16, "what a replay and the final training read"
    again, _ = tune(home, {**overrides, "search.trials": 2})
    assert (again.data, again.trials[1].state) == (study.data, "complete")
    with pytest.raises(ConfigError, match=r"data.size = 32: study 'toy' was begun with 16"):
        tune(home, {**overrides, "data.size": 32})
    other, _, _ = find_study(file_of(home), "other", {**overrides, "data.size": 0}, home)
    assert other.sized, "0 was asked for"


def test_a_stop_request_before_the_first_trial_leaves_nothing(home: Home) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(home, stopping=lambda: True)
    assert not home.path.exists()


@pytest.mark.usefixtures("copied")
def test_a_held_study_is_refused_before_any_worker_is_started(home: Home) -> None:
    engines = Engines()
    with study_lock(home, "toy"), pytest.raises(LockedError):
        tune(home, {"search.trials": 9}, engines=engines)
    assert engines.started == []


def test_trials_of_another_process_are_read_once_the_lock_is_held(copied: StudyRecord, home: Home) -> None:
    study, before, _ = find_study(file_of(home), None, {"search.trials": 3}, home)
    other, _ = tune(home, {"search.trials": 4})
    engines = Engines()
    tuning = Tuning(study, home, copied.file, before, engine=engines, follow=False)
    assert [event.kind for event in tuning.run()] == ["phase", "opened"]
    assert facts(tuning.result()) == facts(other)
    assert engines.started == []
    let_go(tuning.storage)


def test_opening_a_study_writes_nothing_and_refuses_unknown_and_invalid_names(home: Home) -> None:
    assert find_study(file_of(home), None, {}, home)[1] is None
    with pytest.raises(StudyError, match="study 'nothing': no such study file, and no study of that name in "):
        find_study("nothing", None, {}, home)
    for name in ("../../x", "a\0b", "<b>", "x" * 600):
        with pytest.raises(StudyError, match="must be letters"):
            find_study(file_of(home), name, {}, home)
    with pytest.raises(StudyError, match="must be letters"):
        find_study("", None, {}, home)
    with pytest.raises(ConfigError, match=r"train.epochs = 0"):
        find_study(file_of(home), None, {"train.epochs": 0}, home)
    assert not home.path.exists()


def test_a_default_of_an_earlier_version_stays_where_the_file_says_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_schedule(name: str) -> None:
        monkeypatch.setitem(TABLE, "schedule", {"name": name})

    with_schedule("constant")
    tune(home)
    monkeypatch.delitem(TABLE, "schedule")
    for trials in (3, 4):  # the file is stored anew each time
        study, _ = tune(home, {"search.trials": trials})
        assert study.trials[-1].config["schedule"]["name"] == "constant" == study.file["schedule"]["name"]
    assert find_study(file_of(home), "other", {}, home)[0].resolved["schedule"]["name"] == "cosine"
    with_schedule("constant")
    find_study(file_of(home), None, {}, home)
    for other in ("cosine", "step"):
        with_schedule(other)
        with pytest.raises(ConfigError, match=f'schedule.name = "{other}": study .toy. was begun with "constant"'):
            find_study(file_of(home), None, {}, home)


def test_a_study_that_began_with_another_schedule_needs_it_in_its_file(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, "schedule", {"name": "step"})
    tune(home)
    monkeypatch.delitem(TABLE, "schedule")
    with pytest.raises(ConfigError, match=r'schedule.name = "cosine": study .toy. was begun with "step"'):
        find_study(file_of(home), None, {}, home)


def test_another_name_makes_another_study(home: Home) -> None:
    study, before, _ = find_study(file_of(home), "other", {}, home)
    assert (study.name, before) == ("other", None)


# --- devices ----------------------------------------------------------------------------------------------------------


def options(device: str, workers: int | None = None, per_gpu: Any = 1) -> EngineOptions:
    return EngineOptions.from_table({"device": device, "workers": workers, "workers_per_gpu": per_gpu})


NONE, GPUS, MAC = {"cuda": 0, "mps": 0}, {"cuda": 2, "mps": 0}, {"cuda": 0, "mps": 1}


@pytest.mark.parametrize(
    ("device", "workers", "accelerators", "expected"),
    [
        ("auto", 3, NONE, ["cpu"] * 3),
        ("auto", None, NONE, ["cpu"] * default_workers()),
        ("cpu", 2, GPUS, ["cpu"] * 2),
        ("auto", None, GPUS, ["cuda:0", "cuda:1"]),
        ("cuda", 3, GPUS, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", None, GPUS, ["cuda:1"]),
        ("cuda:1", 2, GPUS, ["cuda:1"] * 2),
        ("auto", None, MAC, ["mps"]),
        ("mps", 2, MAC, ["mps"] * 2),
    ],
)
def test_workers_are_spread_over_the_devices(
    device: str, workers: int | None, accelerators: dict[str, int], expected: list[str]
) -> None:
    assert choose_devices(options(device, workers), accelerators) == expected


def test_several_workers_share_each_gpu() -> None:
    assert choose_devices(options("auto", None, 2), GPUS) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert choose_devices(options("cuda:1", None, 3), GPUS) == ["cuda:1"] * 3
    assert choose_devices(options("auto", None, "auto"), GPUS) == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match=r"^--workers-per-gpu 2: the device is cpu, must be a GPU$"):
        choose_devices(options("cpu", None, 2), GPUS)


@pytest.mark.parametrize(
    ("device", "accelerators", "may_be"),
    [
        ("cuda", NONE, "auto, cpu"),
        ("mps", GPUS, "auto, cpu, cuda, cuda:0, cuda:1"),
        ("gpu", GPUS, "auto, cpu, cuda, cuda:0, cuda:1"),
        ("cuda:2", GPUS, "auto, cpu, cuda, cuda:0, cuda:1"),
        ("cuda:x", GPUS, "auto, cpu, cuda, cuda:0, cuda:1"),
        ("cpu:1", NONE, "auto, cpu"),
        ("", NONE, "auto, cpu"),
        ("cuda", MAC, "auto, cpu, mps"),
    ],
)
def test_an_unavailable_device_is_refused_with_the_available_ones(
    device: str, accelerators: dict[str, int], may_be: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_devices(options(device), accelerators)
    assert str(caught.value) == f"--device {device}: torch finds no such device here; may be {may_be}"


def test_with_a_final_training_to_follow_a_search_leaves_it_time_from_its_first_complete_trial_on(home: Home) -> None:
    study, stop, timeout = rows.begin(home), StopRequest(), 3600.0
    ended = [
        rows.trial(number=number, state=state, value=value, epochs=rows.epochs(number, 3))
        for number, (state, value) in enumerate([("pruned", None), ("complete", 0.8), ("complete", 0.9)])
    ]
    opened = StudyOpened(study, 3, ("cpu", "cpu"))
    events = reserving(iter([opened, *(TrialEnded(trial.number, trial) for trial in ended)]), stop, timeout)
    left = [(event.kind, stop.reserve) for event in events]
    first, both = (dataclasses.replace(study, trials=tuple(ended[:count])) for count in (2, 3))
    assert left == [
        ("opened", 0.0),
        ("ended", 0.0),
        ("ended", reserve(first, 2, timeout, math.inf)),
        ("ended", reserve(both, 2, timeout, math.inf)),
    ]
    assert 0 < reserve(first, 2, timeout, math.inf) < reserve(both, 2, timeout, math.inf)


def test_the_time_left_for_the_final_training_includes_the_default_that_ended_late(home: Home) -> None:
    begun, stop, timeout = rows.begin(home), StopRequest(), 3600.0
    study = dataclasses.replace(begun, resolved={**begun.resolved, "first": [{ORIGIN: DEFAULT}]})
    values = (0.1, 0.8, 0.9, 0.7, 0.6)
    trials = [
        rows.trial(number=number, value=value, epochs=rows.epochs(number, 3), digest=f"{number}")
        for number, value in enumerate(values)
    ]
    opened = StudyOpened(study, len(trials), ("cpu", "cpu"))
    late = [*trials[1:], trials[0]]
    list(reserving(iter([opened, *(TrialEnded(trial.number, trial) for trial in late)]), stop, timeout))
    whole = dataclasses.replace(study, trials=tuple(trials))
    assert whole.default == 0
    assert (
        stop.reserve
        == reserve(whole, 2, timeout, math.inf)
        > reserve(dataclasses.replace(begun, trials=tuple(trials)), 2, timeout, math.inf)
    )
