"""From a finished search to one model: finalists with fresh seeds, the winner on all training data, the test part once.

What comes of it is kept as the study's `final` (see `Final`), in `HOME/studies/NAME/final/`, and in MLflow's registry.
"""

from searchfm.retrain.plan import Plan, Wish, make_plan
from searchfm.retrain.record import Final
from searchfm.retrain.work import retrain

__all__ = ["Final", "Plan", "Wish", "make_plan", "retrain"]
