"""The cache of features: what a net's frozen stages compute of each image, once for all epochs, trials and workers.

A file of the cache folder has the features of one part of a data set, of its images as they are or mirrored. Its name
has the sha256 of all that they depend on, and that of its content. All workers of a node map it into memory.
"""

import copy
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import filelock
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor, fx, nn

from searchfm.config import AugmentConfig, Config, Shape, Transfer
from searchfm.errors import DataError
from searchfm.format import seconds, size
from searchfm.home import cache_folder, file_sha256
from searchfm.learn.augment import flips
from searchfm.learn.data import Part, Splits, batches, to_device
from searchfm.learn.datasets import cache_dir
from searchfm.learn.models import Classifier, count_operations
from searchfm.learn.models.transfer import Cut, Pretrained, cut
from searchfm.tables import show

log = logging.getLogger("searchfm")

LIMIT = "SEARCHFM_FEATURE_CACHE"
DEFAULT = "4GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
FORMAT = 1  # of the files; those of another format are left alone
BATCH = 128  # images that the frozen stages take at once: a fixed number, since it decides the last bits of features
POLL = 0.2  # seconds between two tries for a lock


@dataclass(frozen=True)
class Features:
    """The parts of a data set with features (N, ...) in the place of images."""

    train: Part
    mirrored: Part | None  # the training images mirrored left to right, where the augmentation flips some
    val: Part | None
    cut: Cut
    seconds: float  # that the frozen stages took for the training images, mirrored ones too, when they were computed
    missing: Mapping[str, float]  # seconds that they would take for what the cache lacks, by its key; with `part_of`

    def batches(self, count: int, order: Tensor, flip: float, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, ...) and labels (B,) of the training part, `count` at a time: of mirrored images where
        `augment` would mirror them with the same generator.
        """
        if self.mirrored is None:
            yield from batches(self.train, count, order)
            return
        both = zip(batches(self.train, count, order), batches(self.mirrored, count, order), strict=True)
        for (plain, labels), (mirrored, _) in both:
            chosen = flips(len(labels), flip, generator, plain.device)
            yield torch.where(chosen.view(-1, *[1] * (plain.ndim - 1)), mirrored, plain), labels

    def trained(self, model: Classifier) -> nn.Module:
        """What of a classifier takes features."""
        return _Trained(model, self.cut)


class _Trained(nn.Module):
    """Features (N, ...) -> logits (N, K), by the classifier's own modules, in its mode."""

    def __init__(self, model: Classifier, cut: Cut) -> None:
        super().__init__()
        self.model = model
        # No children: all modules in them are the classifier's.
        self._graphs = {mode: (fx.GraphModule(model.net, graph),) for mode, graph in cut.trained.items()}

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self._graphs[self.model.training][0](features)
        return logits


def limit() -> int:
    """Bytes that the cache may take, from SEARCHFM_FEATURE_CACHE; 0 turns it off. Raises DataError."""
    text = os.environ.get(LIMIT) or DEFAULT
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise DataError(f"{LIMIT} = {show(text)}: must be bytes, such as 500MB or {DEFAULT}; 0 turns the cache off")
    return int(float(match[1]) * UNITS[match[2].upper()])


def find(
    model: Classifier,
    data: Splits,
    augment: AugmentConfig,
    precision: Callable[[], torch.autocast],
    tick: Callable[[], None] = lambda: None,
    *,
    restored: bool = False,
    part_of: Splits | None = None,
) -> Features | None:
    """The features of the data; the cache gets those that it lacks.

    None where nothing is frozen, or without weights that all trials share; where the augmentation needs the images;
    where the net cannot be cut; where the features of all images are more than the cache may take; or where it cannot
    be written. tick: called every batch, and while another process computes the same features. restored: whether the
    model's weights are those of a checkpoint. part_of: all of the data, of which `data` are a few images to time a
    training with: then nothing is written. Raises what `tick` raises, and DataError for the variable.
    """
    most, net = limit(), model.net
    if not (isinstance(net, Pretrained) and net.loaded and net.frozen and most and data.train.fingerprint):
        return None
    if not _spares_images(augment) or (where := cut(net)) is None:
        return None
    frozen = _Frozen(model, where, precision, tick, None if restored else net.loaded.source)
    wanted, whole = (_wanted(splits, augment) for splits in (data, part_of or data))
    try:
        missing = [each for each in whole if not frozen.kept(*each)]
        if missing:
            images = sum(len(part) for part, _ in whole)
            if not frozen.splits(data.train) or not frozen.fit(images, data.train, most):
                return None
        found = [frozen.computed(*each) if part_of else frozen.features(*each, most) for each in wanted]
    except (OSError, SafetensorError) as error:
        log.warning("features are not cached: %s", error)
        return None
    an_image = sum(each.seconds for each in found) / sum(len(part) for part, _ in wanted)
    parts = to_device(
        [replace(part, images=each.tensor) for (part, _), each in zip(wanted, found, strict=True)],
        data.train.device,
    )
    train, *mirrored = parts if data.val is None else parts[:-1]
    return Features(
        train,
        mirrored[0] if mirrored else None,
        None if data.val is None else parts[-1],
        where,
        sum(each.seconds for (part, _), each in zip(wanted, found, strict=True) if part is data.train),
        {frozen.key(*each): an_image * len(each[0]) for each in missing},
    )


