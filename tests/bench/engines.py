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

from searchfm.engines import Engine, EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.engines.ray import Ray
from searchfm.engines.remote import RemoteEngine
from searchfm.home import Home
from tests.agents import ENTRIES, LIGHT, await_free, listening, start
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


@contextmanager
def ray(home: Path) -> Iterator[Engine]:
    options = EngineOptions.from_table({"name": "ray", "workers": WORKERS, "ray": {"cpus_per_worker": 0.25}})
    launcher = Ray(options, home, print, warm=LIGHT, entries=ENTRIES)
    engine = RemoteEngine(home, launcher.host(), 0, options=options, launcher=launcher, entries=ENTRIES)
    await_free(engine, WORKERS, 300.0)
    yield engine
    engine.close()


ENGINES: dict[str, Callable[[Path], Any]] = {"local": local, "dial-in": dial_in, "ray": ray}


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
            times: list[float] = []  # of all progress
            watch = lambda *_: times.append(time.perf_counter())  # noqa: E731
            record = search(Home(folder), study, engine=workers, payload=payload, watch=watch)
            elapsed = times[-1] - times[0]  # from the first start to the last end, without the tables of Optuna
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
