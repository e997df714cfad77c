"""Models as single files: they answer as the model does, and what is wrong with a file is said in one line."""

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from searchfm.cli import FORMATS
from searchfm.config import Config
from searchfm.errors import ModelError, UserError
from searchfm.learn import export
from searchfm.learn.checkpoint import save_weights
from searchfm.learn.data import Splits
from searchfm.learn.export import BOUND
from searchfm.learn.models import Classifier, build, served
from searchfm.learn.train import Training
from searchfm.records import SPEC, WEIGHTS
from tests.learn.toys import config

CLASSES = ["cat", "dog", "eel", "fox"]
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "mlp": ({"layers": 2, "width": 16, "batch_norm": True, "dropout": 0.2}, (1, 8, 8)),
    "cnn": ({"stages": 2, "filters": 8, "batch_norm": True, "conv_dropout": 0.2, "dropout": 0.2}, (3, 10, 8)),
    "vit": ({"patch_size": 4, "hidden_dim": 16, "layers": 2, "heads": 2, "dropout": 0.1}, (1, 8, 8)),
    "vit, conv": (
        {"patch_size": 4, "stem_convs": 1, "hidden_dim": 16, "layers": 1, "heads": 2, "pooling": "flatten"},
        (3, 8, 8),
    ),
    "residual": ({"stages": 2, "blocks": 1, "width": 8, "block": ["basic", "bottleneck"]}, (3, 16, 16)),
    "transfer": ({"model": "resnet18", "weights": "none"}, (1, 32, 32)),
}
QUICK = {("vit", "pt2")}  # the others of onnx and pt2 take seconds each
READ = ("onnx", "safetensors")  # the formats that are read back; a .pt2 is torch's alone
CASES = [
    pytest.param(name, kind, marks=[] if kind == "safetensors" or (name, kind) in QUICK else [pytest.mark.slow])
    for name, kind in itertools.product(ARCHITECTURES, FORMATS)
]
Model = tuple[Classifier, dict[str, Any]]


def model_of(name: str) -> Model:
    """A model with weights, and batch norm's statistics, such as training could leave."""
    settings, shape = ARCHITECTURES[name]
    kind = name.partition(",")[0]
    table = {"data": {"name": "digits"}, "model": {"name": kind, kind: settings}}
    net = build(Config.from_table(table).model, shape, len(CLASSES), seed=1)
    model = Classifier(net, torch.full(shape[:1], 0.3), torch.full(shape[:1], 0.4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)  # for dropout
        for _ in range(2):
            model.train()(torch.randint(0, 256, (16, *shape), generator=generator, dtype=torch.uint8))
    return model.eval(), {"format": 1, "config": table, "classes": CLASSES, "shape": list(shape)}


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(5).randint(0, 256, (count, *shape)).astype(np.uint8)


def answers(model: Classifier, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return served(model)(torch.from_numpy(images)).numpy()


@pytest.fixture(scope="module")
def small() -> Model:
    return model_of("mlp")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, small: Model) -> Path:
    """A folder with the same model as m.onnx, m.pt2 and m.safetensors."""
    folder = tmp_path_factory.mktemp("files")
    for kind in FORMATS:
        export.export(*small, folder / f"m.{kind}")
    return folder


@pytest.fixture
def copies(files: Path, tmp_path: Path) -> Path:
    return shutil.copytree(files, tmp_path / "copies")


def refused(path: Path, text: str) -> None:
    """The file is refused in one line that names it."""
    with pytest.raises(ModelError, match=text) as caught:
        export.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- what a file answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_file_answers_as_the_model_does(name: str, kind: str, tmp_path: Path) -> None:
    model, spec = model_of(name)
    done = export.export(model, spec, tmp_path / f"m.{kind}")
    assert done.difference <= 1e-6, "float32 differs by 1e-7 between runtimes"
    assert done.bytes == done.path.stat().st_size
    shape = ARCHITECTURES[name][1]
    if kind == "pt2":
        program = torch.export.load(done.path).module()
        answer = lambda images: program(torch.from_numpy(images)).detach().numpy()  # noqa: E731
    else:
        loaded = export.load(done.path)
        assert (loaded.classes, loaded.shape) == (tuple(CLASSES), shape)
        answer = loaded.answer
    for count in (1, 5, 33):
        images = noise(count, *shape)
        expected = answers(model, images)
        np.testing.assert_allclose(answer(images), expected, rtol=0, atol=1e-6)
        assert np.ptp(expected) > 0.01, "the answers say something"


@pytest.mark.slow  # it imports onnx
def test_onnx_is_one_file_that_other_runtimes_understand(files: Path, small: Model) -> None:
    import onnx as format_

    proto = format_.load(files / "m.onnx", load_external_data=False)
    format_.checker.check_model(proto, full_check=True)
    assert not [
        tensor.name for tensor in proto.graph.initializer if format_.external_data_helper.uses_external_data(tensor)
    ]
    (images,), (probabilities,) = proto.graph.input, proto.graph.output
    assert (images.name, probabilities.name) == ("images", "probabilities")
    assert images.type.tensor_type.elem_type == format_.TensorProto.UINT8
    batch, *shape = images.type.tensor_type.shape.dim
    assert batch.dim_param
    assert [side.dim_value for side in shape] == small[1]["shape"]
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["searchfm"])["config"] == small[1]["config"]


