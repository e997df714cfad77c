"""The process that talks to Ray: it keeps as many actors as there are to be workers, and ends when its standard input
closes. Its task comes as one line of JSON, and what it reports leaves so.

An actor runs an agent with one worker. Ray never restarts it: one that died is replaced here, after a delay that
doubles while they die early.
"""

import json
import logging
import math
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError

from searchfm.engines import EngineOptions
from searchfm.engines.agent import Agent
from searchfm.engines.local import usable_cores
from searchfm.engines.wire import KEY, address, client_tls, find_key
from searchfm.errors import SearchfmError, UserError, one_line
from searchfm.forkserver import without_secrets

POLL_SECONDS = 0.5
ROOM_SECONDS = 10.0  # between two looks at the size of the cluster
QUIET_SECONDS = 5.0  # without a new worker, after which a cluster that is too small is reported
SLOW_SECONDS = 60.0  # the same, for a cluster that has room unless others use it
LEAVE_SECONDS = 3.0  # for workers to leave, before they are killed
EARLY_SECONDS = 60.0  # an actor that dies before has died early
EARLY_DEATHS = 6  # in a row, after which no other replaces it
SERVERS = {"gcs_server", "raylet"}
STORE_BYTES = 100_000_000  # of Ray's object store, through which nothing passes


class Worker:
    """The actor."""

    def run(self, task: Mapping[str, Any], device: str) -> str | None:
        """Serves the coordinator; returns what `serve` does."""
        return serve(task, device)


def serve(task: Mapping[str, Any], device: str) -> str | None:
    """Runs an agent in this process until the search is over. Returns why it could not talk to the coordinator, or
    nothing; None if this process was terminated.
    """
    for name in os.environ.keys() - without_secrets(os.environ).keys():
        del os.environ[name]
    # A worker would import the main module of this process, which is Ray's, and Ray with it.
    sys.modules["__main__"].__file__ = None
    entries = {entry: tuple(keys) for entry, keys in task["entries"].items()}
    try:
        home = Path(task["home"])
        key = find_key(home)
        for name in (KEY, "RAY_AUTH_TOKEN"):  # its worker needs neither
            os.environ.pop(name, None)
        options = EngineOptions.from_table(task["options"])
        client_tls(options.tls_cert)
        where = address(task["address"], "the coordinator")
        agent = Agent(where, home, key, options, devices=[device], entries=entries, warm=task["warm"])
        signal.signal(signal.SIGTERM, agent.terminate)
        with suppress(UserError):  # the coordinator refused this node, or was told why it cannot serve
            agent.run()
    except SearchfmError as error:
        return f"node {socket.gethostname()}: {error}"
    return None if agent.signal else ""


@dataclass(eq=False)
class _Slot:
    """A worker that there is to be."""

    actor: Any = None
    refs: list[Any] = field(default_factory=list)  # results that are awaited: that it has started, that it has ended
    began: float = 0.0
    due: float = 0.0  # when another actor is started
    deaths: int = 0  # early ones in a row
    over: bool = False

    @property
    def waits(self) -> bool:
        return len(self.refs) == 2


