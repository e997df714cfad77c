"""Transfer learning with real ImageNet weights, which a package ships: no hub needed."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from searchfm.config import Config, ModelConfig
from searchfm.learn.data import load
from searchfm.learn.models import build
from searchfm.learn.train import Training
from searchfm.stats import Accuracy
from tests.learn.toys import config
from tests.weights import lite0_weights


def probe(weights: str, **model: Any) -> Config:
    settings = {"model": "tf_efficientnet_lite0", "weights": weights, "tuned_blocks": 0} | model
    return config(
        "transfer",
        settings,
        data={"name": "fashion-mnist", "subset": 0.02, "validation": 0.02},
        optimizer={"lr": 0.01},
        train={"epochs": 2, "batch_size": 32},
    )


def test_real_weights_load_for_grey_images(tmp_path: Path) -> None:
    path = lite0_weights(tmp_path / "lite0.safetensors")
    kind = {"model": "tf_efficientnet_lite0", "weights": str(path), "tuned_blocks": 1}
    net = build(ModelConfig.from_table({"name": "transfer", "transfer": kind}), (1, 28, 28), 10, seed=0)
    state, loaded = safetensors.torch.load_file(path), net.state_dict()
    same = [name for name, tensor in state.items() if torch.equal(loaded[f"model.{name}"], tensor)]
    assert set(state) - set(same) == {"conv_stem.weight", "classifier.weight", "classifier.bias"}


@pytest.mark.slow
def test_pretrained_features_beat_random_ones(tmp_path: Path) -> None:
    """A frozen backbone with ImageNet weights against the same one with random weights, both with a trained head, on
    Fashion-MNIST: better by more than the 95% intervals of the two accuracies.
    """
    path = lite0_weights(tmp_path / "lite0.safetensors")
    data = load(probe("none").data)
    assert data.val is not None
    intervals = {}
    for name, weights in (("pretrained", str(path)), ("random", "none")):
        *_, last = Training(probe(weights), data)
        assert last.val_accuracy is not None
        n = len(data.val)
        intervals[name] = Accuracy(round(last.val_accuracy * n), n).interval
    assert intervals["pretrained"][0] > intervals["random"][1], intervals
