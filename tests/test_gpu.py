"""What needs an NVIDIA GPU: `uv run pytest -m gpu -n 0` on a machine that has one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from searchfm.config import Config
from searchfm.engines import EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.errors import Stopped, WorldError
from searchfm.forecast import TRIAL_SECONDS
from searchfm.home import Home
from searchfm.jobs import Context
from searchfm.learn import data, entries, graphs
from searchfm.learn.train import Training
from searchfm.search.study import Study
from searchfm.tuning import Tuning
from tests.driving import let_go
from tests.learn.test_train import CONFIGS
from tests.learn.toys import config, drain, losses
from tests.test_tuning import TABLE

pytestmark = pytest.mark.gpu
CNN = config("cnn", {"filters": 8}, augment={"crop": 1, "flip": 0.5}, train={"epochs": 3, "precision": "float32"})


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "gpu-cache"))
    monkeypatch.setenv(graphs.SWITCH, "1")


def close(one: list[Any], other: list[Any]) -> bool:
    """Whether two curves are equal but for the order of sums, which CUDA's kernels do not promise."""
    return all(math.isclose(a, b, abs_tol=0.02) for a, b in zip(sum(one, ()), sum(other, ()), strict=True))


def test_images_streamed_from_host_memory_train_as_those_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = data.load(CNN.data, device="cuda:0")
    monkeypatch.setattr(data, "RESIDENT", 0.0)
    streamed = data.load(CNN.data, device="cuda:0")
    assert (resident.train.images.device.type, streamed.train.images.device.type) == ("cuda", "cpu")
    curves = [losses(list(Training(CNN, part, device="cuda:0"))) for part in (resident, streamed)]
    assert close(*curves)


GRAPHS: dict[str, Config] = {
    **{name: chosen for name, chosen in CONFIGS.items() if name != "residual-adagrad"},
    "residual-sgd": config(
        "residual",
        {"stages": 2, "blocks": 1, "width": 8},
        optimizer={"name": "sgd", "lr": 0.02, "sgd": {"momentum": 0.9, "nesterov": True}},
        schedule={"name": "one-cycle"},
        augment={"crop": 1, "flip": 0.5},
    ),
    "vit": config("vit", {"patch_size": 4, "hidden_dim": 16, "layers": 2, "heads": 2, "dropout": 0.1}),
    "transfer": config("transfer", {"model": "test_resnet", "weights": "none", "tuned_blocks": 1, "layer_decay": 0.8}),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_recorded_steps_train_as_steps_that_are_not(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    table = GRAPHS[name].to_table()
    chosen = Config.from_table({**table, "train": {**table["train"], "precision": precision}})
    parts = data.load(chosen.data, device="cuda:0")
    curves, weights = [], []
    for recorded in (False, True):
        monkeypatch.setenv(graphs.SWITCH, str(int(recorded)))
        training = Training(chosen, parts, device="cuda:0")
        curves.append(losses(list(training)))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()]))
        for each in (training._recorded, training._recorded_val):
            assert (each is not None and each._replay is not None) == recorded
    assert close(*curves)
    apart = (weights[1] - weights[0]).norm() / weights[0].norm()
    # RMSProp's arithmetic is another one where learning rates are on the GPU.
    assert apart <= (0.005 if "rmsprop" in name else 1e-6)


def test_a_step_that_waits_for_the_gpu_is_not_recorded_and_runs_as_without() -> None:
    total, recorded = 0.0, graphs.Recorded[None](torch.cuda.Stream("cuda:0"))
    kept = torch.zeros((), device="cuda:0")

    def step(inputs: Tensor, targets: Tensor) -> None:
        nonlocal total
        total += inputs.sum().item()
        kept.add_(F.dropout(targets, 0.5).sum())

    torch.manual_seed(3)
    for value in range(8):
        recorded(step, torch.full((4,), value, device="cuda:0"), torch.ones(1000, device="cuda:0"))
    assert recorded._replay is None
    torch.manual_seed(3)
    assert total == 4 * sum(range(8))
    assert kept.item() == sum(F.dropout(torch.ones(1000, device="cuda:0"), 0.5).sum().item() for _ in range(8))


def test_a_recorded_training_gives_its_memory_back() -> None:
    wide = config("mlp", {"layers": 2, "width": 8192}, train={"epochs": 2})  # 1.1 GB with gradients and moments
    taken = []
    for _ in range(3):
        training = Training(wide, data.load(wide.data, device="cuda:0"), device="cuda:0")
        list(training)
        for each in (training._recorded, training._recorded_val):
            assert each
            assert each._replay
        del training, each
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert taken[2] <= taken[0] + 10**6  # torch 2.11 keeps 70 MB for each stream, 2.15 frees them with the graph


