"""What the forkserver prepares for every worker."""

import gc
import multiprocessing
import subprocess
import sys
from collections.abc import Generator, Mapping
from typing import Any

import pytest
import torch

from searchfm.engines.local import LocalEngine
from searchfm.jobs import Context, Finished, Job, Result
from searchfm.records import Epoch

TINY = 1e-40  # below float32's smallest normal number, 1.2e-38


def settings(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """A number that only exists where denormal numbers do, and how many objects no collection looks at."""
    yield from ()
    product = (torch.full((8,), TINY * 1e10) * torch.full((8,), 1e-10)).sum().item()
    return {"product": product, "frozen": gc.get_freeze_count()}


@pytest.fixture(scope="module", params=["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def result(request: pytest.FixtureRequest) -> Result:
    """What a job finds in a worker that was started so."""
    engine = LocalEngine(["cpu"])
    engine._context = multiprocessing.get_context(request.param)
    try:
        engine.submit(Job("settings", None, "tests.learn.test_warm:settings", {}, attempt=1))
        event = None
        while event is None:
            event = engine.next_event(timeout=10)
    finally:
        engine.close()
    assert isinstance(event, Finished)
    return event.result


def test_workers_take_numbers_too_small_to_matter_for_zero(result: Result) -> None:
    """Where they do not, L2 slows an MLP's training tenfold after a few epochs."""
    assert result["product"] == 0.0


def test_no_collection_looks_at_what_was_imported(result: Result) -> None:
    """Where it does, collecting garbage takes most of a small trial's time."""
    assert result["frozen"] > 100_000


@pytest.mark.slow
def test_nothing_is_printed_when_the_interpreter_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import searchfm.learn.warm"], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "")
