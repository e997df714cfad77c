"""Successive halving with promotion: which paused trial goes on (Li et al. 2020, arXiv 1810.05834, algorithm 2)."""

from bisect import insort
from collections.abc import Container, Mapping, Sequence


class Rungs:
    """The values of the trials that reached each rung. Without rungs no trial is ever paused.

    epochs: the rungs, in ascending order. reduction: one of so many trials is promoted.
    """

    def __init__(self, epochs: Sequence[int] = (), reduction: int = 2) -> None:
        self.epochs, self.reduction = epochs, reduction
        self.highest: dict[int, int] = {}  # the highest rung of each trial that reached one
        self._ranked: dict[int, list[tuple[float, int]]] = {rung: [] for rung in epochs}  # (-value, trial)

    def add(self, trial: int, reported: Mapping[int, float]) -> None:
        """Adds the reports of a trial, by epoch: each report once. Those between rungs are ignored."""
        for rung in self.epochs:
            if rung in reported:
                insort(self._ranked[rung], (-reported[rung], trial))
                self.highest[trial] = rung

    def after(self, epoch: int) -> int | None:
        """The next rung after an epoch; None after the last one."""
        return next((rung for rung in self.epochs if rung > epoch), None)

    def promotable(self, paused: Container[int]) -> int | None:
        """The trial to promote: of the highest rung that has one, the best paused trial among the best floor(n /
        reduction) of the n that reached it; of equal ones the earliest. None if there is none.
        """
        return self._first(paused, self.reduction)

    def best(self, paused: Container[int]) -> int | None:
        """The best paused trial of the highest rung that has one."""
        return self._first(paused, 1)

    def _first(self, paused: Container[int], reduction: int) -> int | None:
        for rung in reversed(self.epochs):
            ranked = self._ranked[rung]
            for _, trial in ranked[: len(ranked) // reduction]:
                if trial in paused and self.highest[trial] == rung:
                    return trial
        return None
