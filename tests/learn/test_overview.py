"""What `searchfm data` shows of user images of all sizes, modes and formats."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from searchfm.errors import DataError
from searchfm.figures import png, samples
from searchfm.learn.overview import SIDE, overview
from tests.commands import searchfm_here
from tests.learn.test_images import noise, small, write
from tests.learn.test_sources import keras, npz


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.mktemp("cache")))


def mixed(root: Path) -> Path:
    """Training and test images; copies between classes and parts, one file that is no image."""
    small(root, parts=("train", "test"), count=10, side=8)
    train, test = root / "train", root / "test"
    write(train / "cat" / "wide.jpg", noise(90, 20, 50, 3))
    Image.fromarray(noise(91, 12, 12)).convert("RGBA").save(train / "dog" / "clear.png")
    shutil.copy(train / "cat" / "0.png", train / "cat" / "again.png")
    shutil.copy(train / "cat" / "1.png", train / "dog" / "as dog.png")
    shutil.copy(train / "dog" / "2.png", test / "dog" / "known.png")
    (train / "cat" / "bad.png").write_text("no image")
    return root


def test_what_is_wrong_with_user_images_is_found(tmp_path: Path) -> None:
    seen = overview(str(mixed(tmp_path)))
    assert seen.classes == ("cat", "dog")
    assert [sum(seen.counts[part]) for part in ("training", "validation", "test")] == [20, 4, 21]
    assert seen.counts["test"] == (10, 11)
    assert (seen.heights, seen.widths, seen.size) == ((8, 8.0, 20), (8, 8.0, 50), 16)
    assert seen.modes == {"PNG L": 22, "JPEG RGB": 1, "PNG RGBA": 1}
    assert seen.repeated == 1
    assert sum(count for pair, count in seen.shared.items() if pair.endswith("and test")) == 1
    assert seen.contradicting == 1
    assert seen.contradictions[0].endswith("as dog.png (dog)")
    assert seen.unreadable == (f"{tmp_path / 'train' / 'cat' / 'bad.png'} (not an image of a known format)",)


def test_the_picture_shows_a_few_images_of_each_class_and_none_of_the_test_part(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", count=12, side=9)
    for name in ("cat", "dog"):
        write(root / "test" / name / "0.png", np.full((9, 9), 200, np.uint8))
    seen = overview(str(root))
    assert [len(row) for row in seen.samples.values()] == [8, 8]
    shown = [image for row in seen.samples.values() for image in row]
    assert all(image.shape == (3, SIDE, SIDE) and image.std() > 20 for image in shown)
    assert png(samples(seen.samples)).startswith(b"\x89PNG")


def test_a_carved_test_part_is_counted_and_shares_nothing(tmp_path: Path) -> None:
    seen = overview(str(small(tmp_path, count=40)))
    assert seen.carved
    assert sum(map(sum, seen.counts.values())) == 80
    assert 4 <= sum(seen.counts["test"]) <= 30
    assert not any(pair.endswith("and test") for pair in seen.shared)


def test_arrays_and_data_sets_by_name_are_shown_too(tmp_path: Path) -> None:
    seen = overview(str(keras(tmp_path)))
    assert [sum(counts) for counts in seen.counts.values()] == [255, 45, 100]
    assert (seen.modes, seen.size) == ({"L": 300}, 0)
    digits = overview("digits")
    assert [sum(counts) for counts in digits.counts.values()] == [1201, 212]
    assert not digits.compared


def test_data_that_cannot_be_divided_are_shown_with_the_reason(tmp_path: Path) -> None:
    path = npz(tmp_path / "few.npz", images=np.stack([noise(i, 8, 8) for i in range(9)]), labels=np.arange(9) % 8)
    assert "must have at least 2" in overview(str(path)).problem
    for name in ("cat", "dog"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"bad: none of 2 images can be read: .*not an image of a known format"):
        overview(str(tmp_path / "bad"))


def test_the_command_prints_all_of_it_and_where_the_picture_is(tmp_path: Path) -> None:
    root, picture = mixed(tmp_path / "pets"), tmp_path / "pets.png"
    done = searchfm_here("data", str(root), "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    for text in (
        "45: 21 test, 4 validation, 20 training",
        "height 8 to 20 (median 8), width 8 to 50 (median 8)",
        "resized to 16x16 by a new study; another: --set data.size=128",
        "1 image repeats an earlier one of the class",
        "1 in two classes: ",
        "bad.png (not an image of a known format)",
        str(picture),
    ):
        assert text in " ".join(done.stdout.split()), text
    with Image.open(picture) as image:
        assert image.width > 8 * SIDE
    (values,) = json.loads(searchfm_here("data", str(root), "--picture", str(picture), "--json").stdout)
    assert values["counts"]["test"] == {"cat": 10, "dog": 11}
    assert (values["size"], values["repeated"], values["picture"]) == (16, 1, str(picture))
