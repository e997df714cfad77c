"""Each pruner replayed over curves that were trained to the end: epochs that it takes, and the best value it finds.

`python -m tests.bench prune [--configs 40] [--searches 5] [--family NAME] [--pruner TOML] [--first] [--collect]`.
A family's curves are trained once, by random configurations of a shipped study on few images, and kept; the same
command resumes a collection that was stopped. A replay is a search by the real coordinator, pool and pruner, with an
engine whose two workers deliver the kept epochs in turn. A search takes all configurations, in an order of its own,
which is the same for each pruner. With --first, searches that begin with the known configurations of the study file are
compared with those that do not.
"""

import argparse
import math
import random
import statistics
import tempfile
import tomllib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from scipy import stats

from searchfm.config import Config
from searchfm.coordinator import CHANCE
from searchfm.home import Home
from searchfm.jobs import PAUSED, EpochDone, Event, Failed, Finished, Interrupted, Job
from searchfm.records import StudyRecord, TrainResult
from searchfm.search.study import Study, fixed_sampler
from tests.bench import _common as common
from tests.bench._curves import FAMILIES, FRESH, Curve, Family
from tests.driving import search

PRUNERS: dict[str, Any] = {
    **{name: name for name in ("none", "median", "percentile", "hyperband", "asha")},
    "asha, promote": {"name": "asha", "promote": True},
    "patient": "patient",
}
WORKERS = 2


class Ordered(Study):
    """A study whose trials take given points, where a sampler would draw them."""

    points_in_order: Sequence[Mapping[str, Any]] = ()

    def sampler(self, number: int) -> BaseSampler:
        return fixed_sampler(self.points_in_order[number])


class Replay:
    """An engine whose workers deliver the epochs of kept curves, one of each worker in turn."""

    def __init__(self, curves: Mapping[str, Curve]) -> None:
        self.curves = curves  # by the digest of their config
        self.jobs: deque[tuple[Job, Iterator[Event]]] = deque()
        self.stopped: set[str] = set()
        self.delivered = 0  # epochs
        self.finished: list[tuple[float, int]] = []  # value of each training that ended, and epochs delivered by then

    @property
    def free(self) -> int:
        return WORKERS - len(self.jobs)

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def expand(self, accelerators: Mapping[str, int]) -> Sequence[str]:
        return ["cpu"] * WORKERS

    def each(self, job: Job) -> None:
        pass

    def pack(self, memory: float) -> str:
        return ""

    def submit(self, job: Job) -> None:
        self.stopped.discard(job.id)
        curve = self.curves[Config.from_table(job.payload["config"]).digest()]
        self.jobs.append((job, self._events(job, curve)))

    def stop(self, job: str) -> None:
        self.stopped.add(job)

    def next_event(self, timeout: float) -> Event | None:
        if not self.jobs:
            return None
        job, events = self.jobs.popleft()
        event = Interrupted(job.id, job.attempt) if job.id in self.stopped else next(events)
        if isinstance(event, EpochDone):
            self.jobs.append((job, events))
        return event

    def close(self) -> None:
        self.jobs.clear()

    def _events(self, job: Job, curve: Curve) -> Iterator[Event]:
        for epoch in curve.epochs[job.received :]:
            self.delivered += 1
            yield EpochDone(job.id, job.attempt, epoch)
            if epoch.index == job.payload.get("until"):
                yield Finished(job.id, job.attempt, {PAUSED: epoch.index})
                return
        if curve.error:
            yield Failed(job.id, job.attempt, "DivergedError", curve.error)
        else:
            self.finished.append((curve.value, self.delivered))
            yield Finished(job.id, job.attempt, TrainResult(curve.value, epochs=len(curve.epochs)).to_json())


@dataclass(frozen=True)
class Outcome:
    """What a search took and found."""

    epochs: int
    to_best: float  # epochs until a training ended within noise of the best of all; infinite where none did
    value: float  # the best
    found: int  # number of its configuration
    lost: int  # trials of the best tenth that were pruned
    chance: int  # trials that were pruned at chance
    chance_lost: int  # those of them that are in the best tenth


def replay(
    family: Family, curves: Mapping[int, Curve], pruner: str, order: Sequence[int], data: dict[str, Any], most: float
) -> Outcome:
    """One search. order: numbers of the configurations. most: the best value of those that are compared."""
    chosen = PRUNERS[pruner] if pruner in PRUNERS else tomllib.loads(f"pruner = {pruner}")["pruner"]
    source = family.whole if order[0] in family.known else family.study  # a study's default is never pruned
    table = {**source.resolved, "search": {"trials": len(order), "sampler": "random", "pruner": chosen}}
    study = Ordered(family.name, table)
    study.points_in_order = [curves[number].params for number in order]
    by_digest = {study.config(curve.params).digest(): curve for curve in curves.values()}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        engine = Replay(by_digest)
        record = search(Home(Path(folder)), study, engine=engine, data=data)
        return outcome(record, engine, curves, order, most)


