"""Every architecture keeps one contract; then what is particular to each."""

import copy
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from torch import nn

from searchfm.config import ModelConfig, Shape
from searchfm.errors import ConfigError, ModelError
from searchfm.learn.data import Splits
from searchfm.learn.models import Classifier, build, classifier, flops, parameters
from searchfm.learn.models.custom import Code
from searchfm.learn.models.transfer import Pretrained, weights_file
from searchfm.learn.train import Training
from searchfm.tables import BranchKey, LeafKey
from tests.learn.toys import config

ANY_CODE = Code(allowed=True)


def model_config(name: str, settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_table({"name": name, name: settings})


class Contract:
    """What is asked of every architecture. Subclasses say which, and what it must reach on digits."""

    name: ClassVar[str]
    settings: ClassVar[dict[str, Any]]
    shape: ClassVar[Shape] = (1, 28, 28)
    count: ClassVar[int]  # parameters at that shape with ten classes
    learner: ClassVar[dict[str, Any]]  # settings, and tables of the config, that learn digits
    tables: ClassVar[dict[str, Any]] = {"optimizer": {"lr": 0.003}, "train": {"epochs": 6}}
    accuracy: ClassVar[float]

    def net(self, seed: int = 3) -> nn.Module:
        return build(model_config(self.name, self.settings), self.shape, 10, seed=seed, code=ANY_CODE)

    def images(self) -> torch.Tensor:
        return torch.randn(4, *self.shape, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_in_logits_out(self, channels: int) -> None:
        net = build(model_config(self.name, self.settings), (channels, *self.shape[1:]), 7, seed=0, code=ANY_CODE)
        logits = net(torch.randn(5, channels, *self.shape[1:]))
        assert logits.shape == (5, 7)
        assert logits.dtype == torch.float32

    def test_gradient_reaches_what_is_trained_and_nothing_else(self) -> None:
        net = self.net().train()
        with torch.no_grad():  # some start parts of themselves at zero, which stops the gradient before them
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        net(self.images()).square().sum().backward()
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None, name

    def test_state_makes_the_same_net_again(self) -> None:
        net, other = self.net(seed=1).eval(), self.net(seed=2).eval()
        assert not torch.equal(net(self.images()), other(self.images()))
        other.load_state_dict(net.state_dict())
        assert torch.equal(net(self.images()), other(self.images()))

    def test_number_of_parameters(self) -> None:
        assert parameters(self.net())[0] == self.count

    def test_a_seed_is_a_net(self) -> None:
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        one = self.net(seed=5)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        two, other = self.net(seed=5), self.net(seed=6)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    def test_learns_digits(self, digits: Splits) -> None:
        *_, last = Training(config(self.name, self.learner, **self.tables), digits, code=ANY_CODE)
        assert last.val_accuracy is not None
        assert last.val_accuracy >= self.accuracy


class SlowToLearn(Contract):
    """An architecture that takes seconds to learn digits."""

    @pytest.mark.slow
    def test_learns_digits(self, digits: Splits) -> None:
        super().test_learns_digits(digits)


class TestCustom(Contract):
    """A factory of the user's own."""

    name = "custom"
    settings: ClassVar[dict[str, Any]] = {"factory": "tests.learn.nets:small", "params": {"width": 8, "sizes": [3, 5]}}
    count = (9 * 8 + 8 + 16) + (25 * 8 * 8 + 8 + 16) + (28 * 28 * 8 * 10 + 10)
    learner: ClassVar[dict[str, Any]] = settings
    accuracy = 0.94


class TestMlp(Contract):
    name, settings = "mlp", {"layers": 2, "width": 200}
    count = 784 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
    learner: ClassVar[dict[str, Any]] = {"width": 64, "dropout": 0.1, "batch_norm": True}
    accuracy = 0.94


class TestNineLayers(Contract):
    """The deep net of the second report: a start that shrinks the signal leaves it at chance."""

    name, settings = "mlp", {"layers": 9, "width": 200}
    count = 784 * 200 + 200 + 8 * (200 * 200 + 200) + 200 * 10 + 10
    learner: ClassVar[dict[str, Any]] = {"layers": 9, "width": 200}
    tables: ClassVar[dict[str, Any]] = {"optimizer": {"lr": 0.0005}, "train": {"epochs": 5}}
    accuracy = 0.95


class TestCnn(Contract):
    name, settings = "cnn", {"stages": 2, "filters": [32, 64], "dense_layers": 1, "dense_width": 100}
    count = 9 * 32 + 32 + 9 * 32 * 64 + 64 + 7 * 7 * 64 * 100 + 100 + 100 * 10 + 10
    learner: ClassVar[dict[str, Any]] = {"filters": [16, 32], "batch_norm": True, "conv_dropout": 0.1, "dropout": 0.1}
    accuracy = 0.94


class TestNineStages(SlowToLearn):
    """The second report's nine convolutions and eight poolings: five halve a 32-pixel image, the rest keep its size."""

    name, shape = "cnn", (3, 32, 32)
    settings: ClassVar[dict[str, Any]] = {
        "stages": 9,
        "filters": 8,
        "pool": ["max", "max-same", "max", "max-same", "max", "max-same", "max", "max", "none"],
        "dense_layers": 2,
    }
    count = (9 * 3 * 8 + 8) + 8 * (9 * 8 * 8 + 8) + (8 * 100 + 100) + (100 * 100 + 100) + (100 * 10 + 10)
    learner: ClassVar[dict[str, Any]] = {
        "stages": 4,
        "filters": 16,
        "pool": ["average", "max-same", "max", "none"],
        "convs": 2,
        "head": "average",
        "batch_norm": True,
    }
    accuracy = 0.95

    def test_images_in_logits_out(self) -> None:  # type: ignore[override]
        assert self.net()(self.images()).shape == (4, 10)


class TestVit(SlowToLearn):
    name, settings = "vit", {}
    # patches, class token, positions of 49 patches and the token; six layers; norm and classes
    count = (16 * 64 + 64) + 64 + 50 * 64 + 6 * (4 * 64 * 64 + 4 * 64 + 8 * 64 * 64 + 5 * 64 + 4 * 64) + 128 + 650
    learner: ClassVar[dict[str, Any]] = {"patch_size": 2, "hidden_dim": 32, "layers": 2, "pooling": "average"}
    tables: ClassVar[dict[str, Any]] = {
        "optimizer": {"lr": 0.005},
        "schedule": {"name": "one-cycle"},
        "train": {"epochs": 14},
    }
    accuracy = 0.88


class TestVitOfConvolutions(SlowToLearn):
    """Its patches of 4 pixels are two 3x3 convolutions that halve the image, and a 1x1 one: 32 filters, then 64."""

    name, settings = "vit", {"stem_convs": 1}
    count = TestVit.count - (16 * 64 + 64) + (9 * 32 + 2 * 32) + (9 * 32 * 64 + 64) + (64 * 64 + 64)
    learner: ClassVar[dict[str, Any]] = TestVit.learner | {"stem_convs": 1}
    tables: ClassVar[dict[str, Any]] = TestVit.tables
    accuracy = 0.93


class TestVitWithAllTokens(SlowToLearn):
    """Its classifier sees the 49 tokens side by side, and there is no class token."""

    name, settings = "vit", {"pooling": "flatten"}
    count = TestVit.count - 64 - 64 + 48 * 64 * 10
    learner: ClassVar[dict[str, Any]] = TestVit.learner | {"pooling": "flatten"}
    tables: ClassVar[dict[str, Any]] = TestVit.tables
    accuracy = 0.93


@pytest.mark.parametrize(
    ("patch_size", "convs", "filters", "strides", "patch"),
    [
        (1, 1, [8], [1], 1),
        (2, 1, [8], [2], 1),
        (7, 1, [8], [1], 7),
        (14, 1, [8], [2], 7),
        (4, 3, [2, 2, 4, 4, 4, 8], [1, 1, 2, 1, 1, 2], 1),
        (7, 2, [4, 8], [1, 1], 7),
    ],
)
def test_a_stem_of_convolutions_halves_as_often_as_the_patch_allows(
    patch_size: int, convs: int, filters: list[int], strides: list[int], patch: int
) -> None:
    settings = {"patch_size": patch_size, "stem_convs": convs, "hidden_dim": 8, "layers": 1}
    embed: Any = build(model_config("vit", settings), (1, 28, 28), 10, seed=0).patch_embed
    assert [layer.conv.out_channels for layer in embed.backbone] == filters
    assert [layer.conv.stride[0] for layer in embed.backbone] == strides
    assert embed.proj.stride == (patch, patch)
    assert embed.num_patches == (28 // patch_size) ** 2


class TestResidual(Contract):
    # ResNet-20 with projections as shortcuts; the paper's 0.27 M.
    name, settings, shape = "residual", {"stages": 3, "blocks": 3, "width": 16}, (3, 32, 32)
    count = 272_474
    learner: ClassVar[dict[str, Any]] = {"stages": 2, "blocks": 1, "width": 8}
    tables: ClassVar[dict[str, Any]] = Contract.tables | {"schedule": {"name": "constant"}}  # few steps
    accuracy = 0.92


class TestBasicThenBottleneck(SlowToLearn):
    """The second report's residual block and bottleneck in series."""

    name = "residual"
    settings: ClassVar[dict[str, Any]] = {"stages": 2, "blocks": 1, "block": ["basic", "bottleneck"], "dropout": 0.4}
    count = (
        (9 * 16 + 32)  # stem
        + 2 * (9 * 16 * 16 + 32)  # basic block
        + (16 * 32 + 64) + (9 * 32 * 32 + 64) + (32 * 128 + 256) + (16 * 128 + 256)  # bottleneck and its shortcut
        + (128 * 10 + 10)
    )  # fmt: skip
    learner: ClassVar[dict[str, Any]] = settings | {"width": 8}
    accuracy = 0.88


class TestTransferWhole(SlowToLearn):
    name = "transfer"
    settings: ClassVar[dict[str, Any]] = {"model": "resnet18", "weights": "none", "tuned_blocks": "all"}
    count = 11_689_512 - 1000 * 513 + 10 * 513 - 2 * 64 * 49  # as published, for 10 classes and one channel
    learner: ClassVar[dict[str, Any]] = {"model": "test_resnet", "weights": "none", "tuned_blocks": "all"}
    accuracy = 0.9


class TestTransferTopStage(SlowToLearn):
    name = "transfer"
    settings: ClassVar[dict[str, Any]] = {
        "model": "test_efficientnet",
        "weights": "none",
        "tuned_blocks": 1,
        "dropout": 0.1,
    }
    count = 101_334
    learner: ClassVar[dict[str, Any]] = {
        "model": "test_resnet",
        "weights": "none",
        "tuned_blocks": 2,
        "layer_decay": 0.8,
    }
    accuracy = 0.7


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit", "residual"])
def test_every_key_of_an_architecture_changes_the_net(name: str) -> None:
    """In its layers, its weights or, where these are the same, its outputs."""
    (models,) = (item for item in ModelConfig.schema.values() if isinstance(item, BranchKey))
    kind = models.options[name]
    base = {"dense_layers": 2} if name == "cnn" else {"layers": 2} if name == "vit" else {}
    other = {"patch_size": 8, "hidden_dim": 128, "heads": 8, "dense_layers": 3, "mlp_ratio": 2.0, "pool": "average"}
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def seen(settings: dict[str, Any]) -> tuple[str, list[float]]:
        net = build(model_config(name, base | settings), (1, 32, 32), 10, seed=0)
        return repr(net), net.eval()(images).flatten().tolist()

    before = seen({})
    for key, item in kind.schema.items():
        assert isinstance(item, LeafKey)
        match base.get(key, item.default):
            case _ if key in other:
                value: Any = other[key]
            case bool(value):
                value = not value
            case int(value):
                value += 2
            case float():
                value = 0.5
            case str(text):
                value = next(each for each in item.texts if each != text)
        assert seen({key: value}) != before, key


def test_classifier_takes_raw_images() -> None:
    mean, std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.1, 0.25])
    model = Classifier(nn.Identity(), mean, std)
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model(images.float()), expected)


