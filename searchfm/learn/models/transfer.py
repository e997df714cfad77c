"""Any timm model, with or without pretrained weights, of which the head and the last stages are trained.

Pretrained weights come from a file, the hub's cache, or the hub itself, with a timeout of seconds.
"""

import contextlib
import copy
import difflib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from searchfm.config import Shape, Transfer
from searchfm.errors import ConfigError, ModelError, model_errors

_PROBE_SECONDS = 5.0  # for the hub's first answer; its own client retries for 47 s
_WAYS_OUT = (
    "use --set model.transfer.model=NAME --set model.transfer.weights=FILE (.safetensors or .pth), or train all of it "
    "from a random start with --set model.transfer.weights=none --set model.transfer.tuned_blocks=all"
)


class Pretrained(nn.Module):
    """A timm model with frozen stages: no gradient, no dropout, batch norm's statistics kept.

    `stages` are the names of its parameters by stage, the stem first, the head last; only the last `trained` are
    trained. `frozen` are the names of the others, as `named_parameters` has them; `fixed` also those of the buffers of
    frozen modules, as `state_dict` has them.
    """

    moments: tuple[Tensor, Tensor] | None = None  # mean, std (C,) of the pretraining, pixels from 0 to 1
    loaded: "Loaded | None" = None  # the model with the pretrained weights, of which this net has a copy

    def __init__(self, model: Any, stages: list[list[str]], trained: int, layer_decay: float) -> None:
        super().__init__()
        self.model, self._stages, self._layer_decay = model, stages, layer_decay  # Any: nn.Module has too few types
        self.frozen = frozenset(f"model.{name}" for stage in stages[: len(stages) - trained] for name in stage)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        self._frozen = list(_frozen_modules(model, {id(p) for p in self.parameters() if not p.requires_grad}))
        buffers = {id(buffer) for module in self._frozen for buffer in module.buffers()}
        self.fixed = self.frozen | {name for name, buffer in self.named_buffers() if id(buffer) in buffers}

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32, normalised -> (N, K) logits."""
        logits: Tensor = self.model(images)
        return logits

    def train(self, mode: bool = True) -> "Pretrained":
        """Frozen stages stay in evaluation mode: their batch norm must keep its statistics of ImageNet, and their
        dropout, which is a module of theirs, drops nothing.
        """
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def unshare(self) -> None:
        """Copies all tensors, so that loading others into them changes no other net."""
        for tensor in [*self.parameters(), *self.buffers()]:
            tensor.data = tensor.data.clone()

    def lr_scales(self) -> dict[str, float]:
        """Each parameter's learning rate over the head's: `layer_decay` to the power of the stages between them."""
        top = len(self._stages) - 1
        return {f"model.{n}": self._layer_decay ** (top - i) for i, stage in enumerate(self._stages) for n in stage}

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm excludes from weight decay, by name."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}


def _frozen_modules(module: nn.Module, frozen: Set[int]) -> Iterator[nn.Module]:
    """The outermost modules that have parameters and only such with one of these ids."""
    ids = {id(parameter) for parameter in module.parameters()}
    if ids and ids <= frozen:
        yield module
    else:
        for child in module.children():
            yield from _frozen_modules(child, frozen)


@dataclass(frozen=True)
class Loaded:
    """A timm model with the weights of a file, never trained itself."""

    model: Any
    stages: list[list[str]]
    lacking: tuple[str, ...]  # layers that the file lacks: the head for other classes
    source: tuple[str, ...]  # names the state of the file, and what timm adapts the weights to
    cuts: dict[int, "Cut | None"] = field(default_factory=dict)  # of its nets, by their number of frozen parameters

    def copy(self, frozen: Collection[str]) -> Any:
        """The model again, with the same memory for its frozen parameters and what belongs to them. Layers that the
        file lacks start as torch initialises them.
        """
        parameters = {id(p): nn.Parameter(p.detach(), False) for n, p in self.model.named_parameters() if n in frozen}
        modules = _frozen_modules(self.model, parameters.keys())
        buffers = {id(buffer): buffer.detach() for module in modules for buffer in module.buffers()}
        model = copy.deepcopy(self.model, {**parameters, **buffers})
        for name in self.lacking:
            model.get_submodule(name).reset_parameters()
        return model

    def __deepcopy__(self, memo: object) -> "Loaded":
        return self  # of a net and its copies


@dataclass(frozen=True)
class Cut:
    """Where the frozen stages of a net end: graphs over the modules of a net of the same config."""

    frozen: fx.Graph  # images (N, C, H, W), normalised -> features (N, ...), in evaluation mode
    trained: Mapping[bool, fx.Graph]  # features -> logits (N, K), by the mode: whether in training


def cut(net: Pretrained) -> Cut | None:
    """The graph of a net, cut where one tensor, the features, is all that its trained part needs.

    Pooling that follows the frozen stages is before the cut, dropout behind it. None where nothing is frozen, where
    more than one tensor crosses, or where torch.fx cannot follow the model's code. Does not check that both halves
    together compute what the net does.
    """
    if net.loaded is None:
        return _cut(net)
    cuts, attributes = net.loaded.cuts, len(vars(net))
    if len(net.frozen) not in cuts:
        where = _cut(net)
        if len(vars(net)) > attributes:  # constants of the code, which the graphs take from this net
            return where
        cuts[len(net.frozen)] = where
    return cuts[len(net.frozen)]


def _cut(net: Pretrained) -> Cut | None:
    training, graphs = net.training, {}
    try:
        for mode in (True, False):
            graphs[mode] = _Tracer(net).trace(net.train(mode))
        ends = {mode: _boundary(net, graph) for mode, graph in graphs.items()}
        starts, outputs = ({m: next(n for n in g.nodes if n.op == op) for m, g in graphs.items()} for op in _ENDS)
        trained = {mode: _between(ends[mode], outputs[mode].args[0]) for mode in graphs}
        return Cut(_between(starts[False], ends[False]), trained)
    except Exception as error:  # hundreds of models, whose code may raise anything for a proxy in place of a tensor
        logging.getLogger(__name__).debug("not cut: %s", error)
        return None
    finally:
        net.train(training)


_ENDS = ("placeholder", "output")


class _Tracer(fx.Tracer):
    """Follows the code of modules that have frozen and trained parameters, and of trained heads with a pooling, which
    may then come before the cut. Other modules are nodes of the graph.
    """

    def __init__(self, net: Pretrained) -> None:
        super().__init__()
        self._frozen = net.frozen

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is a node."""
        frozen = {f"{module_qualified_name}.{name}" in self._frozen for name, _ in m.named_parameters()}
        pools = any("Pool" in type(child).__name__ for child in m.children())
        return len(frozen) < 2 and not (frozen == {False} and pools)


