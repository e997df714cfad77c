"""From config to optimizer, learning rate at every step, and averaged weights."""

import copy
import math
from collections.abc import Mapping
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from searchfm.config import (
    Adagrad,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Exponential,
    OneCycle,
    OptimizerConfig,
    Rmsprop,
    ScheduleConfig,
    Sgd,
    StepDecay,
)
from searchfm.learn.models import Classifier
from searchfm.learn.models.transfer import Pretrained


def optimizer(model: Classifier, config: OptimizerConfig, *, recorded: bool = False) -> torch.optim.Optimizer:
    """The optimizer of the model's trainable parameters, one fused kernel a step where torch has one.

    Each group has its maximum learning rate as `initial_lr`; `set_lr` scales it. recorded: whether steps become part of
    a CUDA graph, for which learning rates and counters are on the device; not for Adagrad.
    """
    groups, kind = parameter_groups(model, config), config.kind
    if recorded:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=model.mean.device)
    match kind:
        case Sgd():
            return torch.optim.SGD(groups, momentum=kind.momentum, nesterov=kind.nesterov, fused=True)
        case Adagrad():  # torch has a fused one on CPUs only
            cpu = model.mean.device.type == "cpu"
            return torch.optim.Adagrad(groups, lr_decay=kind.lr_decay, fused=cpu, foreach=not cpu)
        case Rmsprop():  # torch has no fused one
            return torch.optim.RMSprop(
                groups, alpha=kind.alpha, momentum=kind.momentum, foreach=True, capturable=recorded
            )
        case Adam():
            return torch.optim.Adam(groups, betas=(kind.beta1, kind.beta2), fused=True, capturable=recorded)
        case AdamW():
            return torch.optim.AdamW(groups, betas=(kind.beta1, kind.beta2), fused=True, capturable=recorded)
        case _:
            assert_never(kind)


def parameter_groups(model: Classifier, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of equal weight decay and maximum learning rate, in the model's order.

    Parameters of one dimension (biases, scales of norms) and those that the net names (embeddings of position) do not
    decay: a decay there shifts a layer's working point and regularises nothing.
    """
    net = model.net
    scales = net.lr_scales() if isinstance(net, Pretrained) else {}
    undecayed: set[str] = getattr(net, "no_weight_decay", set)()  # tokens, embeddings of position: as timm lists them
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim <= 1 or name in undecayed else config.weight_decay
            groups.setdefault((decay, config.lr * scales.get(name, 1.0)), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr": lr, "initial_lr": lr}
        for (decay, lr), members in groups.items()
    ]


def set_lr(built: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times its maximum."""
    for group in built.param_groups:
        lr = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_factor(step: int, steps_per_epoch: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate at a step (from 0) over its maximum: a pure function, so that no state needs saving.

    A warm-up rises in equal steps; the schedule covers the rest of training. Equal to torch's StepLR, ExponentialLR,
    CosineAnnealingLR and OneCycleLR stepped every batch, but one-cycle leaves momentum, which has a key of its own.
    """
    warmup = round(config.warmup * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    step, total = step - warmup, max(1, total_steps - warmup)
    kind = config.kind
    match kind:
        case Constant():
            return 1.0
        case StepDecay():
            return float(kind.factor ** (step // (kind.every * steps_per_epoch)))
        case Exponential():
            return float(kind.factor ** (step / steps_per_epoch))
        case Cosine():
            return kind.floor + (1 - kind.floor) * _cosine(step / total)
        case OneCycle():
            first, last = 1 / 25, 1 / 25e4  # of the maximum, as in the paper's fastai and in torch
            top, end = kind.rise * total - 1, total - 1
            if step < top:
                return 1 + (first - 1) * _cosine(step / top)
            return last + (1 - last) * _cosine((step - top) / (end - top))
        case _:
            assert_never(kind)


def _cosine(progress: float) -> float:
    """From 1 down to 0 in half a cosine, as `progress` goes from 0 to 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `INDEX.KEY`, parameters counted through its groups."""
    entries = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value
        for index, entry in entries.items()
        for key, value in entry.items()
        if value is not None  # SGD's momentum where there is none
    }


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Loads what `state` returned into a fresh optimizer.

    Every tensor gets the memory layout of its parameter, not only the values: torch's fused kernels walk parameter,
    gradient and moments side by side and train wrong, silently, where one of them is laid out differently.
    """
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = members[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


class Average:
    """An exponential moving average of a model's weights and batch-norm statistics.

    The decay of step n is min(decay, (1 + n) / (10 + n)), as in Tan & Le's training (2019) and TensorFlow's
    ExponentialMovingAverage: with a plain 0.999 a training of 500 steps would be judged by its random start.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        parameters = zip(self.model.parameters(), model.parameters(), strict=True)
        # Frozen stages are equal already.
        pairs: list[tuple[Tensor, Tensor]] = [(own, other) for own, other in parameters if other.requires_grad]
        pairs += zip(self.model.buffers(), model.buffers(), strict=True)
        self._averaged = [(own, other) for own, other in pairs if own.is_floating_point()]
        self._copied = [(own, other) for own, other in pairs if not own.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the model's weights after a step (from 0). Counters, which have no mean, are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for own, other in self._copied:
            own.copy_(other)