@pytest.mark.parametrize(("width", "adjacent"), [(8, False), (16, True)])
def test_channels_are_adjacent_on_a_cpu_unless_torch_would_crash(width: int, adjacent: bool) -> None:
    settings = {"stages": 2, "blocks": 1, "block": ["basic", "basic"], "width": width}
    model = classifier(
        model_config("residual", settings),
        (3, 48, 48),
        4,
        torch.zeros(3),
        torch.ones(3),
        seed=0,
        device=torch.device("cpu"),
    )
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) == adjacent for conv in convs)
    model(torch.zeros(8, 3, 48, 48, dtype=torch.uint8)).sum().backward()


@pytest.mark.parametrize(
    ("name", "capability", "adjacent"),
    [
        ("test_resnet", "AVX2", True),
        ("test_resnet", "AVX512", False),
        ("vgg11", "AVX2", False),
        ("test_efficientnet", "AVX512", True),  # has depthwise convolutions
        ("test_vit", "AVX2", False),
    ],
)
def test_channels_of_a_timm_model_are_adjacent_where_that_is_faster(
    name: str, capability: str, adjacent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    device = torch.device("cpu")
    config = model_config("transfer", {"model": name, "weights": "none", "tuned_blocks": "all"})
    model = classifier(config, (3, 64, 64), 4, torch.zeros(3), torch.ones(3), seed=0, device=device)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    assert convs
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) == adjacent for conv in convs)


