"""The peer of `trial`: what people write after Optuna's own PyTorch example, in plain torch and torchvision.

A torchvision data set with transforms in a DataLoader, plain Adam, `.item()` at every step, a fresh model.
"""

import gzip
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import FashionMNIST
from torchvision.models import resnet18

from searchfm.learn.data import Splits
from searchfm.learn.datasets import fetch

CLASSES = 10


class Vit(nn.Module):
    """A vision transformer of patches of 4 pixels and 4 heads, of torch's encoder layers."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 50, dim))
        layer = nn.TransformerEncoderLayer(
            dim, 4, 4 * dim, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(dim, eps=1e-6)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.position
        encoded: Tensor = self.encoder(tokens)
        return self.head(encoded[:, 0])  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    hidden = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, CLASSES))


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def resnet() -> nn.Module:
    net = resnet18(num_classes=CLASSES)
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return net


NETS = {"mlp": mlp, "cnn": cnn, "vit16": lambda: Vit(16, 2), "vit32": lambda: Vit(32, 4), "resnet": resnet}


def renamed(arch: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of searchfm's net under the names of the peer's; the nets compute the same function with them."""
    names = list(NETS[arch]().state_dict())
    if arch in ("mlp", "cnn"):  # the same layers in the same order
        return dict(zip(names, weights.values(), strict=True))
    if arch == "resnet":  # timm's names are torchvision's
        return {name: weights[f"model.{name}"] for name in names}
    table = {
        "token": "cls_token",
        "position": "pos_embed",
        "patches.": "patch_embed.proj.",
        "encoder.layers.": "blocks.",
        "encoder.norm.": "norm.",
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
    }

    def original(name: str) -> str:
        for part, other in table.items():
            name = name.replace(part, other)
        return name

    return {name: weights[original(name)] for name in names}


@cache
def fashion(side: int, mean: float, std: float) -> Dataset[tuple[Tensor, int]]:
    """torchvision's FashionMNIST, its training part, from the files that searchfm finds or fetches."""
    steps = [transforms.ToTensor(), transforms.Normalize((mean,), (std,))]
    if side != 28:
        steps.insert(0, transforms.Resize(side))
    with tempfile.TemporaryDirectory(prefix="bench-") as root:  # the class reads all into memory
        raw = Path(root) / "FashionMNIST/raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
                (raw / name).write_bytes(_content(name) if part == "train" else b"")  # it asks for test files too
        return FashionMNIST(root, train=True, transform=transforms.Compose(steps))


def _content(name: str) -> bytes:
    packed = fetch("fashion-mnist") / f"{name}.gz"
    return gzip.decompress(packed.read_bytes()) if packed.exists() else packed.with_suffix("").read_bytes()


def dataset(data: Splits) -> Dataset[tuple[Tensor, int]]:
    return fashion(data.train.images.shape[-1], data.mean.item(), data.std.item())


@dataclass(frozen=True)
class Trained:
    """What either side leaves: the optimizer's steps, probabilities of the validation part, weights by peer's names."""

    steps: int
    accuracy: float
    predicted: Tensor  # (V,) int64
    weights: Mapping[str, Tensor]
    loss: float  # of the training part, mean of the last epoch


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """The steps that Adam counted."""
    return int(max(state["step"].item() for state in optimizer.state.values()))


def train(
    arch: str,
    weights: Mapping[str, Tensor],
    data: Splits,
    orders: Iterator[Sequence[int]],
    lr: float,
    batch: int,
    device: str = "cpu",
) -> Trained:
    """A trial. weights: of the fresh net. orders: of an epoch's training images each, as positions in the part."""
    images = dataset(data)
    assert data.val is not None
    training = Subset(images, data.train.indices.tolist())
    validation = DataLoader(Subset(images, data.val.indices.tolist()), batch_size=batch)
    net = NETS[arch]().to(device)
    net.load_state_dict(weights)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for order in orders:
        net.train()
        running = 0.0
        for x, y in DataLoader(training, batch_size=batch, sampler=order):
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            running += loss.item() * len(x)
        net.eval()
        correct, rows = 0, []
        with torch.no_grad():
            for x, y in validation:
                x, y = x.to(device), y.to(device)
                predicted = net(x).argmax(1)
                rows.append(predicted)
                correct += predicted.eq(y).sum().item()
    accuracy = correct / len(data.val)
    final = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    return Trained(steps_of(optimizer), accuracy, torch.cat(rows), final, running / len(data.train))
