"""Where workers run: jobs and ids, without search, tracking or Optuna's trials."""

from collections.abc import Sequence
from typing import Protocol

from searchfm.jobs import Event, Job


class Engine(Protocol):
    """Starts workers and carries their messages: local processes here, Ray on a cluster."""

    @property
    def free(self) -> int:
        """Workers that can receive a job now."""

    @property
    def busy(self) -> bool:
        """Whether any job is under way, or its end not yet read."""

    def resize(self, devices: Sequence[str]) -> None:
        """One worker per device named; workers of other devices end, the rest stay warm."""

    def submit(self, job: Job) -> None:
        """Sends the job to a free worker, a warm one if there is one."""

    def stop(self, job: str) -> None:
        """Stops the job at its next batch; its end still comes as an event."""

    def next_event(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds (or less) without one."""

    def close(self) -> None:
        """Ends all workers at once, busy or not."""
