"""The work of the peers: the folder that `study.py` writes, what a peer prints, and what its trials train."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STARTED = time.perf_counter()
MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's pixels, as people write them down


@dataclass(frozen=True)
class Work:
    """What each side trains."""

    folder: Path
    points: list[dict[str, Any]]  # of each trial: `widths` of its layers, `lr`
    epochs: int
    batch_size: int
    seed: int

    @classmethod
    def read(cls, folder: str) -> "Work":
        path = Path(folder).resolve()
        return cls(path, **json.loads((path / "work.json").read_text()))

    def arrays(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 28, 28) uint8 and labels (N,) int64 of the part: train or val."""
        with np.load(self.folder / f"{part}.npz") as arrays:
            return arrays["images"], arrays["labels"]


def report(trials: list[tuple[int, float]], **more: float) -> None:
    """Prints the JSON line. trials: steps and accuracy of each, in the order of their points.

    more: `cpu` seconds, where those of the process and its descendants do not tell.
    """
    seconds = time.perf_counter() - STARTED  # without the interpreter's own start
    steps, accuracies = [steps for steps, _ in trials], [accuracy for _, accuracy in trials]
    answer = {"trials": len(trials), "steps": steps, "accuracies": accuracies, "seconds": seconds, **more}
    print(json.dumps(answer), flush=True)
