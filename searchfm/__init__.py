"""Hyperparameter search for image classifiers: search, prune, track, retrain, test once.

    import searchfm

    study = searchfm.tune("vit", trials=50, dataset="digits")
    final = searchfm.retrain("vit", top=3, seeds=5)
    model = searchfm.load_model("vit")
    classes, probabilities = model.predict(images)

`import searchfm` is quick: torch, Optuna and MLflow are imported by the functions that need them.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.4.0"

if TYPE_CHECKING:
    from searchfm.api import (
        LoadedModel,
        OpenStudy,
        Predicted,
        iter_retrain,
        iter_tune,
        load_model,
        open_study,
        retrain,
        tune,
    )
    from searchfm.errors import (
        CodeError,
        ConfigError,
        DataError,
        DivergedError,
        LockedError,
        ModelError,
        OutOfTimeError,
        SearchfmError,
        StorageError,
        StudyError,
        UserError,
        WorldError,
    )
    from searchfm.events import (
        JobEnded,
        JobEpoch,
        JobPlanned,
        JobRetried,
        JobStarted,
        Note,
        Phase,
        Retrained,
        RetrainEvent,
        SearchEnded,
        StudyFound,
        StudyOpened,
        TrialEnded,
        TrialEpoch,
        TrialPaused,
        TrialRetried,
        TrialStarted,
        TuneEvent,
    )
    from searchfm.learn.models.custom import check_model
    from searchfm.records import Epoch, Final, Trial

__all__ = [
    "CodeError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Epoch",
    "Final",
    "JobEnded",
    "JobEpoch",
    "JobPlanned",
    "JobRetried",
    "JobStarted",
    "LoadedModel",
    "LockedError",
    "ModelError",
    "Note",
    "OpenStudy",
    "OutOfTimeError",
    "Phase",
    "Predicted",
    "RetrainEvent",
    "Retrained",
    "SearchEnded",
    "SearchfmError",
    "StorageError",
    "StudyError",
    "StudyFound",
    "StudyOpened",
    "Trial",
    "TrialEnded",
    "TrialEpoch",
    "TrialPaused",
    "TrialRetried",
    "TrialStarted",
    "TuneEvent",
    "UserError",
    "WorldError",
    "check_model",
    "iter_retrain",
    "iter_tune",
    "load_model",
    "open_study",
    "retrain",
    "tune",
]

if not TYPE_CHECKING:  # for a type checker, an unknown name stays an error

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used (PEP 562)."""
        if name in __all__:
            for module in ("api", "errors", "records", "events", "learn.models.custom"):
                value = getattr(importlib.import_module(f"searchfm.{module}"), name, None)
                if value is not None:
                    globals()[name] = value
                    return value
        raise AttributeError(f"module 'searchfm' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
