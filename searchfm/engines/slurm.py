"""The SLURM launcher: one array job of dial-in workers, submitted by sbatch and cancelled at the end.

SLURM ends a task (scancel, preemption, requeue, a time limit) with SIGTERM, and after KillWait, 30 seconds by default,
with SIGKILL. It sends both to the batch script, so the worker takes the script's place (exec): it stops its jobs, which
write checkpoints, and hands them back. Where KillWait is too short, `--slurm-args --signal=B:TERM@60` sends SIGTERM a
minute before the time limit.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from searchfm.engines import EngineOptions
from searchfm.engines.remote import worker_command
from searchfm.engines.wire import source_address
from searchfm.errors import UserError, WorldError
from searchfm.forkserver import without_secrets

COMMAND_SECONDS = 60.0  # for an answer of SLURM
FIRST_SECONDS, POLL_SECONDS, RARE_SECONDS = 2.0, 5.0, 60.0  # to the first look at the queue; between two
CANCEL_SECONDS = 5.0  # for cancelled workers to be gone
UNREACHABLE = (
    "Unable to contact",
    "timed out",
    "Zero Bytes",
    "Connection refused",
)  # in messages: no mistake of the user
NODES = 20  # of a cluster, whose addresses are tried


class Slurm:
    """A `Launcher` whose agents are the tasks of an array job, each with one worker, or one a GPU that `gres` asks for.

    home: its folder `slurm` takes the tasks' output. notify: receives lines for the user. command: makes the command of
    a worker from the address that it dials.
    """

    def __init__(
        self,
        options: EngineOptions,
        home: Path,
        notify: Callable[[str], None] = lambda line: None,
        command: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        self._options, self._notify = options, notify
        self._home, self._folder = home, home / "slurm"
        self._command = command or self._worker
        self._tasks = options.workers or 1
        # Neither sbatch nor a job has a password in its environment. With a list of names in --export, SLURM would add
        # what the user's login shell sets, after running that shell on each node.
        self._environment = without_secrets(os.environ)
        self._job = ""
        self._queue: subprocess.Popen[bytes] | None = None  # squeue, while it runs
        self._answer: IO[bytes] | None = None  # what it writes: a long queue would fill a pipe
        self._next_look = 0.0
        self._shown: set[str] = set()  # reasons to wait
        self._over = False  # no task is left

    def host(self) -> str:
        """The address from which packets of this machine leave for the nodes of the cluster.

        Raises UserError without SLURM's commands or without a route; WorldError if SLURM does not answer.
        """
        if shutil.which("sbatch") is None:
            raise UserError("--engine slurm: there is no sbatch here; start the search where jobs are submitted")
        partition = self._options.slurm.partition
        nodes = ["sinfo", "--noheader", "--Node", "--format=%o"]
        names = self._run([*nodes, f"--partition={partition}"] if partition else nodes).split()
        names = list(dict.fromkeys(names or self._run(nodes).split()))[:NODES]
        found = [source for name in names if (source := source_address(name))]
        # Loopback serves only if every node is this machine.
        if not found or (len(found) < len(names) and all(map(_loopback, found))):
            raise UserError("--engine slurm: no node's address can be reached from here; name this machine by --listen")
        return next((source for source in found if not _loopback(source)), found[0])

    def start(self, address: str) -> None:
        """Submits the array job. Raises UserError for what sbatch refuses, WorldError if SLURM does not answer."""
        self._folder.mkdir(parents=True, exist_ok=True)
        slurm = self._options.slurm
        asked = {"--partition": slurm.partition, "--gres": slurm.gres, "--time": slurm.time}
        flags = [
            "--parsable",
            f"--array=0-{self._tasks - 1}",
            "--ntasks=1",
            "--requeue",
            "--export=ALL",
            f"--job-name=searchfm-{self._home.name}",
            f"--chdir={self._home}",
            f"--output={str(self._folder).replace('%', '%%')}/%A_%a.out",
            "--open-mode=append",  # a task that was requeued goes on in its file
            *(f"{flag}={value}" for flag, value in asked.items() if value),
            *slurm.args,
        ]
        script = f"#!/bin/sh\nexec {shlex.join(self._command(address))}\n"
        self._job, _, cluster = self._run(["sbatch", *flags], script).split()[-1].partition(";")
        if cluster:
            self._environment["SLURM_CLUSTERS"] = cluster
        self._notify(f"slurm: job {self._job}: {self._tasks} workers submitted, output in {self._folder}")
        self._next_look = time.monotonic() + FIRST_SECONDS

    def check(self, nodes: int) -> None:
        """Looks at the queue now and then, without waiting for it, until every task is connected; shows why tasks wait.

        nodes: those connected. Raises WorldError if there are none, and no task is left.
        """
        if nodes >= self._tasks:
            return
        if self._queue is None and time.monotonic() > self._next_look:
            command = ["squeue", "--noheader", "--array", f"--jobs={self._job}", "--format=%T|%r"]
            self._answer = tempfile.TemporaryFile()  # noqa: SIM115
            self._queue = subprocess.Popen(
                command, stdout=self._answer, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        if self._queue is not None and self._queue.poll() is not None:
            code, self._queue = self._queue.returncode, None
            waiting = self._read(code)
            self._next_look = time.monotonic() + (RARE_SECONDS if nodes and not waiting else POLL_SECONDS)
        if self._over and not nodes:
            raise WorldError(f"slurm: job {self._job}: no worker is left; {self._last_line()}")

    def close(self) -> None:
        """Cancels what is left of the job, and waits a few seconds for its end."""
        if self._queue is not None:
            self._queue.kill()
            self._queue.wait()
        if self._answer is not None:
            self._answer.close()
        if not self._job:
            return
        try:
            self._run(["scancel", "--quiet", self._job])
            until = time.monotonic() + CANCEL_SECONDS
            while time.monotonic() < until and self._run(["squeue", "--noheader", f"--jobs={self._job}"]).strip():
                time.sleep(0.1)
        except UserError:
            pass  # SLURM has forgotten the job, which ended
        except WorldError as error:
            self._notify(f"{error}; what is left of job {self._job} ends within two minutes, once it finds no search")

    def _worker(self, address: str) -> list[str]:
        """The command of a task: this interpreter, with one worker, or one a GPU."""
        options, gpus = self._options, _gpus(self._options.slurm.gres)
        command = [sys.executable, "-m", "searchfm", *worker_command(options, self._home, address)]
        each_gpu = gpus > 1 or options.workers_per_gpu != 1
        # Else a task without its GPUs would take every core of its node.
        device = "cuda" if options.device == "auto" and (gpus or each_gpu) else options.device
        command += ["--device", device]
        if options.workers_per_gpu != 1:
            command += ["--workers-per-gpu", str(options.workers_per_gpu)]
        return command if each_gpu else [*command, "--workers", "1"]

    def _read(self, code: int) -> int:
        """Takes what squeue wrote; returns how many tasks wait."""
        assert self._answer is not None
        with self._answer:
            self._answer.seek(0)
            text = self._answer.read().decode(errors="replace")
        if code and "Invalid job id" not in text:  # workers that run are none the worse for it
            self._show(f"does not answer ({_reason(text)})", "SLURM")
            return 0
        tasks = [line.split("|", 1) for line in text.splitlines()] if code == 0 else []
        self._over = not tasks
        waiting = Counter(reason for state, reason in tasks if state == "PENDING")
        for reason, count in waiting.items():
            if reason != "None":  # SLURM has not looked at it yet
                self._show(reason, f"{count} of {self._tasks} workers wait for SLURM")
        return waiting.total()

    def _show(self, reason: str, what: str) -> None:
        """Shows a reason once."""
        if reason not in self._shown:
            self._shown.add(reason)
            self._notify(f"slurm: job {self._job}: {what}: {reason}")

    def _last_line(self) -> str:
        """The newest output file of a task, and its last line."""
        newest, text = (
            max(self._folder.glob(f"{self._job}_*.out"), key=lambda path: path.stat().st_mtime, default=None),
            "",
        )
        if newest is None:
            return f"no node wrote into {self._folder}; do all nodes mount it?"
        with suppress(IndexError):
            text = newest.read_text(errors="replace").strip().splitlines()[-1]
        return f"{newest} ends with: {text}"

    def _run(self, command: list[str], text: str = "") -> str:
        """What a command of SLURM prints. Raises UserError for a refusal, WorldError if SLURM does not answer."""
        try:
            done = subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                env=self._environment,
                timeout=COMMAND_SECONDS,
                start_new_session=True,  # Ctrl-C is for the search alone
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise WorldError(f"slurm: {command[0]} did not answer within {COMMAND_SECONDS:g} seconds") from None
        except OSError as error:
            raise UserError(f"slurm: {command[0]}: {error.strerror}") from None
        if done.returncode:
            kind = WorldError if any(words in done.stderr for words in UNREACHABLE) else UserError
            raise kind(f"slurm: {command[0]}: {_reason(done.stderr) or f'exit code {done.returncode}'}")
        return done.stdout


def _reason(text: str) -> str:
    """The messages of a command of SLURM in one line, without what stands before them ("sbatch: error: ")."""
    lines = [re.sub(r"^s\w+: (error: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("Try "))


def _gpus(gres: str | None) -> int:
    """How many GPUs a task gets: "gpu", "gpu:2", "gpu:a100:2", also among others."""
    for item in (gres or "").split(","):
        name, *rest = item.split(":")
        if name == "gpu":
            return int(rest[-1]) if rest and rest[-1].isdecimal() else 1
    return 0


def _loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
