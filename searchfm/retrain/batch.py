"""A set of jobs brought to their ends on an engine: those that are done are known again, the others go on.

A job's folder is its record: `epochs.csv` as the epochs come, and, last of all, a file of its own with the result and
the identity of what was asked. So the same batch after a crash does only what is left.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from searchfm import errors
from searchfm.coordinator import LEAVE_SECONDS, LOCK_SECONDS, gather
from searchfm.engines import Engine
from searchfm.errors import DataError, ModelError, StorageError
from searchfm.job import Epoch, EpochDone, Failed, Finished, Job, Left, Lost, Result
from searchfm.search.history import write_epochs


@dataclass(frozen=True)
class Errand:
    """A job, and what it is called."""

    label: str  # for a person: "trial 7, seed 2 of 3"
    identity: str  # equal identities are the same work
    folder: Path
    record: str  # name of the file in the folder that holds the result
    entry: str
    payload: Mapping[str, Any]
    epochs: int = 0  # that it will train

    def result(self) -> Result | None:
        """What the job returned, if it was done before."""
        try:
            found = json.loads((self.folder / self.record).read_text())
        except (OSError, ValueError):
            return None
        result: Result | None = found["result"] if found["identity"] == self.identity else None
        return result


@dataclass(frozen=True)
class Step:
    """Something a person who watches wants to know."""

    kind: Literal["planned", "started", "epoch", "done", "found", "failed", "lost", "said"]
    errand: Errand | None = None
    epoch: Epoch | None = None
    result: Result | None = None
    text: str = ""


@dataclass
class _Live:
    errand: Errand
    attempt: int
    epochs: list[Epoch] = field(default_factory=list)
    lost: int = 0


@dataclass
class Batch:
    """Does errands: `results` and `failures` (one line each) by label, once `run` is through."""

    engine: Engine
    retries: int  # times that a job is given again when its worker died
    stopping: Callable[[], bool]
    check_lock: Callable[[], None]
    results: dict[str, Result] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self, errands: Iterable[Errand]) -> Iterator[Step]:
        """Brings all errands to their ends. Raises KeyboardInterrupt once all have left, if told to stop; DataError,
        ModelError or StorageError where a job meets one, for all others would meet it too.
        """
        waiting: deque[_Live] = deque()
        for errand in errands:
            result = errand.result()
            if result is None:
                waiting.append(_Live(errand, _attempts(errand.folder) + 1))
                yield Step("planned", errand)
            else:
                self.results[errand.label] = result
                yield Step("found", errand, result=result)
        live: dict[str, _Live] = {}
        told: float | None = None
        looked = time.monotonic()
        while waiting or live:
            if told is None and self.stopping():
                told = time.monotonic()
                for label in live:
                    self.engine.stop(label)
            if told is not None and (not live or time.monotonic() > told + LEAVE_SECONDS):
                raise KeyboardInterrupt
            while waiting and self.engine.free > 0 and told is None:
                one = waiting.popleft()
                live[one.errand.label] = one
                self._submit(one)
                yield Step("started", one.errand)
            event = self.engine.next_event(timeout=0.2)
            if time.monotonic() > looked + LOCK_SECONDS:
                self.check_lock()
                looked = time.monotonic()
            if event is None or event.job not in live or live[event.job].attempt != event.attempt:
                continue  # nothing, or from an attempt that was given up
            one = live[event.job]
            if isinstance(event, EpochDone):
                yield from self._epoch(one, event.epoch)
                continue
            del live[event.job]
            match event:
                case Finished(result=result):
                    yield self._finish(one, result)
                case Failed(kind="DataError" | "ModelError" | "StorageError" as kind, reason=reason):
                    known: type[DataError | ModelError | StorageError] = getattr(errors, kind)
                    raise known(reason)
                case Failed(reason=reason):
                    yield self._fail(one, reason)
                case Left():
                    one.attempt += 1
                    waiting.append(one)
                case Lost(reason=reason):
                    one.lost += 1
                    if one.lost > self.retries:
                        yield self._fail(one, f"{reason}, {one.lost} times")
                    else:
                        yield Step("lost", one.errand, text=reason)
                        one.attempt += 1
                        waiting.append(one)
                case _:
                    raise AssertionError(event)

    def _submit(self, one: _Live) -> None:
        errand = one.errand
        (errand.folder / f"attempt-{one.attempt}").mkdir(parents=True, exist_ok=True)  # its number is taken
        one.epochs = []
        self.engine.submit(Job(errand.label, one.attempt, errand.folder, errand.entry, errand.payload))

    def _epoch(self, one: _Live, epoch: Epoch) -> Iterator[Step]:
        one.epochs.append(epoch)
        write_epochs(one.errand.folder / "epochs.csv", one.epochs)
        yield Step("epoch", one.errand, epoch)

    def _finish(self, one: _Live, result: Result) -> Step:
        errand = one.errand
        gather(errand.folder, keep=True)
        partial = errand.folder / f"{errand.record}.tmp"
        partial.write_text(json.dumps({"identity": errand.identity, "result": result}, indent=1) + "\n")
        partial.replace(errand.folder / errand.record)
        self.results[errand.label] = result
        return Step("done", errand, result=result)

    def _fail(self, one: _Live, reason: str) -> Step:
        gather(one.errand.folder, keep=False)
        self.failures[one.errand.label] = reason
        return Step("failed", one.errand, text=reason)


def _attempts(folder: Path) -> int:
    """The highest number that an attempt in the folder has; the worker of a dead coordinator may still be writing."""
    return max((int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-*")), default=0)
