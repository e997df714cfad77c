"""How busy each engine keeps four workers: toy trials that sleep, the real coordinator, SQLite, the random sampler.

Busy is the time that trials sleep over the time that the workers were there. Sleeping trials need no core, so what is
missing is the coordinator's, the engine's and the wire's. `python -m tests.bench engines [TRIALS] [SECONDS]`.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from searchfm.engines import Engine
from searchfm.engines.local import LocalEngine
from searchfm.home import Home
from tests.agents import LIGHT, await_free, listening, start
from tests.driving import check, search, toy

WORKERS = 4


@contextmanager
def local(home: Path) -> Iterator[Engine]:
    engine = LocalEngine(["cpu"] * WORKERS, warm=LIGHT)
    yield engine
    engine.close()


@contextmanager
def dial_in(home: Path) -> Iterator[Engine]:
    engine = listening(home)
    agents = [start(engine, home, f"node{i}") for i in range(WORKERS)]
    await_free(engine, WORKERS)
    yield engine
    engine.close()
    for agent in agents:
        agent.communicate(timeout=30)


ENGINES: dict[str, Callable[[Path], Any]] = {"local": local, "dial-in": dial_in}


def measure(engine: str, trials: int, seconds: float) -> tuple[float, float]:
    """Seconds of the search, and the fraction of them that the workers slept."""
    study = toy(search={"trials": trials}, train={"epochs": 1})
    ticks = max(1, round(seconds / 0.1))
    payload = {"ticks": ticks, "seconds": seconds / ticks}
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        with ExitStack() as stack:
            workers = stack.enter_context(ENGINES[engine](folder))
            search(Home(folder), toy("warm", search={"trials": WORKERS}, train={"epochs": 1}), engine=workers)
            began = time.perf_counter()
            record = search(Home(folder), study, engine=workers, payload=payload)
            elapsed = time.perf_counter() - began
        check(record, trials)
        trained = sum(trial.twin is None for trial in record.trials)
        return elapsed, trained * seconds / (WORKERS * elapsed)
    finally:
        shutil.rmtree(folder)


def main(arguments: list[str]) -> None:
    trials = int(arguments[0]) if arguments else 200
    lengths = [float(text) for text in arguments[1:]] or [1.0, 0.05]
    print(f"{trials} toy trials, {WORKERS} workers: seconds of the search, workers busy")
    for seconds in lengths:
        for engine in ENGINES:
            elapsed, busy = measure(engine, trials, seconds)
            print(f"{seconds:5.2f} s a trial  {engine:8} {elapsed:6.1f} s  {busy:4.0%} busy", flush=True)
    elapsed, _ = measure("local", trials, 0.0)
    print(f"   0 s a trial  local    {elapsed:6.1f} s: {1000 * elapsed / trials:.0f} ms a trial, the coordinator's own")
