"""A search without training that is followed into MLflow, made to be killed: `python following.py HOME TRIALS`."""

import sys
import time
from pathlib import Path

import optuna
import rows
from optuna.trial import TrialState

from searchfm.home import Home
from searchfm.tracking import Tracker

EPOCHS = 3


def main(home: Home, trials: int) -> int:
    """Trains what is left of so many trials; 0 once MLflow holds them all."""
    study = rows.study(home)
    tracker = Tracker(home, study)
    tracker.reconcile(study)
    stored = optuna.load_study(study_name="toy", storage=rows._open(home))
    for number in range(trials):
        known = stored.get_trials(deepcopy=False)
        if number < len(known) and known[number].state.is_finished():
            continue
        trial = optuna.Trial(stored, known[number]._trial_id) if number < len(known) else rows.ask(home)
        home.trial("toy", number).mkdir(exist_ok=True)
        row = rows.study(home).trials[number]
        tracker.started(row)
        for count in range(len(row.epochs) + 1, EPOCHS + 1):
            time.sleep(0.1)
            rows.record(home, trial, rows.epochs(number, count))
            tracker.epoch(number, rows.epochs(number, count)[-1])
        rows.tell(home, trial, TrialState.COMPLETE if number % 3 else TrialState.PRUNED)
        tracker.ended(rows.study(home).trials[number])
    study = rows.study(home)
    tracker.keep(study.ranked()[:2])
    return tracker.close(study, 120)


if __name__ == "__main__":
    raise SystemExit(main(Home(Path(sys.argv[1])), int(sys.argv[2])))
