"""The errors that a user can meet. Any other exception is a bug of searchfm and shows its traceback.

Each message is one line: where, what came, what may come.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SearchfmError(Exception):
    """An error shown to the user as one line; `exit_code` is that of the command."""

    exit_code = 1


class WorldError(SearchfmError):
    """A failure outside the user's control: disk, database, network, every trial. The same command resumes."""


class UserError(SearchfmError):
    """A mistake in the command or a file; nothing was started and nothing is left behind."""

    exit_code = 2


class ConfigError(UserError):
    """An invalid key of a study file or config: `key` is dotted, `problem` says what came and what may come."""

    def __init__(self, key: str, problem: str, where: str = "") -> None:
        self.key, self.problem, self.where = key, problem, where
        super().__init__(key, problem, where)

    def __str__(self) -> str:
        return f"{self.where}: {self.key} {self.problem}" if self.where else f"{self.key} {self.problem}"

    def under(self, path: str) -> "ConfigError":
        """The same error, its key prefixed with the path of an outer table."""
        return ConfigError(f"{path}.{self.key}" if path else self.key, self.problem, self.where)

    def at(self, where: str) -> "ConfigError":
        """The same error with the file or command-line option that the key came from."""
        return ConfigError(self.key, self.problem, self.where or where)


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


@contextmanager
def model_errors(problem: str) -> Iterator[None]:
    """ModelError, a line that begins with `problem`, for any error inside: libraries raise many classes for a model."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{problem}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first 200 characters of an error's text in one line, or its class if it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class StorageError(WorldError):
    """The database or the home folder failed."""


class DivergedError(WorldError):
    """A loss that is not finite; the message says which and in which epoch."""


class Stopped(BaseException):  # not an error: it must pass every `except Exception` on its way out
    """Raised by `tick()` when the job must stop; the job writes a checkpoint and ends."""
