"""The errors that a user can meet. Any other exception is a bug of searchfm and shows its traceback.

Each message is one line: where, what came, what may come.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

LISTED = 12  # names that a message lists in full
LONGEST = 2000  # characters of a message


class SearchfmError(Exception):
    """An error shown to the user as one line; `exit_code` is that of the command."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(self.text())

    def text(self) -> str:
        """The message as it was made: keys, values and names in it may hold any characters."""
        return super().__str__()


class WorldError(SearchfmError):
    """A failure outside the user's control: disk, database, network, every trial. The same command resumes."""


class OutOfTimeError(SearchfmError):
    """The timeout was over before the study was opened: nothing was begun, and nothing is left behind."""

    exit_code = 0


class UserError(SearchfmError):
    """A mistake in the command or a file; nothing was started and nothing is left behind."""

    exit_code = 2


class ConfigError(UserError):
    """An invalid key of a study file or config: `key` is dotted, `problem` says what came and what may come."""

    def __init__(self, key: str, problem: str, where: str = "") -> None:
        self.key, self.problem, self.where = key, problem, where
        super().__init__(key, problem, where)

    def text(self) -> str:
        """See `SearchfmError`."""
        return f"{self.where}: {self.key} {self.problem}" if self.where else f"{self.key} {self.problem}"

    def under(self, path: str) -> "ConfigError":
        """The same error, its key prefixed with the path of an outer table."""
        return type(self)(f"{path}.{self.key}" if path else self.key, self.problem, self.where)

    def at(self, where: str) -> "ConfigError":
        """The same error with the file or command-line option that the key came from."""
        return type(self)(self.key, self.problem, self.where or where)


class UnknownKeyError(ConfigError):
    """A key that no table of its place has."""


class StudyError(UserError):
    """A study that is unknown, unfinished, of another shape, or not locked by this process."""


class LockedError(UserError):
    """A study that another coordinator holds; the message names it, the `holder`, by host and pid."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class DataError(UserError):
    """Data that are unknown, unreachable, unreadable or changed."""


class ModelError(UserError):
    """A model, or its weights, that is unknown, unreachable or of another shape."""


class CodeError(ModelError):
    """Code of the user that may not run on this host, cannot be imported, or has changed."""


class CodeNotAllowedError(CodeError):
    """Code of the user on a host that does not allow any; another host may."""


def near(name: str, options: Iterable[str]) -> str:
    """The option that a mistyped name most probably means, upper and lower case alike; "" if none is close."""
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), by_lower, 1)
    return by_lower[found[0]] if found else ""


def one_of(name: str, options: Iterable[str], form: Callable[[str], str] = str, hint: str = "") -> str:
    """What may stand in place of a wrong name: `tpe, grid, gp; did you mean tpe?`. A long list is cut.

    form: how a message shows an option. hint: ends the message where no option is close; `{}` stands for the name.
    """
    names = list(options)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listed = ", ".join(map(form, names[:LISTED])) + more
    if close := near(name, names):
        return f"{listed}; did you mean {form(close)}?"
    return f"{listed}; {hint.replace('{}', form(name))}" if hint and name else listed


@contextmanager
def model_errors(problem: str) -> Iterator[None]:
    """ModelError, a line that begins with `problem`, for any error inside: libraries raise many classes for a model."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{problem}: {one_line(error)}") from error


def printable(text: str) -> str:
    """A text as one line that a terminal shows as it is: with escapes for line ends, control characters and the rest
    that `str.isprintable` excludes, and without the middle of a long one.
    """
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    half = LONGEST // 2 - 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def one_line(error: BaseException) -> str:
    """The first 200 characters of an error's text in one line, or its class if it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class StorageError(WorldError):
    """The database or the home folder failed."""


class DamagedError(StorageError):
    """A record that cannot be read."""


class NewerError(StorageError):
    """A record that a newer version wrote."""


class DivergedError(WorldError):
    """A loss that is not finite; the message says which and in which epoch."""


class Stopped(BaseException):  # not an error: it must pass every `except Exception` on its way out
    """Raised by `tick()` when the job must stop; the job writes a checkpoint and ends."""
