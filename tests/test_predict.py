"""`searchfm predict` and `searchfm export` as a user runs them: real images, a model that was really trained."""

import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rows import four

from searchfm import cli
from searchfm.cli import FORMATS
from searchfm.config import Config
from searchfm.home import Home
from searchfm.learn import datasets, export
from searchfm.learn.checkpoint import load_classifier, save_weights
from searchfm.learn.data import load
from searchfm.learn.datasets import CLOTHES
from searchfm.learn.images import Arrays
from searchfm.learn.sources import open_folder, read_part
from searchfm.learn.train import Training
from tests.commands import searchfm_here
from tests.json_page import check

Output = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture(scope="module")
def fashion() -> Arrays:
    """Fashion-MNIST's test part, as its makers published it."""
    return datasets.read_named("fashion-mnist", "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a trial leaves it: a small MLP, trained on a tenth of Fashion-MNIST."""
    folder, threads = tmp_path_factory.mktemp("studies") / "mlp" / "0007", torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = Config.from_table(
            {
                "data": {"name": "fashion-mnist", "subset": 0.1},
                "model": {"name": "mlp", "mlp": {"layers": 1, "width": 64}},
                "train": {"epochs": 3, "batch_size": 64},
            }
        )
        training = Training(config, load(config.data))
        assert list(training)[-1].val_accuracy > 0.75
    spec = {"config": config.to_table(), "classes": list(training.data.classes), "shape": [1, 28, 28]}
    save_weights(folder, training.classifier, spec)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def images(fashion: Arrays, tmp_path: Path) -> Path:
    """The first 100 test images as PNGs, in a folder each class."""
    root = tmp_path / "images"
    for number, (image, label) in enumerate(zip(fashion.images[:100], fashion.labels[:100], strict=True)):
        path = root / f"{label}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    return root


@pytest.fixture
def searchfm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Output]:
    """Runs a command in this process, in an empty folder, where `runs` is the home."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str | Path) -> Output:
        monkeypatch.setattr(sys, "argv", ["searchfm", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        if "--json" in arguments and out:
            check([str(argument) for argument in arguments], out)
        code = left.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


def refused(output: Output, text: str) -> None:
    code, out, err = output
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert text in err


# --- images -----------------------------------------------------------------------------------------------------------


def test_fashion_mnists_own_images_are_classified_correctly(
    searchfm: Callable[..., Output], model: Path, images: Path
) -> None:
    code, out, _ = searchfm("predict", model, images, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["image"] for row in rows] == sorted(str(path) for path in images.rglob("*.png"))
    assert all(set(row) == {"schema", "image", "class", "probability"} for row in rows)
    correct = [row for row in rows if row["class"] == CLOTHES[int(Path(row["image"]).parent.name)]]
    assert len(correct) >= 70
    sure = [row for row in rows if row["probability"] > 0.95]
    assert len([row for row in sure if row in correct]) > 0.85 * len(sure), "probabilities mean something"


def test_what_is_printed_is_what_the_model_says(
    searchfm: Callable[..., Output], model: Path, images: Path, fashion: Arrays
) -> None:
    classifier, _ = load_classifier(model)
    with torch.inference_mode():
        expected = classifier(torch.tensor(fashion.images[:100])).softmax(1).numpy()
    rows = json.loads(searchfm("predict", model, images, "--json", "--top", "20")[1])
    for row in rows:
        probabilities = expected[int(Path(row["image"]).stem)]
        assert row["class"] == CLOTHES[probabilities.argmax()]
        assert {one["class"] for one in row["top"]} == set(CLOTHES)
        for one in row["top"]:
            assert one["probability"] == pytest.approx(probabilities[CLOTHES.index(one["class"])], abs=2e-6)
        ranked = [one["probability"] for one in row["top"]]
        assert ranked == sorted(ranked, reverse=True)
        assert row["top"][0] == {"class": row["class"], "probability": row["probability"]}


def test_size_and_mode_do_not_matter(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    paths = sorted(images.rglob("*.png"))[:40]
    plain = json.loads(searchfm("predict", model, *paths, "--json")[1])
    for mode in ("RGB", "RGBA", "LA", "CMYK", "P", "I;16"):
        for path in paths:
            image = Image.open(path)
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
            elif mode == "CMYK":
                image = image.convert("RGB")
            image = image.convert(mode) if mode != "I;16" else image
            image.save(tmp_path / f"{path.stem}.{'tif' if mode == 'CMYK' else 'png'}")
        others = [tmp_path / f"{path.stem}.{'tif' if mode == 'CMYK' else 'png'}" for path in paths]
        again = json.loads(searchfm("predict", model, *others, "--json")[1])
        assert [(row["class"], row["probability"]) for row in again] == [
            (row["class"], row["probability"]) for row in plain
        ], mode
    for path in paths:
        Image.open(path).resize((90, 70), Image.Resampling.BICUBIC).save(tmp_path / f"{path.stem}.jpg", quality=95)
    again = json.loads(searchfm("predict", model, *[tmp_path / f"{path.stem}.jpg" for path in paths], "--json")[1])
    assert sum(one["class"] == other["class"] for one, other in zip(plain, again, strict=True)) >= 34


def varied(root: Path) -> Path:
    """PART/CLASS/* with images of all modes and sizes, some turned by EXIF."""
    random = np.random.RandomState(3)
    colours = random.randint(0, 256, (14, 9, 3)).astype(np.uint8)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            image = Image.fromarray(colours)
            for mode in ("RGB", "L", "1", "P", "RGBA", "LA"):
                image.convert(mode).save(folder / f"{mode}.png")
            image.convert("CMYK").save(folder / "CMYK.tif")
            Image.fromarray(random.randint(0, 65536, (30, 7)).astype(np.uint16)).save(folder / "deep.png")
            for turn in range(2, 9):
                exif = Image.Exif()
                exif[0x0112] = turn
                image.resize((20, 31)).save(folder / f"turned{turn}.jpg", exif=exif)
            clear = image.convert("RGBA")
            clear.putalpha(Image.fromarray(random.randint(0, 256, (14, 9)).astype(np.uint8)))
            clear.save(folder / "clear.webp", lossless=True)
            image.save(folder / "still.gif")
    return root


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [6, 12, 40])
def test_an_image_is_read_bitwise_as_training_reads_it(channels: int, size: int, tmp_path: Path) -> None:
    files = open_folder(varied(tmp_path), "val")
    trained = read_part(files, size, channels).images
    assert len(files.files) == 34
    for path, image in zip(files.files, trained, strict=True):
        ours = export.read(path, (channels, size, size))
        assert ours.dtype == np.uint8
        assert ours.tobytes() == image.tobytes(), path.name


def test_a_folders_own_size_need_not_be_square(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, (part, label) in enumerate((part, label) for part in ("train", "val") for label in ("cat", "dog")):
        (root / part / label).mkdir(parents=True)
        pixels = np.random.RandomState(number).randint(0, 256, (9, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / part / label / "0.png")
    files = open_folder(root, "val")
    trained = read_part(files, 0, 3).images
    assert trained.shape == (2, 3, 9, 14)
    for path, image in zip(files.files, trained, strict=True):
        assert (export.read(path, (3, 9, 14)) == image).all()
        Image.open(path).resize((28, 18), Image.Resampling.NEAREST).save(tmp_path / "large.png")
        again = export.read(tmp_path / "large.png", (3, 9, 14))
        assert again.shape == (3, 9, 14)
        assert np.abs(again.astype(int) - image).mean() < 30, "the same picture, not its transpose"


# --- files and folders ------------------------------------------------------------------------------------------------


def test_unreadable_files_are_named_and_the_rest_goes_on(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    good = sorted(images.rglob("*.png"))[:2]
    text, cut, deep = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "deep.tif"
    text.write_text("not an image")
    cut.write_bytes(good[0].read_bytes()[:200])
    Image.fromarray(np.zeros((5, 5), np.float32)).save(deep)
    (tmp_path / "empty").mkdir()
    paths = [good[0], text, cut, deep, tmp_path / "nix.png", tmp_path / "empty", good[1]]
    code, out, err = searchfm("predict", model, *paths, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    assert ["error" in row for row in rows] == [False, True, True, True, True, True, False]
    assert all(set(row) == {"schema", "image", "error"} for row in rows[1:6])
    assert [row["error"] for row in rows[3:5]] == [
        "floating-point pixels have no known range",
        "No such file or directory",
    ]
    assert rows[5]["error"].startswith("holds no image; may hold .bmp, ")
    code, out, _ = searchfm("predict", model, *paths)
    assert code == 0
    assert len(out.splitlines()) == 10
    assert "5 of 7 files cannot be read" in out
    assert "2 images: " in out.splitlines()[-1]
    assert f"{text}" in out
    assert "cannot be read: No such file or directory" in out


def test_where_nothing_can_be_read_one_line_says_so(
    searchfm: Callable[..., Output], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    refused(searchfm("predict", model, tmp_path / "text.png"), "text.png: not an image of a known format")
    refused(searchfm("predict", model, "nix"), "no image could be read: nix: No such file or directory")
    refused(searchfm("predict", model, *["nix"] * 5), "nix: No such file or directory; ...")
    code, out, err = searchfm("predict", model, "nix", "--json")
    assert (code, err.count("\n")) == (2, 1)
    assert json.loads(out) == [{"schema": 2, "image": "nix", "error": "No such file or directory"}]


def test_a_folder_stands_for_the_images_in_it(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    one = images / "9" / "000.png"
    root = tmp_path / "some"
    (root / "b" / "c").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere.png"
    for path in (root / "z.PNG", root / "a.jpeg", root / "b" / "c" / "deep.png", root / ".hidden.png", elsewhere):
        path.write_bytes(one.read_bytes())
    (root / "notes.txt").write_text("no image")
    (root / "link.png").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    rows = json.loads(searchfm("predict", model, root, one, "--json")[1])
    assert [row["image"] for row in rows] == [
        *(str(root / name) for name in ("a.jpeg", "b/c/deep.png", "z.PNG")),
        str(one),
    ]
    assert len({row["probability"] for row in rows}) == 1


def test_images_in_folders_named_after_classes_are_counted(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    for label, name in ((8, "Bag"), (4, "Coat")):
        shutil.copytree(images / str(label), tmp_path / "named" / name)
    rows = json.loads(searchfm("predict", model, tmp_path / "named", "--json")[1])
    correct = sum(Path(row["image"]).parent.name == row["class"] for row in rows)
    lines = [line.strip() for line in searchfm("predict", model, tmp_path / "named")[1].splitlines()]
    assert lines[-1] == f"{correct / len(rows):.2%} correct by the names of their folders: {correct} of {len(rows)}"
    assert lines[-2].startswith(f"{len(rows)} images: ")


def test_a_name_of_any_bytes_is_shown(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/[red]\xff.png"))
    odd.write_bytes((images / "9" / "000.png").read_bytes())
    for option in ("--json", "--csv"):
        code, out, _ = searchfm("predict", model, odd, option)
        assert code == 0
        assert "[red]\N{REPLACEMENT CHARACTER}.png" in (json.loads(out)[0]["image"] if option == "--json" else out)
    code, out, _ = searchfm("predict", model, odd)
    assert code == 0
    assert "[red]\N{REPLACEMENT CHARACTER}.png" in out


def test_csv_goes_to_stdout_or_into_a_file(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    paths = [*sorted(images.rglob("*.png"))[:3], tmp_path / "nix,.png"]
    expected = json.loads(searchfm("predict", model, *paths, "--top", "2", "--json")[1])
    code, out, _ = searchfm("predict", model, *paths, "--top", "2", "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["image", "class", "probability", "class_2", "probability_2", "error"]
    for row, one in zip(rows[:3], expected[:3], strict=True):
        assert (row["image"], row["class"], row["error"]) == (one["image"], one["class"], "")
        assert float(row["probability"]) == one["probability"]
        assert row["class_2"] == one["top"][1]["class"]
    assert rows[3] == {
        **dict.fromkeys(rows[0], ""),
        "image": str(paths[3]),
        "error": "No such file or directory",
    }
    for order in (["--csv", *paths, "out.csv"], [*paths, "--csv", "out.csv"]):
        assert searchfm("predict", model, "--top", "2", *order) == (0, "", "")
        assert Path("out.csv").read_text() == out
        Path("out.csv").unlink()
    refused(searchfm("predict", model, paths[0], "--csv", "--json"), "--csv: must be without --json")
    refused(searchfm("predict", model, paths[0], "--csv", "a.csv", "b.csv"), "with one file at most (came 2)")


def test_tables_show_the_next_classes(searchfm: Callable[..., Output], model: Path, images: Path) -> None:
    one = images / "9" / "000.png"
    lines = searchfm("predict", model, one)[1].splitlines()
    assert lines[0].split() == ["image", "class", "probability"]
    assert lines[1].split()[:1] == [str(one)]
    (row,) = json.loads(searchfm("predict", model, one, "--top", "3", "--json")[1])
    line = searchfm("predict", model, one, "--top", "3")[1].splitlines()[1]
    for part in row["top"]:
        assert re.search(rf"{re.escape(part['class'])} +{part['probability']:.4f}", line)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_none_is_one_line(
    searchfm: Callable[..., Output], model: Path, images: Path, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    four(home)
    for file in ("text.safetensors", "m.pt2", "m.bin"):
        (tmp_path / file).write_text("no model")
    for name, message in {
        "toy": "study 'toy': was not retrained, so it has no model; first: searchfm retrain toy",
        "nix": "study 'nix' is not in ",
        "nix.onnx": "nix.onnx: no model here",
        str(tmp_path / "text.safetensors"): "not a model of this version",
        str(
            tmp_path / "m.bin"
        ): "m.bin: must be .onnx, .safetensors, or a folder with weights.safetensors and model.json",
        str(
            tmp_path / "m.pt2"
        ): "m.pt2: must be .onnx, .safetensors, or a folder with weights.safetensors and model.json",
        "models:/searchfm-toy@champion": "mlflow.db is not there yet; begin with `searchfm tune`",
        "models:/searchfm-toy": "must be models:/NAME@ALIAS or models:/NAME/VERSION",
        "models:/../x@y": "must be models:/NAME@ALIAS",
    }.items():
        refused(searchfm("predict", name, images, "--home", home.path), message)
        refused(searchfm("export", name, "--home", home.path), message)
    assert not list(Path().iterdir())
    for name in ("nix", "models:/nix@champion"):
        empty = tmp_path / "nothing"
        refused(searchfm("predict", name, images, "--home", empty), "--home")
        assert not empty.exists()


@pytest.mark.slow
def test_export_writes_to_the_output_option(searchfm: Callable[..., Output], model: Path, images: Path) -> None:
    plain = json.loads(searchfm("predict", model, images, "--json")[1])
    Path("out").mkdir()
    for arguments, path in {
        ("--format", "safetensors"): "mlp-0007.safetensors",
        ("--output", "my.safetensors"): "my.safetensors",
        ("--output", "out", "--format", "onnx"): "out/mlp-0007.onnx",
    }.items():
        code, out, err = searchfm("export", model, *arguments, "--json")
        assert (code, err) == (0, "")
        answer = json.loads(out)
        assert list(answer) == ["schema", "model", "format", "path", "bytes", "difference"]
        assert (answer["model"], answer["path"], answer["format"]) == (str(model), path, path.rpartition(".")[2])
        assert answer["bytes"] == Path(path).stat().st_size
        assert 0 <= answer["difference"] < 1e-5
        again = json.loads(searchfm("predict", path, images, "--json")[1])
        assert [row["class"] for row in again] == [row["class"] for row in plain]
        assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in plain], abs=2e-6)
    Path("my.pt2").write_text("mine")
    refused(searchfm("export", model, "--output", "my.pt2"), "my.pt2: already exists; --force overwrites it")
    assert Path("my.pt2").read_text() == "mine"
    code, out, _ = searchfm("export", model, "--output", "new/", "--format", "safetensors")
    assert (code, len(list(Path("new").glob("*.safetensors")))) == (0, 1)
    assert "\nnext  searchfm predict new/" in out
    code, out, _ = searchfm("export", model, "--output", "my.pt2", "--force")
    assert code == 0
    assert re.search(r"my\.pt2: [\d,]+ bytes; largest difference of a probability \d\.\de[+-]\d\d$", out.strip())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "h5"), "format 'h5': must be one of onnx, pt2, safetensors"),
        (("--output", "m.h5"), "format 'h5': must be one of"),
        (
            ("--output", "m.pt2", "--format", "onnx"),
            "--output m.pt2: must be a folder (a new one ends with /), or end in .onnx",
        ),
        (("--output", "m"), "--output m: must be a folder (a new one ends with /), or end in .onnx"),
        (("--output", "nix/new/"), "--output nix/new/: cannot be made, there is no folder nix"),
        (("--output", "nix/m.pt2"), "nix/m.pt2: cannot be written, there is no folder nix"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(
    arguments: tuple[str, ...], message: str, searchfm: Callable[..., Output], model: Path
) -> None:
    refused(searchfm("export", model, *arguments), message)
    assert not list(Path().iterdir())


def test_help_shows_its_brackets(searchfm: Callable[..., Output]) -> None:
    help_text = searchfm("export", "--help")[1]
    for text in ("searchfm[onnx]", "[default: by --output's name, else onnx]", "[default: SEARCHFM_HOME or ./runs]"):
        assert text in help_text


# --- from a study to its answers --------------------------------------------------------------------------------------


def command(home: Path, *arguments: str) -> Any:
    """What a command prints as JSON."""
    done = searchfm_here(*arguments, "--home", str(home), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, which SQLAlchemy warns of
def test_a_studys_champion_answers_by_its_name(
    searchfm: Callable[..., Output], new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tune, retrain, predict and export, one after another, with a second model that does not become the champion."""
    home, digits, images = new_home(tmp_path / "home").path, datasets.read_named("digits", "test"), tmp_path / "images"
    images.mkdir()
    for number in range(60):
        Image.fromarray(digits.images[number][0]).save(images / f"{number:02}.png")

    def ask(model: str | Path) -> list[tuple[str, float]]:
        code, out, err = searchfm("predict", model, images, "--home", home, "--json")
        assert code == 0, err
        return [(row["class"], row["probability"]) for row in json.loads(out)]

    command(home, "tune", "mlp", "--trials", "3", "--dataset", "digits", "--epochs", "8", "--workers", "2")
    assert command(home, "retrain", "mlp", "--top", "1", "--seeds", "1")["model"]["version"] == 1
    final = home / "studies" / "mlp" / "final"
    best = ask("mlp")
    correct = [answer == str(label) for (answer, _), label in zip(best, digits.labels[:60], strict=True)]
    assert sum(correct) > 40
    assert ask("models:/searchfm-mlp@champion") == ask("models:/searchfm-mlp/1") == ask(final) == best
    for kind in FORMATS:
        code, _, err = searchfm("export", "mlp", "--format", kind, "--home", home)
        assert code == 0, err
        if kind == "pt2":
            continue
        answers = ask(f"mlp.{kind}")
        assert [name for name, _ in answers] == [name for name, _ in best]
        assert [p for _, p in answers] == pytest.approx([p for _, p in best], abs=2e-6)

    # One epoch makes a worse model: version 2 is the final one, and version 1 keeps the alias.
    second = command(home, "retrain", "mlp", "--top", "1", "--seeds", "1", "--epochs", "1")
    assert second["model"]["version"] == 2
    worse = ask(final)
    assert worse != best
    assert ask("models:/searchfm-mlp/2") == worse
    assert ask("mlp") == best, "the champion, from the registry"
    for model in ("models:/searchfm-mlp@nobody", "models:/searchfm-mlp/9", "models:/searchfm-nix/1"):
        refused(searchfm("predict", model, images, "--home", home), "has no such model")

    for files in home.glob("mlartifacts/*/models/*/artifacts/extra_files"):
        files.rename(files.with_name("elsewhere"))
    lacking = "version 2 carries no weights.safetensors and model.json; must be one that `searchfm retrain` registered"
    refused(searchfm("predict", "models:/searchfm-mlp/2", images, "--home", home), lacking)
    for files in home.glob("mlartifacts/*/models/*/artifacts/elsewhere"):
        files.rename(files.with_name("extra_files"))

    # Where MLflow knows nothing of the study, the final model is what there is; if it is still what it was.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'nix.db'}")
    assert ask("mlp") == worse
    content = bytearray((final / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (final / "weights.safetensors").write_bytes(content)
    code, _, err = searchfm("predict", "mlp", images, "--home", home)
    assert code == 2
    assert "damaged, its sha256 is" in err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert ask("mlp") == best
