"""What all tests share whose inputs hypothesis generates: its settings, and seeds of its own every night."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, configuration

# Hypothesis keeps tables of Unicode there, by default in the checkout.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))


def settings(examples: int, number: int | None, *phases: Phase, **more: Any) -> hypothesis.settings:
    """So many examples of a seed; None: the same ones every time. No examples are stored: one that failed becomes a
    test.
    """
    return hypothesis.settings(
        max_examples=max(examples, 1),
        derandomize=number is None,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases or (Phase.explicit, Phase.generate, Phase.shrink),
        **more,
    )


def with_new_seed(run: Callable[[int], object], given: str | None) -> int:
    """Calls `run` with a random seed, which a failure names; returns it. given: of `--hypothesis-seed`."""
    number = int(given or random.SystemRandom().randrange(2**32))
    try:
        run(number)
    except BaseException as error:
        error.add_note(f"seed {number}")
        raise
    return number