class _Driver:
    def __init__(self, task: Mapping[str, Any], report: Any) -> None:
        self._task, self._report = task, report
        self._options = EngineOptions.from_table(task["options"])
        self._slots: list[_Slot] = []
        self._changed = self._looked = time.monotonic()  # the last start of an actor; look at the cluster's size
        self._waiting = 0  # workers, as reported
        self._connected = False
        self.closing = threading.Event()

    def connect(self) -> None:
        """Connects to the cluster, or starts one."""
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._task["cluster"]:
            ray.init(address=self._task["cluster"], **quiet)
        else:
            cores = math.ceil((self._options.workers or 0) * self._options.ray.cpus_per_worker)
            ray.init(
                address="local",
                num_cpus=max(usable_cores(), cores),  # more workers than cores are the user's choice, as without Ray
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                _temp_dir=self._task["folder"],
                **quiet,
            )
        self._connected = True
        self._choose()
        self._report("up")

    def watch(self) -> None:
        """Waits for the end of the input; until the cluster is up, also for a server of it that dies, which Ray takes
        minutes to notice. Ray's start cannot be interrupted, so this process ends, and all servers with it. Runs in a
        thread.
        """
        servers: set[str] = set()
        while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            if self._connected:
                continue
            running, dead = child_servers()
            if dead := dead | (servers - running):
                self._report("failed", f"its {dead.pop()} died")
                os._exit(1)
            servers = running
        self.closing.set()
        if not self._connected:
            shutil.rmtree(self._task["folder"], ignore_errors=True)
            os._exit(1)

    def run(self) -> None:
        """Keeps workers until there is none left to keep, or the input closes."""
        while not self.closing.is_set():
            if time.monotonic() > self._looked + ROOM_SECONDS:
                self._looked = time.monotonic()
                self._grow()
            for slot in self._slots:
                if slot.actor is None and not slot.over and time.monotonic() > slot.due:
                    self._start(slot)
            refs = {ref: slot for slot in self._slots for ref in slot.refs}
            done, _ = ray.wait(list(refs), timeout=POLL_SECONDS) if refs else ([], [])
            if not refs:
                self.closing.wait(POLL_SECONDS)
            for ref in done:
                if ref in refs[ref].refs:
                    self._on_result(refs[ref], ref)
            self._report_waiting()
            if all(slot.over for slot in self._slots):
                return

    def close(self) -> None:
        """Lets actors end that are about to, and kills the others."""
        with suppress(Exception):
            if refs := [slot.refs[-1] for slot in self._slots if slot.refs]:
                ray.wait(refs, num_returns=len(refs), timeout=LEAVE_SECONDS)
            for slot in self._slots:
                if slot.actor is not None:
                    ray.kill(slot.actor)
        ray.shutdown()
        if self.closing.is_set():  # else the coordinator reads the logs
            shutil.rmtree(self._task["folder"], ignore_errors=True)

    def _choose(self) -> None:
        """Which device a worker gets, and how many there are to be. Raises UserError."""
        wanted, resources, device = self._options.ray.gpus_per_worker, ray.cluster_resources(), self._options.device
        if wanted is None:
            wanted = 0.0 if device == "cpu" or not resources.get("GPU") else 1.0
        if device == "cuda" and not wanted:
            raise UserError("--device cuda: the cluster has no GPU; --gpus-per-worker 1 waits for one")
        if device == "cpu" and wanted:
            raise UserError(f"--gpus-per-worker {wanted:g}: the device is cpu, must be cuda or auto")
        self._gpus, self._device = wanted, "cuda:0" if wanted else "cpu"  # Ray shows a worker its own GPU alone
        self._grow()

    def _grow(self) -> None:
        """Adds workers up to the number that was asked for, or that the cluster has ever had room for."""
        workers = self._options.workers or self._room()
        while len(self._slots) < max(workers, 1):  # for an empty cluster, which an autoscaler may let grow
            self._slots.append(_Slot())

    def _room(self) -> int:
        """Workers that the cluster's nodes have room for, if nothing else uses them."""
        total = 0
        for resources in (node["Resources"] for node in ray.nodes() if node["Alive"]):
            rooms = [resources.get("CPU", 0.0) / self._options.ray.cpus_per_worker]
            if self._gpus:
                rooms.append(resources.get("GPU", 0.0) / self._gpus)
            total += math.floor(min(rooms) + 1e-6)  # 1 / 0.1 workers are ten
        return total

    def _start(self, slot: _Slot) -> None:
        make = ray.remote(Worker).options(
            num_cpus=self._options.ray.cpus_per_worker,
            num_gpus=self._gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        slot.actor, self._changed = make.remote(), time.monotonic()
        slot.refs = [slot.actor.__ray_ready__.remote(), slot.actor.run.remote(self._task, self._device)]

    def _on_result(self, slot: _Slot, ref: Any) -> None:
        if slot.waits and ref == slot.refs[0]:
            del slot.refs[0]
            slot.began = self._changed = time.monotonic()
            return  # if it has failed, so has the other
        try:
            reason = ray.get(ref)
            if reason is None:
                self._replace(slot)
            else:
                slot.over = True
            if reason:
                self._report("refused", reason)
        except RayActorError as error:
            if not self._replace(slot) or error.actor_init_failed:
                slot.over = True
                self._report("refused", last_line(error))
        except RayError as error:  # such as a package that the node lacks
            slot.over = True
            self._report("refused", last_line(error))
        slot.actor, slot.refs = None, []

    def _replace(self, slot: _Slot) -> bool:
        """Lets another actor start after a while. Returns False if too many have died early."""
        with suppress(Exception):
            ray.kill(slot.actor)  # one that is only unavailable would come back
        slot.deaths = 0 if slot.began and time.monotonic() > slot.began + EARLY_SECONDS else slot.deaths + 1
        slot.due, slot.began = time.monotonic() + 2.0 ** min(slot.deaths, EARLY_DEATHS) / 2, 0.0
        return slot.deaths <= EARLY_DEATHS

    def _report_waiting(self) -> None:
        """Reports how many workers have no room, when that has changed and nothing has for a while."""
        waiting = sum(slot.waits for slot in self._slots)
        if waiting == self._waiting:
            return
        if waiting:
            elapsed = time.monotonic() - self._changed
            if elapsed < QUIET_SECONDS:
                return
            if elapsed < SLOW_SECONDS:  # any beyond these are only starting, or others use their room
                waiting = min(waiting, max(len(self._slots) - self._room(), 0))
        if waiting != self._waiting:
            self._waiting = waiting
            self._report("waiting", waiting, len(self._slots))


def child_servers() -> tuple[set[str], set[str]]:
    """Of Ray's processes without which no cluster comes up, those that run, and those that have died."""
    running, dead = set[str](), set[str]()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            (dead if child.status() == psutil.STATUS_ZOMBIE else running).add(child.name())
    return running & SERVERS, dead & SERVERS


def last_line(error: Exception) -> str:
    """Of an error of Ray, whose text holds the traceback of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def main() -> None:
    """Runs the task that comes on standard input."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not come between the lines

    def report(*message: Any) -> None:
        with suppress(OSError):  # the coordinator is dead, and the input closes
            print(json.dumps(message), file=output, flush=True)

    task = json.loads(sys.stdin.readline())
    driver = _Driver(task, report)
    threading.Thread(target=driver.watch, daemon=True).start()
    try:
        driver.connect()
        driver.run()
    except UserError as error:
        report("mistake", str(error))
    except Exception as error:
        report("failed", one_line(error))
        raise
    finally:
        driver.close()
