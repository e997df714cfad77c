"""What a trial of a study costs, found out by building its models."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from searchfm.config import Config, Shape, Transfer
from searchfm.learn.models import classifier, flops, parameters


def costs(configs: Iterable[Config], shape: Shape, classes: int) -> dict[str, tuple[float, float]]:
    """The cheapest and the dearest of some configs: `parameters`, and `mflop` of one image's forward pass."""
    found = []
    for config in configs:
        model = config.model
        if isinstance(model.kind, Transfer):
            model = replace(model, kind=replace(model.kind, weights="none"))  # a cost does not depend on the weights
        blank = torch.zeros(shape[0])
        net = classifier(model, shape, classes, blank, blank + 1, seed=0, device=torch.device("cpu"))
        found.append((parameters(net)[0], flops(net, shape) / 1e6))
    sizes, work = zip(*found, strict=True)
    return {"parameters": (min(sizes), max(sizes)), "mflop": (min(work), max(work))}
