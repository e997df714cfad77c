"""Training on disk: checkpoints to resume from, and weights to use. safetensors and JSON; nothing is pickled.

A checkpoint is one file, `checkpoint-0003-SHA256.safetensors`, named by its epoch and the hash of its content. So one
rename puts both in place, and a flipped bit, which safetensors loads without an error, is detected.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from searchfm.config import Config
from searchfm.errors import CodeError, ModelError, one_line
from searchfm.home import file_sha256, write_json, write_whole
from searchfm.inputs import SPEC_BYTES, free_memory, read_text, regular
from searchfm.learn.models import Classifier, build
from searchfm.learn.models.custom import Code
from searchfm.records import SPEC, WEIGHTS, Epoch

log = logging.getLogger("searchfm")

_FORMAT = 1
HEADER = 10_000_000  # bytes of a safetensors file: names and shapes of tensors, and our JSON
_KEPT = 2  # the newest, and a fallback
UNREADABLE = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)
METADATA = "searchfm"  # key of our JSON in the metadata of every format
_NAME = re.compile(r"checkpoint-(\d{4,})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after an epoch: all epoch records so far, and every tensor that resuming needs."""

    epochs: tuple[Epoch, ...]
    tensors: Mapping[str, Tensor]
    numerics: tuple[int, ...] = (1,)  # under which they were trained


def write(folder: Path, checkpoint: Checkpoint, owner: Mapping[str, str]) -> Path:
    """Writes a checkpoint into the folder, whole or not at all, and removes all but the two newest.

    owner: what it belongs to (trial, config, data), which `read` compares. Raises StorageError; older ones then stay.
    """
    about = {
        "format": _FORMAT,
        "owner": dict(owner),
        "epochs": [asdict(epoch) for epoch in checkpoint.epochs],
        "numerics": checkpoint.numerics,
    }
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    content = safetensors.torch.save(tensors, metadata={METADATA: json.dumps(about)})
    sha = hashlib.sha256(content).hexdigest()
    path = folder / f"checkpoint-{len(checkpoint.epochs):04}-{sha}.safetensors"
    write_whole(path, content)
    for old in _listed([folder])[_KEPT:]:
        old.unlink(missing_ok=True)
    return path


def read(path: Path, owner: Mapping[str, str]) -> Checkpoint:
    """The checkpoint in a file. Raises one of UNREADABLE if it is damaged, unreadable, or another owner's."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not the name of a checkpoint")
    sha = file_sha256(path)
    if sha != match[2]:
        raise ValueError(f"damaged, its sha256 is {sha[:12]}..., not {match[2][:12]}...")
    text, tensors = _contents(path)
    about = json.loads(text)
    if about["format"] != _FORMAT:
        raise ValueError(f"of format {about['format']}, this version reads {_FORMAT}")
    for key, expected in owner.items():
        if about["owner"].get(key) != expected:
            raise ValueError(f"belongs to {key} {about['owner'].get(key)}, not {expected}")
    numerics = tuple(about.get("numerics", (1,)))  # versions that wrote none had the first
    return Checkpoint(tuple(Epoch(**record) for record in about["epochs"]), tensors, numerics)


def newest(folders: Iterable[Path], owner: Mapping[str, str]) -> Checkpoint | None:
    """The owner's undamaged checkpoint with the most epochs, if any; others are logged. A folder may be missing."""
    for path in _listed(folders):
        try:
            return read(path, owner)
        except UNREADABLE as error:
            log.warning("skipped: %s: %s", path, error)
    return None


def remove(folders: Iterable[Path]) -> None:
    """Removes the folders' checkpoints; ignores those that cannot be removed."""
    for path in _listed(folders):
        with contextlib.suppress(OSError):
            path.unlink()