def test_recorded_steps_on_cached_features_train_as_steps_that_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    settings = {"model": "test_resnet", "weights": str(weights), "tuned_blocks": 0}
    chosen = config("transfer", settings, augment={"flip": 0.5})
    parts, curves = data.load(chosen.data, device="cuda:0"), []
    for recorded in (False, True):
        monkeypatch.setenv(graphs.SWITCH, str(int(recorded)))
        training = Training(chosen, parts, device="cuda:0")
        assert training._features
        curves.append(losses(list(training)))
        assert (training._recorded is not None and training._recorded._replay is not None) == recorded
    assert close(*curves)


def trial(settings: Config, folder: Path, *earlier: Path, tick: Callable[[], None] = lambda: None) -> list[Any]:
    """The curve of a trial on the GPU, as a worker trains it."""
    folder.mkdir()
    payload = {
        "config": settings.to_table(),
        "data_dir": None,
        "fingerprint": data.load(settings.data).fingerprint,
        "identity": "a-study-uuid/7",
        "checkpoint_seconds": 1000.0,
    }
    return losses(drain(entries.trial(payload, Context(folder, earlier, "cuda:0", tick)))[0])


def test_a_trial_on_a_gpu_stops_and_resumes(tmp_path: Path) -> None:
    calls = iter(range(30))  # an epoch has 23 batches

    def stop() -> None:
        if next(calls, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        trial(CNN, tmp_path / "first", tick=stop)
    assert list((tmp_path / "first").glob("checkpoint-*"))
    assert close(trial(CNN, tmp_path / "whole"), trial(CNN, tmp_path / "second", tmp_path / "first"))


def test_memory_that_a_gpu_lacks_is_one_line_and_comes_back(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    others = torch.empty(free - 2 * 10**9, dtype=torch.uint8, device="cuda:0")
    before = torch.cuda.memory_reserved()
    wide = config("mlp", {"layers": 2, "width": 20_000})  # 1.6 GB, and as much for gradients
    with pytest.raises(WorldError, match=r"^out of memory on cuda:0: CUDA out of memory"):
        trial(wide, tmp_path / "wide")
    assert torch.cuda.memory_reserved() < before + 10**8
    assert len(trial(CNN, tmp_path / "next")) == 3
    del others
    torch.cuda.empty_cache()  # the next test's workers need it


def test_a_trial_records_its_gpu_and_memory_and_auto_packs_by_it(tmp_path: Path) -> None:
    options = EngineOptions.from_table({"device": "cuda:0", "workers_per_gpu": "auto"})
    study, home = Study("toy", {**TABLE, "search": {"trials": 6, "pruner": "none"}}), Home(tmp_path / "home")
    engines: list[LocalEngine] = []

    def start() -> LocalEngine:
        engines.append(LocalEngine(options=options))
        return engines[0]

    tuning = Tuning(study, home, study.resolved, None, engine=start, follow=False)
    packed = [item.text for item in tuning.run() if item.kind == "note"]
    record = tuning.result()
    let_go(tuning.storage)
    assert len(record.of("complete")) == 6
    for trial in record.trials:
        assert trial.result is not None
        assert trial.result.device == f"{torch.cuda.get_device_name(0)} (cuda:0)"
        assert trial.result.memory is not None
        assert 0 < trial.result.memory < 0.2  # a tiny MLP, and CUDA's context
    assert len(packed) == 1
    assert "workers a GPU" in packed[0]


def test_a_forecast_leaves_out_the_seconds_in_which_a_gpu_loads_its_kernels(tmp_path: Path) -> None:
    study, home = Study("toy", {**TABLE, "search": {"trials": 3, "pruner": "none"}}), Home(tmp_path / "home")
    options = EngineOptions.from_table({"device": "cuda:0"})
    tuning = Tuning(study, home, study.resolved, None, engine=lambda: LocalEngine(options=options), follow=False)
    for _ in tuning.run():
        pass
    record = tuning.result()
    let_go(tuning.storage)
    assert record.forecast is not None
    took = sum(TRIAL_SECONDS + trial.result.seconds for trial in record.trials if trial.result)
    assert record.forecast.seconds < 2 * took