def _wanted(data: Splits, augment: AugmentConfig) -> list[tuple[Part, bool]]:
    """The parts whose features are needed, and whether mirrored; the validation part last."""
    mirrored = [(data.train, True)] if augment.flip else []
    return [(data.train, False), *mirrored, *([] if data.val is None else [(data.val, False)])]


def trained_flops(model: Classifier, shape: Shape, config: Config) -> int | None:
    """Floating-point operations for one image in the part of a model that takes cached features, as `models.flops`
    counts them; None where a training of the config takes images. The model's weights need not be the config's.
    """
    net, kind = model.net, config.model.kind
    if not (isinstance(net, Pretrained) and isinstance(kind, Transfer) and kind.weights != "none" and net.frozen):
        return None
    if not (limit() and _spares_images(config.augment)) or (where := cut(net)) is None:
        return None
    with torch.no_grad():
        model.eval()
        features = fx.GraphModule(net, where.frozen)(torch.zeros(1, *shape))
    return sum(count_operations(_Trained(model, where), features).values())


def _spares_images(config: AugmentConfig) -> bool:
    """Whether all augmentation is flips."""
    return not (config.crop or config.erase or (config.mix and (config.mixup or config.cutmix)))


_version = cache(version)  # reads a file
_weights: dict[tuple[str, ...] | None, str] = {}  # digests by source and graph


class _Frozen:
    """The frozen part of a classifier, and its files."""

    def __init__(
        self,
        model: Classifier,
        where: Cut,
        precision: Callable[[], torch.autocast],
        tick: Callable[[], None],
        source: tuple[str, ...] | None,
    ) -> None:
        self._model, self._cut, self._precision, self._tick = model, where, precision, tick
        self._part = fx.GraphModule(model.net, where.frozen)
        device = model.mean.device
        with precision():
            autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        about = {
            "format": FORMAT,
            "weights": self._weights(source),
            "graph": str(where.frozen),
            "modules": str(self._part),
            "precision": str(autocast),
            "device": [device.type, gpu, platform.machine(), torch.backends.cpu.get_cpu_capability()],
            "threads": torch.get_num_threads(),
            "versions": [_version("torch"), _version("timm")],
        }
        self._digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()

    def _weights(self, source: tuple[str, ...] | None) -> str:
        """A digest of all tensors, once a process for each source: 0.07 s for ResNet-18's 11 million numbers."""
        name = (*source, str(self._cut.frozen)) if source else None
        if name in _weights:
            return _weights[name]
        digest = hashlib.blake2b()
        for key, tensor in {**self._part.state_dict(), "mean": self._model.mean, "std": self._model.std}.items():
            digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        if name:
            _weights[name] = digest.hexdigest()
        return digest.hexdigest()

    def kept(self, part: Part, mirrored: bool) -> bool:
        """Whether there is a file."""
        return any(_files(self.key(part, mirrored)))

    def splits(self, part: Part) -> bool:
        """Whether both halves of the net compute what it does, in both modes, on two images; and whether the trained
        one leaves its input as it is, since files are mapped into memory.
        """
        images = next(batches(part, 2))[0]
        model = copy.deepcopy(self._model)  # batch norm changes
        features, trained = self(images, False), _Trained(model, self._cut)
        before = features.clone()
        cuda = [images.device] if images.device.type == "cuda" else []
        same = True
        for mode in (False, True):
            logits = []
            for net, inputs in ((model.train(mode), images), (trained, features)):
                with torch.random.fork_rng(devices=cuda), torch.no_grad(), self._precision():
                    torch.manual_seed(0)
                    logits.append(net(inputs).float())
            same = same and torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)
        return same and torch.equal(features, before)

    def fit(self, images: int, part: Part, most: int) -> bool:
        """Whether the features of so many images are no more than `most` bytes. Raises OSError for a full disk."""
        one = self(next(batches(part, 1))[0], False)
        if images * one.nbytes > most:
            log.info("features of %d images would take %s: not cached (%s)", images, size(images * one.nbytes), LIMIT)
            return False
        _folder().mkdir(parents=True, exist_ok=True)
        if images * one.nbytes > shutil.disk_usage(_folder()).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(_folder()))
        return True

    def features(self, part: Part, mirrored: bool, most: int) -> "_Kept":
        """The features of a part, from its file, which is written where there is none or it is damaged."""
        key = self.key(part, mirrored)
        kept = _opened(key)
        if kept is None:
            with _locked(key, self._tick):
                kept = _opened(key)
                if kept is None:
                    new = self.computed(part, mirrored)
                    taken = size(new.tensor.nbytes)
                    log.info("features of %d images computed in %s (%s)", len(part), seconds(new.seconds), taken)
                    kept = _write(key, new, most)
        return kept

    def computed(self, part: Part, mirrored: bool) -> "_Kept":
        """The features of a part, in memory."""
        began, rows = time.perf_counter(), []
        for images, _ in batches(part, BATCH):
            self._tick()
            rows.append(self(images, mirrored).cpu())
        return _Kept(torch.cat(rows), time.perf_counter() - began)

    def __call__(self, images: Tensor, mirrored: bool) -> Tensor:
        """Raw images (B, C, H, W) -> features (B, ...)."""
        training = self._model.training
        self._model.eval()
        with torch.no_grad(), self._precision():
            features: Tensor = self._part(self._model.normalised(images.flip(-1) if mirrored else images))
        self._model.train(training)
        return features.contiguous()  # safetensors writes no other layout

    def key(self, part: Part, mirrored: bool) -> str:
        """The name of the file, but for its content's sha256."""
        about = f"{part.fingerprint} {tuple(part.images.shape)} {mirrored} ".encode()
        return hashlib.sha256(self._digest + about + part.indices.numpy().tobytes()).hexdigest()


