"""A search on a machine whose clock is set while it runs, forwards and back."""

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from searchfm.home import HOME, Home
from searchfm.search.storage import read_study
from tests.commands import searchfm, searchfm_here
from tests.driving import facts, without_following
from tests.programs import missing

TUNE = ("tune", "mlp", "--dataset", "digits", "--trials", "8", "--epochs", "4", "--workers", "1")
OFFSETS = ("+1d", "-2d", "+0", "-6y", "+5y", "-1h", "+10m")


@contextmanager
def jumping(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of processes whose clock is set every half second. What measures durations is not changed."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        missing("this test sets a clock: apt-get install faketime")
    stamp, over = folder / "offset", threading.Event()

    def jump() -> None:
        for offset in itertools.cycle(OFFSETS):
            (folder / "next").write_text(f"{offset}\n")
            (folder / "next").replace(stamp)
            if over.wait(0.5):
                return

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(stamp),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    finally:
        over.set()
        thread.join()


@pytest.mark.slow(seconds=30)
def test_a_search_whose_clock_jumps_is_the_same_search(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    homes = [new_home(tmp_path / name) for name in ("calm", "jumping")]
    with without_following():
        assert searchfm_here(*TUNE, "--home", str(homes[0].path)).returncode == 0
    with jumping(tmp_path) as clock:
        done = searchfm(*TUNE, **{HOME: str(homes[1].path), **clock})
        assert done.returncode == 0, done.stderr
    calm, study = (read_study(home, "mlp") for home in homes)
    assert facts(study) == facts(calm)
    durations = {trial.number: (trial.ended or 0.0) - (trial.started or 0.0) for trial in study.trials}
    assert max(map(abs, durations.values())) > 3600, "the clock did not jump in a trial"
    shown = searchfm_here("trial", "mlp", str(min(durations, key=durations.__getitem__)), "--home", str(homes[1].path))
    assert not re.search(r"\s-\d", shown.stdout.partition("\ntime ")[2].partition("\n")[0])
    assert searchfm_here("sync", "mlp", "--json", "--home", str(homes[1].path)).stdout == "[]\n"
    assert searchfm_here("check", "--json", "--home", str(homes[1].path)).returncode == 0
