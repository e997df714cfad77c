"""Where "auto" is bfloat16: by a table of CPU features and architectures, chosen once a study and kept by its jobs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from searchfm.config import Config
from searchfm.errors import WorldError
from searchfm.jobs import Context
from searchfm.learn import entries, precision
from searchfm.learn.checkpoint import load_classifier
from searchfm.learn.data import Splits
from searchfm.learn.entries import fit, forecast, prepare, trial
from searchfm.learn.models import Classifier, build
from searchfm.learn.train import Training
from searchfm.records import ForecastJob, Prepared, PrepareJob, PrepareResult, TestJob, TrainJob, TrainResult
from tests.learn.toys import config, drain, losses

ALL = ("mlp", "cnn", "vit", "transfer", "residual", "custom")
FAST = ("mlp", "cnn", "transfer", "residual")
MLP = config(settings={"layers": 2, "width": 64, "dropout": 0.1}, optimizer={"lr": 0.003}, train={"epochs": 4})
CNN = config("cnn", {"filters": 16, "batch_norm": True}, optimizer={"lr": 0.005}, train={"epochs": 4})
VIT = config("vit", {"patch_size": 4, "hidden_dim": 16, "layers": 1, "heads": 2}, train={"epochs": 1})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "entries-cache"))


@pytest.fixture
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with units for bfloat16, as far as searchfm knows."""
    monkeypatch.setattr(precision, "cpu_features", lambda: frozenset({"avx512_f", "avx512_bf16"}))


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: frozenset({"avx512_f"}))


def prepared(tmp_path: Path, device: str = "cpu", **changes: Any) -> Prepared:
    job = PrepareJob({"name": "digits"}, (), None, **{"architectures": ALL, **changes})
    _, values = drain(prepare(job.to_json(), Context(tmp_path, (), device, lambda: None)))
    return PrepareResult.from_json(values, "").data


def payload(settings: Config, data: Prepared, **changes: Any) -> dict[str, Any]:
    job = TrainJob(settings.to_table(), "a-study/1", None, data.fingerprint, 1000.0, bfloat16=data.bfloat16)
    return job.to_json() | changes


def trained(settings: Config, data: Prepared, folder: Path, *earlier: Path) -> TrainResult:
    _, values = drain(trial(payload(settings, data), Context(folder, earlier, "cpu", lambda: None)))
    return TrainResult.from_json(values)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512_f", "avx512_bf16"}, FAST),
        ({"amx_tile", "amx_bf16"}, FAST),
        ({"avx512_f", "avx512_vnni"}, ()),
        ({"amx_tile", "amx_int8", "avx512_fp16"}, ()),
        ({"bf16", "asimd"}, ()),  # ARM, where nothing was measured
        (set(), ()),
    ],
)
def test_the_table_knows_features_and_architectures(features: set[str], expected: tuple[str, ...]) -> None:
    assert precision.faster(features, ALL) == expected
    assert precision.faster(features, ("vit", "custom")) == ()


def test_this_cpu_s_features_are_those_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    here = precision.cpu_features()
    assert "cpu_name" not in here
    if not Path("/proc/cpuinfo").is_file():
        pytest.skip("only Linux lists them")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert set(precision.FASTER) & here == set(precision.FASTER) & precision.cpu_features()


@pytest.mark.parametrize(
    ("model", "side", "expected"),
    [("test_resnet", 32, True), ("test_convnext", 32, False), ("test_vit", 160, False), ("test_byobnet", 32, True)],
)
def test_of_pretrained_nets_convolutional_ones_suit(model: str, side: int, expected: bool) -> None:
    settings = config("transfer", {"model": model, "weights": "none", "tuned_blocks": "all"})
    net = build(settings.model, (3, side, side), 10, seed=0)
    shown = Classifier(net, torch.zeros(3), torch.ones(3))
    chosen = precision.choose(settings, shown, (3, side, side), FAST)
    assert (chosen, precision.convolutional(shown, (3, side, side))) == (
        "bfloat16" if expected else "float32",
        expected,
    )


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_precision_that_is_given_stands(given: str, expected: str, digits: Splits) -> None:
    assert Training(config(train={"precision": given}), digits, bfloat16=("mlp",)).precision == expected
    assert Training(config(train={"precision": given}), digits).precision == ("float32" if given == "auto" else given)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("settings", [MLP, CNN], ids=["mlp", "cnn"])
