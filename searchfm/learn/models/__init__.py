"""One file for each architecture, and `build`, which chooses one."""

from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor, nn

from searchfm.config import Cnn, Config, Custom, Mlp, ModelConfig, Residual, Shape, Transfer, Vit
from searchfm.learn.models import cnn, custom, mlp, residual, transfer, vit
from searchfm.learn.models.custom import NO_CODE, Code
from searchfm.learn.models.dropout import replace_dropout
from searchfm.learn.models.transfer import Pretrained


def build(
    config: ModelConfig, shape: Shape, classes: int, *, seed: int, pretrained: bool = True, code: Code = NO_CODE
) -> nn.Module:
    """The net: (N, *shape) float32, normalised -> (N, classes) float32 logits, on the CPU.

    The weights depend on `seed` alone; torch's global generator is left as it was. Unless `pretrained`, no weights are
    read. The config's `fit_images(shape)` must hold. Raises ModelError for pretrained models and their weights,
    ConfigError for more tuned stages than there are, CodeError for the user's code that `code` does not allow.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = config.kind
        match kind:
            case Mlp():
                net: nn.Module = mlp.build(kind, shape, classes)
            case Cnn():
                net = cnn.build(kind, shape, classes)
            case Vit():
                net = vit.build(kind, shape, classes)
            case Transfer():
                net = transfer.build(kind if pretrained else replace(kind, weights="none"), shape, classes)
            case Residual():
                net = residual.build(kind, shape, classes)
            case Custom():
                return custom.build(kind, shape, classes, code)
            case _:
                assert_never(kind)
    replace_dropout(net)
    return net


class Classifier(nn.Module):
    """A net with its preprocessing inside: raw images in, logits out.

    `mean` and `std`, each (C,) float32 with pixels from 0 to 1, are buffers, so they are saved with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, C, H, W), pixels from 0 to 255, uint8 or (mixed images) float32 -> (N, K) logits."""
        logits: Tensor = self.net(self.normalised(images))
        return logits

    def normalised(self, images: Tensor) -> Tensor:
        """What the net takes: float32, of mean 0 and standard deviation 1 in each channel."""
        scale = (1 / (255 * self.std)).view(-1, 1, 1)
        shift = (-self.mean / self.std).view(-1, 1, 1)
        return torch.addcmul(shift, images.float(), scale)


def served(model: Classifier) -> nn.Module:
    """A classifier for use: (N, C, H, W) uint8 -> probabilities (N, K) float32, each row adding up to 1."""
    return nn.Sequential(model, nn.Softmax(1)).eval()


def classifier(
    config: ModelConfig,
    shape: Shape,
    classes: int,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    device: torch.device,
    code: Code = NO_CODE,
) -> Classifier:
    """A classifier on its device, in the memory layout that is fastest there.

    mean, std: (C,) of the data; pretrained weights have their own. Raises as `build` does.
    """
    net = build(config, shape, classes, seed=seed, code=code)
    if isinstance(net, Pretrained) and net.moments:
        mean, std = net.moments
    model = Classifier(net, mean.cpu(), std.cpu())
    own = isinstance(config.kind, Custom)  # a user's `view` may not take another layout
    layout = torch.channels_last if not own and _channels_last(net, device) else torch.preserve_format
    return model.to(device).to(memory_format=layout)


def _channels_last(net: nn.Module, device: torch.device) -> bool:
    """Whether channels should be adjacent in memory.

    Measured on one core in float32. AVX-512: plain convolutions x1.3 to x1.6, small residual nets x1.3, nets with
    depthwise convolutions x1.9 to x3.4, but resnet18 x0.87. AVX2: resnet18 x1.14 at 32 pixels and its frozen stages
    x1.8; other residual nets x0.96 to x1.06, frozen x1.0 to x1.3; densenet121 x1.15; vgg11, which shrinks images by
    pooling alone, x0.9. On a GPU bfloat16 convolutions always gain.
    """
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if len(convs) < 2:  # a transformer's one is its patches
        return False
    if device.type == "cuda":
        return True
    if any(map(_crashes, convs)):
        return False
    if not isinstance(net, Pretrained) or any(conv.groups > 1 for conv in convs):
        return True
    strided = any(conv.stride != (1, 1) for conv in convs)
    return strided and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _crashes(conv: nn.Conv2d) -> bool:
    """Whether the backward pass of a convolution may write beyond its memory with adjacent channels on a CPU: torch
    2.15 with AVX-512 does so (SIGSEGV, SIGABRT) for strided 1x1 kernels with 4, 8 or 12 input channels and images from
    48 pixels on; never with 16 or more.
    """
    return conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < 16


def parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters: all, and trainable ones."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def costs(configs: Iterable[Config], shape: Shape, classes: int, code: Code = NO_CODE) -> dict[str, tuple[int, int]]:
    """Minimum and maximum cost over the configs: `parameters`, and `flops` of one image's forward pass."""
    rows = []
    for config in configs:
        net = build(
            config.model, shape, classes, seed=0, pretrained=False, code=code
        )  # a cost does not depend on the weights
        model = Classifier(net, torch.zeros(shape[0]), torch.ones(shape[0]))
        rows.append((parameters(model)[0], flops(model, shape)))
    sizes, work = zip(*rows, strict=True)
    return {"parameters": (min(sizes), max(sizes)), "flops": (min(work), max(work))}


def flops(model: Classifier, shape: Shape) -> int:
    """Floating-point operations of one image's forward pass. The model's mode is left as it was."""
    return sum(operations(model, shape).values())


def operations(model: Classifier, shape: Shape) -> dict[str, int]:
    """`flops` by torch's operators, such as aten.convolution. A multiply-add is counted as two (torch's
    FlopCounterMode: products of matrices, convolutions, attention; not norms and activations).
    """
    return count_operations(model, torch.zeros(1, *shape, dtype=torch.uint8, device=model.mean.device))


def count_operations(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """The operations of a forward pass in evaluation mode. The model's mode is left as it was."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton; `predict` counts nothing

    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    model.train(training)
    return {str(operator): int(count) for operator, count in counter.get_flop_counts().get("Global", {}).items()}
