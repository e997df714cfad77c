"""An engine by its options: a name, or a TOML file, and flags."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_never, get_args

from searchfm.engines import Engine, EngineName, EngineOptions
from searchfm.errors import ConfigError, UserError, one_of
from searchfm.inputs import parse_toml, read_text
from searchfm.tables import read_within

NAMES = get_args(EngineName)
ELSEWHERE = ("listen", "tls_cert", "tls_key")  # options of engines whose workers dial in


def start_engine(options: EngineOptions, home: Path, notify: Callable[[str], None]) -> Engine:
    """The engine of these options, with one worker until `expand`.

    home: the folder that all nodes share. notify: receives lines for the user: what to type on another machine, which
    workers joined, left or were refused. Raises UserError, WorldError.
    """
    if options.workers_per_gpu == "auto" and options.name != "local":
        raise UserError(f"--workers-per-gpu auto: is for --engine local; with {options.name} it must be a number")
    match options.name:
        case "local":
            from searchfm.engines.local import LocalEngine

            return LocalEngine(options=options)
        case "listen":
            from searchfm.engines.remote import listen

            return listen(options, home, notify)
        case "slurm":
            from searchfm.engines.remote import launch
            from searchfm.engines.slurm import Slurm

            return launch(options, home, notify, Slurm(options, home, notify))
        case "ray":
            from searchfm.engines.ray import Ray
            from searchfm.engines.remote import launch

            return launch(options, home, notify, Ray(options, home, notify))
        case _:
            assert_never(options.name)


def read_options(engine: str, flags: Mapping[str, Any]) -> EngineOptions:
    """The options of an engine: its name, or a TOML file with a table [engine], and over them the flags that are not
    None, by dotted key. Raises UserError.
    """
    values: dict[str, Any] = {"name": engine}
    if engine.endswith(".toml"):
        try:
            values = parse_toml(read_text(Path(engine)))["engine"]
        except (OSError, ValueError, KeyError) as error:
            reason = "has no table [engine]" if isinstance(error, KeyError) else getattr(error, "strerror", 0) or error
            raise UserError(f"--engine {engine}: {reason}") from None
    elif engine not in NAMES:
        raise UserError(f"--engine {engine}: must be {one_of(engine, NAMES, hint='or a TOML file with [engine]')}")
    for name, value in flags.items():
        if isinstance(values, dict) and value not in (None, ()):
            *parents, last = name.split(".")
            users = parents or [item for item in NAMES if item != "local" or name not in ELSEWHERE]
            if values.get("name", "local") not in users:
                flag = "--slurm-args" if name == "slurm.args" else f"--{last.replace('_', '-')}"
                raise UserError(f"{flag} {value}: is for --engine {' or '.join(users)}")
            inner = values
            for parent in parents:
                inner = inner.setdefault(parent, {})
            if isinstance(inner, dict):  # what else stands there is refused below
                inner[last] = value
    try:
        return read_within("engine", EngineOptions.from_table, values)
    except ConfigError as error:
        raise error.at(f"--engine {engine}") from None
