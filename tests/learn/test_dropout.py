"""Dropout: the rate, the mean and the generator of torch's own; nothing of it in evaluation, exports and state."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from searchfm.config import ModelConfig, Shape
from searchfm.learn.models import Classifier, build, served
from searchfm.learn.models.custom import Code
from searchfm.learn.models.dropout import Dropout

COUNT = 1_000_000
NETS: dict[str, tuple[dict[str, Any], Shape, int]] = {  # settings, shape, dropouts
    "mlp": ({"layers": 2, "width": 8, "dropout": 0.2}, (1, 8, 8), 2),
    "cnn": ({"filters": 4, "dense_layers": 2, "dropout": 0.2, "conv_dropout": 0.1}, (1, 16, 16), 2),
    "residual": ({"stages": 1, "blocks": 1, "width": 4, "dropout": 0.2}, (1, 8, 8), 1),
    "vit": ({"patch_size": 4, "hidden_dim": 16, "layers": 1, "heads": 2, "dropout": 0.1}, (1, 8, 8), 4),
    "transfer": ({"model": "test_vit", "weights": "none", "dropout": 0.2}, (3, 160, 160), 1),
}


def net(name: str) -> nn.Module:
    settings, shape, _ = NETS[name]
    return build(ModelConfig.from_table({"name": name, name: settings}), shape, 3, seed=0)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_a_million_draws_keep_rate_and_mean(p: float) -> None:
    """Within five standard deviations of the binomial distribution with the realised probability."""
    torch.manual_seed(3)
    kept = Dropout(p)(torch.ones(COUNT))
    keep = round((1 - p) * 65536) / 65536
    bound = 5 * math.sqrt(keep * (1 - keep) / COUNT)
    assert abs(int((kept > 0).sum()) / COUNT - keep) < bound
    assert abs(kept.double().mean().item() - 1) < bound / keep
    assert kept.unique().tolist() == [0.0, torch.tensor(1 / keep).item()], "scaled by exactly the probability to keep"
    # Each of the four slices of a word by itself, and units beside each other.
    for i in range(4):
        assert abs((kept[i::4] > 0).double().mean().item() - keep) < 2 * bound
        pairs = (kept[i::4] > 0) & (kept.roll(-1)[i::4] > 0)
        assert abs(pairs.double().mean().item() - keep**2) < 2 * 5 * math.sqrt(keep**2 / COUNT)


@pytest.mark.parametrize(("p", "zeros"), [(0.0, 0), (1e-9, 0), (1.0, 10_000)])
def test_ends_of_the_range(p: float, zeros: int) -> None:
    assert int((Dropout(p)(torch.ones(10_000)) == 0).sum()) == zeros
    assert Dropout(1 - 1e-9)(torch.ones(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_and_type_are_those_of_the_kept_units(dtype: torch.dtype) -> None:
    units = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)
    out = Dropout(0.4)(units)
    out.backward(torch.ones_like(out))
    assert out.dtype == dtype
    assert units.grad is not None
    torch.testing.assert_close(units.grad * units, out)


def test_masks_follow_torch_s_generator_and_not_the_layout_in_memory() -> None:
    layer, units = Dropout(0.5), torch.ones(2, 3, 4, 5)
    torch.manual_seed(1)
    first, second = layer(units), layer(units)
    torch.manual_seed(1)
    assert torch.equal(layer(units.to(memory_format=torch.channels_last)), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NETS)
def test_every_net_of_ours_has_it_where_torch_s_was(name: str) -> None:
    model = net(name)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    assert all(type(module) is Dropout for module in layers)
    assert len(layers) == NETS[name][2]
    assert not any("drop" in key for key in model.state_dict())
    for module in model.modules():
        if type(module) is Dropout:
            module.__class__ = nn.Dropout
    torch.manual_seed(2)
    images = torch.randn(2, *NETS[name][1])
    assert torch.equal(model.eval()(images), net(name).eval()(images)), "the same weights, and the identity"


def test_the_user_s_own_nets_keep_torch_s() -> None:
    config = ModelConfig.from_table({"name": "custom", "custom": {"factory": "tests.learn.nets:small"}})
    model = build(config, (1, 8, 8), 3, seed=0, code=Code(allowed=True))
    assert [type(module) for module in model.modules() if isinstance(module, nn.Dropout)] == [nn.Dropout]


def test_an_exported_graph_draws_nothing() -> None:
    model = served(Classifier(net("mlp"), torch.zeros(1), torch.ones(1)))
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8, dtype=torch.uint8),))
    operators = " ".join(str(node.target) for node in program.graph.nodes)
    assert "linear" in operators
    assert not any(word in operators for word in ("drop", "rand", "bernoulli"))