def test_flops_count_two_an_addition_and_multiplication() -> None:
    model = Classifier(
        build(model_config("mlp", {"width": 200}), (1, 28, 28), 10, seed=0), torch.zeros(1), torch.ones(1)
    )
    model.train()
    assert flops(model, (1, 28, 28)) == 2 * (784 * 200 + 200 * 200 + 200 * 10)
    assert model.training


def test_flops_see_attention() -> None:
    settings = {"patch_size": 7, "hidden_dim": 16, "layers": 1, "heads": 2, "pooling": "average"}
    model = Classifier(build(model_config("vit", settings), (1, 28, 28), 10, seed=0), torch.zeros(1), torch.ones(1))
    tokens, dim = 16, 16
    dense = tokens * (49 * dim + 12 * dim * dim)
    attention = 2 * tokens * tokens * dim
    assert flops(model, (1, 28, 28)) == 2 * (dense + attention + dim * 10)


def test_pooling_before_relu_is_the_same_function() -> None:
    images = torch.randn(3, 4, 8, 8)
    pooled_first = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
    assert torch.equal(pooled_first(images), nn.functional.max_pool2d(images.relu(), 2))
    layers = [type(layer) for layer in build(model_config("cnn", {}), (1, 28, 28), 10, seed=0).children()]
    assert layers.index(nn.MaxPool2d) < layers.index(nn.ReLU)


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("vit", {"patch_size": 3}, "model.vit.patch_size"),
        ("residual", {"stages": 5}, "model.residual.stages"),
        ("cnn", {"stages": 4}, "model.cnn.pool"),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], key: str, digits: Splits) -> None:
    with pytest.raises(ConfigError, match=key):
        Training(config(name, settings), digits)


