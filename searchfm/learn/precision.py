"""The precision of a training: where `precision = "auto"` means bfloat16."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from searchfm.config import Cnn, Config, Mlp, Residual, Shape, Transfer
from searchfm.learn.models import Classifier, operations

Precision: TypeAlias = Literal["float32", "bfloat16"]

# Architectures that a CPU with a feature trains faster in bfloat16 (autocast), of `transfer` the convolutional nets.
# Measured on avx512_bf16 (AMD EPYC, Zen 4, torch 2.15, one thread, whole trainings, n = 3): MLP 3x200 x1.21, CNN of 32
# and 64 filters x1.63, ResNet-18 at 28 pixels x1.32; a ViT (hidden_dim 32, 4 layers) takes 2.7 times as long a step,
# since torch's attention is slow in bfloat16. Accuracies of three seeds were within 0.009 of float32. On a Xeon without
# such a feature all of them take twice as long. On a Xeon with amx_bf16 (n = 1, one thread): CNN of 16 filters, batches
# of 32, x1.1, of 32 and 64, batches of 64, x1.4, of four layers of 64, x2.8; MLP 3x600 x1.5, MLP 3x200 x0.7 in batches
# of 32, x0.9 of 128, x1.3 of 512.
FASTER: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("avx512_bf16", "amx_bf16"), (Mlp.tag, Cnn.tag, Residual.tag, Transfer.tag)
)


def cpu_features() -> frozenset[str]:
    """The features of this CPU, by the names of Linux, as far as they are known."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    try:  # torch before 2.15 may not list them
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def faster(features: Iterable[str], architectures: Iterable[str]) -> tuple[str, ...]:
    """Those of the architectures that a CPU with these features trains faster in bfloat16."""
    known = {architecture for feature in features for architecture in FASTER.get(feature, ())}
    return tuple(architecture for architecture in architectures if architecture in known)


def choose(config: Config, model: Classifier, shape: Shape, bfloat16: Collection[str]) -> Precision:
    """The precision that a config is trained in, on the model's device. shape: of the images, (C, H, W); bfloat16:
    architectures that "auto" trains in it on a CPU.
    """
    match config.train.precision:
        case "auto":
            device, kind = model.mean.device.type, config.model.kind
            suits = kind.tag in bfloat16 and (not isinstance(kind, Transfer) or convolutional(model, shape))
            return "bfloat16" if device == "cuda" or (device == "cpu" and suits) else "float32"
        case given:
            return given


def convolutional(model: Classifier, shape: Shape) -> bool:
    """Whether convolutions are most of a model's operations, and none is attention or a product of batches, by which
    some models compute attention.
    """
    counts = operations(model, shape)
    attends = any("attention" in operator or "bmm" in operator for operator in counts)
    return not attends and 2 * counts.get("aten.convolution", 0) > sum(counts.values())


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a model computes in a precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
