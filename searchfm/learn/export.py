"""Models as single files (safetensors with a JSON spec, ONNX, torch.export's .pt2), and predictions with them.

All take raw images, (N, C, H, W) uint8 with any N, and return probabilities, (N, K) float32. An export is compared with
the model before it is kept. Only safetensors and ONNX, which hold numbers and operators but no code, are read back:
torch.export.load unpickles a .pt2. User images, of any size and mode, are read as training reads its own.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from searchfm.config import Shape
from searchfm.errors import DataError, ModelError, UserError, model_errors
from searchfm.home import write_json, write_whole
from searchfm.inputs import read_bytes
from searchfm.learn.checkpoint import METADATA, load_classifier, rebuild, refusing, tensors_sha256
from searchfm.learn.images import SUFFIXES, Pixels, as_pixels, decode, image_files, in_channels, resized
from searchfm.learn.models import Classifier, served
from searchfm.records import SPEC, WEIGHTS

Probabilities: TypeAlias = NDArray[np.float32]
Answer: TypeAlias = Callable[[Pixels], Probabilities]
Side: TypeAlias = Annotated[int, msgspec.Meta(gt=0)]  # of an image, in pixels

BOUND = 1e-5  # largest difference of a probability that an export may have; 1e-7 is what float32 gives
LARGEST = 2**31 - 2**20  # bytes of an ONNX file: protobuf, its format, ends at two gigabytes
BATCH = 64  # images held in memory at once by `predict`
_CHECKED = (1, 2, 7, 32)  # batch sizes
_INPUT, _OUTPUT = "images", "probabilities"  # of an ONNX graph


class Interface(msgspec.Struct, frozen=True):
    """What every model's spec must have; its other keys are not read here."""

    classes: tuple[str, ...]
    shape: tuple[Side, Side, Side]  # of one image: channels, height, width


class Predictor(Interface, frozen=True):
    """A model that can predict, whatever file it came from."""

    answer: Answer  # (N, *shape) uint8 -> (N, K), each row adding up to 1


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file."""

    image: str
    top: tuple[tuple[str, float], ...] = ()  # classes with their probabilities, the most probable first
    error: str = ""  # why there is none


@dataclass(frozen=True)
class Exported:
    """A file that was checked and written."""

    path: Path
    format: str
    bytes: int
    difference: float  # the largest of any probability to the model's own, over random images


def load(path: Path, *, allow_code: bool = False) -> Predictor:
    """A predictor from an .onnx or .safetensors file, or a folder with weights.safetensors and model.json.

    allow_code: as for `load_model`; an ONNX file needs no code. Raises ModelError for a file that is no model, or
    damaged; CodeError; UserError for ONNX files if ONNX is not installed.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        runtime = _onnxruntime()
        with refusing(path):
            spec, answer = _read_onnx(read_bytes(path, LARGEST), runtime)
    else:
        model, spec = load_model(path, allow_code=allow_code)
        answer = _answer(served(model))
    with refusing(path):
        interface = msgspec.convert(spec, Interface)
        rows = answer(np.zeros((2, *interface.shape), np.uint8))
        if rows.shape != (2, len(interface.classes)):
            raise ValueError(f"returns {rows.shape[1:]} numbers an image, for {len(interface.classes)} classes")
        return Predictor(interface.classes, interface.shape, answer)


def load_model(path: Path, *, allow_code: bool = False) -> tuple[Classifier, dict[str, Any]]:
    """As `load_classifier`, with the reason for a file of another format."""
    if path.is_dir() or path.suffix == ".safetensors" or not path.exists():
        return load_classifier(path, allow_code=allow_code)
    if path.suffix == ".onnx":
        raise ModelError(f"{path}: an ONNX file can only predict; export the original model")
    reason = "; a .pt2 would have to be unpickled" if path.suffix == ".pt2" else ""
    raise ModelError(f"{path}: must be .onnx, .safetensors, or a folder with {WEIGHTS} and {SPEC}{reason}")


