"""What the forkserver prepares for every worker."""

from collections.abc import Generator, Mapping
from typing import Any

import torch

from searchfm.engines.local import LocalEngine
from searchfm.job import Context, Epoch, Finished, Job, Result

TINY = 1e-40  # below float32's smallest normal number, 1.2e-38


def product(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """A number that only exists where denormal numbers do."""
    yield from ()
    return {"value": (torch.full((8,), TINY * 1e10) * torch.full((8,), 1e-10)).sum().item()}


def test_workers_take_numbers_too_small_to_matter_for_zero() -> None:
    """Where they do not, L2 slows an MLP's training tenfold after a few epochs."""
    engine = LocalEngine(["cpu"])
    try:
        engine.submit(Job("product", 1, None, "tests.learn.test_warm:product", {}))
        event = None
        while event is None:
            event = engine.next_event(timeout=10)
    finally:
        engine.close()
    assert event == Finished("product", 1, {"value": 0.0})
