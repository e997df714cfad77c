"""Properties under generated inputs: the same ones in CI, and many of a new seed every night."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import Phase, example, given, seed
from hypothesis.strategies import SearchStrategy

from searchfm.errors import SearchfmError
from tests.generated import settings, with_new_seed

HANG = 10  # seconds; an example takes milliseconds
LINE = 2000  # characters of an error


@dataclass(frozen=True)
class Property:
    """A function that must hold for all inputs of its strategies."""

    check: Callable[..., None]
    strategies: Mapping[str, SearchStrategy[Any]]
    count: int  # of examples, times a factor
    found: Sequence[Mapping[str, Any]]  # inputs that failed once

    def run(self, factor: int, number: int | None = None) -> None:
        """Runs the examples of a seed, else the same ones every time; factor 0: only what failed once. No examples are
        stored.
        """
        test = given(**self.strategies)(self.check)
        for each in self.found:
            test = example(**each)(test)
        phases = () if factor else (Phase.explicit,)
        (test if number is None else seed(number)(test))  # a decorator that marks the function
        settings(self.count * factor, number, *phases)(test)()

    def run_new(self, factor: int, given_seed: str | None) -> int:
        """Runs examples of a random seed, which a failure names; returns it."""
        return with_new_seed(lambda number: self.run(factor, number), given_seed)


def fuzz(
    count: int, *, found: Sequence[Mapping[str, Any]] = (), **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Property]:
    """Makes a property of a function. found: inputs that failed once, which are tried first."""
    return lambda check: Property(check, strategies, count, found)


def properties(namespace: Mapping[str, Any]) -> dict[str, Property]:
    """The properties of a module, by name."""
    return {name: value for name, value in namespace.items() if isinstance(value, Property)}


class HangError(Exception):
    """An example took too long."""


@contextlib.contextmanager
def bounded(seconds: int = HANG) -> Iterator[None]:
    """Fails if the block takes longer, also where it catches the exception."""
    late: list[bool] = []

    def ring(*_: object) -> None:
        late.append(True)
        raise HangError(f"takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not late


def check_line(error: SearchfmError | str) -> None:
    """An error is one line that a terminal shows as it is."""
    text = str(error)
    assert text.isprintable(), text
    assert 0 < len(text) <= LINE, text


@contextlib.contextmanager
def refused(*classes: type[SearchfmError]) -> Iterator[None]:
    """The block works, or raises one of the errors, in one line, and in time."""
    try:
        with bounded():
            yield
    except classes as error:
        check_line(error)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Everything in a folder: path, size and time of change."""
    found = []
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            status = (Path(parent) / name).lstat()
            found.append((f"{parent}/{name}", status.st_size, status.st_mtime_ns))
    return sorted(found)
