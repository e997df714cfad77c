"""What can honestly be said of a finished search: rows to facts, for the report. Draws and prints nothing."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.storages import BaseStorage

from searchfm import plots
from searchfm.search.history import StudyRow, TrialRow
from searchfm.stats import holm, mcnemar, wilson

ALPHA = 0.05  # a difference at least this likely without any reason is called a tie
ENOUGH = 10  # complete trials before importance says anything


@dataclass(frozen=True)
class Rank:
    """A complete trial beside the best."""

    row: TrialRow
    low: float  # 95% interval of its validation accuracy
    high: float
    difference: float  # its accuracy less the best trial's: 0 or less
    p: float | None  # of McNemar's test against the best, Holm-corrected; None for the best, or without predictions
    tied: bool  # cannot be told from the best


@dataclass(frozen=True)
class Saved:
    """What pruning saved."""

    epochs: int  # not trained
    full: int  # that all trained trials would have had
    seconds: float  # that those epochs would have taken, at each trial's own pace

    @property
    def share(self) -> float:
        """Epochs not trained, of all."""
        return self.epochs / self.full if self.full else 0.0


@dataclass(frozen=True)
class Predictions:
    """A model's answers on one part of the data."""

    labels: NDArray[np.int64]  # (N,)
    probabilities: NDArray[np.float32]  # (N, K)
    indices: NDArray[np.int64]  # (N,) places in the part of the data set

    @property
    def chosen(self) -> NDArray[np.int64]:
        """(N,) the likeliest class."""
        chosen: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return chosen

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N,) whether that is the true one."""
        right: NDArray[np.bool_] = self.chosen == self.labels
        return right


@dataclass(frozen=True)
class PerClass:
    """How one class fares; 0 where it was never answered, or is in no image."""

    precision: float
    recall: float
    n: int  # images


@dataclass(frozen=True)
class Confused:
    """Two classes taken for each other, one way."""

    true: int
    predicted: int
    count: int
    share: float  # of the true class's images
    examples: tuple[int, ...]  # places among the predictions, the surest mistakes first


def ranks(study: StudyRow) -> list[Rank]:
    """All complete trials that were trained, the best first, and which of them cannot be told from it.

    By McNemar's test on the predictions of the same validation images, Holm-corrected for all that are compared; where
    a trial's predictions are not kept, by whether its accuracy lies in the best one's interval. The best of many was
    chosen for its luck too, so this errs on the side of seeing differences.
    """
    rows = study.ranked(twins=False)
    if not rows:
        return []
    n = int(study.data["validation"])
    best, answers = rows[0], predictions(rows[0].folder)
    tests: dict[int, float] = {}
    for row in rows[1:]:
        others = predictions(row.folder)
        if answers and others and np.array_equal(answers.indices, others.indices):
            tests[row.number] = mcnemar(answers.right, others.right)
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    top = _value(best)
    floor = wilson(round(top * n), n)[0]
    found = []
    for row in rows:
        p = adjusted.get(row.number)
        tied = row is best or (p >= ALPHA if p is not None else _value(row) >= floor)
        found.append(Rank(row, *wilson(round(_value(row) * n), n), _value(row) - top, p, tied))
    return found


def cheapest(ranked: Sequence[Rank]) -> TrialRow | None:
    """Of the trials that cannot be told from the best, the one that trained fastest; None where there is no record."""
    known = [rank.row for rank in ranked if rank.tied and rank.row.epochs]
    return min(known, key=lambda row: sum(epoch.seconds for epoch in row.epochs), default=None)


def saved(study: StudyRow) -> Saved:
    """Epochs that pruned trials did not train. Twins, which train nothing, and failed trials are left out."""
    trained = [row for row in study.trials if row.twin is None and row.epochs and row.state in ("complete", "pruned")]
    full = sum(int(row.config["train"]["epochs"]) for row in trained)
    missing = {row.number: int(row.config["train"]["epochs"]) - len(row.epochs) for row in trained}
    seconds = sum(missing[row.number] * seconds_per_epoch(row) for row in trained)
    return Saved(sum(missing.values()), full, seconds)


def seconds_per_epoch(row: TrialRow) -> float:
    """Mean wall time of a trial's epochs, validation included."""
    return sum(epoch.seconds for epoch in row.epochs) / max(len(row.epochs), 1)


def importances(study: StudyRow, storage: BaseStorage) -> dict[str, float]:
    """How much of what tells good trials from others each key explains, 0 to 1, the most first (PED-ANOVA: Watanabe,
    Bansal & Hutter 2023, arXiv 2304.10255), from complete trials that were trained themselves.

    Empty where those are fewer than 10, or all of one value.
    """
    rows = study.ranked(twins=False)
    if len(rows) < ENOUGH or len({row.value for row in rows}) == 1:
        return {}
    numbers = {row.number for row in rows}
    trials = [trial for trial in storage.get_all_trials(study.number, deepcopy=False) if trial.number in numbers]
    trained = optuna.create_study(direction="maximize")
    trained.add_trials(trials)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)  # the report says how few they are
        return optuna.importance.get_param_importances(trained)


def predictions(folder: Path) -> Predictions | None:
    """What a trial's or a final model's folder keeps of its answers; None where that is nothing."""
    path = folder / plots.PREDICTIONS
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return Predictions(file["labels"], file["probabilities"], file["indices"])


def confused(answers: Predictions, *, most: int = 6, each: int = 6) -> list[Confused]:
    """The pairs of classes most often taken for each other, at most `most`, with at most `each` examples."""
    labels, chosen = answers.labels, answers.chosen
    wrong = np.flatnonzero(~answers.right)
    surest = wrong[np.argsort(-answers.probabilities[wrong, chosen[wrong]], kind="stable")]
    places: dict[tuple[int, int], list[int]] = {}
    for place in surest.tolist():
        places.setdefault((int(labels[place]), int(chosen[place])), []).append(place)
    totals = np.bincount(labels)
    pairs = sorted(places.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:most]
    return [
        Confused(true, other, len(found), len(found) / int(totals[true]), tuple(found[:each]))
        for (true, other), found in pairs
    ]


def per_class(answers: Predictions) -> list[PerClass]:
    """Each class, by number."""
    classes = answers.probabilities.shape[1]
    hits, claims, totals = (
        np.bincount(values, minlength=classes)
        for values in (answers.labels[answers.right], answers.chosen, answers.labels)
    )
    shares = zip(hits / np.maximum(claims, 1), hits / np.maximum(totals, 1), totals, strict=True)
    return [PerClass(float(precision), float(recall), int(n)) for precision, recall, n in shares]


def p_value(p: float) -> str:
    """A p-value for a person."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _value(row: TrialRow) -> float:
    assert row.value is not None
    return row.value
