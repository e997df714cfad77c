"""A study's precision from its first trial to its final model: chosen once, recorded, and kept elsewhere or refused."""

import json
import multiprocessing.forkserver
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from searchfm.engines import EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.errors import WorldError
from searchfm.home import STORAGE, TRACKING, Home
from searchfm.records import StudyHeader, StudyRecord
from searchfm.retraining import RetrainOptions, retrain
from searchfm.search.storage import load_study, open_storage, write_record
from searchfm.search.study import Study
from searchfm.tuning import Tuning
from tests.cpus import FEATURES

pytestmark = [
    pytest.mark.slow(seconds=20),
    pytest.mark.usefixtures("own_forkserver"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]

TABLE: dict[str, Any] = {
    "search": {"sampler": "random", "pruner": "none"},
    "data": {"name": "digits", "subset": 0.5},
    "model": {"name": "mlp", "mlp": {"layers": 1, "width": {"choice": [8, 16, 32, 64]}}},
    "train": {"epochs": 1},
}
ENGINE = partial(LocalEngine, warm="tests.cpus", options=EngineOptions.from_table({"device": "cpu", "workers": 2}))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the features of the CPU that later workers see."""

    def change(features: str) -> None:
        multiprocessing.forkserver._forkserver._stop()
        monkeypatch.setenv(FEATURES, features)

    yield change
    multiprocessing.forkserver._forkserver._stop()


def stored(home: Home) -> StudyRecord:
    return load_study(open_storage(home), home, "half")


def tune(home: Home, trials: int, begun: StudyRecord | None = None) -> StudyRecord:
    study = Study("half", {**TABLE, "search": {**TABLE["search"], "trials": trials}})
    for _ in Tuning(study, home, study.resolved, begun, engine=ENGINE, follow=False).run():
        pass
    return stored(home)


def precisions(study: StudyRecord) -> list[str]:
    return [trial.result.precision for trial in study.trials if trial.result and trial.twin is None]


def test_the_choice_is_recorded_and_a_cpu_without_it_is_refused(
    on_cpu: Callable[[str], None], new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (STORAGE, TRACKING):
        monkeypatch.delenv(name, raising=False)
    home = new_home(tmp_path / "home")
    on_cpu("avx512_bf16")
    study = tune(home, 2)
    assert (study.data.bfloat16, study.resolved["train"]["precision"]) == (("mlp",), "auto")
    assert set(precisions(study)) == {"bfloat16"}
    for _ in retrain(RetrainOptions(home, "half", top=1, seeds=2), lambda: False, ENGINE):
        pass
    kept = [*study.folder.glob("finalists/*/*.json"), *study.folder.glob("final/*.json")]
    results = [json.loads(path.read_text()).get("result", {}) for path in kept]
    assert [result["precision"] for result in results if "precision" in result] == ["bfloat16"] * 3

    # Begun by a version that made no choice: float32, on any CPU.
    copy = Home(shutil.copytree(home.path, tmp_path / "older"))
    study = stored(copy)
    header = {name: value for name, value in vars(study).items() if name in StudyHeader.__dataclass_fields__}
    data = study.data.to_json()
    del data["bfloat16"]
    older = StudyHeader(**{**header, "data": type(study.data).from_json(data)})
    write_record(open_storage(copy), study.number, older)
    study = tune(copy, 4, stored(copy))
    assert study.data.bfloat16 == ()
    assert set(precisions(study)[:2]) == {"bfloat16"}
    assert set(precisions(study)[2:]) == {"float32"}

    on_cpu("")
    with pytest.raises(WorldError) as refused:
        tune(home, 3, stored(home))
    assert str(refused.value).startswith("study 'half' trains mlp in bfloat16, and this CPU has no bfloat16 (avx512_bf")
    assert len(stored(home).trials) == 2
