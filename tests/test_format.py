"""Results as text: the images of a study, and accuracies of data whose classes differ in size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from searchfm.format import data_lines, final_sentences, largest_sentence, short_path
from searchfm.records import StudyRecord
from tests import rows


def study(subset: float = 1.0, **data: Any) -> StudyRecord:
    resolved = {"data": {"name": "photos", "subset": subset}, "search": {"keep": 3}}
    about = {"classes": ("cat", "dog"), "shape": (3, 64, 64), "train": 461, "validation": 81, "available": 461}
    header = rows.header(resolved, **(about | {"test": 158} | data))
    return StudyRecord(**vars(header), name="toy", number=1, folder=Path("nowhere"), trials=())


def test_every_image_of_a_study_is_accounted_for() -> None:
    assert data_lines(study()) == ["700 images: 158 test (not read), 81 validation, 461 training"]
    (line,) = data_lines(study(0.2, train=92))
    assert line == "700 images: 158 test (not read), 81 validation, 461 training, of which 92 (subset 0.2)"
    (line,) = data_lines(replace(study(), final=rows.final((1.0, 158))))
    assert line == "700 images: 158 test, 81 validation, 461 training", "the test part has been read"
    assert data_lines(study(test=None)) == ["461 images to train on, 81 to validate"], "as stored by 0.3"


def test_a_size_that_was_chosen_is_named_with_the_flag_that_changes_it() -> None:
    assert len(data_lines(study(sides=(64, 64)))) == 1
    assert len(data_lines(study(sides=(64, 90), shape=(3, 90, 64)))) == 1, "images that are not square keep their sides"
    _, line = data_lines(study(sides=(20, 400)))
    assert line == "sides of 20 to 400 pixels, resized to 64x64; another size: --set data.size=128"
    _, line = data_lines(study(sides=(500, 500), shape=(3, 128, 128)))
    assert line == "sides of 500 pixels, resized to 128x128; another size: --set data.size=64"


@pytest.mark.parametrize(
    ("counts", "end"),
    [
        ((50, 31), "61.7% of the validation images: accuracy misleads; retrain prints balanced accuracy"),
        ((20, 20, 10, 31), "38.3% of the validation images"),
    ],
)
def test_of_imbalanced_data_the_largest_class_is_the_accuracy_to_beat(counts: tuple[int, ...], end: str) -> None:
    names = ("cat", "dog", "eel", "fox")[: len(counts)]
    _, line = data_lines(study(validation_classes=counts, classes=names))
    assert line == f'always answering "{names[counts.index(max(counts))]}", the largest class, is correct for {end}'


@pytest.mark.parametrize("counts", [(41, 40), (48, 33), (20, 20, 20, 21)])
def test_of_balanced_data_it_is_not_printed(counts: tuple[int, ...]) -> None:
    assert len(data_lines(study(validation_classes=counts, classes=("cat", "dog", "eel", "fox")[: len(counts)]))) == 1
    test = final_sentences(rows.final(*((0.9, count) for count in counts)))["Test"]
    assert test[-1] == "Balanced accuracy, the mean recall of the classes, is 90.00%."


def test_balanced_accuracy_is_the_mean_recall_of_classes_with_images() -> None:
    answers = rows.final((1.0, 80), (0.5, 20), (0.0, 0))
    assert answers.balanced == 0.75
    assert answers.largest == 0.8
    assert replace(answers, per_class=()).balanced is None
    assert largest_sentence("it", 0.5, 3, "test") == "always answering it is correct for 50.0% of the test images"
    assert final_sentences(answers)["Test"][-1].endswith(
        "is 75.00%; always answering the largest class is correct for 80.0% of the test images: accuracy misleads."
    )


def test_a_long_path_keeps_its_last_parts() -> None:
    path = "/home/ada/photographs/2026/birds"
    assert short_path(path, len(path)) == path
    assert short_path(path, 20) == "…/2026/birds"
    assert short_path(path, 7) == "…/birds"
    assert short_path("/home/photographs-of-birds", 10) == "phot…birds"
    assert len(short_path("/home/photographs-of-birds/", 9)) == 9
