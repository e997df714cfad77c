"""A real SLURM: slurmctld and one slurmd a node, with a configuration of its own in a temporary folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.programs import missing, worker_port

CONF = """
ClusterName=searchfm
SlurmctldHost={controller}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeued job waits for the end of its old credential.
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES
PartitionName=urgent Nodes=ALL PriorityTier=10
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"  # 22.05 would mount cgroups otherwise


class Cluster:
    """slurmctld on one host and slurmd on others, all on this machine unless `enter` says how to enter a host.

    nodes: name -> address. cpus: of each node. enter: makes a command run on a host ("" is the controller's).
    """

    def __init__(
        self,
        folder: Path,
        nodes: dict[str, str],
        *,
        cpus: int = 2,
        controller: str = "127.0.0.1",
        enter: Callable[[str, Sequence[str]], list[str]] = lambda host, command: list(command),
    ) -> None:
        for name in ("slurmctld", "slurmd"):
            if not (shutil.which(name) or Path("/usr/sbin", name).exists()):
                missing("this test starts a SLURM: apt-get install slurm-wlm")
        self.folder, self.nodes, self.enter = folder, nodes, enter
        self.conf = folder / "slurm.conf"
        (folder / "state").mkdir(parents=True)
        ports, here = _ports(len(nodes) + 1), socket.gethostname()
        alone = controller == "127.0.0.1"
        lines = [
            f"NodeName={name} NodeAddr={address} NodeHostname={here if alone else name} Port={port} CPUs={cpus}"
            for (name, address), port in zip(nodes.items(), ports[1:], strict=True)
        ]
        host = f"{here if alone else 'head'}({controller})"
        user = psutil.Process().username()
        self.conf.write_text(
            CONF.format(controller=host, ports=ports, user=user, folder=folder, nodes="\n".join(lines))
        )
        (folder / "cgroup.conf").write_text(CGROUP)
        self.environment = {"SLURM_CONF": str(self.conf)}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Returns once all nodes are idle."""
        self._daemon("", "slurmctld", "-D", "-i", "-c")
        for name in self.nodes:
            self._daemon(name, "slurmd", "-D", "-N", name)
        until = time.monotonic() + 30
        while self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split() != ["idle"] * len(
            self.nodes
        ):
            assert time.monotonic() < until, [path.read_text() for path in self.folder.glob("*.log")]
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """What a command of SLURM prints on the controller's host."""
        done = subprocess.run(
            self.enter("", command),
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    def stop(self) -> None:
        """Ends the daemons, and all that they started."""
        self.run("scancel", f"--user={psutil.Process().username()}")
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # slurmd waits for its tasks
                process.kill()
                process.wait()
        for process in self.left():
            with suppress(psutil.Error):
                process.kill()

    def left(self) -> list[psutil.Process]:
        """Processes of this cluster, its jobs included."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.conf) and process.pid != os.getpid():
                    found.append(process)
        return found

    def _daemon(self, host: str, name: str, *flags: str) -> None:
        program = shutil.which(name) or f"/usr/sbin/{name}"
        self.processes.append(
            subprocess.Popen(
                self.enter(host, [program, *flags, "-f", str(self.conf)]),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )


def _ports(count: int) -> list[int]:
    """Free ports."""
    ports: list[int] = []
    while len(ports) < count:
        ports.append(worker_port(6500, ports))
    return ports
