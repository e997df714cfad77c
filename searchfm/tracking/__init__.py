"""A study in MLflow: a parent run a study, a child run a trial. The only package that imports mlflow, in functions.

`Tracking` starts the process that follows a search; `sync` aligns MLflow afterwards.
"""

from searchfm.tracking.follow import Tracking, sync
from searchfm.tracking.mirror import Difference, make_schema, run_links
from searchfm.tracking.registry import find_model, log_comparison, log_report, publish, study_environment

__all__ = [
    "Difference",
    "Tracking",
    "find_model",
    "log_comparison",
    "log_report",
    "make_schema",
    "publish",
    "run_links",
    "study_environment",
    "sync",
]
