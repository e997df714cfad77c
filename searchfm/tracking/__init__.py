"""A study in MLflow: a parent run a study, a child run a trial. The only room that imports mlflow, and never at import.

`Tracker` follows a search from a background thread; `differences` and `apply` bring MLflow in line afterwards.
"""

from searchfm.search.notes import Links
from searchfm.tracking.client import shown
from searchfm.tracking.mirror import Difference
from searchfm.tracking.pages import log_comparison, log_report, study_environment
from searchfm.tracking.sync import apply, differences, make_schema, run_links
from searchfm.tracking.tracker import NullTracker, Tracker

__all__ = [
    "Difference",
    "Links",
    "NullTracker",
    "Tracker",
    "apply",
    "differences",
    "log_comparison",
    "log_report",
    "make_schema",
    "run_links",
    "shown",
    "study_environment",
]
