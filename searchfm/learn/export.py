"""Models as single files: safetensors with a JSON spec, torch.export's .pt2, and ONNX; written, checked and read again.

All take raw images, (N, C, H, W) uint8 with any N, and answer probabilities, (N, K) float32. What reads them runs no
code of theirs: torch.export.load unpickles what it finds, so of a .pt2 only the weights, which lie there as plain
bytes, and our spec are taken, and the model is built from those.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from searchfm.config import Shape
from searchfm.errors import ModelError, SearchfmError, UserError
from searchfm.learn import onnx
from searchfm.learn.checkpoint import SPEC, WEIGHTS, load_classifier, rebuild, refusing
from searchfm.learn.download import whole
from searchfm.learn.models import Classifier, Served
from searchfm.learn.predict import Predictor, Probabilities
from searchfm.learn.splits import Pixels

Format = Literal["onnx", "pt2", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)

BOUND = 1e-5  # largest difference of a probability that an export may have; 1e-7 is what float32 gives
_CHECKED = (1, 2, 7, 32)  # batch sizes
_KEY = "searchfm"  # of the spec, in every format's own metadata
_PT2_SPEC, _PT2_INDEX, _PT2_WEIGHTS = "extra/searchfm.json", "data/weights/model_weights_config.json", "data/weights"


@dataclass(frozen=True)
class Exported:
    """A file that was written, and checked."""

    path: Path
    format: Format
    bytes: int
    difference: float  # the largest of any probability to the model's own, over random images


def format_of(name: str) -> Format:
    """The format of that name. Raises UserError."""
    for kind in FORMATS:
        if name == kind:
            return kind
    raise UserError(f"format {name!r}: must be one of {', '.join(FORMATS)}")


def load(path: Path) -> Predictor:
    """A model to predict with: a file that `export` wrote, or a folder with weights.safetensors and model.json.

    Raises ModelError for what is no model, or damaged; UserError where it is ONNX, and that is not installed.
    """
    if path.suffix == ".onnx":
        with refusing(path):
            spec, answer = onnx.load(_there(path), _KEY)
    else:
        model, spec = load_model(path)
        answer = _answer(Served(model).eval())
    with refusing(path):
        classes, shape = _about(spec)
        try:
            rows = answer(np.zeros((2, *shape), np.uint8))
        except Exception as error:  # onnxruntime's come from nothing narrower
            raise ValueError(f"does not answer images of {shape}: {error}") from None
        if rows.shape != (2, len(classes)):
            raise ValueError(f"answers {rows.shape[1:]} numbers an image, for {len(classes)} classes")
        return Predictor(classes, shape, answer)


def load_model(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier in a .pt2, a .safetensors or a folder, on the CPU in evaluation mode, and its spec.

    Raises ModelError.
    """
    if path.is_dir():
        return load_classifier(path)
    with refusing(path):
        read = _READERS.get(_there(path).suffix)
    if read is None:
        kinds = ", ".join(f".{kind}" for kind in FORMATS)
        onnx_ = "ONNX is to predict with only; export what it was made of"
        raise ModelError(f"{path}: {onnx_ if path.suffix == '.onnx' else f'must be one of {kinds}'}")
    with refusing(path):
        spec, tensors = read(path)
        if spec.get("sha256", (found := _sha256(tensors))) != found:
            raise ValueError(f"damaged: its weights' sha256 is {found[:12]}..., not {str(spec['sha256'])[:12]}...")
        return rebuild(spec, tensors), spec


def export(
    model: Classifier, spec: Mapping[str, Any], kind: Format, path: Path, *, force: bool = False, bound: float = BOUND
) -> Exported:
    """Writes a model (on the CPU, in evaluation mode, with the spec it was loaded with) as one file, and compares what
    the file answers with what the model does, at several batch sizes. A .safetensors gets its spec beside it too.

    Raises UserError for a file that is there, unless forced, and where ONNX is not installed; ModelError where the
    answers differ by more than `bound`. Nothing is left behind then.
    """
    served, (classes, shape) = Served(model).eval(), _about(spec)
    spec = {**spec, "sha256": _sha256(model.state_dict())}
    text = json.dumps(spec, ensure_ascii=False)
    beside = {path.with_suffix(".json"): f"{json.dumps(spec, indent=1, ensure_ascii=False)}\n"}
    beside = beside if kind == "safetensors" else {}
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, there is no folder {path.parent}")
    for target in (path, *beside):
        if target.exists() and not force:
            raise UserError(f"{target}: is there already; --force overwrites it")
    example = torch.zeros(2, *shape, dtype=torch.uint8)  # with a batch of one, the batch would stay one for ever
    with ExitStack() as stack:
        temporary = stack.enter_context(whole(path))
        match kind:
            case "onnx":
                with _exporting(path):
                    onnx.save(served, example, temporary, {_KEY: text, "classes": json.dumps(classes)})
                _, answer = onnx.load(temporary, _KEY)
            case "pt2":
                with _exporting(path):
                    _save_pt2(served, example, temporary, text)
                _, tensors = _read_pt2(temporary)
                assert _sha256(tensors) == spec["sha256"]
                with temporary.open("rb") as file:  # our own, so its program may be run
                    answer = _answer(torch.export.load(file).module())
            case "safetensors":
                tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                temporary.write_bytes(safetensors.torch.save(tensors, {_KEY: text}))
                answer = _answer(Served(rebuild(*_read_safetensors(temporary))).eval())
            case _:
                assert_never(kind)
        found = difference(_answer(served), answer, shape)
        if not found <= bound:  # not a number is no match either
            raise ModelError(f"{path}: answers differ from the model's by {found:.1e}, more than {bound:.0e}: not kept")
        for target, content in beside.items():
            stack.enter_context(whole(target)).write_text(content, "utf-8")
    return Exported(path, kind, path.stat().st_size, found)


