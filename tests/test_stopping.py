"""Durations, and when a timeout stops."""

import time

import pytest

from searchfm.errors import UserError
from searchfm.stopping import StopRequest, read_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1H30M5", 5405),
        ("0.5h", 1800),
        (2.5, 2.5),
    ],
)
def test_a_duration_is_seconds_without_a_unit(text: float | str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "30 minutes", "m30", "-5", "1m1h", "1e3", float("nan"), float("inf"), -1.0])
def test_what_is_no_duration_is_one_line(text: float | str) -> None:
    with pytest.raises(
        UserError, match=r"^--timeout .*: must be a duration, such as 90 \(seconds\), 30m, 1h or 1h30m$"
    ):
        read_duration(text, "--timeout")


def test_a_timeout_counts_from_the_beginning_of_the_command_and_keeps_its_reserve() -> None:
    stop = StopRequest(began=time.monotonic() - 100)
    stop.watch(150, lambda: False)
    assert not stop()
    assert stop.left == pytest.approx(50, abs=10)
    stop.reserve = 80
    assert stop()
    assert stop.reason == "timeout"
    stop.clear_timeout()
    assert not stop()