def test_three_seeds_in_bfloat16_are_as_accurate(settings: Config, digits: Splits) -> None:
    seeds = [replace(settings, train=replace(settings.train, seed=seed)) for seed in (1, 2, 3)]
    half = [list(Training(each, digits, bfloat16=FAST))[-1] for each in seeds]
    full = [list(Training(each, digits))[-1] for each in seeds]
    assert losses(half) != losses(full)
    mean_half, mean_full = (sum(epoch.val_accuracy or 0 for epoch in epochs) / 3 for epochs in (half, full))
    assert mean_half == pytest.approx(mean_full, abs=0.01)
    assert mean_full > 0.9


@pytest.mark.usefixtures("fast_cpu")
def test_what_prepare_chose_is_what_trials_finalists_and_the_final_training_use(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    assert data.bfloat16 == FAST
    assert trained(MLP, data, tmp_path / "mlp").precision == "bfloat16"
    assert trained(VIT, data, tmp_path / "vit").precision == "float32"
    # `fit` is the entry of the final training; finalists have that of trials.
    context = Context(tmp_path / "final", (), "cpu", lambda: None)
    _, values = drain(fit(payload(MLP, data), context))
    assert values["precision"] == "bfloat16"
    # The test part is in float32: predictions are those of the weights as `predict` has them.
    job = TestJob(str(tmp_path / "final"), values["files"], None)
    _, tested = drain(entries.test(job.to_json(), context))
    assert tested["accuracy"] > 0.9
    model, _ = load_classifier(tmp_path / "final")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    table = MLP.to_table()
    _, timed = drain(forecast(ForecastJob((table,), None, 0.0, bfloat16=FAST).to_json(), context))
    assert timed["timings"][0]["train"] > 0


@pytest.mark.usefixtures("fast_cpu")
def test_without_a_recorded_choice_a_study_stays_float32_bitwise(tmp_path: Path, digits: Splits) -> None:
    """As studies begun before there was one, resumed where the CPU has bfloat16."""
    older = prepared(tmp_path)
    older = Prepared.from_json({name: value for name, value in older.to_json().items() if name != "bfloat16"})
    epochs, values = drain(trial(payload(MLP, older), Context(tmp_path / "old", (), "cpu", lambda: None)))
    assert values["precision"] == "float32"
    assert losses(epochs) == losses(list(Training(MLP, digits)))
    without = {name: value for name, value in payload(MLP, older).items() if name != "bfloat16"}
    again, _ = drain(trial(without, Context(tmp_path / "again", (), "cpu", lambda: None)))
    assert losses(again) == losses(epochs)


@pytest.mark.usefixtures("fast_cpu")
def test_a_resumed_trial_is_bitwise_unbroken_in_bfloat16(digits: Splits) -> None:
    unbroken = list(Training(CNN, digits, bfloat16=FAST))
    begun = Training(CNN, digits, bfloat16=FAST)
    next(begun), next(begun)
    assert losses(list(Training(CNN, digits, bfloat16=FAST, resume=begun.checkpoint()))) == losses(unbroken[2:])


@pytest.mark.usefixtures("slow_cpu")
def test_a_node_whose_cpu_lacks_it_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorldError) as refused:
        prepared(tmp_path, bfloat16=("mlp", "cnn"))
    assert str(refused.value) == (
        "its CPU has no bfloat16 (avx512_bf16 or amx_bf16), in which the search trains mlp, cnn"
    )
    assert prepared(tmp_path).bfloat16 == ()
