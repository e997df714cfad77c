"""The tree of errors a user can meet. Anything else that is raised is our bug and shows its traceback.

Every message is one line that says where, what came and what may come.
"""


class SearchfmError(Exception):
    """Anything we tell the user in one line; `exit_code` is what the command line answers with."""

    exit_code = 1


class WorldError(SearchfmError):
    """The world failed: disk, database, network, every trial. The same command resumes."""


class UserError(SearchfmError):
    """The user's mistake; nothing was begun and nothing is left behind."""

    exit_code = 2


class ConfigError(UserError):
    """A key of a study file or config that cannot be: `key` is dotted, `problem` says what came and what may come."""

    def __init__(self, key: str, problem: str, where: str = "") -> None:
        self.key, self.problem, self.where = key, problem, where
        super().__init__(key, problem, where)

    def __str__(self) -> str:
        return f"{self.where}: {self.key} {self.problem}" if self.where else f"{self.key} {self.problem}"

    def under(self, path: str) -> "ConfigError":
        """The same error seen from one table further out."""
        return ConfigError(f"{path}.{self.key}" if path else self.key, self.problem, self.where)

    def at(self, where: str) -> "ConfigError":
        """The same error with the file (or command-line option) that it came from."""
        return ConfigError(self.key, self.problem, self.where or where)


class StudyError(UserError):
    """A study that is unknown, unfinished, of another shape, or in nobody's hands."""


class LockedError(UserError):
    """A study that another coordinator holds; the message names it by host and pid."""


class DataError(UserError):
    """Data that are unknown, unreachable, unreadable or not what they were."""


class ModelError(UserError):
    """A model, or its weights, that is unknown, unreachable or of another shape."""


class CheckpointError(WorldError):
    """A checkpoint that is damaged or belongs to another trial."""


class StorageError(WorldError):
    """The database or the home folder failed."""


class DivergedError(WorldError):
    """Training left the finite numbers; the message says where."""


class Stopped(BaseException):  # not an error: it must pass every `except Exception` on its way out
    """Raised by `tick()` when a worker has been asked to leave its job; the job checkpoints and goes."""