@pytest.mark.slow
def test_a_pt2_program_takes_any_batch_without_our_code(files: Path, small: Model, tmp_path: Path) -> None:
    images = noise(3, *small[1]["shape"])
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np, torch; answer = torch.export.load('m.pt2').module();"
        f" images = torch.from_numpy(np.load({str(tmp_path / 'images.npy')!r}));"
        " rows = torch.cat([answer(images[:1]), answer(images[1:])]);"
        " assert not [name for name in sys.modules if name.startswith('searchfm')];"
        f" np.save({str(tmp_path / 'rows.npy')!r}, rows.detach().numpy())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=files, check=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), answers(small[0], images), rtol=0, atol=1e-6)


def test_safetensors_bring_their_spec_inside_and_beside(copies: Path, small: Model) -> None:
    path, beside = copies / "m.safetensors", copies / "m.json"
    with safetensors.safe_open(path, "pt") as opened:
        inside = json.loads(opened.metadata()["searchfm"])
    assert inside == json.loads(beside.read_text())
    assert {key: inside[key] for key in small[1]} == small[1]
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == small[0].state_dict().keys()
    beside.unlink()
    assert export.load(path).classes == tuple(CLASSES)
    safetensors.torch.save_file(tensors, path)
    refused(path, "no spec in the file, nor beside it as m.json")
    beside.write_text(json.dumps(inside))
    assert export.load(path).classes == tuple(CLASSES)


def test_what_a_trial_leaves_is_a_model(tmp_path: Path, digits: Splits) -> None:
    training = Training(config("cnn", {"filters": 8}, train={"epochs": 1}), digits)
    next(training)
    spec = {"config": training.config.to_table(), "classes": list(digits.classes), "shape": [1, 8, 8]}
    save_weights(tmp_path, training.classifier, spec)
    images = noise(4, 1, 8, 8)
    for path in (tmp_path, tmp_path / WEIGHTS):
        np.testing.assert_allclose(
            export.load(path).answer(images), answers(training.classifier.eval(), images), rtol=0, atol=1e-6
        )


def test_a_file_can_be_exported_again(files: Path, tmp_path: Path) -> None:
    export.export(*export.load_model(files / "m.safetensors"), tmp_path / "m.safetensors")
    again, _ = export.load_model(tmp_path / "m.safetensors")
    first, _ = export.load_model(files / "m.safetensors")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
    with pytest.raises(ModelError, match="an ONNX file can only predict; export the original model"):
        export.load_model(files / "m.onnx")


