"""Runs searchfm's commands, in a process of their own or in this one."""

import io
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from searchfm import cli
from searchfm.forkserver import KEYS, SECRETS, SIGNALS
from searchfm.home import shipped_folder
from searchfm.search.files import question
from tests.json_page import check


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def searchfm(*arguments: str, **environment: str) -> Done:
    """Runs a command in a process of its own, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "searchfm", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160", **environment},
        timeout=300,
        check=False,
    )
    return _checked(arguments, Done(done.returncode, done.stdout, done.stderr))


def _checked(arguments: Sequence[str], done: Done) -> Done:
    """What is printed with `--json` is what `.github/JSON.md` documents."""
    if done.returncode == 0 and "--json" in arguments:
        check(arguments, done.stdout)
    return done


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after the code."""
    tail = "\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.rpartition("loaded:")[2].split())


def loaded_by(*words: str) -> set[str]:
    """The modules that a command has loaded at its end."""
    return loaded(
        f"""
from searchfm.cli import main
import sys
sys.argv = {["searchfm", *words]}
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    )


def header(study: str, data: str) -> str:
    """What `tune` prints first of a built-in study."""
    return f"{study} on {data}: {question((shipped_folder() / f'{study}.toml').read_text('utf-8'))}\n"


def after_imports(printed: str) -> str:
    """What a command printed, less the phase that is shown once it takes long: on busy cores."""
    return printed.removeprefix("importing Optuna\n")


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of searchfm that workers have."""
    names = environment.keys() - KEYS
    return {name: environment[name] for name in names if name.startswith("SEARCHFM") and not name.startswith(SECRETS)}


def searchfm_here(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    """Runs a command in this process, for tests that run several and are not about processes: one of its own takes 6
    (tune) to 14 s (retrain) of CPU for imports alone, its workers' included.

    Workers have the environment that the process-wide forkserver started with, so another environment starts another
    forkserver. A module that gives one takes the fixture `own_forkserver`.
    """
    out, err, server = io.StringIO(), io.StringIO(), multiprocessing.forkserver._forkserver
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does; here MLflow's would be errors
        patch.setattr(sys, "argv", ["searchfm", *arguments])
        for name, value in {"COLUMNS": "160", **environment}.items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        pid = server._forkserver_pid
        if pid is not None and settings(psutil.Process(pid).environ()) != settings(os.environ):
            server._stop()
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            for number, handler in handlers.items():  # which end with the process of a command
                signal.signal(number, handler)
    code = ended.value.code
    number = code if isinstance(code, int) else int(code is not None)
    return _checked(arguments, Done(number, out.getvalue(), err.getvalue()))
