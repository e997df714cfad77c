"""A search without training that is followed into MLflow, made to be killed.

`python following.py HOME TRIALS [--die-before-report EPOCH]`: with the option it kills itself in the first trial,
between epochs.csv and the report of that epoch.
"""

import os
import signal
import sys
import time
from pathlib import Path

import rows
from optuna.trial import TrialState

from searchfm.home import Home
from searchfm.records import EPOCHS, write_epochs
from searchfm.tracking.follow import Tracking

LENGTH = 3  # epochs


def main(home: Home, trials: int, last: int | None) -> int:
    """Trains what is left of so many trials; 0 once MLflow holds them all."""
    tracking = Tracking(home, "toy")
    tracking.begin()
    stored = rows.study(home).trials
    for number in range(trials):
        if number < len(stored) and stored[number].state != "running":
            continue
        trial = rows.resume(home, number) if number < len(stored) else rows.ask(home)
        home.trial("toy", number).mkdir(exist_ok=True)
        for count in range(len(rows.study(home).trials[number].epochs) + 1, LENGTH + 1):
            time.sleep(0.1)
            if count == last:
                write_epochs(home.trial("toy", number) / EPOCHS, rows.epochs(number, count))
                os.kill(os.getpid(), signal.SIGKILL)
            rows.record(home, trial, rows.epochs(number, count))
        rows.tell(home, trial, TrialState.COMPLETE if number % 3 else TrialState.PRUNED)
    return tracking.close(120)


if __name__ == "__main__":
    option = sys.argv[3:]
    raise SystemExit(main(Home(Path(sys.argv[1])), int(sys.argv[2]), int(option[1]) if option else None))
