"""What three searches and their final trainings were forecast to take, over what they took, as a user runs them.

Fashion-MNIST, all workers of this machine, MLflow. `python -m tests.bench forecast [STUDY...]`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import searchfm
from searchfm.engines.local import usable_cores
from searchfm.format import seconds

STUDIES: dict[str, dict[str, Any]] = {
    "mlp": {"trials": 12, "subset": 0.1, "epochs": 3},
    "cnn": {"trials": 6, "subset": 0.05, "epochs": 2, "set": {"data.size": 14}},  # else the final training takes 17 min
    "vit": {"trials": 6, "subset": 0.05, "epochs": 2, "set": {"data.size": 14}},
}


def measure(name: str, home: Path) -> None:
    """Searches and retrains the study, and prints a line for each."""
    record = searchfm.tune(name, home=home, progress=False, **STUDIES[name]).record
    forecast = record.forecast
    assert forecast is not None
    line(name, "search", forecast.pruned, record.seconds)
    final = searchfm.retrain(name, home=home, progress=False)
    line(name, "retrain", forecast.retrain, final.seconds or 0.0)


def line(name: str, part: str, expected: float, actual: float) -> None:
    row = f"| {name} {part} | {seconds(expected)} | {seconds(actual)} | {expected / actual:.2f} |"
    print(row, flush=True)


def main(arguments: list[str]) -> None:
    cores, load = usable_cores(), os.getloadavg()[0]
    print(
        f"{cores} cores; load before the first search {load:.1f} (forecasts are for a machine that does nothing else)"
    )
    print("| | forecast | took | ratio |\n|---|---|---|---|")
    for name in arguments or STUDIES:
        with tempfile.TemporaryDirectory(prefix="bench-") as home:
            measure(name, Path(home))
