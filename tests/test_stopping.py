"""Durations, when a timeout stops, and what a signal leaves of the output."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

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


class Interrupted(io.RawIOBase):
    """A file, in the middle of whose writes Ctrl-C is pressed."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return len(data)


def test_ctrl_c_within_a_write_to_standard_error_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupted()), line_buffering=True))
        print("a line", file=sys.stderr)
        monkeypatch.undo()
        assert stop.reason == "Ctrl-C"


SHOWING = """
import signal, sys, termios, time
from rich.console import Console
from searchfm import stopping
from searchfm.show.live import Region

how = sys.argv[1]
stopping.KILL_SECONDS = 60.0 if how == "second Ctrl-C" else 0.1
with stopping.StopRequest(exits=True), Region(Console()):
    if how == "held output":
        termios.tcflow(1, termios.TCOOFF)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT) if how == "second Ctrl-C" else time.sleep(60)
"""


@pytest.mark.parametrize("how", ["second Ctrl-C", "nine seconds", "held output"])
def test_an_end_at_once_shows_the_terminals_cursor_again(how: str) -> None:
    """A live region hides it. A terminal whose output the user holds (Ctrl-S) does not block the end."""
    ours, theirs = pty.openpty()
    arguments, environment = [sys.executable, "-c", SHOWING, how], {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        assert process.wait(30) == 128 + signal.SIGINT
        shown = b""
        with suppress(OSError):  # at its end
            while True:
                shown += os.read(ours, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    _, hidden, after = shown.rpartition(b"\x1b[?25l")
    assert hidden
    assert how == "held output" or b"\x1b[?25h" in after
