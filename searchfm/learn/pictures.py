"""Single images of a data set's training part, to be looked at. The test part is nobody's to look at. No torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.learn import parsed
from searchfm.tables import show


def images(
    config: DataConfig, places: Sequence[int], fingerprint: str, data_dir: Path | None = None
) -> NDArray[np.uint8]:
    """The images (N, C, H, W) uint8 at `places`, as `Part.indices` counts them: a folder's own validation images go on
    where those of training end.

    `fingerprint` is that of the data which the places belong to. Raises DataError for data that have changed since, or
    cannot be read.
    """
    paths = parsed.training_files(config, data_dir)
    if parsed.fingerprint(paths) != fingerprint:
        raise DataError(f"data.name = {show(config.name)}: the data have changed since the study began")
    found, begin = dict[int, NDArray[np.uint8]](), 0
    for path in paths:
        with safe_open(path, "np") as opened:
            content = opened.get_slice("images")
            count = content.get_shape()[0]
            for place in places:
                if begin <= place < begin + count:
                    found[place] = content[place - begin : place - begin + 1][0]
        begin += count
    return np.stack([found[place] for place in places])