def _listed(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints in folders, those with the most epochs first."""
    paths = [path for folder in folders for path in folder.glob("checkpoint-*.safetensors")]
    epochs = {path: int(match[1]) for path in paths if (match := _NAME.fullmatch(path.name))}
    return sorted(epochs, key=epochs.__getitem__, reverse=True)


def _contents(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The JSON and the tensors in a safetensors file of ours; the JSON is empty in others."""
    with safetensors.safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        return (opened.metadata() or {}).get(METADATA, ""), tensors


def _check_header(path: Path) -> None:
    """Raises OSError, ValueError for a safetensors file that would take more memory than a model of its size."""
    if (size := regular(path)) > (free := free_memory()):
        raise ValueError(f"has {size:,} bytes, {free:,} of memory are free")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > HEADER:
        raise ValueError(f"its header has {header:,} bytes, may have {HEADER:,}")


def save_weights(folder: Path, model: Classifier, spec: Mapping[str, Any]) -> dict[str, str]:
    """Writes `weights.safetensors` (float32, preprocessing inside) and `model.json`; returns their sha256 by name.

    spec: plain values, among them `config` (a table), `classes` (names) and `shape` (C, H, W). Raises StorageError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    described = {"format": _FORMAT, **spec, "mean": model.mean.tolist(), "std": model.std.tolist()}
    return {
        WEIGHTS: write_whole(folder / WEIGHTS, partial(_save, tensors)),
        SPEC: write_json(folder / SPEC, described),
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Without a copy of all tensors in memory. Raises OSError."""
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from None


def load_classifier(path: Path, *, allow_code: bool = False) -> tuple[Classifier, dict[str, Any]]:
    """The classifier in a folder of `save_weights` or in a .safetensors file, on the CPU in evaluation mode, and its
    spec, which is in the file or beside it: NAME.json, or model.json. allow_code: whether the user's code that makes
    the model may run; it must be the code that was trained. Raises ModelError, CodeError.
    """
    with refusing(path):
        file = path / WEIGHTS if path.is_dir() else path
        text = read_text(path / SPEC, SPEC_BYTES) if path.is_dir() else ""
        _check_header(file)
        inside, tensors = _contents(file)
        if not (text := text or inside):
            specs = [file.with_suffix(".json"), *([file.with_name(SPEC)] if file.name == WEIGHTS else [])]
            beside = next((spec for spec in specs if spec.is_file()), None)
            if beside is None:
                raise ValueError(f"no spec in the file, nor beside it as {' or '.join(spec.name for spec in specs)}")
            text = read_text(beside, SPEC_BYTES)
        spec: dict[str, Any] = json.loads(text)
        if "sha256" in spec and (actual := tensors_sha256(tensors)) != spec["sha256"]:
            raise ValueError(f"damaged: its weights' sha256 is {actual[:12]}..., not {str(spec['sha256'])[:12]}...")
        return rebuild(spec, tensors, allow_code=allow_code), spec


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and bytes: detects a flipped bit, which the formats themselves do not."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def rebuild(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], *, allow_code: bool) -> Classifier:
    """A spec's classifier, on the CPU in evaluation mode. Call it within `refusing`: a bad spec raises many errors."""
    config, (channels, height, width) = Config.from_table(spec["config"]), spec["shape"]
    code, shape, classes = Code(allow_code, spec.get("code", "")), (channels, height, width), len(spec["classes"])
    net = build(config.model, shape, classes, seed=0, pretrained=False, code=code)
    model = Classifier(net, tensors["mean"], tensors["std"])
    model.load_state_dict(tensors)
    return model.eval()


@contextlib.contextmanager
def refusing(where: Path) -> Iterator[None]:
    """ModelError, in one line, for any error while a file or folder is read as a model."""
    if not where.exists():
        raise ModelError(f"{where}: no model here, no such file or folder")
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{where}: no model here: {error.filename or error} is missing") from None
    except CodeError as error:
        raise type(error)(f"{where}: {error}") from None
    except Exception as error:  # a foreign file or spec raises anything
        raise ModelError(f"{where}: not a model of this version: {one_line(error)}") from error
