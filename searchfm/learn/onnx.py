"""ONNX: a model in one file for other runtimes, written through torch's exporter and run by onnxruntime.

Needs the extra `onnx`. The format holds operators and numbers, no code.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchfm.errors import ModelError, UserError
from searchfm.learn.predict import Probabilities
from searchfm.learn.splits import Pixels

_INPUT, _OUTPUT = "images", "probabilities"
LARGEST = 2**31 - 2**20  # bytes: protobuf, the file's format, ends at two gigabytes


def save(model: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes `model` ((N, C, H, W) uint8 -> (N, K) float32) for any N: input `images`, output `probabilities`.

    example: (2 or more, C, H, W) uint8. Raises UserError without the extra, ModelError for a model too large for one
    file.
    """
    _extra()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ModelError(f"{size:,} bytes of weights: one ONNX file holds at most {LARGEST:,}; use pt2 or safetensors")
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def load(path: Path, key: str) -> tuple[dict[str, Any], Callable[[Pixels], Probabilities]]:
    """The JSON under `key` in a file's metadata, and what the file answers to (N, C, H, W) uint8, on the CPU.

    Raises UserError without the extra; OSError, ValueError or KeyError for a file that is none of ours.
    """
    runtime = _extra()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said by us, in one line
    content = path.read_bytes()  # given as bytes, a model cannot name files elsewhere
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes come from nothing narrower
        raise ValueError(str(error)) from None
    spec: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map[key])

    def answer(images: Pixels) -> Probabilities:
        rows: Probabilities = session.run([_OUTPUT], {_INPUT: images})[0]
        return rows

    return spec, answer


def _extra() -> Any:
    """onnxruntime, if all of the extra is here."""
    try:
        import onnx  # noqa: F401 (torch's exporter wants it, and says so at length)
        import onnxruntime
        import onnxscript  # noqa: F401 (the same)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}, which is not installed; install searchfm[onnx]") from None
    return onnxruntime
