"""Cached features of frozen stages: a trial with them is the trial without, and nothing is computed twice."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from searchfm.config import Config
from searchfm.errors import DataError
from searchfm.learn import features
from searchfm.learn.data import Splits
from searchfm.learn.models import build, flops
from searchfm.learn.models.transfer import Pretrained, cut
from searchfm.learn.train import Training, epoch_seconds
from tests.learn.test_models import transfer_settings
from tests.learn.toys import config, first, losses

PARTS = 2  # training and validation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for each of two models; the channels of the second are adjacent in memory."""
    path = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        for model in ("test_resnet", "test_efficientnet"):
            torch.manual_seed(5)
            save_file(timm.create_model(model).state_dict(), path / f"{model}.safetensors")
    return path


@pytest.fixture
def weights(folder: Path) -> Path:
    return folder / "test_resnet.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; the files of features in it."""
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "cache"))
    features._read.cache_clear()
    return tmp_path / "cache" / "features-1"


@pytest.fixture
def data(digits: Splits) -> Splits:
    """A few digits, with the fingerprint that parts of a data set have."""
    assert digits.val is not None
    few = first(digits, 200)
    return replace(few, train=replace(few.train, fingerprint=digits.train.fingerprint), val=digits.val)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that frozen stages took, batch by batch."""
    counts: list[int] = []
    whole = features._Frozen.__call__

    def counted(self: features._Frozen, images: Tensor, mirrored: bool) -> Tensor:
        counts.append(len(images))
        return whole(self, images, mirrored)

    monkeypatch.setattr(features._Frozen, "__call__", counted)
    return counts


def probe(weights: Path, model: dict[str, Any] | None = None, **tables: Any) -> Config:
    """A trained head, or more, on frozen stages."""
    settings = {"model": "test_resnet", "weights": str(weights), "tuned_blocks": 0} | (model or {})
    tables = {"optimizer": {"lr": 0.01}, **tables}
    return config("transfer", settings, **{**tables, "train": {"epochs": 2} | tables.get("train", {})})


def without(monkeypatch: pytest.MonkeyPatch, train: Callable[[], Training]) -> Training:
    with monkeypatch.context() as patch:
        patch.setenv(features.LIMIT, "0")
        return train()


SAME: dict[str, dict[str, Any]] = {
    "head": {},
    "flip": {"model": {"dropout": 0.3}, "augment": {"flip": 0.5}, "train": {"ema": 0.9}},
    "stage": {"model": {"tuned_blocks": 1, "dropout": 0.3}, "augment": {"flip": 0.5}},
    "adjacent": {
        "model": {"model": "test_efficientnet", "tuned_blocks": 1},
        "optimizer": {"name": "sgd"},  # Adam's first steps have the sign of a gradient, however small
    },
    "bfloat16": {"train": {"precision": "bfloat16"}},
}


@pytest.mark.parametrize("name", SAME)
def test_a_trial_with_cached_features_is_the_trial_without(
    name: str, weights: Path, data: Splits, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    model = SAME[name].get("model", {}).get("model", "test_resnet")
    settings = probe(weights.with_name(f"{model}.safetensors"), **SAME[name])
    cached = Training(settings, data)
    plain = without(monkeypatch, lambda: Training(settings, data))
    assert list(cache.glob("*.safetensors"))
    for one, other in zip(losses(list(cached)), losses(list(plain)), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert cached.validation is not None
    assert plain.validation is not None
    assert cached.validation[1].probabilities == pytest.approx(plain.validation[1].probabilities, abs=1e-5)
    assert (cached.validation[1].correct == plain.validation[1].correct).all()
    state = plain.checkpoint().tensors
    assert cached.checkpoint().tensors.keys() == state.keys()
    for key, tensor in cached.checkpoint().tensors.items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-4, atol=1e-5, msg=key)


def test_a_training_goes_on_without_the_cache_and_with_it(
    weights: Path, data: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = probe(weights, augment={"flip": 0.5}, train={"epochs": 3})
    whole, begun = Training(settings, data), Training(settings, data)
    list(whole), next(begun)
    resumed = Training(settings, data, resume=begun.checkpoint())
    assert [epoch.index for epoch in resumed] == [2, 3]
    assert losses(resumed.epochs) == losses(whole.epochs)
    without_cache = without(monkeypatch, lambda: Training(settings, data, resume=begun.checkpoint()))
    list(without_cache)
    for one, other in zip(losses(without_cache.epochs), losses(whole.epochs), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_checkpoint_of_other_weights_changes_no_other_training(weights: Path, data: Splits) -> None:
    settings = probe(weights, train={"epochs": 3})
    expected, begun = Training(settings, data), Training(settings, data)
    list(expected), next(begun)
    state = begun.checkpoint()
    other = replace(state, tensors={n: t + 1 if "layer1" in n else t for n, t in state.tensors.items()})
    resumed = Training(settings, data, resume=other)
    next(resumed)
    assert torch.equal(
        resumed.model.state_dict()["net.model.layer1.0.conv1.weight"],
        other.tensors["model.net.model.layer1.0.conv1.weight"],
    )
    after = Training(settings, data)
    assert losses(list(after)) == losses(expected.epochs)
    assert losses([*begun]) == losses(expected.epochs)[1:]


def test_each_image_passes_the_frozen_stages_once_for_all_trials(
    weights: Path, data: Splits, computed: list[int], cache: Path
) -> None:
    assert data.val is not None
    images, held = len(data.train), len(data.val)
    list(Training(probe(weights), data))
    examples = 2 + 1
    assert sum(computed) == images + held + examples
    list(Training(probe(weights, {"dropout": 0.5}, train={"seed": 8, "batch_size": 50}, optimizer={"lr": 0.1}), data))
    assert sum(computed) == images + held + examples, "another trial reads the file"
    list(Training(probe(weights, augment={"flip": 0.5}), data))
    assert sum(computed) == 2 * images + held + 2 * examples, "only the mirrored images were missing"
    assert len(list(cache.glob("*.safetensors"))) == PARTS + 1


def test_features_are_kept_for_all_that_they_depend_on(weights: Path, data: Splits, cache: Path) -> None:
    def files() -> int:
        return len(list(cache.glob("*.safetensors")))

    Training(probe(weights), data)
    assert files() == PARTS
    Training(probe(weights, train={"precision": "bfloat16"}), data)
    assert files() == 2 * PARTS, "precision"
    Training(probe(weights, {"tuned_blocks": 1}), data)
    assert files() == 3 * PARTS, "boundary"
    part = data.train
    Training(probe(weights), replace(data, train=replace(part, indices=part.indices + 1)))
    assert files() == 3 * PARTS + 1, "images"
    state = timm.create_model("test_resnet").state_dict()
    other = cache.parent / "other.safetensors"
    save_file(state, other)
    Training(probe(other), data)
    assert files() == 4 * PARTS + 1, "weights"
    trained = Training(probe(weights, {"tuned_blocks": 1}), data)
    next(trained)
    resumed = Training(probe(weights, {"tuned_blocks": 1}), data, resume=trained.checkpoint())
    assert files() == 4 * PARTS + 1, "not the weights that are trained"
    assert next(resumed).index == 2


@pytest.mark.parametrize(
    ("used", "augment"),
    [
        (False, {"crop": 1}),
        (False, {"erase": 0.5}),
        (False, {"mixup": 0.2}),
        (False, {"cutmix": 1.0}),
        (True, {"mixup": 0.2, "mix": 0.0}),
        (True, {"flip": 1.0}),
    ],
)
def test_augmentation_beyond_flips_needs_the_images(
    used: bool, augment: dict[str, float], weights: Path, data: Splits, cache: Path
) -> None:
    Training(probe(weights, augment=augment), data)
    assert cache.exists() == used


@pytest.mark.parametrize("value", ["0", "0GB", "10KB", "1.5 kB"])
def test_features_beyond_the_limit_are_not_cached(
    value: str, weights: Path, data: Splits, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHFM_FEATURE_CACHE", value)
    assert next(Training(probe(weights), data)).index == 1
    assert not cache.exists()


def test_random_weights_and_trained_stems_leave_nothing_in_the_cache(weights: Path, data: Splits, cache: Path) -> None:
    Training(probe(weights, {"weights": "none"}), data)
    Training(probe(weights, {"tuned_blocks": "all"}), data)
    assert not cache.exists()


def test_a_limit_that_is_no_size_is_refused(weights: Path, data: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_FEATURE_CACHE", "much")
    with pytest.raises(DataError, match='SEARCHFM_FEATURE_CACHE = "much": must be bytes, such as 500MB or 4GB; 0'):
        Training(probe(weights), data)
    monkeypatch.setenv("SEARCHFM_FEATURE_CACHE", "1.5GB")
    assert features.limit() == 1_500_000_000


def test_a_damaged_file_is_computed_again(
    weights: Path, data: Splits, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = losses(list(Training(probe(weights), data)))
    for number, path in enumerate(sorted(cache.glob("*.safetensors"))):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content if number else content[:100])
    features._read.cache_clear()  # as in another process
    assert losses(list(Training(probe(weights), data))) == unbroken
    assert len([record for record in caplog.records if "damaged" in record.message]) == PARTS
    assert len(list(cache.glob("*"))) == PARTS


def test_what_was_not_used_for_longest_goes(
    weights: Path, data: Splits, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, tuned: int) -> set[Path]:
        """Trains, and returns the files that are new; their last use was the earlier the earlier they were read."""
        before = set(cache.glob("*"))
        Training(probe(weights, {"tuned_blocks": tuned}, train={"precision": name}), data)
        for path in before:
            status = path.stat() if path.exists() else None
            if status is not None:
                os.utime(path, (status.st_atime - 10, status.st_mtime - 10))
        return set(cache.glob("*")) - before

    half = train("bfloat16", 0)
    (cache / ".left-by-a-killed-process.tmp").write_bytes(bytes(10))
    os.utime(cache / ".left-by-a-killed-process.tmp", (0, 0))
    head = train("float32", 0)
    taken = sum(path.stat().st_size for path in half | head)
    assert not train("bfloat16", 0), "used again"
    for path in half:
        os.utime(path)
    monkeypatch.setenv("SEARCHFM_FEATURE_CACHE", str(taken))
    part = data.train
    Training(probe(weights), replace(data, train=replace(part, indices=part.indices + 1), val=None))
    assert half < set(cache.glob("*"))
    assert head - set(cache.glob("*"))
    assert sum(path.stat().st_size for path in cache.glob("*")) <= taken + 200  # headers
    assert not list(cache.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_done_without(
    weights: Path, data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "file"))
    assert next(Training(probe(weights), data)).index == 1
    assert "features are not cached: [Errno 20]" in caplog.text


PROGRAM = """
import logging, sys, torch
from searchfm.config import Config, DataConfig
from searchfm.learn.data import load
from searchfm.learn.train import Training
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
torch.set_num_threads(1)
model = {"name": "transfer", "transfer": {"model": "test_resnet", "weights": sys.argv[1], "tuned_blocks": 0}}
config = Config.from_table({"data": {"name": "digits"}, "model": model, "train": {"epochs": 1, "seed": 7}})
data = load(config.data)
print("ready", flush=True)
input()
print("loss", next(Training(config, data)).train_loss)
"""


@pytest.mark.slow
def test_of_processes_that_begin_together_one_computes(weights: Path, cache: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(weights)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":  # imports take longer than the training
            assert process.poll() is None
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "".join(printed).count("images computed in") == PARTS
    assert len(list(cache.glob("*"))) == PARTS
    assert len({line for text in printed for line in text.splitlines() if line.startswith("loss")}) == 1


@pytest.mark.parametrize(
    ("model", "tuned", "shape"),
    [
        ("test_resnet", 0, (96,)),
        ("test_efficientnet", 0, (256,)),
        ("test_convnext", 0, (64, 1, 1)),
        ("test_convnext", 1, (48, 2, 2)),
    ],
)
def test_a_net_is_cut_behind_its_pooling_and_before_its_dropout(model: str, tuned: int, shape: tuple[int, ...]) -> None:
    net = build(transfer_settings(model=model, tuned_blocks=tuned, dropout=0.3), (1, 32, 32), 10, seed=0)
    assert isinstance(net, Pretrained)
    where = cut(net)
    assert where is not None
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    halves = {mode: torch.fx.GraphModule(net, graph) for mode, graph in where.trained.items()}
    net.eval()
    with torch.no_grad():
        taken = torch.fx.GraphModule(net, where.frozen)(images)
        assert taken.shape[1:] == shape
        torch.testing.assert_close(halves[False](taken), net(images))
    net.train()
    torch.manual_seed(0)
    expected = net(images)
    torch.manual_seed(0)
    torch.testing.assert_close(halves[True](taken), expected)
    assert not torch.equal(halves[True](taken), expected), "dropout drops anew"


def test_frozen_stages_drop_nothing() -> None:
    net = build(transfer_settings(model="test_vit", tuned_blocks=0, dropout=0.3), (1, 32, 32), 10, seed=0).train()
    assert isinstance(net, Pretrained)
    inside = [module for frozen in net._frozen for module in frozen.modules()]
    assert any("drop" in type(module).__name__.lower() for module in inside)
    assert not any(module.training for module in inside)


def test_a_forecast_times_the_trained_part_and_counts_the_frozen_one_once(
    weights: Path, data: Splits, cache: Path
) -> None:
    settings = probe(weights, augment={"flip": 0.5})
    with_cache = epoch_seconds(settings, data, 0.0)
    assert with_cache is not None
    assert sum(with_cache[2].values()) > 0
    assert not list(cache.glob("*"))
    training = Training(settings, data)
    assert {path.name.partition("-")[0] for path in cache.glob("*")} == with_cache[2].keys()
    assert training.frozen_seconds > 0
    again = epoch_seconds(settings, data, 0.0)
    assert again is not None
    assert again[2] == {}, "nothing is missing now"
    model = training.model
    assert 0 < (features.trained_flops(model, (1, 8, 8), settings) or 0) < flops(model, (1, 8, 8)) / 100
    assert features.trained_flops(model, (1, 8, 8), probe(weights, augment={"crop": 1})) is None


def test_a_net_whose_code_cannot_be_followed_has_no_cut() -> None:
    net = build(transfer_settings(model="test_vit", tuned_blocks=0), (1, 32, 32), 10, seed=0)
    assert isinstance(net, Pretrained)
    assert cut(net) is None
    assert net.training
