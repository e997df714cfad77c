"""Agents with the toy entries, for tests of engines whose workers dial in.

`python -m tests.agents HOST:PORT HOME NAME DEVICES [--allow-code]` runs one in a process, as `searchfm worker` does.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from searchfm.engines import DEFAULTS
from searchfm.engines.agent import Agent
from searchfm.engines.remote import RemoteEngine
from searchfm.engines.wire import address, find_key

ENTRIES = {"tests.toys:work": (), "tests.toys:trial": (), "tests.toys:prepare": ()}
LIGHT = "tests.toys"


def make(where: str, home: Path, name: str = "node", devices: int = 1, *, allow_code: bool = False) -> Agent:
    key = find_key(home)
    return Agent(
        address(where, "HOST:PORT"),
        home,
        key,
        replace(DEFAULTS, allow_code=allow_code),
        devices=["cpu"] * devices,
        entries=ENTRIES,
        warm=LIGHT,
        host=name,
        retry=20.0,
    )


def listening(home: Path, **options: object) -> RemoteEngine:
    """A listener on loopback."""
    return RemoteEngine(home, "127.0.0.1", 0, entries=ENTRIES, **options)  # type: ignore[arg-type]


@contextmanager
def threads(engine: RemoteEngine, home: Path, *names: str) -> Iterator[None]:
    """Agents of one worker each, in threads of this process; they leave when the engine closes."""
    agents = [make(f"127.0.0.1:{engine.port}", home, name) for name in names]
    running = [threading.Thread(target=agent.run) for agent in agents]
    for thread in running:
        thread.start()
    try:
        await_free(engine, len(names))
        yield
    finally:
        engine.close()
        for thread in running:
            thread.join(30)
        assert not any(thread.is_alive() for thread in running)


def start(
    engine: RemoteEngine, home: Path, name: str = "node", devices: int = 1, *, allow_code: bool = False
) -> "subprocess.Popen[str]":
    """An agent in a process."""
    command = [sys.executable, "-m", "tests.agents", f"127.0.0.1:{engine.port}", str(home), name, str(devices)]
    command += ["--allow-code"] * allow_code
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def await_free(engine: RemoteEngine, count: int, seconds: float = 40.0) -> None:
    """Reads until so many workers are free; no event comes meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if engine.free >= count:
            return
        assert engine.next_event(0.1) is None
    raise AssertionError(f"{engine.free} of {count} workers joined")


def main() -> None:
    where, home, name, devices, *allowed = sys.argv[1:]
    agent = make(where, Path(home), name, int(devices), allow_code=bool(allowed))
    agent.notify = lambda line: print(line, file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, agent.terminate)
    agent.run()


if __name__ == "__main__":
    main()