def _boundary(net: Pretrained, graph: fx.Graph) -> fx.Node:
    """The last node of the frozen part: what it gives does not change while the net is trained. Raises ValueError."""
    of = {node: _parameters(net, node) for node in graph.nodes}
    below: set[fx.Node] = set()  # frozen parameters, and all that is before them
    for node in reversed(graph.nodes):
        if node in below or of[node] & net.frozen:
            below |= {node, *node.all_input_nodes}
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        constant = fixed.issuperset(node.all_input_nodes) and of[node] <= net.frozen
        if node.op != "output" and constant and (node in below or not _random(net, node)):
            fixed.add(node)
    crossing: list[fx.Node] = [
        node for node in graph.nodes if node in fixed and node.op != "get_attr" and not fixed.issuperset(node.users)
    ]
    if len(crossing) != 1 or crossing[0].op == "placeholder":
        raise ValueError(f"{crossing} cross from the frozen to the trained part: must be one tensor, not the images")
    return crossing[0]


def _parameters(net: Pretrained, node: fx.Node) -> set[str]:
    """The names of the parameters that a node uses."""
    target = str(node.target)
    if node.op == "call_module":
        return {f"{target}.{name}" for name, _ in net.get_submodule(target).named_parameters()}
    return {target} if node.op == "get_attr" and target in dict(net.named_parameters()) else set()


def _random(net: Pretrained, node: fx.Node) -> bool:
    """Whether a node is a kind of dropout."""
    if node.op == "call_module":
        return any("drop" in type(module).__name__.lower() for module in net.get_submodule(str(node.target)).modules())
    return "drop" in getattr(node.target, "__name__", str(node.target))


