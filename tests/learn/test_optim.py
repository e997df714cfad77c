"""The optimizers against plain torch, the schedules against torch's own, the average against its definition."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from searchfm.config import ModelConfig, OptimizerConfig, ScheduleConfig
from searchfm.learn import optim
from searchfm.learn.models import Classifier, build


def classifier_of(name: str, settings: dict[str, Any]) -> Classifier:
    model = ModelConfig.from_table({"name": name, name: settings})
    return Classifier(build(model, (1, 8, 8), 10, seed=0), torch.zeros(1), torch.ones(1))


def net() -> Classifier:
    return classifier_of("mlp", {"layers": 1, "width": 16, "batch_norm": True})


# --- optimizers -------------------------------------------------------------------------------------------------------

PLAIN = {
    "sgd": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.8, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}, {"lr_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.5}, {"alpha": 0.9, "momentum": 0.5}),
    "adam": (torch.optim.Adam, {"beta1": 0.8, "beta2": 0.95}, {"betas": (0.8, 0.95)}),
    "adamw": (torch.optim.AdamW, {"beta1": 0.8, "beta2": 0.95}, {"betas": (0.8, 0.95)}),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randint(256, (32, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_plain_torchs(name: str) -> None:
    kind, settings, arguments = PLAIN[name]
    config = OptimizerConfig.from_table({"name": name, "lr": 0.01, "weight_decay": 0.1, name: settings})
    first, second = net(), net()
    weights = [p for p in second.parameters() if p.ndim > 1]
    others = [p for p in second.parameters() if p.ndim <= 1]
    plain = kind(
        [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01, **arguments
    )
    built = optim.optimizer(first, config)
    for seed in range(3):
        step(first, built, seed)
        step(second, plain, seed)
    for own, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "rmsprop"])
def test_one_kernel_a_step(name: str) -> None:
    built = optim.optimizer(net(), OptimizerConfig.from_table({"name": name}))
    assert all(group["fused"] for group in built.param_groups)


def test_only_weights_decay() -> None:
    model = classifier_of("vit", {"patch_size": 4, "hidden_dim": 8, "layers": 1, "heads": 2})
    groups = optim.parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    names = {id(p): name for name, p in model.net.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"} <= decayed
    assert not [
        name for name in decayed if name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token")
    ]
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_layer_decay_scales_the_learning_rate() -> None:
    settings = {"model": "test_resnet", "weights": "none", "tuned_blocks": 2, "layer_decay": 0.5}
    built = optim.optimizer(classifier_of("transfer", settings), OptimizerConfig(lr=0.1))
    optim.set_lr(built, 0.5)
    assert sorted({group["lr"] for group in built.param_groups}) == [0.0125, 0.025, 0.05]


@pytest.mark.parametrize("name", PLAIN)
def test_state_has_the_memory_layout_of_the_parameters(name: str) -> None:
    """channels_last weights: moments that came back in another layout would train wrong without a word."""
    config = OptimizerConfig.from_table({"name": name, "lr": 0.01})
    model = classifier_of("cnn", {"filters": [8, 8]}).to(memory_format=torch.channels_last)
    built = optim.optimizer(model, config)
    step(model, built, 0)
    saved = {key: value.contiguous().clone() for key, value in optim.state(built).items()}
    other = copy.deepcopy(model)
    again = optim.optimizer(other, config)
    optim.restore(again, saved)
    for seed in (1, 2):
        step(model, built, seed)
        step(other, again, seed)
    for own, copied in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, copied)


# --- schedules --------------------------------------------------------------------------------------------------------


def reference(name: str, optimizer: torch.optim.Optimizer, per_epoch: int, total: int) -> Any:
    of = torch.optim.lr_scheduler
    match name:
        case "constant":
            return of.ConstantLR(optimizer, factor=1.0)
        case "step":
            return of.StepLR(optimizer, step_size=2 * per_epoch, gamma=0.3)
        case "exponential":
            return of.ExponentialLR(optimizer, gamma=0.7 ** (1 / per_epoch))
        case "cosine":
            return of.CosineAnnealingLR(optimizer, T_max=total, eta_min=0.1 * 0.2)
        case "one-cycle":
            return of.OneCycleLR(optimizer, max_lr=0.2, total_steps=total, pct_start=0.4, cycle_momentum=False)
    raise AssertionError(name)


SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {},
    "step": {"every": 2, "factor": 0.3},
    "exponential": {"factor": 0.7},
    "cosine": {"floor": 0.1},
    "one-cycle": {"rise": 0.4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_schedules_are_torchs(name: str) -> None:
    per_epoch, epochs = 7, 6
    total = per_epoch * epochs
    config = ScheduleConfig.from_table({"name": name} | ({name: SETTINGS[name]} if SETTINGS[name] else {}))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = reference(name, optimizer, per_epoch, total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [0.2 * optim.lr_factor(i, per_epoch, total, config) for i in range(total)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_warmup_rises_evenly_and_then_the_schedule_begins() -> None:
    config = ScheduleConfig.from_table({"name": "cosine", "warmup": 1.5})
    factors = [optim.lr_factor(i, 4, 20, config) for i in range(20)]
    assert factors[:7] == pytest.approx([i / 7 for i in range(1, 8)])
    after = ScheduleConfig.from_table({"name": "cosine"})
    assert factors[6:] == [optim.lr_factor(i, 4, 14, after) for i in range(14)]
    assert max(factors) == 1.0


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_trainings_have_a_learning_rate(name: str, total: int) -> None:
    config = ScheduleConfig.from_table({"name": name, "warmup": 0.0 if name == "one-cycle" else 1.0})
    assert all(0 < optim.lr_factor(i, 1, total, config) <= 1 for i in range(total))


# --- the average ------------------------------------------------------------------------------------------------------


def test_the_average_is_its_definition() -> None:
    model = net()
    average = optim.Average(model, decay=0.3)
    expected = [p.detach().clone() for p in _floating(model)]
    built = optim.optimizer(model, OptimizerConfig(lr=0.1))
    for i in range(4):
        step(model, built, i)
        average.update(i)
        decay = min(0.3, (1 + i) / (10 + i))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, _floating(model), strict=True)]
    for own, reference in zip(_floating(average.model), expected, strict=True):
        torch.testing.assert_close(own, reference)
    counters = [own for own in average.model.buffers() if not own.is_floating_point()]
    assert [int(counter) for counter in counters] == [4]


def test_a_short_training_is_not_judged_by_its_random_start() -> None:
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    average = optim.Average(model, decay=0.9999)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for i in range(40):
        average.update(i)
    moved = [float((own - begin).mean()) for own, begin in zip(average.model.parameters(), start, strict=True)]
    assert min(moved) > 0.99  # plain decay would have moved by 0.004


def _floating(model: nn.Module) -> list[Tensor]:
    return [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