class _Kept(NamedTuple):
    """What a file holds."""

    tensor: Tensor  # features (N, ...)
    seconds: float  # that they took to compute


def _folder() -> Path:
    return cache_folder() / f"features-{FORMAT}"


def _files(key: str) -> list[Path]:
    return list(_folder().glob(f"{key}-*.safetensors"))


def _opened(key: str) -> _Kept | None:
    """The features in a file, memory-mapped. A damaged file is removed."""
    for path in _files(key):
        try:
            kept = _read(path)
            os.utime(path)  # the time of the last use
            return kept
        except FileNotFoundError:  # another process removed it
            continue
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("%s: %s; its features are computed again", path, error)
            path.unlink(missing_ok=True)
    return None


@lru_cache(maxsize=8)  # read and checked once a process
def _read(path: Path) -> _Kept:
    if (actual := file_sha256(path)) != path.stem.partition("-")[2]:
        raise ValueError(f"damaged, its sha256 is {actual[:12]}...")
    with safe_open(path, "pt") as opened:
        return _Kept(opened.get_tensor("features"), float(opened.metadata()["seconds"]))


def _write(key: str, new: _Kept, most: int) -> _Kept:
    """Writes a file, whole or not at all, in the place of those that were not used for longest."""
    _make_room(most - new.tensor.nbytes)
    partial = _folder() / f".{key}.tmp"
    try:
        safetensors.torch.save_file({"features": new.tensor}, partial, {"seconds": f"{new.seconds:.6f}"})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        path = partial.rename(_folder() / f"{key}-{file_sha256(partial)}.safetensors")
    finally:
        partial.unlink(missing_ok=True)
    return _read(path)


def _make_room(most: int) -> None:
    """Removes the files that were not used for longest, until all take at most so many bytes."""
    found = []
    for path in _folder().iterdir():  # files that killed processes left, too
        with suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(taken for _, taken, _ in found)
    for _, taken, path in sorted(found):
        if total <= most:
            break
        path.unlink(missing_ok=True)
        total -= taken


@contextmanager
def _locked(key: str, tick: Callable[[], None]) -> Iterator[None]:
    """The lock for writing a file."""
    path = cache_dir() / "locks" / f"features-{key[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    while True:
        tick()
        with suppress(filelock.Timeout):
            lock.acquire(timeout=POLL)
            break
    try:
        yield
    finally:
        lock.release()