def _between(start: fx.Node, end: Any) -> fx.Graph:
    """The graph from one node's value to that of another. Raises ValueError if `end` needs more than `start`."""
    wanted, graph = {end}, fx.Graph()
    for node in reversed(end.graph.nodes):
        if node in wanted and node is not start:
            wanted.update(node.all_input_nodes)
    copies = {start: graph.placeholder("inputs")}
    for node in end.graph.nodes:
        if node in wanted and node is not start:
            if node.op == "placeholder":
                raise ValueError("the trained part takes the images, too")
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    return graph


def build(config: Transfer, shape: Shape, classes: int) -> Pretrained:
    """(N, C, H, W) float32 -> (N, classes) float32 logits; the first convolution, the embeddings of position and the
    head are adapted to the images as timm does it. Raises ModelError, ConfigError.

    A model with the weights of a file is loaded once, and copied for each net. The nets share the memory of what is
    frozen in them: `Pretrained.unshare` comes before a change in place.
    """
    _check_name(config.model)
    loaded = None
    if config.weights == "none":
        model = _create(config, shape, classes)
        _try_out(model, config, shape, classes)
        stages = _stages(model)
    else:
        path = weights_file(config.model, config.weights)
        alike = replace(config, weights=str(path), tuned_blocks=0, layer_decay=1.0)
        loaded = _load(alike, shape, classes, _source(config, shape, path))
        stages = loaded.stages
    below = len(stages) - 1
    if config.tuned_blocks != "all" and config.tuned_blocks > below:
        raise ConfigError(
            "model.transfer.tuned_blocks",
            f'= {config.tuned_blocks}: {config.model} has {below} stages below its head; may be 0 to {below}, or "all"',
        )
    trained = len(stages) if config.tuned_blocks == "all" else 1 + int(config.tuned_blocks)
    if loaded is None:
        return Pretrained(model, stages, trained, config.layer_decay)
    model = loaded.copy({name for stage in stages[: len(stages) - trained] for name in stage})
    net = Pretrained(model, stages, trained, config.layer_decay)
    mean, std = (_channels(model.pretrained_cfg[key], shape[0]) for key in ("mean", "std"))
    net.moments, net.loaded = (mean, std), loaded
    return net


def _create(config: Transfer, shape: Shape, classes: int, path: Path | None = None) -> Any:
    """timm's model with random weights, or with those of a file."""
    import timm  # only studies that need timm pay for its import

    settings: dict[str, Any] = {"in_chans": shape[0], "num_classes": classes}
    if config.dropout:
        settings["drop_rate"] = config.dropout
    source = timm.models.get_pretrained_cfg(config.model)
    if source is not None and source.fixed_input_size:
        settings["img_size"] = shape[1:]
    problem = _unsupported(config, shape)
    if path is not None:
        settings |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "custom_load": False}}
        problem = f'model.transfer.weights = "{path}": does not load into {config.model}'
    with model_errors(problem):
        return timm.create_model(config.model, **settings)


MODELS = 4  # that a process keeps: their weights take memory


@lru_cache(maxsize=MODELS)
def _load(config: Transfer, shape: Shape, classes: int, source: tuple[str, ...]) -> Loaded:
    """The model with the weights of the file that `config.weights` names.

    timm loads leniently as soon as the head differs, so a file of another model could leave random weights in place
    without an error. Hence the comparison with a model of the same seed without a file. timm has no better way:
    load_checkpoint returns the missing keys, but adapts neither channels nor head; create_model adapts, and only logs.
    A process compares once: half of the time of loading.
    """
    path, key = Path(config.weights), (*source, str(classes))
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of the head's keys, which it leaves out as intended
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = None if key in _lacking else _create(config, shape, classes)
        torch.manual_seed(0)
        model = _create(config, shape, classes, path)
    _try_out(model, config, shape, classes)
    stages = _stages(model)
    if plain is not None:
        before = dict(plain.named_parameters())
        # Biases and scales may be what they start as: zeros and ones.
        random = [name for name, p in model.named_parameters() if p.ndim > 1 and torch.equal(p, before[name])]
        if missing := [name for name in random if name not in stages[-1]]:
            raise ModelError(f'model.transfer.weights = "{path}": not of {config.model}, has no {missing[0]}')
        _lacking[key] = tuple(name.rpartition(".")[0] for name in random)
    return Loaded(model, stages, _lacking[key], source)