def export(model: Classifier, spec: Mapping[str, Any], path: Path, *, force: bool = False) -> Exported:
    """Writes a model (on the CPU, in evaluation mode, with the spec it was loaded with) as one file of the format that
    the suffix names, once its answers were compared with those of the model, at several batch sizes. A .safetensors
    gets its spec beside it too.

    Raises UserError for a file that is there, unless forced, and where ONNX is not installed; ModelError where the
    outputs differ by more than BOUND; StorageError. Nothing is left behind then.
    """
    module, interface = served(model), msgspec.convert(spec, Interface)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    spec = {**spec, "sha256": tensors_sha256(tensors)}
    metadata = {METADATA: json.dumps(spec, ensure_ascii=False)}
    beside = [path.with_suffix(".json")] if path.suffix == ".safetensors" else []
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, there is no folder {path.parent}")
    for target in (path, *beside):
        if target.exists() and not force:
            raise UserError(f"{target}: already exists; --force overwrites it")
    match path.suffix:
        case ".onnx":
            runtime = _onnxruntime()
            with model_errors(f"{path}: torch cannot write this model as .onnx"):
                content = _onnx(module, interface.shape, {**metadata, "classes": json.dumps(interface.classes)})
            _, answer = _read_onnx(content, runtime)
        case ".pt2":
            with model_errors(f"{path}: torch cannot write this model as .pt2"):
                content = program(module, interface.shape, metadata)
            answer = _answer(torch.export.load(io.BytesIO(content)).module())  # our own, so it may be unpickled
        case _:
            content = safetensors.torch.save(tensors, metadata)
            answer = _answer(served(rebuild(spec, safetensors.torch.load(content), allow_code=True)))
    largest = difference(_answer(module), answer, interface.shape)
    if not largest <= BOUND:  # a nan is refused too
        raise ModelError(f"{path}: outputs differ from the model's by {largest:.1e}, more than {BOUND:.0e}: not kept")
    for target in beside:
        write_json(target, spec)
    write_whole(path, content)
    return Exported(path, path.suffix.removeprefix("."), len(content), largest)


def difference(first: Answer, second: Answer, shape: Shape) -> float:
    """The largest difference between two models' probabilities for random images (*shape), from black to full
    contrast, in batches of several sizes; nan if an answer is no number.
    """
    rng = np.random.default_rng(0)
    largest = 0.0
    for size in _CHECKED:
        contrast = np.linspace(1, 0, size).reshape(-1, 1, 1, 1)  # full noise alone may saturate the answers
        images = (rng.integers(0, 256, (size, *shape)) * contrast).astype(np.uint8)
        largest = float(np.maximum(largest, np.abs(first(images) - second(images)).max()))  # unlike max, keeps a nan
    return largest


def _answer(module: nn.Module) -> Answer:
    return torch.inference_mode()(lambda images: module(torch.from_numpy(images)).numpy())


