"""Generated folders of images: arrays or one line, and nothing is written into the folder."""

import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from searchfm.errors import DataError
from searchfm.learn.sources import common_side, open_source, read_part
from tests.fuzzing import fuzz, listing, refused

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr"]
KINDS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
NAMES = [
    "a",
    "A",
    "b",
    "ä",
    "😀",
    "a b",
    "a\nb",
    "-a",
    "%s%d{}",
    "train",
    "val",
    "test",
    ".hidden",
    "\udce9",
    "\x1b[31m",
    "x" * 200,
]


def image(mode: str, kind: str, side: tuple[int, int], frames: int, seed: int) -> bytes:
    """An image file; where its format lacks the mode, a PNG."""
    rng = np.random.default_rng(seed)
    grey = Image.fromarray(rng.integers(0, 256, side, dtype=np.uint8))
    picture = Image.fromarray(rng.integers(0, 65536, side, dtype=np.uint16)) if mode == "I;16" else grey.convert(mode)
    content = io.BytesIO()
    try:
        more = {"save_all": True, "append_images": [picture] * (frames - 1)} if frames > 1 and kind == "GIF" else {}
        picture.save(content, kind, **more)
    except (OSError, ValueError, KeyError):
        content = io.BytesIO()
        grey.save(content, "PNG")
    return content.getvalue()


@st.composite
def entries(draw: Callable[..., Any]) -> list[tuple[str, bytes | str | None]]:
    """Paths below a folder, each with a file's content, a link's target, or None for an empty folder. Most are of a
    data set as it must be.
    """
    classes = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    parts = draw(st.sampled_from([[""], [""], ["train/"], ["train/", "test/"], ["train/", "val/"]]))
    side = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    tree: list[tuple[str, bytes | str | None]] = []
    for part in parts:
        for name in classes:
            for number in range(draw(st.sampled_from([3, 3, 3, 1]))):
                suffix = draw(st.sampled_from([".png", ".png", ".JPG", ".gif", ".tif"]))
                content = image(
                    draw(st.sampled_from(MODES)), draw(st.sampled_from(KINDS)), side, draw(st.integers(1, 2)), number
                )
                tree.append((f"{part}{name}/{number}{suffix}", content))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        folder = f"{draw(st.sampled_from(parts))}{draw(st.sampled_from([*classes, 'c', '']))}"
        name = f"{folder}/{draw(st.sampled_from(NAMES))}"
        match draw(st.sampled_from(["cut", "bytes", "empty", "size", "link", "circle", "folder", "deep", "parquet"])):
            case "cut" if isinstance(content := tree[0][1], bytes):
                tree.append((f"{name}.png", content[: draw(st.integers(0, len(content)))]))
            case "bytes":
                tree.append((f"{name}.png", draw(st.binary(max_size=40))))
            case "empty":
                tree.append((f"{name}.png", b""))
            case "size":
                tree.append((f"{name}.png", image("L", "PNG", (7, 9), 1, 5)))
            case "link":
                tree.append((f"{name}.png", draw(st.sampled_from(["0.png", "/etc/passwd", "none", "/dev/zero"]))))
            case "circle":
                tree.append((f"{name}.png", f"{name.rpartition('/')[2]}.png"))
                tree.append((f"{folder}/loop", ".."))
            case "folder":
                tree.append((name, None))
            case "deep":
                tree.append((f"{name}/{'d/' * 30}x.png", image("L", "PNG", side, 1, 6)))
            case "parquet":
                tree.append(("train-0.parquet", draw(st.binary(max_size=40))))
    return tree


def make(root: Path, tree: list[tuple[str, bytes | str | None]]) -> None:
    for name, content in tree:
        path = root / name.lstrip("/")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir(exist_ok=True)
            elif isinstance(content, str):
                path.symlink_to(content)
            else:
                path.write_bytes(content)
        except OSError:  # the name is taken
            continue


READ = {"parts": 0}
PIXEL = image("L", "PNG", (1, 1), 1, 0)


@fuzz(
    40,
    tree=entries(),
    size=st.sampled_from([0, 0, 4]),
    found=[
        # UnicodeEncodeError: the name of a class is no UTF-8
        {"tree": [(f"{name}/{i}.png", PIXEL) for name in ("a", "\udce9") for i in range(3)], "size": 0},
        # RuntimeError: a link to itself
        {"tree": [("a/0.png", PIXEL), ("b/0.png", PIXEL), ("b/1.png", "1.png")], "size": 0},
    ],
)
def folders(tree: list[tuple[str, bytes | str | None]], size: int) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        make(root, tree)
        before = listing(root)
        for part in ("train", "test", "val"):
            with refused(DataError):
                source = open_source(root, part)  # type: ignore[arg-type]
                source.key()
                common_side(source, ())
                arrays = read_part(source, size)
                assert arrays.images.dtype == np.uint8
                assert len(arrays.images) == len(arrays.labels)
                READ["parts"] += 1
        assert listing(root) == before
    finally:
        shutil.rmtree(root)


@pytest.mark.slow(seconds=10)
def test_generated_folders() -> None:
    """Not all are refused."""
    READ["parts"] = 0
    folders.run(1)
    assert READ["parts"] >= 20


@pytest.mark.nightly
def test_new_folders(record_property: Callable[[str, object], None], pytestconfig: pytest.Config) -> None:
    number = folders.run_new(100, pytestconfig.getoption("--hypothesis-seed"))
    record_property("figures", f"{100 * folders.count:,} folders of images, seed {number}")
