"""Whether to stop: signals, a timeout, the request of another process, or of the caller. Standard library only."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

REQUEST_SECONDS = 1.0  # between two looks for a stop request of another process


class StopRequest:
    """Whether what runs is to stop: after Ctrl-C, SIGTERM, `searchfm stop`, a timeout, or when `stopping` says so.

    It receives signals while it is entered, in the main thread alone. The first one asks all jobs to stop, which then
    keep their checkpoints. `exits`, for a command: a second signal ends the process at once, and leaving ends it as
    the signal would have. Else, in somebody's program: a second Ctrl-C raises KeyboardInterrupt, and leaving after
    Ctrl-C goes on; SIGTERM still ends the process then.
    """

    def __init__(self, stopping: Callable[[], bool] = lambda: False, *, exits: bool = False) -> None:
        self.signal = 0  # that the command ends with; `searchfm stop` acts as SIGTERM does
        self.reason = ""  # what the first request was
        self._stopping, self._exits, self._due = stopping, exits, 0.0
        self._requested: Callable[[], bool] = lambda: False
        self._deadline: float | None = None
        self._handlers: dict[int, Any] = {}

    @classmethod
    def of(cls, stopping: "Callable[[], bool] | None") -> "StopRequest":
        """The request itself, or one that asks a function."""
        return stopping if isinstance(stopping, cls) else cls(stopping or (lambda: False))

    def watch(self, timeout: float | None, requested: Callable[[], bool]) -> None:
        """timeout: seconds from now, or None. requested: whether another process asked for a stop."""
        self._requested = requested
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def __call__(self) -> bool:
        """Whether to stop."""
        now = time.monotonic()
        if not self.reason:
            if now > self._due:
                self._due = now + REQUEST_SECONDS
                if self._requested():
                    self.signal = signal.SIGTERM
                    self._stop("searchfm stop")
            if self._deadline is not None and now > self._deadline:
                self.reason = "timeout"
            elif self._stopping():
                self.reason = "stopping"
        return bool(self.reason)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._exits and self.signal and kind in (None, KeyboardInterrupt):
            raise SystemExit(128 + self.signal)
        if not self._exits and self.reason == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal and (self._exits or number == signal.SIGTERM):
            os._exit(128 + number)
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        self._stop("Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    def _stop(self, reason: str) -> None:
        self.reason = reason
        print("\nsearchfm: stopping; running trials are kept and go on with the same command", file=sys.stderr)