# --- transfer ---------------------------------------------------------------------------------------------------------


def transfer_settings(**settings: Any) -> ModelConfig:
    return model_config("transfer", {"model": "test_resnet", "weights": "none"} | settings)


@pytest.mark.parametrize(
    ("tuned", "trained"),
    [
        (0, {"fc"}),
        (1, {"fc", "layer4"}),
        (3, {"fc", "layer4", "layer3", "layer2"}),
        ("all", {"fc", "layer4", "layer3", "layer2", "layer1", "conv1", "bn1"}),
    ],
)
def test_stages_are_trained_from_the_top(tuned: int | str, trained: set[str]) -> None:
    net = build(
        model_config("transfer", {"model": "resnet18", "weights": "none", "tuned_blocks": tuned}),
        (1, 28, 28),
        10,
        seed=0,
    )
    assert {name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad} == trained


def test_more_stages_than_there_are_is_refused_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r'tuned_blocks = 6: test_resnet has 5 stages .* 0 to 5, or "all"'):
        build(transfer_settings(tuned_blocks=6), (1, 28, 28), 10, seed=0)


def test_frozen_stages_keep_their_statistics_and_trained_ones_do_not() -> None:
    net = build(transfer_settings(tuned_blocks=1), (1, 28, 28), 10, seed=0)
    before = copy.deepcopy(net.state_dict())
    for mode in (True, False, True):
        net.train(mode)
    net(torch.randn(8, 1, 28, 28))
    moved = {name.split(".")[1] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"layer4"}
    assert isinstance(net, Pretrained)
    assert net.fixed == {name for name in before if name.split(".")[1] not in {"layer4", "fc"}}


