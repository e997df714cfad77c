"""Where workers run: jobs and ids, without search, tracking or Optuna's trials."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from searchfm.jobs import Event, Job
from searchfm.tables import Table, key, table


class Engine(Protocol):
    """Starts workers, or accepts them, and carries their messages. Workers run on nodes: this machine, or others."""

    @property
    def free(self) -> int:
        """Workers that can receive a job now."""

    @property
    def busy(self) -> bool:
        """Whether any job is under way, or its end not yet read."""

    def expand(self, accelerators: Mapping[str, int]) -> Sequence[str]:
        """Takes all workers that the engine's options ask for, of which one served until now; returns the devices of
        those that are there. accelerators: their numbers on the node of the first job: {"cuda": 2, "mps": 0}.

        Raises UserError for a device that is not there.
        """

    def each(self, job: Job) -> None:
        """Runs the job once on every node, and on a node that joins later before it gets another job. A node where it
        fails is not used. Its events are the engine's own. No effect where the only node is this machine.
        """

    def pack(self, memory: float) -> str:
        """Lets more workers share each GPU where the options say `workers_per_gpu = "auto"`. memory: the fraction of a
        GPU's memory that a trial took. Returns what it did, in a line for the user, or nothing.
        """

    def submit(self, job: Job) -> None:
        """Sends the job to a free worker, a warm one if there is one."""

    def stop(self, job: str) -> None:
        """Stops the job at its next batch; its end still comes as an event."""

    def next_event(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds (or less) without one. Raises WorldError if no worker is
        left and none can come.
        """

    def close(self) -> None:
        """Ends all workers at once, busy or not."""


EngineName: TypeAlias = Literal["local", "listen", "slurm", "ray"]


class SlurmOptions(Table):
    """The array job of workers: flags of sbatch."""

    partition: str | None = key(None, "partition; default: that of SLURM")
    gres: str | None = key(None, "resources of each worker, such as gpu:1")
    time: str | None = key(None, "time limit of each worker, as sbatch reads it, such as 4:00:00")
    args: tuple[str, ...] = key((), "further flags of sbatch, such as --cpus-per-task=4")


class RayOptions(Table):
    """The resources of each worker on a Ray cluster."""

    gpus_per_worker: float | None = key(None, "GPUs; a fraction shares one; default: 1 where the cluster has any", ge=0)
    cpus_per_worker: float = key(1.0, "CPU cores", gt=0)


class EngineOptions(Table):
    """Options of a file for `--engine`; a flag overrides its key. Without a default, the engine has its own."""

    name: EngineName = key("local", "where workers run")
    device: str = key("auto", "auto, cpu, cuda, cuda:1 or mps")
    workers: int | None = key(None, "workers; default: cores or GPUs; slurm: 1; ray: all that have room", ge=1)
    workers_per_gpu: int | Literal["auto"] = key(1, "workers that share a GPU; auto: by the first trial's memory", ge=1)
    listen: str | None = key(None, "HOST:PORT that workers elsewhere dial")
    tls_cert: str | None = key(None, "PEM file: certificate of the listener; encrypts the connection")
    tls_key: str | None = key(None, "PEM file: key of the certificate")
    data_dir: str | None = key(None, "folder to search for data first, on every node")
    allow_code: bool = key(False, "whether to run the code that [model.custom] names")
    slurm: SlurmOptions = table(SlurmOptions)
    ray: RayOptions = table(RayOptions)


DEFAULTS = EngineOptions.from_table({})