@contextmanager
def _exporting(path: Path) -> Iterator[None]:
    """torch's exporters do not take every model that timm has, and each failure is of another class."""
    try:
        yield
    except (SearchfmError, OSError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: torch cannot write this model as {path.suffix}: {reason}") from error


def difference(one: Callable[[Pixels], Probabilities], other: Callable[[Pixels], Probabilities], shape: Shape) -> float:
    """The largest difference between two models' probabilities for random images (*shape), from black to full
    contrast, in batches of several sizes; nan where one gives no number.
    """
    rng = np.random.default_rng(0)
    found = 0.0
    for size in _CHECKED:
        contrast = np.linspace(1, 0, size).reshape(-1, 1, 1, 1)  # full noise alone may saturate the answers
        images = (rng.integers(0, 256, (size, *shape)) * contrast).astype(np.uint8)
        found = float(np.maximum(found, np.abs(one(images) - other(images)).max()))  # unlike max, keeps a nan
    return found


def _answer(module: nn.Module) -> Callable[[Pixels], Probabilities]:
    @torch.inference_mode()
    def answer(images: Pixels) -> Probabilities:
        rows: Probabilities = module(torch.from_numpy(images)).numpy()
        return rows

    return answer


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The spec is in the file, or beside it: NAME.json, or model.json as a trial's folder has it."""
    with safetensors.safe_open(path, "pt") as opened:
        text = (opened.metadata() or {}).get(_KEY)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    if text is None:
        places = [path.with_suffix(".json"), *([path.with_name(SPEC)] if path.name == WEIGHTS else [])]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ValueError(f"no spec in the file, nor beside it as {' or '.join(place.name for place in places)}")
        text = found.read_text("utf-8")
    return json.loads(text), tensors


def _save_pt2(served: Served, example: Tensor, path: Path, spec: str) -> None:
    program = torch.export.export(served, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={Path(_PT2_SPEC).name: spec})


def _read_pt2(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Weights and spec, without torch.export.load. An entry that must be unpickled is never read."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]

        def entry(name: str) -> bytes:
            info = archive.getinfo(f"{root}/{name}")
            if info.compress_type != zipfile.ZIP_STORED:  # torch stores; what unpacks could unpack to anything
                raise ValueError(f"{name} is compressed")
            return archive.read(info)

        spec, tensors = json.loads(entry(_PT2_SPEC)), {}
        for name, about in json.loads(entry(_PT2_INDEX))["config"].items():
            if about["use_pickle"]:
                raise ValueError(f"{name} is pickled")
            meta, raw = about["tensor_meta"], bytearray(entry(f"{_PT2_WEIGHTS}/{about['path_name']}"))
            flat = torch.frombuffer(raw, dtype=_DTYPES[meta["dtype"]])
            tensors[name.removeprefix("model.")] = flat.view([size["as_int"] for size in meta["sizes"]])
    return spec, tensors


# The numbers that such files have for types, of those that weights and counts of models come in.
_DTYPES = {4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool}
_READERS = {".pt2": _read_pt2, ".safetensors": _read_safetensors}


def _about(spec: Mapping[str, Any]) -> tuple[tuple[str, ...], Shape]:
    """The names of the classes and the shape of an image. Raises ValueError, TypeError or KeyError."""
    classes, (channels, height, width) = spec["classes"], spec["shape"]
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("classes must be a list of names")
    if not all(isinstance(side, int) and side > 0 for side in (channels, height, width)):
        raise ValueError("shape must be three numbers above 0")
    return tuple(classes), (channels, height, width)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes: a flipped bit, which none of the formats sees, is seen."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