def _example(shape: Shape) -> dict[str, Any]:
    """The example input of torch's exporters. They would take a batch of one as a constant."""
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    return {"args": (example,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def program(model: nn.Module, shape: Shape, metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The torch.export program (.pt2) of a model that takes images (N, *shape) uint8, with texts by name beside it."""
    content = io.BytesIO()
    files = {f"{name}.json": text for name, text in metadata.items()}
    torch.export.save(torch.export.export(model, **_example(shape)), content, extra_files=files)
    return content.getvalue()


def _onnx(model: nn.Module, shape: Shape, metadata: Mapping[str, str]) -> bytes:
    """Raises ValueError for a model too large for one file."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes of weights: one ONNX file holds at most {LARGEST:,}; use pt2 or safetensors")
    program = torch.onnx.export(
        model, **_example(shape), dynamo=True, input_names=[_INPUT], output_names=[_OUTPUT], verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _read_onnx(content: bytes, runtime: Any) -> tuple[dict[str, Any], Answer]:
    """The spec in an ONNX file, and a function that runs it on the CPU. As bytes, it cannot refer to other files."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are reported by `refusing`, in one line
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    spec: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    return spec, lambda images: session.run([_OUTPUT], {_INPUT: images})[0]


def _onnxruntime() -> Any:
    """onnxruntime, if all of the extra `onnx` is here. Raises UserError."""
    try:
        import onnx  # noqa: F401 (torch's exporter needs it; its own error is long)
        import onnxruntime
        import onnxscript  # noqa: F401 (the same)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}, which is not installed; install searchfm[onnx]") from None
    return onnxruntime


# --- predictions ------------------------------------------------------------------------------------------------------


def predict(model: Predictor, arguments: Sequence[Path], *, top: int = 1) -> Iterator[Prediction]:
    """The `top` most probable classes of every image file, in order; a folder stands for the images in it.

    A file that cannot be read has an error instead. Raises ModelError where the model does not return probabilities.
    """
    folders = {path: image_files(path, path) for path in arguments if path.is_dir()}
    paths = (file for path in arguments for file in folders.get(path) or [path])
    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        while batch := list(islice(paths, BATCH)):
            images = list(pool.map(lambda path: read(path, model.shape), batch))
            rows = iter(_answers(model, [image for image in images if not isinstance(image, str)]))
            for path, image in zip(batch, images, strict=True):
                name = os.fsencode(path).decode("utf-8", "replace")  # a file's name may be any bytes
                if isinstance(image, str):
                    yield Prediction(name, error=image)
                else:
                    row = next(rows)
                    best = np.argsort(-row, kind="stable")[:top]
                    yield Prediction(name, tuple((model.classes[i], float(row[i])) for i in best))


def predict_images(model: Predictor, images: Any) -> Probabilities:
    """(N, K) for an array (N, H, W[, C]) uint8, or one or several paths, PIL images or arrays (H, W[, C]).

    Raises DataError for an image that cannot be read; ModelError where the model does not return probabilities.
    """
    if isinstance(images, np.ndarray) and images.ndim not in (3, 4):
        raise DataError(f"images: an array of {images.shape}: must be (N, H, W) or (N, H, W, C)")
    items = [images] if isinstance(images, str | Path | Image) else list(images)
    with ThreadPoolExecutor() as pool:
        batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
        rows = [_answers(model, list(pool.map(lambda item: _readable(item, model.shape), batch))) for batch in batches]
    return np.concatenate(rows) if rows else _answers(model, [])


def _readable(image: Any, shape: Shape) -> Pixels:
    pixels = read(Path(image), shape) if isinstance(image, str | Path) else _fitted(image, shape)
    if isinstance(pixels, str):
        raise DataError(f"{image if isinstance(image, str | Path) else 'image'}: {pixels}")
    return pixels


def check_any(predictions: Sequence[Prediction]) -> None:
    """Raises DataError if no image could be read."""
    errors = [f"{each.image}: {each.error}" for each in predictions if each.error]
    if len(errors) == len(predictions):
        some = "; ".join(errors[:3]) or "none was given"
        raise DataError(f"no image could be read: {some}{'; ...' if len(errors) > 3 else ''}")


def read(path: Path, shape: Shape) -> Pixels | str:
    """An image file as training reads it for images of `shape` (C, H, W), or the reason why it cannot be read."""
    if path.is_dir():
        return f"holds no image; may hold {', '.join(sorted(SUFFIXES))}"
    return _fitted(path, shape)


def _fitted(image: Any, shape: Shape) -> Pixels | str:
    try:
        pixels = decode(image) if isinstance(image, Path) else as_pixels(image)
        return np.ascontiguousarray(in_channels(resized(pixels, shape[1:]), shape[0]))
    except ValueError as error:
        return str(error)


def _answers(model: Predictor, batch: Sequence[Pixels]) -> Probabilities:
    if not batch:
        return np.empty((0, len(model.classes)), np.float32)
    rows = model.answer(np.stack(batch))
    if rows.shape != (len(batch), len(model.classes)) or not np.allclose(rows.sum(1), 1, atol=1e-3):
        raise ModelError(f"the model returns {rows.shape} numbers that are no probabilities of {len(model.classes)}")
    return rows
