"""Models of the user's own code: `factory(shape, classes, **params) -> nn.Module`, named "package.module:function".

The code is imported from the folder of the command or from PYTHONPATH, only where the caller allows it on this host,
and only with the sha256 that the study was begun with.
"""

import copy
import hashlib
import importlib
import importlib.util
import io
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchfm.config import Custom, Shape
from searchfm.errors import CodeError, CodeNotAllowedError, ModelError, one_line
from searchfm.tables import show


@dataclass(frozen=True)
class Code:
    """Whether the user's code may run in this process, and which."""

    allowed: bool = False
    sha256: str = ""  # that its source must have; empty: any


NO_CODE = Code()
_imported: dict[str, str] = {}  # sha256 by top-level module, when it was imported


def build(config: Custom, shape: Shape, classes: int, code: Code) -> nn.Module:
    """The net that the factory makes: (N, *shape) float32, normalised -> (N, classes) float32 logits.

    Raises CodeError where the code may not run, is not found or has changed; ModelError where the factory raises or
    returns no module.
    """
    where, factory = _where(config.factory), _import(config.factory, code)
    try:
        net = factory(shape, classes, **{name: _plain(value) for name, value in config.params.items()})
    except Exception as error:  # the user's code raises anything
        raise ModelError(f"{where}: raises {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise ModelError(f"{where}: returns {type(net).__name__}, must return a torch.nn.Module")
    return net


def try_out(net: nn.Module, config: Custom, shape: Shape, classes: int) -> None:
    """Raises ModelError unless the net takes a batch of two images and returns finite float32 logits."""
    where, training = _where(config.factory), net.training
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(2, *shape))
    except Exception as error:
        raise ModelError(
            f"{where}: its model does not take images of (2, {', '.join(map(str, shape))}): {one_line(error)}"
        ) from error
    net.train(training)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes) or logits.dtype != torch.float32:
        came = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{where}: its model returns {came}, must return torch.float32 (2, {classes})")
    if not logits.isfinite().all():
        raise ModelError(f"{where}: its model returns numbers that are not finite")


def check_model(factory: str, shape: Shape, classes: int, **params: Any) -> None:
    """Checks a factory of your own as searchfm's own models are tested; runs its code. For your own tests:

        searchfm.check_model("nets:small", (1, 28, 28), 10, width=32)

    The model takes batches of any size; gradients reach every trained parameter; equal seeds make equal models; in
    evaluation mode an image's logits do not depend on the others; state_dict, copies and torch.export hold all of it.
    Raises ModelError with the first point that fails, ConfigError for the arguments.
    """
    config = Custom(factory=factory, params=params)

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(config, shape, classes, Code(allowed=True))

    net, other = make(0), make(0)
    try_out(net, config, shape, classes)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    points: dict[str, Callable[[], bool]] = {
        "equal seeds make different weights": lambda: _equal(net.state_dict(), other.state_dict()),
        "has no parameter to train": lambda: any(each.requires_grad for each in net.parameters()),
        "a trained parameter gets no gradient": lambda: _gradients(make(0), images),
        "logits of an image depend on the other images in evaluation mode": lambda: _independent(net, images),
        "logits differ between two calls in evaluation mode": lambda: torch.equal(net(images), net(images)),
        "state_dict does not hold all of the model": lambda: _restores(net, make(1), images),
        "the outputs of a copy differ": lambda: torch.equal(copy.deepcopy(net)(images), net(images)),
        "the outputs of torch.export differ": lambda: _exports(net, images),
    }
    net.eval()
    for problem, holds in points.items():
        try:
            correct = holds()
        except Exception as error:
            raise ModelError(f"{_where(factory)}: {problem}: {type(error).__name__}: {one_line(error)}") from error
        if not correct:
            raise ModelError(f"{_where(factory)}: {problem}")


def source_sha256(factory: str) -> str:
    """sha256 of the factory's module, or of all Python files of its package. Imports nothing. Raises CodeError."""
    top, digest = factory.partition(":")[0].partition(".")[0], hashlib.sha256()
    with _importable():
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):  # a module without a spec, such as __main__
            spec = None
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise CodeError(f"{_where(factory)}: there is no module {top} in {Path.cwd()}, on PYTHONPATH or installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(file, folder) for folder in folders for file in sorted(folder.rglob("*.py"))]
    try:
        for file, folder in files or [(Path(str(spec.origin)), Path(str(spec.origin)).parent)]:
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    except OSError as error:
        raise CodeError(f"{_where(factory)}: {error.filename}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _import(factory: str, code: Code) -> Any:
    """The factory itself."""
    where, top = _where(factory), factory.partition(":")[0].partition(".")[0]
    if not code.allowed:
        raise CodeNotAllowedError(f"{where}: is code: a host runs it only with --allow-code; give that if you trust it")
    actual = source_sha256(factory)
    if code.sha256 and actual != code.sha256:
        change = f"sha256 {actual[:12]}, was {code.sha256[:12]}"
        raise CodeError(f"{where}: its code has changed ({change}); put it back, or begin another study with --name")
    if _imported.setdefault(top, actual) != actual:
        raise CodeError(f"{where}: its code has changed since this process imported it; start the process again")
    try:
        with _importable():
            return pkgutil.resolve_name(factory)
    except AttributeError:
        file = getattr(sys.modules.get(factory.partition(":")[0]), "__file__", "its module")
        raise CodeError(f"{where}: {file} has no {factory.partition(':')[2]}") from None
    except Exception as error:
        raise CodeError(f"{where}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def _importable() -> Iterator[None]:
    """The folder of the command counts as it does for `python -m`, after what is installed."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        importlib.invalidate_caches()
        yield
    finally:
        if added:
            sys.path.remove(folder)


def _where(factory: str) -> str:
    return f"model.custom.factory = {show(factory)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _gradients(net: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():  # some start parts of themselves at zero, which stops the gradient before them
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.autograd.backward(net.train()(images).square().sum())
    return all(each.grad is not None and bool(each.grad.any()) for each in net.parameters() if each.requires_grad)


def _independent(net: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(net(images)[:1], net(images[:1]), rtol=1e-4, atol=1e-5)


def _restores(net: nn.Module, other: nn.Module, images: Tensor) -> bool:
    content = io.BytesIO()
    torch.save(net.state_dict(), content)
    content.seek(0)
    other.load_state_dict(torch.load(content, weights_only=True))
    return torch.equal(other.eval()(images), net(images))


def _exports(net: nn.Module, images: Tensor) -> bool:
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
    return torch.allclose(program.module()(images[:3]), net(images[:3]), rtol=1e-4, atol=1e-5)
