"""Commands as a shell sees them: their mistakes in one line, their arguments in --help, and what completes a word.

Loads no torch, optuna or mlflow: a shell asks while the user types. What completes keys is imported where it is used:
their classes take a sixth of the time of --help.
"""

import contextlib
import io
import os
import re
import signal
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, get_args

import typer
from typer.main import get_command

from searchfm.errors import UserError
from searchfm.home import Home, shipped

if TYPE_CHECKING:
    from searchfm.tables import LeafKey

COMPLETE = "_SEARCHFM_COMPLETE"  # the variable by which typer's scripts ask


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ends the process with exit code 130 after Ctrl-C, whatever error that becomes: in the middle of an import it may
    be a RuntimeError. `tune`, `retrain`, `worker` and `dashboard` set handlers of their own.
    """
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = before in (signal.SIG_DFL, signal.default_int_handler)  # not ignored, as in the background of a script
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if interrupted:
            raise SystemExit(130) from None
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@_interruptible()
def run(app: typer.Typer) -> int:
    """Runs the command of `sys.argv`; returns its exit code. Raises UserError for what typer refuses."""
    command: Any = get_command(app)
    for each in (command, *command.commands.values()):
        _plain(each)
    if os.environ.get(COMPLETE) == "complete_bash":
        return _complete_bash(command)
    try:
        code = command(prog_name="searchfm", standalone_mode=False)
    except typer.Abort as error:
        if isinstance(error.__cause__, EOFError):  # of any code: a bug
            raise error.__cause__ from None
        raise UserError("nothing was done") from None
    except typer.TyperException as error:
        if message := " ".join(error.format_message().split()):
            raise UserError(_mistake(error, message)) from None
        code = error.exit_code  # the help was printed
    return code if isinstance(code, int) else 0


def _plain(command: Any) -> None:
    """Flags without a type in --help, and all arguments in capitals."""
    for param in (*command.params, command.get_help_option(typer.Context(command))):
        if getattr(param, "is_flag", False) and param.type_descriptor.annotation is bool:
            param.metavar = ""
        elif param.param_type_name == "argument":
            param.metavar = (param.metavar or param.name).upper()


def _mistake(error: Any, message: str) -> str:
    """A mistake that typer found, as one line in the words of ours."""
    where = getattr(error.ctx, "command_path", "searchfm")
    cause = error.__cause__
    if cause is not None and getattr(error, "param", None) is not None:  # pydantic's, with the value
        came = cause.errors()[0]
        flag = error.param.opts[-1] if error.param.opts[-1].startswith("-") else error.param.metavar
        problem = (
            came["msg"].partition(", unable")[0].replace("Input should be", "must be").replace("Value error, ", "")
        )
        problem = (
            problem.replace("a valid integer", "a whole number")
            .replace("greater than or equal to", ">=")
            .replace("less than or equal to", "<=")
        )
        message = f"{flag} {came['input']}: {problem}"
    return f"{message.rstrip('.')}; see {where} --help"


# --- completion -------------------------------------------------------------------------------------------------------


def built_in_studies(incomplete: str) -> list[str]:
    """Study files that ship; the shell adds files where none begins like this."""
    return _beginning(shipped(), incomplete)


def home_studies(ctx: typer.Context, incomplete: str) -> list[str]:
    """Studies of the home."""
    return _beginning(Home.find(ctx.params.get("home")).studies(), incomplete)


def all_studies(ctx: typer.Context, incomplete: str) -> list[str]:
    """Studies of the home, and those that ship."""
    return list(dict.fromkeys([*home_studies(ctx, incomplete), *built_in_studies(incomplete)]))


def data_sets(incomplete: str) -> list[str]:
    """Data sets by name; the shell adds folders where none begins like this."""
    from searchfm.config import DATASETS

    return _beginning(DATASETS, incomplete)


def assignments(incomplete: str) -> list[str]:
    """Keys for --set with their values: all of a few, else the default and the beginning of a range."""
    keys = _keys()
    key, equals, _ = incomplete.partition("=")
    found = [key] if equals and key in keys else _beginning(keys, incomplete)
    if len(found) != 1:
        return [f"{key}=" for key in found]
    return _beginning([f"{found[0]}={value}" for value in _values(found[0], keys[found[0]])], incomplete)


def tables(incomplete: str) -> list[str]:
    """Tables of the keys of a study file, and of an engine file."""
    names = {dotted.rpartition(".")[0] for dotted in _keys()}
    return _beginning(sorted({*names, "engine"}), incomplete)


def engines(incomplete: str) -> list[str]:
    """Engines by name; the shell adds files where none begins like this."""
    from searchfm.engines import EngineName

    return _beginning(get_args(EngineName), incomplete)


def _keys() -> "dict[str, LeafKey]":
    """The keys of a study file."""
    from searchfm.config import Config, SearchConfig
    from searchfm.tables import walk

    return {dotted: item for dotted, _, item in [*walk(SearchConfig, "search."), *walk(Config)]}


def _values(dotted: str, key: "LeafKey") -> list[str]:
    from searchfm.tables import show

    if dotted == "data.name":
        return data_sets("")
    few = [*key.texts, *(["true", "false"] if bool in key.types else [])]
    return few or [show(key.default), *([] if key.fixed or dotted.startswith("search.") else ["{low="])]


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _complete_bash(command: Any) -> int:
    """Prints what completes the current word. Bash takes "=" for a word of its own: the pieces are joined here, and of
    an answer bash gets the piece that it replaces.
    """
    words, current = re.split(r"[\n ]", os.environ["COMP_WORDS"]), int(os.environ["COMP_CWORD"])
    joined: list[str] = []
    for index, word in enumerate([*words, ""][: current + 1]):
        if joined and (word == "=" or (index > 1 and words[index - 1] == "=")):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ.update(COMP_WORDS="\n".join(joined), COMP_CWORD=str(len(joined) - 1))
    kept = joined[-1][: joined[-1].rfind("=") + 1]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        command(prog_name="searchfm", complete_var=COMPLETE)
    for line in filter(None, printed.getvalue().splitlines()):
        print(line.removeprefix(kept).removeprefix(kept.partition("=")[2]))
    return 0
