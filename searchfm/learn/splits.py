"""Which images are for training, validation and test: indices only, from labels, pixels and a seed. No torch."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.tables import show

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

TEST_SHARE = 0.2  # of a data set without a test part of its own; a constant, so that no setting ever moves the part


def fingerprint(image: Pixels) -> bytes:
    """sha256 (32 bytes) of one image (C, H, W), its shape included."""
    return hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()


def is_test(fingerprint: bytes) -> bool:
    """Whether an image belongs to the test part that is carved out of data without one.

    The image's own pixels decide, so equal images never stand on both sides, and more images never move earlier ones.
    """
    return int.from_bytes(fingerprint[:8], "big") < TEST_SHARE * 2**64


def split(
    labels: Labels, classes: Sequence[str], config: DataConfig, *, validated: bool = False
) -> tuple[Labels, Labels]:
    """Places (ascending) of the training and of the validation images among `labels` (N,).

    Validation is `config.validation` of every class (nothing if the data are `validated` otherwise), training is
    `config.subset` of what is left: both by `config.seed`, to the nearest image, and at least one image of each class.
    Subsets of one seed lie within each other. Raises DataError for a class with too few images.
    """
    counts, least = np.bincount(labels, minlength=len(classes)), 1 if validated else 2
    if counts.min() < least:
        few = int(counts.argmin())
        raise DataError(
            f"data.name = {show(config.name)}: class {show(classes[few])} has {counts[few]} images to "
            f"{'train' if validated else 'train and validate'} on: must have at least {least}"
        )
    held = np.zeros(len(labels), dtype=np.bool_)
    if not validated:
        held = _share(labels, config.validation, "validation", config.seed, leave=1)
    rest = np.flatnonzero(~held)
    if config.subset < 1:
        rest = rest[_share(labels[rest], config.subset, "subset", config.seed, leave=0)]
    return rest, np.flatnonzero(held)


def _share(labels: Labels, share: float, purpose: str, seed: int, *, leave: int) -> NDArray[np.bool_]:
    """A mask (N,) of about `share` of each class: at least one image, and all but `leave` at most."""
    counts = np.bincount(labels)
    exact = counts * share
    number = np.floor(exact).astype(np.int64)
    # Largest remainder: the whole is as near to `share` as each class.
    missing = max(0, round(len(labels) * share) - int(number.sum()))
    number[np.argsort(number - exact, kind="stable")[:missing]] += 1
    number = np.clip(number, 1, np.maximum(counts - leave, 1))
    # RandomState, because NumPy promises never to change its stream; the seed may be any whole number.
    words = np.frombuffer(hashlib.sha256(f"{purpose} {seed}".encode()).digest(), dtype="<u4")
    rng = np.random.RandomState(words)
    mask = np.zeros(len(labels), dtype=np.bool_)
    for label, wanted in enumerate(number):
        mask[rng.permutation(np.flatnonzero(labels == label))[:wanted]] = True
    return mask
