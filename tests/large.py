"""Studies of thousands of toy trials: `fill` writes ended ones into the storage; as a program it runs a whole search.

`python -m tests.large HOME TRIALS` searches with two workers, followed into MLflow. It prints one JSON object a
thousand trials, and at last how many trials MLflow lacks.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
from optuna.trial import TrialState, create_trial

from searchfm.home import Home
from searchfm.records import EPOCHS, Epoch, TrainResult, write_epochs
from searchfm.search.storage import create_study, open_storage
from searchfm.search.study import Study
from searchfm.tracking.follow import Tracking
from tests import rows, toys
from tests.driving import search, toy

EVERY = 1000  # trials
END_SECONDS = 60.0  # for MLflow at the end, as a command has


def large(trials: int, sampler: str = "random") -> Study:
    """The study: two epochs a trial, no pruner."""
    lr = {"lr": {"low": 1e-4, "high": 0.1, "log": True}}
    return toy(search={"trials": trials, "sampler": {"name": sampler}}, optimizer=lr, train={"epochs": 2})


def fill(home: Home, study: Study, numbers: range, pruned: int = 3) -> None:
    """Writes ended trials and their folders; every `pruned`-th is pruned. The first call creates the study."""
    storage = open_storage(home, create=True)
    if numbers.start == 0:
        create_study(storage, study.name, rows.header(study.resolved, planned=study.trials))
    study_id = storage.get_study_id_from_name(study.name)
    for number in numbers:
        asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(study.seed(number))).ask()
        config = study.sample(asked)
        config = replace(config, train=replace(config.train, seed=study.seed(number)))
        table, epochs = config.to_table(), config.train.epochs - (number % pruned == 0)
        curve = {index: toys.curve(table, index) for index in range(1, epochs + 1)}
        complete = epochs == config.train.epochs
        result = TrainResult(curve[epochs], best_epoch=epochs, parameters=1, seconds=0.3, epochs=epochs, device="cpu")
        end = {"result": result.to_json()} if complete else {"reason": f"pruned by median after epoch {epochs}"}
        trial = create_trial(
            state=TrialState.COMPLETE if complete else TrialState.PRUNED,
            value=curve[epochs],
            params=asked.params,
            distributions=asked.distributions,
            user_attrs={"config": table, "digest": config.digest(), **end},
            intermediate_values=curve,
        )
        storage.create_new_trial(study_id, trial)
        folder = home.trial(study.name, number)
        folder.mkdir(parents=True)
        trained = [
            Epoch(i, 1 - value, value, 1 - value, value, 0.1, 0.1, 1000.0, rows.STARTED + number + i)
            for i, value in curve.items()
        ]
        write_epochs(folder / EPOCHS, trained)
        (folder / "curves.png").touch()  # else the first report draws all, in ten minutes
    storage._backend.engine.dispose()  # type: ignore[attr-defined]


def main(home: Home, trials: int) -> None:
    this, ended = psutil.Process(), 0
    began, tracking = time.monotonic(), Tracking(home, "toy")
    tracking.begin()

    def watch(item: object, _: object) -> None:
        nonlocal ended
        ended += getattr(item, "kind", "") == "ended"
        if getattr(item, "kind", "") == "ended" and ended % EVERY == 0:
            assert tracking._process is not None
            follower = psutil.Process(tracking._process.pid).memory_info().rss
            mark = {"seconds": time.monotonic() - began, "cpu": time.process_time()}
            print(json.dumps({"ended": ended, **mark, "coordinator": this.memory_info().rss, "tracking": follower}))
            sys.stdout.flush()

    search(home, large(trials), workers=2, payload={"ticks": 1}, watch=watch)
    print(json.dumps({"missing": tracking.close(END_SECONDS)}))


if __name__ == "__main__":
    main(Home(Path(sys.argv[1])), int(sys.argv[2]))