def outcome(
    record: StudyRecord, engine: Replay, curves: Mapping[int, Curve], order: Sequence[int], most: float
) -> Outcome:
    """Reads a replayed study, whose epochs lie in its folder."""
    assert record.best is not None
    noise = math.sqrt(most * (1 - most) / record.data.validation)  # the standard error of a value
    best = sorted(order, key=lambda number: -curves[number].value)[: max(1, len(order) // 10)]
    pruned = {order[trial.number]: trial.reason or "" for trial in record.of("pruned")}
    chance = [number for number, reason in pruned.items() if reason.startswith(CHANCE)]
    return Outcome(
        epochs=sum(len(trial.epochs) for trial in record.trials),
        to_best=next((epochs for value, epochs in engine.finished if value >= most - noise), math.inf),
        value=record.best.value or 0.0,
        found=order[record.best.number],
        lost=sum(number in pruned for number in best),
        chance=len(chance),
        chance_lost=sum(number in best for number in chance),
    )


def interval(values: Sequence[float]) -> str:
    """The mean, and half the width of its 95% interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


def described(family: Family) -> dict[str, Any]:
    """A family's images, as a replayed search records them."""
    return {name: value for name, value in asdict(family.data()).items() if name != "fingerprint"}


def with_fresh_seeds(family: Family, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[int, float]:
    """The mean value, with fresh seeds, of each configuration that a search found best; trains what is missing."""
    found = sorted({each.found for runs in outcomes.values() for each in runs})
    seeds = range(1, FRESH + 1)
    family.collect((number, seed) for number in found for seed in seeds)
    return {number: statistics.mean(family.curve(number, seed).value for seed in seeds) for number in found}


def cells(runs: Sequence[Outcome], base: Sequence[Outcome], fresh: Mapping[int, float]) -> list[Any]:
    """The cells of searches that both tables have. base: the searches with which epochs are compared."""
    return [
        round(statistics.median(each.epochs for each in runs)),
        common.ratio([each.epochs for each in base], [each.epochs for each in runs]),
        statistics.median(each.to_best for each in runs),
        interval([each.value for each in runs]),
        interval([fresh[each.found] for each in runs]),
    ]


def compare(family: Family, pruners: Sequence[str], configs: int, trials: int, searches: int) -> None:
    """Replays pruners over a family's curves, and prints a row each."""
    curves, about = family.curves(range(configs)), described(family)
    outcomes: dict[str, list[Outcome]] = {}
    for pruner in pruners:
        outcomes[pruner] = []
        for index in range(searches):
            common.progress(f"{family.name}: {pruner}, search {index + 1} of {searches}")
            order = random.Random(index).sample(range(configs), trials)
            most = max(curves[number].value for number in order)
            outcomes[pruner].append(replay(family, curves, pruner, order, about, most))
    fresh = with_fresh_seeds(family, outcomes)
    for pruner, runs in outcomes.items():
        common.row(
            family.name,
            pruner,
            *cells(runs, outcomes["median"], fresh),
            f"{sum(each.lost for each in runs)} of {max(1, trials // 10) * searches}",
            f"{sum(each.chance for each in runs)}, {sum(each.chance_lost for each in runs)}",
        )


def compare_first(family: Family, pruner: str, configs: int, trials: int, searches: int) -> None:
    """Replays searches that begin with the study's known configurations, and the same without them; a row each."""
    known, about = list(family.known), described(family)
    curves = family.curves([*range(configs), *known])
    outcomes: dict[str, list[Outcome]] = {"drawn": [], "known first": []}
    for index in range(searches):
        common.progress(f"{family.name}: {pruner}, search {index + 1} of {searches}")
        drawn = random.Random(index).sample(range(configs), trials)
        most = max(curves[number].value for number in (*drawn, *known))
        for name, order in {"drawn": drawn, "known first": [*known, *drawn][:trials]}.items():
            outcomes[name].append(replay(family, curves, pruner, order, about, most))
    fresh = with_fresh_seeds(family, outcomes)
    for name, runs in outcomes.items():
        best = f"{sum(each.found in known for each in runs)} of {searches}"
        common.row(family.name, f"{pruner}; {name}", *cells(runs, outcomes["drawn"], fresh), best)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tests.bench prune", description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", type=int, default=40, help="configurations of each family")
    parser.add_argument("--trials", type=int, help="of them, drawn for each search; default: all")
    parser.add_argument("--searches", type=int, default=5, help="searches of each pruner")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="default: all")
    parser.add_argument("--pruner", action="append", help="besides median, as in a study file; default: all")
    parser.add_argument("--first", action="store_true", help="compare with the known first trials of the study file")
    parser.add_argument("--collect", action="store_true", help="only train the curves that are missing")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    families = [Family.of(name) for name in options.family or FAMILIES]
    for family in families:
        numbers = [*range(options.configs), *(family.known if options.first else ())]
        family.collect((number, 0) for number in numbers)
    if options.collect:
        return
    trials = min(options.configs, options.trials or options.configs)
    searches = f"{options.searches} searches of {trials} trials each"
    common.header(f"Pruners replayed over {options.configs} trainings a family: {searches}", cores=None)
    columns = ("family", "pruner", "epochs", "times fewer", "epochs to the best", "best value", "with fresh seeds")
    if options.first:
        common.table(*columns, "a known one is best")
        for family in families:
            for pruner in options.pruner or ("median", "asha, promote"):
                compare_first(family, pruner, options.configs, trials, options.searches)
    else:
        common.table(*columns, "best tenth: pruned", "pruned at chance: all, best tenth")
        pruners = ["median", *options.pruner] if options.pruner else list(PRUNERS)
        for family in families:
            compare(family, pruners, options.configs, trials, options.searches)
    than = "with drawn trials alone" if options.first else "by median"
    print(f"\nValues: means with 95% intervals over the searches; with fresh seeds: means of {FRESH}. Epochs: medians;")
    print("to the best: until a training ended within one standard error of the best of all; inf: none did.")
    print(f"Times fewer: than {than}.")
