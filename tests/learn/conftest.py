import os
from collections.abc import Iterator

import pytest
import torch

from searchfm.config import DataConfig
from searchfm.learn.data import Splits, load


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """scikit-learn's 1,797 digits, 8x8, split as a study splits them, out of a cache of the tests' own."""
    before = os.environ.get("SEARCHFM_CACHE")
    os.environ["SEARCHFM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        return load(DataConfig(name="digits"))
    finally:
        if before is None:
            del os.environ["SEARCHFM_CACHE"]
        else:
            os.environ["SEARCHFM_CACHE"] = before


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker; bitwise equality is promised for equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
