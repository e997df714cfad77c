"""Where workers run: jobs and ids, without search, tracking or Optuna's trials."""

from collections.abc import Sequence
from typing import Protocol

from searchfm.jobs import Event, Job


class Engine(Protocol):
    """What starts workers and carries messages: local processes here, Ray on a cluster."""

    @property
    def free(self) -> int:
        """Workers that could take a job now."""

    @property
    def busy(self) -> bool:
        """Whether any job is under way."""

    def resize(self, devices: Sequence[str]) -> None:
        """One worker for each device named; those that are no longer wanted end, those that are stay warm."""

    def submit(self, job: Job) -> None:
        """Gives the job to a free worker."""

    def stop(self, job: str) -> None:
        """Asks the job to leave at its next batch; its end still comes as an event."""

    def next_event(self, timeout: float) -> Event | None:
        """The next thing that happened, or None after `timeout` seconds without any."""

    def close(self) -> None:
        """Ends all workers, at once and whatever they do."""
