"""The loop: what it learns is golden, resuming is bitwise, and what cannot go on says why."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from searchfm.config import Config
from searchfm.errors import ConfigError, DivergedError, Stopped
from searchfm.learn.data import Splits
from searchfm.learn.models import parameters
from searchfm.learn.train import FIRST_SECONDS, Training, epoch_seconds, evaluate
from tests.learn.toys import config, first, losses

GOLDEN = Path(__file__).parent / "golden" / "losses.json"

# Between them: every optimizer, schedule and augmentation, dropout, batch norm, clipping, smoothing, averaged weights.
CONFIGS: dict[str, Config] = {
    "mlp-sgd": config(
        settings={"width": 32, "dropout": 0.2},
        optimizer={"name": "sgd", "lr": 0.05, "sgd": {"momentum": 0.9}},
        schedule={"name": "cosine", "warmup": 0.5},
        train={"epochs": 5},
    ),
    "mlp-adamw-average": config(
        settings={"width": 32, "dropout": 0.2, "batch_norm": True},
        optimizer={"name": "adamw", "lr": 0.003, "weight_decay": 0.05, "clip": 1.0},
        schedule={"name": "constant"},
        augment={"flip": 0.3, "crop": 1, "erase": 0.3, "mixup": 0.2, "cutmix": 1.0, "mix": 0.7},
        train={"epochs": 5, "ema": 0.98, "label_smoothing": 0.1},
    ),
    "cnn-rmsprop": config(
        "cnn",
        {"filters": 8, "batch_norm": True, "conv_dropout": 0.1},
        optimizer={"name": "rmsprop", "lr": 0.001, "weight_decay": 0.001, "rmsprop": {"momentum": 0.5}},
        schedule={"name": "step", "step": {"every": 2}},
        train={"epochs": 5},
    ),
    "cnn-adam": config(
        "cnn",
        {"filters": 8, "pool": ["average", "max-same"], "dense_layers": 1, "dense_width": 16},
        optimizer={"name": "adam"},
        schedule={"name": "exponential"},
        augment={"mixup": 0.2},
        train={"epochs": 5, "batch_size": 100},
    ),
    "residual-adagrad": config(
        "residual",
        {"stages": 2, "blocks": 1, "width": 4},
        optimizer={"name": "adagrad", "lr": 0.02},
        schedule={"name": "one-cycle"},
        train={"epochs": 5, "ema": 0.9},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_five_losses_are_golden(name: str, digits: Splits) -> None:
    """Written by `python tests/learn/test_train.py`, on another machine maybe: hence the tolerance."""
    golden = json.loads(GOLDEN.read_text())[name]
    epochs = list(Training(CONFIGS[name], digits))
    assert [epoch.train_loss for epoch in epochs] == pytest.approx(golden["train"], rel=2e-3)
    assert [epoch.val_loss for epoch in epochs] == pytest.approx(golden["val"], rel=5e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_is_bitwise_unbroken(name: str, digits: Splits) -> None:
    whole = Training(CONFIGS[name], digits)
    unbroken = list(whole)
    begun = Training(CONFIGS[name], digits)
    next(begun), next(begun)
    middle = begun.checkpoint()
    next(begun)  # a checkpoint is a copy: what comes after does not change it
    torch.manual_seed(99)  # nothing may depend on what the process did before
    resumed = Training(CONFIGS[name], digits, resume=middle)
    assert [epoch.index for epoch in resumed] == [3, 4, 5]
    assert losses(resumed.epochs) == losses(unbroken)
    for key, value in whole.checkpoint().tensors.items():
        assert torch.equal(value, resumed.checkpoint().tensors[key]), key


def test_a_resumed_learning_rate_goes_on(digits: Splits) -> None:
    unbroken = [epoch.lr for epoch in Training(CONFIGS["mlp-sgd"], digits)]
    begun = Training(CONFIGS["mlp-sgd"], digits)
    next(begun)
    assert [epoch.lr for epoch in Training(CONFIGS["mlp-sgd"], digits, resume=begun.checkpoint())] == unbroken[1:]
    assert unbroken[-1] < unbroken[0] / 5


def test_seeds_differ_and_repeat(digits: Splits) -> None:
    runs = [losses(list(Training(config(train={"epochs": 2, "seed": seed}), digits))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_process_s_own_randomness_is_left_alone(digits: Splits) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(Training(config(settings={"dropout": 0.5}, train={"epochs": 1}), digits))
    assert torch.equal(torch.rand(1), expected)


def test_every_epoch_has_an_order_of_its_own(digits: Splits) -> None:
    """Without learning, equal orders would give equal sums of losses."""
    frozen = config(settings={"batch_norm": True}, optimizer={"name": "sgd", "lr": 1e-30}, train={"epochs": 2})
    first_epoch, second_epoch = Training(frozen, digits)
    assert first_epoch.train_loss != second_epoch.train_loss


def test_epochs_hold_what_happened(digits: Splits) -> None:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    training = Training(config(train={"epochs": 2}), digits, tick=tick)
    epochs = list(training)
    assert [epoch.index for epoch in epochs] == [1, 2]
    batches = math.ceil(len(digits.train) / 64) + math.ceil(212 / 64)
    assert ticks == 2 * batches
    assert all(0 < epoch.seconds < 60 and epoch.samples_per_second > 0 for epoch in epochs)
    assert training.validation is not None
    loss, predictions = training.validation
    assert predictions.probabilities.shape == (212, 10)
    assert predictions.probabilities.sum(1) == pytest.approx(1.0, abs=1e-5)
    assert (epochs[-1].val_loss, epochs[-1].val_accuracy) == (loss, predictions.correct.mean())


def test_evaluation_is_plain_arithmetic(digits: Splits) -> None:
    training = Training(config(train={"epochs": 1, "ema": 0.5}), digits)
    next(training)
    assert digits.val is not None
    model = training.classifier.eval()
    logits = model(digits.val.images)
    loss, predictions = evaluate(model, digits.val, config(train={"batch_size": 50}).train, lambda: None)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, digits.val.labels)), rel=1e-5)
    assert predictions.correct.tolist() == (logits.argmax(1) == digits.val.labels).tolist()
    torch.testing.assert_close(torch.from_numpy(predictions.probabilities), logits.softmax(1).detach())


def test_the_average_is_what_is_validated(digits: Splits) -> None:
    training = Training(config(optimizer={"name": "sgd", "lr": 0.2}, train={"epochs": 1, "ema": 0.999}), digits)
    next(training)
    assert training.classifier is not training.model
    assert digits.val is not None
    settings = training.config.train
    loss, _ = evaluate(training.classifier, digits.val, settings, lambda: None)
    assert training.validation is not None
    assert loss == training.validation[0]
    assert loss != evaluate(training.model, digits.val, settings, lambda: None)[0]


def test_without_a_validation_part_there_is_no_validation_accuracy(digits: Splits) -> None:
    epochs = list(Training(config(train={"epochs": 1}), replace(digits, val=None)))
    assert (epochs[0].val_loss, epochs[0].val_accuracy) == (None, None)


@pytest.mark.parametrize(("images", "batch_norm", "trained"), [(129, True, 128), (129, False, 129), (130, True, 130)])
def test_the_last_batch_is_kept_unless_batch_norm_would_see_one_image(
    digits: Splits, images: int, batch_norm: bool, trained: int
) -> None:
    training = Training(config(settings={"batch_norm": batch_norm}, train={"epochs": 1}), first(digits, images))
    epoch = next(training)
    rights = epoch.train_accuracy * trained
    assert rights == pytest.approx(round(rights), abs=1e-4)
    steps = {int(value) for key, value in training.checkpoint().tensors.items() if key.endswith(".step")}
    assert steps == {math.ceil(trained / 64)}


def test_batches_of_one_and_batch_norm_are_refused(digits: Splits) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size = 1: batch norm needs at least 2"):
        Training(config(settings={"batch_norm": True}, train={"batch_size": 1}), digits)
    assert next(Training(config(train={"epochs": 1, "batch_size": 1}), first(digits, 3))).index == 1


@pytest.mark.parametrize("lr", [1e30, 1e4])
def test_a_loss_that_is_not_finite_ends_training(digits: Splits, lr: float) -> None:
    wild = config(optimizer={"name": "sgd", "lr": lr, "sgd": {"momentum": 0.99}}, train={"epochs": 4})
    with pytest.raises(DivergedError, match=r"^(train|val)_loss is (nan|inf) in epoch \d; .*optimizer\.lr"):
        list(Training(wild, digits))


VIT = config(
    "vit", {"patch_size": 4, "hidden_dim": 16, "layers": 2, "heads": 2, "dropout": 0.1}, augment={"erase": 0.3}
)


@pytest.mark.parametrize("name", ["mlp-adamw-average", "residual-adagrad", "vit"])
def test_no_step_of_an_epoch_waits_for_the_device(name: str, digits: Splits) -> None:
    """A fake tensor has no value: what needs one, as `.item()` and `if` do, raises. On a GPU it would wait."""
    training = Training(CONFIGS.get(name, VIT), first(digits, 130))
    with FakeTensorMode(allow_non_fake_inputs=True):
        training._loss_sum, training._correct = torch.zeros(2)
        loss, correct, _ = training._steps(1)
        for waits in (loss.item, correct.tolist, lambda: bool(loss > 0), lambda: correct.nonzero().shape):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waits()


def test_what_tick_raises_leaves_the_epoch(digits: Splits) -> None:
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise Stopped

    training = Training(config(train={"epochs": 3}), digits, tick=tick)
    next(training)
    with pytest.raises(Stopped):
        next(training)
    assert [epoch.index for epoch in training.epochs] == [1]


def test_clipping_bounds_the_step(digits: Splits) -> None:
    """Plain descent moves by lr times the gradient, whose norm is clipped."""
    one_step = first(digits, 64)
    settings: dict[str, Any] = {"name": "sgd", "lr": 1.0, "sgd": {"momentum": 0.0}}
    moved = []
    for clip in (0.0, 0.01):
        training = Training(config(optimizer=settings | {"clip": clip}, train={"epochs": 1}), one_step)
        before = [p.detach().clone() for p in training.model.parameters()]
        next(training)
        pairs = zip(training.model.parameters(), before, strict=True)
        moved.append(math.sqrt(sum(float((after.detach() - was).square().sum()) for after, was in pairs)))
    assert moved[0] > 0.1
    assert moved[1] == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_is_near_float32(digits: Splits) -> None:
    half = list(Training(config(train={"epochs": 2, "precision": "bfloat16"}), digits))
    full = list(Training(config(train={"epochs": 2, "precision": "float32"}), digits))
    assert losses(half) != losses(full)
    assert half[-1].train_loss == pytest.approx(full[-1].train_loss, rel=0.02)


def test_a_frozen_backbone_stays_bitwise(digits: Splits) -> None:
    settings = {"model": "test_resnet", "weights": "none", "tuned_blocks": 0}
    training = Training(config("transfer", settings, train={"epochs": 1, "ema": 0.9}), first(digits, 200))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    next(training)
    for model in (training.model, training.classifier):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {"net.model.fc.weight", "net.model.fc.bias"}
    assert parameters(training.model)[1] == sum(p.numel() for p in training.model.net.model.fc.parameters())


def test_a_forecast_does_not_take_the_time_of_a_first_batch(digits: Splits) -> None:
    """It is several times that of others, even where no seconds are left for more."""
    ticks: list[float] = []

    def tick() -> None:
        time.sleep(FIRST_SECONDS / 4 if not ticks else 0)
        ticks.append(time.monotonic())

    timed = epoch_seconds(config(), digits, 0.0, tick=tick)
    assert timed is not None
    assert len(ticks) > 2, "a batch of training, and one of validation, are the first"
    assert timed[0] < FIRST_SECONDS / 4


if __name__ == "__main__":
    from searchfm.config import DataConfig
    from searchfm.learn.data import load

    torch.set_num_threads(1)
    data = load(DataConfig(name="digits"))
    curves = {name: list(Training(settings, data)) for name, settings in CONFIGS.items()}
    rows = {n: {"train": [e.train_loss for e in es], "val": [e.val_loss for e in es]} for n, es in curves.items()}
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