def test_layer_decay_falls_stage_by_stage() -> None:
    net = build(transfer_settings(tuned_blocks="all", layer_decay=0.5), (1, 28, 28), 10, seed=0)
    assert isinstance(net, Pretrained)
    scales = {name.split(".")[1]: scale for name, scale in net.lr_scales().items()}
    assert scales["fc"] == 1.0
    assert (scales["layer4"], scales["layer3"], scales["layer1"]) == (0.5, 0.25, 0.0625)
    assert scales["conv1"] == scales["bn1"] == 0.03125


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file such as timm's own: test_resnet for 1,000 classes and colour images."""
    net = build(transfer_settings(), (3, 160, 160), 1000, seed=11)
    path = tmp_path / "test_resnet.safetensors"
    safetensors.torch.save_file({n.removeprefix("model."): t for n, t in net.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(weights: Path, suffix: str) -> None:
    state = safetensors.torch.load_file(weights)
    path = weights.with_suffix(suffix)
    if suffix == ".pth":
        torch.save(state, path)
    model = transfer_settings(weights=str(path))
    net = build(model, (1, 28, 28), 10, seed=0)
    assert isinstance(net, Pretrained)
    loaded = net.model.state_dict()
    assert torch.equal(loaded["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    # One channel takes the sum of the three, so that a grey image answers as its colour copy did.
    torch.testing.assert_close(loaded["conv1.0.weight"], state["conv1.0.weight"].sum(1, keepdim=True))
    assert loaded["fc.weight"].shape == (10, state["fc.weight"].shape[1])
    # Weights bring the statistics they were trained with; the data's are not theirs.
    whole = classifier(model, (3, 28, 28), 10, torch.zeros(3), torch.ones(3), seed=0, device=torch.device("cpu"))
    torch.testing.assert_close(whole.mean, torch.tensor(net.model.pretrained_cfg["mean"]))


def test_nets_of_a_file_share_what_is_frozen_and_nothing_else(weights: Path) -> None:
    def pretrained(seed: int, **settings: Any) -> Pretrained:
        torch.manual_seed(3 * seed)  # of no influence
        net = build(transfer_settings(weights=str(weights), **settings), (1, 28, 28), 10, seed=seed)
        assert isinstance(net, Pretrained)
        return net

    head = {"model.fc.weight", "model.fc.bias"}
    one, other, stage = pretrained(1), pretrained(2), pretrained(1, tuned_blocks=1)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a is not b
        assert (a.data_ptr() == b.data_ptr()) == torch.equal(a, b) == (name not in head), name
    apart = [n for (n, a), b in zip(one.state_dict().items(), stage.state_dict().values(), strict=True) if a is not b]
    assert {name for name, p in stage.named_parameters() if p.requires_grad} <= set(apart)
    memory = {tensor.data_ptr() for tensor in one.state_dict().values()}
    alone = {n for n, tensor in stage.state_dict().items() if tensor.data_ptr() not in memory}
    assert {name.split(".")[1] for name in alone} == {"layer4", "fc"}, "statistics of batch norm too"
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in stage.state_dict().items())
    again = pretrained(1)
    other.unshare()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    for net in (one, pretrained(1), copy.deepcopy(one)):
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


def test_a_head_for_as_many_classes_comes_from_the_file(weights: Path) -> None:
    expected = safetensors.torch.load_file(weights)["fc.weight"]
    for seed in (1, 2):
        net = build(transfer_settings(weights=str(weights)), (1, 28, 28), 1000, seed=seed)
        assert torch.equal(net.state_dict()["model.fc.weight"], expected)


def test_a_file_that_changed_is_loaded_again(weights: Path) -> None:
    settings = transfer_settings(weights=str(weights))
    before = build(settings, (1, 28, 28), 10, seed=0).state_dict()["model.bn1.weight"].clone()
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({**state, "bn1.weight": state["bn1.weight"] + 1}, weights)
    assert torch.equal(build(settings, (1, 28, 28), 10, seed=0).state_dict()["model.bn1.weight"], before + 1)


def test_an_unknown_model_is_refused_with_names_near_it() -> None:
    with pytest.raises(ModelError, match=r'"resnet81".*near: .*resnet18'):
        build(transfer_settings(model="resnet81"), (1, 28, 28), 10, seed=0)
    with pytest.raises(ModelError, match="no such model"):
        build(transfer_settings(model="hf-hub:someone/anything"), (1, 28, 28), 10, seed=0)


def test_weights_that_cannot_be_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    def refused(model: str, path: str, text: str) -> None:
        with pytest.raises(ModelError, match=text) as caught:
            build(transfer_settings(model=model, weights=path), (1, 28, 28), 10, seed=0)
        assert "\n" not in str(caught.value)

    refused("test_resnet", str(tmp_path / "missing.safetensors"), "no such file")
    refused("test_resnet", "weights.bin", "must be .*safetensors or .pth")
    refused("resnet18", str(weights), "does not load into resnet18")
    (tmp_path / "broken.safetensors").write_bytes(weights.read_bytes()[:1000])
    refused("test_resnet", str(tmp_path / "broken.safetensors"), "does not load into test_resnet")
    # timm would leave random weights where a file has none; nothing may pass for pretrained that is not.
    state = safetensors.torch.load_file(weights)
    del state["layer2.0.conv1.weight"]
    safetensors.torch.save_file(state, tmp_path / "partial.safetensors")
    refused("test_resnet", str(tmp_path / "partial.safetensors"), "not of test_resnet, has no layer2.0.conv1.weight")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_hostile_weights_file_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"conv1.weight": Hostile(mark)}, tmp_path / "hostile.pth")
    with pytest.raises(ModelError, match="does not load"):
        build(transfer_settings(weights=str(tmp_path / "hostile.pth")), (1, 28, 28), 10, seed=0)
    assert not mark.exists()


def test_images_too_small_for_a_model_are_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"patches of 16x16 pixels do not cover images of 28x28.*data.size"):
        build(transfer_settings(model="vit_tiny_patch16_224"), (1, 28, 28), 10, seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets where this process finds the hub, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def at(address: str) -> None:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        monkeypatch.setattr(constants, "ENDPOINT", address)

    return at


def test_an_unreachable_hub_is_an_error_within_seconds(hub: Callable[[str], None]) -> None:
    hub("http://127.0.0.1:9")  # nobody listens there
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        weights_file("resnet18", "hub")
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert "resnet18" in message
    assert "weights=FILE" in message
    assert "weights=none" in message
    assert "\n" not in message


def test_the_hub_is_asked_once_and_its_copy_kept(hub: Callable[[str], None], weights: Path) -> None:
    """A server that answers as the hub does; and then none."""
    content = weights.read_bytes()
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            served = self.path == "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
            self.send_response(200 if served or self.path == "/" else 404)
            self.send_header("Content-Length", str(len(content) if served else 0))
            if served:
                self.send_header("ETag", '"0123456789abcdef"')
                self.send_header("X-Repo-Commit", "c" * 40)
            self.end_headers()
            if served and self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD  # noqa: N815 (http.server's name)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        hub(f"http://127.0.0.1:{server.server_port}")
        assert weights_file("test_resnet", "hub").read_bytes() == content
        assert sum(line.startswith("GET /timm/") for line in asked) == 1, asked
    finally:
        server.shutdown()
        server.server_close()
    count = len(asked)
    assert weights_file("test_resnet", "hub").read_bytes() == content
    assert len(asked) == count
    net = build(transfer_settings(weights="hub"), (1, 28, 28), 10, seed=0)
    assert torch.equal(net.state_dict()["model.bn1.weight"], safetensors.torch.load_file(weights)["bn1.weight"])