# --- what is not written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_there_stays_unless_forced(kind: str, small: Model, tmp_path: Path) -> None:
    path = tmp_path / f"m.{kind}"
    path.write_text("mine")
    with pytest.raises(UserError, match="already exists; --force"):
        export.export(*small, path)
    assert path.read_text() == "mine"
    if kind == "safetensors":
        path.unlink()
        (tmp_path / "m.json").write_text("mine too")
        with pytest.raises(UserError, match=r"m\.json: already exists; --force"):
            export.export(*small, path)
    done = export.export(*small, path, force=True)
    assert path.stat().st_size == done.bytes > 1000


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_that_answers_no_numbers_is_not_kept(kind: str, tmp_path: Path) -> None:
    model, spec = model_of("mlp")
    with torch.no_grad():
        next(model.net.parameters()).fill_(float("nan"))
    path = tmp_path / f"m.{kind}"
    path.write_text("mine")
    with pytest.raises(ModelError, match=r"outputs differ from the model's by nan, more than 1e-05: not kept"):
        export.export(model, spec, path, force=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "mine"


def test_another_model_is_seen_to_be_another(small: Model) -> None:
    other = model_of("mlp")[0]
    with torch.no_grad():
        other.net.get_parameter("9.bias")[0] += 1e-3
    functions = [lambda images, model=model: answers(model, images) for model in (small[0], other)]
    largest = export.difference(functions[0], functions[1], (1, 8, 8))
    assert BOUND < largest < 1e-2
    assert export.difference(functions[0], functions[0], (1, 8, 8)) == 0


class Choosy(nn.Module):
    """What torch's exporters cannot write down: what it does depends on the numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4] if images.sum() > 0 else images.flatten(1)[:, 4:8]


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_a_model_that_torch_cannot_write_is_named(kind: str, small: Model, tmp_path: Path) -> None:
    model = Classifier(Choosy(), torch.tensor([0.3]), torch.tensor([0.4])).eval()
    with pytest.raises(ModelError, match=rf"m\.{kind}: torch cannot write this model as \.{kind}: ") as caught:
        export.export(model, small[1], tmp_path / f"m.{kind}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(small: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nix/m\.pt2: cannot be written, there is no folder"):
        export.export(*small, tmp_path / "nix" / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_one_line_says_what_to_install(
    package: str, files: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say that there is no such package
    message = rf"ONNX needs {package}, which is not installed; install searchfm\[onnx\]"
    with pytest.raises(UserError, match=message):
        export.load(files / "m.onnx")
    with pytest.raises(UserError, match=message):
        export.export(*small, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_one_onnx_file_is_refused_before_it_is_made(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(ModelError, match=r"bytes of weights: one ONNX file holds at most 1,000; use pt2 or"):
        export.export(*small, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# --- what is not read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [pair for pair in itertools.product(FORMATS, READ) if len({*pair}) == 2])
def test_a_renamed_file_is_refused(kind: str, name: str, copies: Path, tmp_path: Path) -> None:
    refused((copies / f"m.{kind}").rename(tmp_path / f"n.{name}"), "not a model of this version: ")


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_a_cut_file_is_refused(kind: str, fraction: float, copies: Path) -> None:
    path = copies / f"m.{kind}"
    os.truncate(path, int(path.stat().st_size * fraction))
    refused(path, "not a model of this version: ")


def test_a_flipped_bit_is_seen(copies: Path, small: Model) -> None:
    path = copies / "m.safetensors"
    content = bytearray(path.read_bytes())
    weights = small[0].net.get_parameter("1.weight").detach().numpy().tobytes()
    content[content.index(weights) + 10] ^= 4
    path.write_bytes(content)
    refused(path, "damaged: its weights' sha256 is")


def test_files_that_are_not_there_or_of_another_kind_are_named(tmp_path: Path) -> None:
    for kind in FORMATS:
        refused(tmp_path / f"nix.{kind}", "no model here, no such file or folder")
        (tmp_path / f"folder.{kind}").mkdir()
        refused(tmp_path / f"folder.{kind}", "no model here")
    (tmp_path / "m.h5").write_bytes(b"?")
    refused(tmp_path / "m.h5", r"must be \.onnx, \.safetensors, or a folder with weights\.safetensors and model\.json$")


def test_another_s_files_are_refused(tmp_path: Path, small: Model) -> None:
    import onnx as format_

    node = format_.helper.make_node("Identity", ["x"], ["y"])
    ends = [format_.helper.make_tensor_value_info(name, format_.TensorProto.FLOAT, [1]) for name in "xy"]
    proto = format_.helper.make_model(
        format_.helper.make_graph([node], "g", ends[:1], ends[1:]),
        ir_version=10,
        opset_imports=[format_.helper.make_opsetid("", 20)],
    )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "m.onnx", "searchfm")
    proto.metadata_props.add(key="searchfm", value=json.dumps(small[1]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "m.onnx", "Required inputs")


SPECS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no table": lambda spec: [spec],
    "none": lambda spec: None,
    "no config": lambda spec: {key: value for key, value in spec.items() if key != "config"},
    "config": lambda spec: spec | {"config": "mlp"},
    "key": lambda spec: spec | {"config": {"model": {"name": "mlp", "mlp": {"layers": 2, "wid": 3}}}},
    "other": lambda spec: spec | {"config": {"model": {"name": "mlp", "mlp": {"layers": 3}}}},
    "any code": lambda spec: spec | {"config": {"model": {"name": "transfer", "transfer": {"model": "hf-hub:x/y"}}}},
    "classes": lambda spec: spec | {"classes": dict.fromkeys(CLASSES)},
    "numbers": lambda spec: spec | {"classes": [1, 2, 3, 4]},
    "few": lambda spec: spec | {"classes": CLASSES[:3]},
    "shape": lambda spec: spec | {"shape": [1, 8]},
    "sides": lambda spec: spec | {"shape": ["1", 8, 8]},
    "huge": lambda spec: spec | {"shape": [1, 10**9, 10**9]},
}


@pytest.mark.parametrize("case", SPECS)
def test_a_spec_that_cannot_be_is_refused(case: str, copies: Path) -> None:
    path = copies / "m.safetensors"
    spec = json.loads((copies / "m.json").read_text())
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"searchfm": json.dumps(SPECS[case](spec))})
    refused(path, "not a model of this version: ")


class Hostile:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pt2_is_not_read(copies: Path) -> None:
    refused(copies / "m.pt2", r"must be \.onnx, \.safetensors, or a folder .*; a \.pt2 would have to be unpickled$")
    with pytest.raises(ModelError, match="would have to be unpickled"):
        export.load_model(copies / "m.pt2")


def test_no_file_is_unpickled(copies: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    poison = pickle.dumps(Hostile(mark))
    for kind in FORMATS:
        (copies / f"m.{kind}").write_bytes(poison)
        refused(copies / f"m.{kind}", "not a model of this version|must be")
    assert not mark.exists()
    pickle.loads(poison)
    assert mark.exists(), "the attack is a real one"


def test_onnx_weights_elsewhere_are_not_read(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx as format_

    proto = format_.load(copies / "m.onnx")
    tensor = next(tensor for tensor in proto.graph.initializer if len(tensor.raw_data) > 100)
    secret = copies / "secret.bin"
    secret.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = format_.TensorProto.EXTERNAL
    monkeypatch.chdir(copies / "..")
    for location in (str(secret), "../copies/secret.bin", "/etc/hostname"):
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=location)
        (copies / "m.onnx").write_bytes(proto.SerializeToString())
        refused(copies / "m.onnx", "not a model of this version")


def test_a_models_folder_names_what_it_lacks(tmp_path: Path) -> None:
    refused(tmp_path, f"no model here: .*{SPEC} is missing")


def test_files_without_an_end_or_of_many_gigabytes_are_not_read(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is not a regular file")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    refused(tmp_path / "zero.safetensors", "is not a regular file")
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(5 * 10**9)
    refused(tmp_path / "huge.onnx", "has 5,000,000,000 bytes, may have at most 2,146,435,072")
    with (tmp_path / "header.safetensors").open("wb") as file:
        file.write((9 * 10**7).to_bytes(8, "little"))
        file.truncate(10**8)
    refused(tmp_path / "header.safetensors", "its header has 90,000,000 bytes, may have 10,000,000")
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / SPEC).open("wb") as file:
        file.truncate(5 * 10**9)
    refused(folder, "has 5,000,000,000 bytes, may have at most 4,000,000")
