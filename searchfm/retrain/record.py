"""What a final training leaves: the study's `final` record, its folder with pictures, and the count of test reads."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from searchfm import plots, stats
from searchfm.home import Home
from searchfm.job import Epoch, Result
from searchfm.retrain.finalists import Verdict
from searchfm.search.history import StudyRow, TrialRow
from searchfm.search.storage import open_storage, write_final

FOLDER = "final"
READS = "test-reads.json"

Final = Mapping[str, Any]


def record(
    row: StudyRow,
    trial: TrialRow,
    verdict: Verdict | None,
    epochs: Sequence[Epoch],
    fitted: Result,
    tested: Result,
    reads: int,
) -> dict[str, Any]:
    """The record of a final training, as plain values.

    trial: the winner; verdict: None where it was chosen by a person; epochs, fitted, tested: of the final training, and
    what its two jobs returned. `validation` says what a training gives on the search's budget and `test` what the final
    model gives on the test part; `model` and `seconds` are still to come.
    """
    low, high = stats.wilson(tested["right"], tested["n"])
    training = sum(epoch.seconds for epoch in epochs)
    searched = {"accuracy": trial.value, "low": None, "high": None, "spread": None, "n": row.data["validation"]}
    return {
        "study": row.name,
        "finalists": [one.record() for one in verdict.finalists] if verdict else [],
        "tie": list(verdict.tie) if verdict else [],
        "winner": trial.number,
        "optimism": verdict.optimism if verdict else None,
        "validation": verdict.validation() if verdict else searched,
        "test": {
            "accuracy": tested["accuracy"],
            "low": low,
            "high": high,
            "n": tested["n"],
            "reads": reads,
            "fingerprint": tested["fingerprint"],
        },
        "per_class": tested["per_class"],
        "model": None,
        "seconds": None,
        "seconds_per_epoch": training / len(epochs),
        "training_seconds": training,
        "parameters": fitted["parameters"],
        "flops": fitted["flops"],
        "epochs": len(epochs),
        "fingerprint": row.data["fingerprint"],
        "time": time.time(),
        "params": dict(trial.params),
        "weights": fitted["files"]["weights.safetensors"],
    }


def count_read(home: Home, row: StudyRow, winner: int, model: str) -> int:
    """Counts a reading of the test part before it happens; returns how many there have been, by all studies of the home
    on the same data. A model is counted once, however often a crash makes it read again.
    """
    path = home.path / READS
    with FileLock(path.with_suffix(".lock")):
        try:
            reads = json.loads(path.read_text())
        except FileNotFoundError:
            reads = {}
        mine = reads.setdefault(row.data["fingerprint"], [])
        if not any(read["model"] == model for read in mine):
            mine.append({"study": row.name, "winner": winner, "model": model, "time": time.time()})
            _write(path, reads)
        return len(mine)


def draw(folder: Path, epochs: Sequence[Epoch], names: Sequence[str]) -> None:
    """Pictures of the final model into its folder: curves, and the confusion matrix on the test part."""
    with np.load(folder / plots.PREDICTIONS, allow_pickle=False) as file:
        matrix = plots.confusion(file["labels"], file["probabilities"].argmax(axis=1), names)
    (folder / "curves.png").write_bytes(plots.png(plots.curves(epochs)))
    (folder / "confusion.png").write_bytes(plots.png(matrix))


def install(coming: Path, place: Path) -> None:
    """Puts a finished model in the place of an earlier one; what others began and left beside it is removed."""
    old = place.with_name(f"{FOLDER}-old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    coming.rename(place)
    for path in place.parent.glob(f"{FOLDER}-*"):
        shutil.rmtree(path, ignore_errors=True)


def keep(home: Home, row: StudyRow, final: Final) -> None:
    """Writes the record into the model's folder, then into the study, where it counts."""
    _write(row.folder / FOLDER / "final.json", final)
    write_final(open_storage(home), row.number, final)


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
