"""How important the keys of a search are."""

import importlib
import sys
import threading
import warnings
from types import ModuleType

import optuna
from optuna.storages import BaseStorage

from searchfm.records import StudyRecord, Trial

ENOUGH = 10  # complete and pruned trials that importance needs


def importances(study: StudyRecord, storage: BaseStorage) -> dict[str, float]:
    """How much of the difference between the best tenth of the trials and all trials each key explains: fractions, in
    descending order (PED-ANOVA: Watanabe, Bansal & Hutter 2023, arXiv 2304.10255), from complete and pruned trials.

    They are ranked as TPE ranks them: complete trials by accuracy, then pruned ones by their epochs and by the accuracy
    after the last one. Empty where they are fewer than 10, or all equal.
    """
    trials = {trial.number: _rank(trial) for trial in study.compared}
    if len(trials) < ENOUGH or len(set(trials.values())) == 1:
        return {}
    ranks = {key: float(rank) for rank, key in enumerate(sorted(set(trials.values())))}
    ranked = optuna.create_study(direction="maximize")  # a copy takes 0.3 s for a thousand trials of ten keys
    for trial in storage.get_all_trials(study.number, deepcopy=False):
        if trial.number in trials:
            value = ranks[trials[trial.number]]
            ranked.add_trial(
                optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)  # the report says how few they are
        return dict(_importance().get_param_importances(ranked))


def _importance() -> ModuleType:
    """optuna.importance without scikit-learn, which takes 2 s to import, and which only its other methods need. Whoever
    imports it later gets all of it.
    """
    name, lazy = "optuna.importance", optuna.importance
    if name in sys.modules or "sklearn" in sys.modules or threading.active_count() > 1:
        return importlib.import_module(name)
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # as if it were not installed, which Optuna provides for
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["sklearn"]
        for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
            del sys.modules[module]
        optuna.importance = lazy


def _rank(trial: Trial) -> tuple[bool, int, float]:
    """Greater for the better one of two trials that ended."""
    if trial.state == "complete":
        return True, 0, trial.value or 0.0
    return False, *max(trial.reported.items())
