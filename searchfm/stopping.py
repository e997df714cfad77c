"""Whether to stop: signals, a timeout, the request of another process, or of the caller. Durations as text.
Imports the standard library, `errors` and `forkserver` alone.
"""

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Self

from searchfm import forkserver
from searchfm.errors import UserError

DURATION = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?")
REQUEST_SECONDS = 1.0  # between two looks for a stop request of another process
HANG_SECONDS = 600.0  # without a heartbeat, until a worker is killed; the default
STOP_SECONDS = 6.0  # for jobs to reach the end of a batch after a stop; then their workers are killed
# After a signal: Docker kills after ten seconds. Workers have `STOP_SECONDS`, MLflow the rest of eight; what still runs
# after nine is killed.
EXIT_SECONDS, KILL_SECONDS = 8.0, 9.0
SHOW_CURSOR = b"\x1b[?25h"  # to a terminal


def read_duration(value: float | str, where: str = "timeout") -> float:
    """Seconds of a duration: 90, "90", "90s", "30m", "1h", "1h30m". Raises UserError; `where` begins its line."""
    if isinstance(value, str):
        match = DURATION.fullmatch(value.strip().lower())
        parts = {unit: text for unit, text in match.groupdict().items() if text} if match else {}
        seconds = sum(float(text) * {"h": 3600, "m": 60, "s": 1}[unit] for unit, text in parts.items())
    else:
        parts, seconds = {"s": value}, float(value)
    if not parts or not 0 <= seconds < math.inf:
        raise UserError(f"{where} {value}: must be a duration, such as 90 (seconds), 30m, 1h or 1h30m")
    return seconds


def on_stop_signals(first: Callable[[int, Any], object]) -> dict[int, Any]:
    """Sets the handler of the signals that stop a command; returns those that it replaces. A SIGHUP that is ignored, by
    nohup, stays ignored.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in forkserver.SIGNALS if not (ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, first) for number in numbers}


def exit_at_second(first: Callable[[int, Any], object]) -> None:
    """Calls `first` at the first signal that stops a command. A second Ctrl-C or SIGTERM ends the process and its
    workers at once: see `StopRequest`.
    """
    received = False
    terminal = _terminals()

    def on_signal(number: int, frame: Any) -> None:
        nonlocal received
        if number == signal.SIGHUP:
            _hang_up(terminal)
        if not received:
            received = True
            first(number, frame)
        elif number != signal.SIGHUP:
            exit_now(number)

    on_stop_signals(on_signal)


def exit_now(number: int) -> NoReturn:
    """Ends this process and its workers at once, as a signal would."""
    try:
        _show_cursor()
        forkserver.kill()
    finally:
        os._exit(128 + number)


def _terminals() -> list[int]:
    """The file descriptors of standard output and error that are a terminal."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def _show_cursor() -> None:
    """Shows the cursor, which a live region hides until its end. A terminal is opened again for this: one whose output
    is held (Ctrl-S) would block.
    """
    for descriptor in _terminals():
        with suppress(OSError):
            terminal = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            os.write(terminal, SHOW_CURSOR)


def _hang_up(terminals: list[int]) -> None:
    """Redirects outputs to /dev/null: a write to a closed terminal raises OSError."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(null, descriptor)
    os.close(null)


class StopRequest:
    """Whether what runs is to stop: after Ctrl-C, SIGTERM, SIGHUP, `searchfm stop`, a timeout, or when `stopping` says
    so.

    It receives signals while it is entered, in the main thread alone. The first one asks all jobs to stop, which then
    keep their checkpoints. `exits`, for a command: a second Ctrl-C or SIGTERM ends the process and its workers at once,
    a first one after nine seconds, and the end of the block as the signal would have. Without it, for a program that
    calls searchfm: a second Ctrl-C raises KeyboardInterrupt, and the program continues after Ctrl-C; SIGTERM and SIGHUP
    still end the process at the end of the block. A further SIGHUP is ignored: a closed terminal sends two, by its
    shell and by the kernel.

    began: when the command began, in seconds of `time.monotonic`: a timeout counts from then on. Default: now.
    """

    def __init__(
        self, stopping: Callable[[], bool] = lambda: False, *, exits: bool = False, began: float | None = None
    ) -> None:
        self.began = time.monotonic() if began is None else began
        self.reserve = 0.0  # seconds of the timeout that are for what comes after
        self.signal = 0  # that the command ends with; `searchfm stop` acts as SIGTERM does
        self.reason = ""  # what the first request was
        self._stopping, self._exits, self._due = stopping, exits, 0.0
        self._requested: Callable[[], bool] = lambda: False
        self._deadline: float | None = None
        self._exit_by = math.inf  # in seconds of `time.monotonic`
        self._terminal: list[int] = []  # file descriptors of outputs that are one
        self._handlers: dict[int, Any] = {}

    @classmethod
    def of(cls, stopping: "Callable[[], bool] | None") -> "StopRequest":
        """The request itself, or one that asks a function."""
        return stopping if isinstance(stopping, cls) else cls(stopping or (lambda: False))

    def watch(self, timeout: float | None, requested: Callable[[], bool]) -> None:
        """timeout: seconds since the command began, or None. requested: whether another process asked for a stop."""
        self._requested = requested
        self._deadline = None if timeout is None else self.began + timeout

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds to the end of the timeout; below 0 after it, infinite without one."""
        return math.inf if self._deadline is None else self._deadline - time.monotonic()

    @property
    def exit_in(self) -> float:
        """Seconds in which what remains must be done; infinite unless a signal or another process stops it."""
        return max(0.0, self._exit_by - time.monotonic())

    def clear_timeout(self) -> None:
        """What follows runs to its end, however long that takes, unless something else stops it."""
        self._deadline = None
        self.reason = "" if self.reason == "timeout" else self.reason

    def __call__(self) -> bool:
        """Whether to stop."""
        now = time.monotonic()
        if not self.reason:
            if now > self._due:
                self._due = now + REQUEST_SECONDS
                if self._requested():
                    self.signal = signal.SIGTERM
                    self._stop("searchfm stop")
            if self._deadline is not None and now > self._deadline - self.reserve:
                self.reason = "timeout"
            elif self._stopping():
                self.reason = "stopping"
        return bool(self.reason)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            self._handlers = on_stop_signals(self._on_signal)
            self._terminal = _terminals()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._exits and self.signal and kind in (None, KeyboardInterrupt):
            raise SystemExit(128 + self.signal)
        if not self._exits and self.reason in ("SIGTERM", "SIGHUP"):
            signal.raise_signal(self.signal)

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _hang_up(self._terminal)
            if self.signal:
                return
        if self.signal and (self._exits or number == signal.SIGTERM):
            exit_now(number)
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        self._stop("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        self.reason = reason
        self._exit_by = time.monotonic() + EXIT_SECONDS
        if self._exits:
            timer = threading.Timer(KILL_SECONDS, exit_now, (self.signal,))
            timer.daemon = True
            timer.start()
        with suppress(OSError, RuntimeError):  # the latter if the signal came within a write to the same file
            print("\nsearchfm: stopping; running trials are kept and go on with the same command", file=sys.stderr)