_lacking: dict[tuple[str, ...], tuple[str, ...]] = {}  # layers that files lack, as this process found


def _source(config: Transfer, shape: Shape, path: Path) -> tuple[str, ...]:
    status = path.stat()
    return (config.model, str(shape), str(path.resolve()), str(status.st_mtime_ns), str(status.st_size))


def _stages(model: Any) -> list[list[str]]:
    """The parameters' names by stage; timm counts to the last, the head, a final norm or a last 1x1 convolution too."""
    from timm.models import group_parameters

    groups = group_parameters(model, model.group_matcher(coarse=True))
    return [groups[i] for i in sorted(groups)]


def _try_out(model: Any, config: Transfer, shape: Shape, classes: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch and any(side % size for side, size in zip(shape[1:], patch, strict=True)):
        raise ModelError(
            f'model.transfer.model = "{config.model}": its patches of {patch[0]}x{patch[1]} pixels do not cover images'
            f" of {shape[1]}x{shape[2]}; set data.size to a multiple of {patch[0]}"
        )
    with model_errors(_unsupported(config, shape)), torch.no_grad():
        logits = model.eval()(torch.zeros(1, *shape))
    if tuple(logits.shape) != (1, classes):
        raise ModelError(f'model.transfer.model = "{config.model}": gives {tuple(logits.shape)}, not (1, {classes})')
    model.train()


def _unsupported(config: Transfer, shape: Shape) -> str:
    return f'model.transfer.model = "{config.model}": does not take images of {"x".join(map(str, shape))}'


def _channels(values: tuple[float, ...], channels: int) -> Tensor:
    """Means or deviations; where the images have another number of channels than the weights, their mean for each."""
    own = torch.tensor(values, dtype=torch.float32)
    return own if len(own) == channels else own.mean().expand(channels).clone()


def input_sides(models: Sequence[str]) -> list[int]:
    """Input sides in pixels of the models that timm knows, without a network."""
    if not models:
        return []  # the import of timm takes seconds, which the first trial of any study would wait for
    import timm

    known = [timm.models.get_pretrained_cfg(name) for name in models if ":" not in name and timm.is_model(name)]
    return [max(config.input_size[1:]) for config in known if config is not None and config.input_size]


def weights_file(model: str, weights: str) -> Path:
    """The file with a model's weights: `weights` itself, or the hub's, which is kept. Raises ModelError in seconds."""
    if weights == "hub":
        return _from_hub(model)
    path = Path(weights).expanduser()
    if path.suffix not in (".safetensors", ".pth"):
        raise ModelError(f'model.transfer.weights = "{weights}": must be "hub", "none", or a .safetensors or .pth file')
    if not path.is_file():
        raise ModelError(f'model.transfer.weights = "{weights}": no such file')
    return path


def _check_name(name: str) -> None:
    """Raises ModelError, with names near it, unless timm has a model of this name."""
    import timm

    # Names with a scheme ("hf-hub:...") would let a study file name any code that timm can fetch.
    if ":" not in name and timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.6)
    hint = f"near: {', '.join(near)}" if near else "any name that timm.list_models() gives"
    raise ModelError(f'model.transfer.model = "{name}": timm has no such model; {hint}')


def _from_hub(model: str) -> Path:
    """A cached copy is used without a request; the hub has a few seconds for its first answer."""
    import huggingface_hub as hub
    import timm
    from huggingface_hub import constants, errors

    source = timm.models.get_pretrained_cfg(model)
    if source is None or not source.hf_hub_id:
        raise ModelError(f"{model} has no weights on the hub; {_WAYS_OUT}")
    names = [source.hf_hub_filename] if source.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        cached = hub.try_to_load_from_cache(source.hf_hub_id, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
        hub.get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        for name in names:
            with contextlib.suppress(errors.EntryNotFoundError):
                return Path(hub.hf_hub_download(source.hf_hub_id, name, etag_timeout=_PROBE_SECONDS))
        reason = f"{source.hf_hub_id} has no {' or '.join(names)}"
    except Exception as error:  # its HTTP client, and thus the errors, differ by version
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
    raise ModelError(f"the weights of {model} cannot be fetched from the hub ({reason}); {_WAYS_OUT}")
