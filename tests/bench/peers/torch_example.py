"""A trial as in the PyTorch examples of Optuna and of Ray Tune: DataLoader, transforms, plain Adam."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from work import MEAN, STD, Work

TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])


class Fashion(Dataset):
    """As torchvision's FashionMNIST gives images: from an array in memory, through PIL and the transforms."""

    def __init__(self, work: Work, part: str) -> None:
        images, labels = work.arrays(part)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return TRANSFORM(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def net(widths: Sequence[int]) -> nn.Module:
    """The same function as searchfm's `mlp`; so are its first weights (He et al. 2015), since five epochs show them."""
    layers: list[nn.Module] = []
    units = 28 * 28
    for width in widths:
        linear = nn.Linear(units, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, 10))


def train(work: Work, model: nn.Module, lr: float, after: Callable[[int, float, int], None]) -> None:
    """Trains all epochs; `after` gets each of them, from 0, its validation accuracy, and the steps so far."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    train_loader = DataLoader(Fashion(work, "train"), batch_size=work.batch_size, shuffle=True)
    valid_loader = DataLoader(Fashion(work, "val"), batch_size=work.batch_size)
    steps = 0
    for epoch in range(work.epochs):
        model.train()
        running_loss = 0.0
        for data, target in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.view(data.size(0), -1)), target)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            steps += 1
        model.eval()
        correct = 0
        with torch.no_grad():
            for data, target in valid_loader:
                predicted = model(data.view(data.size(0), -1)).argmax(dim=1)
                correct += predicted.eq(target).sum().item()
        after(epoch, correct / len(valid_loader.dataset), steps)
