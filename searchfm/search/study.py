"""A checked study: its search space, sampler and pruner, and the resolved table that is stored with it."""

import hashlib
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, assert_never, cast

import optuna
import tomli_w
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import BaseTrial, FixedTrial, TrialState

from searchfm.config import (
    Asha,
    CmaEs,
    Config,
    Custom,
    Gp,
    Grid,
    Hyperband,
    Median,
    Model,
    NoPruner,
    OneCycle,
    Patient,
    Percentile,
    Qmc,
    Random,
    SearchConfig,
    Shape,
    Tpe,
    Transfer,
    image_shape,
    rungs,
)
from searchfm.errors import CodeError, ConfigError, StudyError, UnknownKeyError, one_of
from searchfm.records import DEFAULT, Prepared, Trial, ranked
from searchfm.search import first, space
from searchfm.search.promotion import Rungs
from searchfm.stats import Accuracy
from searchfm.tables import below, digest, read_within, show, walk

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHANCE_FACTOR = 1.2  # of the largest class's fraction: below it an accuracy is at chance
CHANCE_LEVEL = 0.99  # of the bound that must be below it
CHANCE_IMAGES = 10  # validation images of each class that this takes
# What other libraries call our keys.
WORDS = {
    **dict.fromkeys(("learning_rate", "learningrate", "eta"), "lr"),
    **dict.fromkeys(("wd", "decay", "l2"), "weight_decay"),
    **dict.fromkeys(("batch", "bs", "batchsize"), "batch_size"),
    **dict.fromkeys(("n_epochs", "num_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(("n_trials", "num_trials", "max_trials"), "trials"),
}


class Ending(NamedTuple):
    """The rule of `[search]` that ended a search."""

    key: str  # target or stop_after
    text: str  # one line


@contextmanager
def _experimental() -> Iterator[None]:
    """No ExperimentalWarning: these classes have not changed for years."""
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        yield


def parse(table: Mapping[str, Any]) -> tuple[SearchConfig, space.Tree]:
    """Reads the table of a study. Checks each key, but no combination of keys. Raises ConfigError."""
    tables = ["name", "search", "first", *Config.schema]
    try:
        for name in table:
            if name not in tables:
                raise UnknownKeyError(name, f"is unknown here; may be one of: {one_of(name, tables)}")
        search = read_within("search", SearchConfig.from_table, table.get("search", {}))
        return search, space.parse(Config, {name: table[name] for name in table if name not in ("search", "first")})
    except UnknownKeyError as error:
        raise _elsewhere(error) from None


def _elsewhere(error: UnknownKeyError) -> UnknownKeyError:
    """The error with the places that have a key of this name; the same error if they are none, or many."""
    name = error.key.rpartition(".")[2].lower()
    name = WORDS.get(name, name)
    dotted = [dotted for dotted, _, _ in [*walk(SearchConfig, "search."), *walk(Config)]]
    found = [each for each in dict.fromkeys(dotted) if each.endswith(f".{name}") and each != f"{error.key}.name"]
    if "did you mean" in error.problem or not 0 < len(found) <= 3:
        return error
    return UnknownKeyError(error.key, f"{error.problem}; did you mean {' or '.join(found)}?")


def resolve(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The table of a study with all defaults. Checks as `parse` does; `where` names the origin in errors."""
    try:
        search, tree = parse(table)
        known = read_known(tree, table.get("first", ()))
    except ConfigError as error:
        raise error.at(where) from None
    return _resolved(search, tree, known)


def _resolved(search: SearchConfig, tree: space.Tree, known: Sequence[first.Known]) -> dict[str, Any]:
    tables = {"first": [each.to_table() for each in known]} if known else {}
    return {"search": search.to_table(), **space.to_toml(tree), **tables}


def read_known(tree: space.Tree, tables: Any, dropped: Collection[str] = ()) -> list[first.Known]:
    """The points of `[[first]]` tables (see `first.read`), without repeats: tables may differ in what the command line
    overrides. Raises ConfigError, with the number of the table.
    """
    known: list[first.Known] = []
    for number, table in enumerate(first.tables(tables), 1):
        try:
            point = first.read(tree, table, dropped)
        except ConfigError as error:
            raise error.under(f"first.{number}") from None
        if all(each.params != point.params for each in known):
            known.append(point)
    return known


class Study:
    """A checked study: every config of its search space is valid. Raises ConfigError.

    where: the file. given: for a built-in file, the dotted keys that the user gave. Of other keys, values that do not
    fit the images are left out. None: all keys are the user's. overridden: the keys of the command line, which win over
    those of `[[first]]`.
    """

    def __init__(
        self,
        name: str,
        table: Mapping[str, Any],
        *,
        question: str = "",
        where: str = "",
        given: Collection[str] | None = None,
        overridden: Collection[str] = (),
    ) -> None:
        self.name, self.question, self.where, self.given = name, question, where, given
        self._tables, self._dropped = table.get("first", ()), set(overridden)
        self.known: list[first.Known] = []  # configurations to try before the sampler proposes
        self.notes: list[str] = []  # lines for the user: what has no effect, or was left out
        try:
            self.search, self.tree = parse(table)
            self.example = Config.from_table(next(space.edge_cases(self.tree)))
            self.check_images(image_shape(self.example.data))
            self._check_search()
        except ConfigError as error:
            raise error.at(where) from None
        self.sized = "size" in table.get("data", {})  # else user images that differ in size are given one

    @property
    def resolved(self) -> dict[str, Any]:
        """File, overrides and defaults as one table, to store, compare and display."""
        return _resolved(self.search, self.tree, self.known)

    @property
    def epochs(self) -> int:
        """The maximum epochs of a trial."""
        return int(max(space.all_leaves(self.tree)["train.epochs"].ends))

    @cached_property
    def points(self) -> list[dict[str, Any]] | None:
        """Every point of the space; None for an infinite one, or more than `space.MAX_POINTS`."""
        return space.points(self.tree)

    @property
    def trials(self) -> int:
        """The number of trials."""
        if self.search.trials is not None:
            return self.search.trials
        return self.fixed if isinstance(self.search.sampler, Grid) else 20

    @property
    def fixed(self) -> int:
        """The trials whose configs are fixed by their numbers: known configurations, then the points of a grid."""
        return len(self.known) + (len(self.points or ()) if isinstance(self.search.sampler, Grid) else 0)

    @property
    def default(self) -> bool:
        """Whether trial 0 is the default of the study file: its first `[[first]]` table."""
        return bool(self.known) and self.known[0].origin == DEFAULT

    def add_known(self, table: Mapping[str, Any], origin: str, *, strict: bool = False) -> first.Known:
        """Adds a configuration to try after those known already, unless one of them equals it. Raises ConfigError.

        strict: its values of overridden keys must fit too.
        """
        known = replace(first.read(self.tree, table, () if strict else self._dropped), origin=origin)
        if all(each.params != known.params for each in self.known):
            self.known.append(known)
            self._tables = [*self._tables, known.to_table()]
        return known

    @property
    def data(self) -> Mapping[str, Any]:
        """The table `[data]`, the same for every trial."""
        return self.example.data.to_table()

    def transfers(self) -> list[tuple[str, str]]:
        """(model, weights) of every timm model in the space."""
        leaves = space.all_leaves(self.tree)
        names = [f"model.{Transfer.tag}.{key}" for key in ("model", "weights")]
        return list(itertools.product(*(leaves[name].ends for name in names))) if names[0] in leaves else []

    def customs(self) -> tuple[dict[str, Any], ...]:
        """Tables of [model.custom] with each end of each argument; none where no trial enters it."""
        kinds = (Config.from_table(table).model.kind for table in space.edge_cases(self.tree))
        tables = {digest(kind.to_table()): kind.to_table() for kind in kinds if isinstance(kind, Custom)}
        return tuple(tables.values())

    def check_code(self, allowed: bool) -> None:
        """Raises CodeError if a trial runs the user's code and that is not allowed."""
        if not allowed and (tables := self.customs()):
            factory = show(tables[0]["factory"])
            problem = "is code: a host runs it only with --allow-code; give that if you trust it"
            raise CodeError(f"{self.where or self.name}: model.custom.factory = {factory}: {problem}")

    def with_size(self, size: int) -> "Study":
        """The same study with another `data.size`. Raises ConfigError."""
        table = {**self.resolved, "data": {**self.data, "size": size}}
        study = Study(self.name, table, question=self.question, where=self.where, given=self.given)
        study.notes = self.notes
        return study

    @property
    def input_models(self) -> tuple[str, ...]:
        """The timm models, if the space has no other architecture: images may have their input size."""
        only = space.all_leaves(self.tree)["model.name"].ends == (Transfer.tag,)
        return tuple(dict.fromkeys(model for model, _ in self.transfers())) if only else ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """The architectures of the space, if their precision is to be chosen."""
        leaves = space.all_leaves(self.tree)
        return tuple(leaves["model.name"].ends) if leaves["train.precision"].ends == ("auto",) else ()

    def sample(self, trial: BaseTrial) -> Config:
        """The config of one trial. With `FixedTrial(trial.params)`, an earlier trial's config except its seed."""
        return Config.from_table(space.sample(trial, self.tree))

    def config(self, params: Mapping[str, Any]) -> Config:
        """The config of a point of the space."""
        return self.sample(FixedTrial(dict(params)))

    def samples(self, count: int) -> list[Config]:
        """Configs of the space: those of the first trials, as far as the sampler proposes them without results; all of
        the space if it has at most `count` points.
        """
        if (points := space.points(self.tree, count)) is not None:
            return [self.config(point) for point in points]
        study, configs = optuna.create_study(), []
        for number in range(count):
            study.sampler = self.sampler(number)
            trial = study.ask()
            configs.append(self.sample(trial))
            study.tell(trial, state=TrialState.FAIL)  # a sampler counts no failed trial
        return configs

    def check_images(self, shape: Shape | None) -> None:
        """Checks all configs, and their models against (channels, height, width) if known. `notes` name the values that
        are left out, or that make little sense. Raises ConfigError, with a `--set` that fits.
        """
        left_out: dict[str, dict[Any, ConfigError]] = {}
        try:
            while misfits := self._misfits(shape):  # again, since other values are first in the edge cases now
                for (dotted, value), misfit in misfits.items():
                    self._leave_out(dotted, value, misfit)
                    left_out.setdefault(dotted, {})[value] = misfit.error
            self.known = read_known(self.tree, self._tables, self._dropped)
        except ConfigError as error:
            raise error.at(self.where) from None
        for dotted, problems in left_out.items():
            (value, problem), *more = sorted(problems.items())
            also = f", as {'are' if len(more) > 1 else 'is'} {', '.join(str(each) for each, _ in more)}" if more else ""
            reason = "" if problem.key == dotted else f"{dotted} = {value}: "
            self._note(f"{reason}{problem}: left out{also}")

    def _misfits(self, shape: Shape | None) -> "dict[tuple[str, Any], _Misfit]":
        """What must be left out, by (dotted key, value). Raises ConfigError where the user gave that key."""
        misfits: dict[tuple[str, Any], _Misfit] = {}
        doubts: dict[tuple[str, Any], ConfigError] = {}
        good: set[tuple[str, Any]] = set()
        for table in space.edge_cases(self.tree):
            config = Config.from_table(table)
            kind = config.model.kind
            point = f"model.{kind.tag}.{kind.fits}", getattr(kind, kind.fits, None)
            try:
                if shape is not None:
                    config.fit_images(shape)
            except ConfigError as error:
                misfit = _Misfit(error, _fitting_flag(kind, cast(Shape, shape)))
                if not kind.fits or self._is_given(point[0]):
                    raise misfit.with_flag from None
                misfits.setdefault(point, misfit)
            else:
                if doubt := kind.doubt():
                    doubts.setdefault(point, ConfigError(point[0], doubt))
                else:
                    good.add(point)
        for point, problem in doubts.items():
            if self._is_given(point[0]) or point in good:
                self._note(str(problem.at(self.where)))
            else:
                misfits[point] = _Misfit(problem)
        return misfits

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _is_given(self, dotted: str) -> bool:
        return self.given is None or below(dotted, self.given)

    def _leave_out(self, dotted: str, value: Any, misfit: "_Misfit") -> None:
        """Takes a value out of the space. Raises ConfigError where no other is left, or a model that the user named."""
        tree = space.without(self.tree, dotted.split("."), value)
        if tree is None or (self._is_given("model.name") and _models(tree) != _models(self.tree)):
            raise misfit.with_flag
        self._dropped |= {dotted} if _models(tree) == _models(self.tree) else {"model.name"}
        self.tree = tree
        self.example = Config.from_table(next(space.edge_cases(tree)))
        self.__dict__.pop("points", None)  # cached

    @_experimental()
    def sampler(self, number: int) -> BaseSampler:
        """The sampler of trial `number`, seeded from the study's seed and this number only."""
        if number < len(self.known):
            return fixed_sampler(self.known[number].params)
        seed = self.seed(number)
        random = optuna.samplers.RandomSampler(seed)
        match self.search.sampler:
            case Tpe(startup_trials=startup, candidates=candidates):
                # Branches make the space conditional; the multivariate TPE supports that only in groups.
                return optuna.samplers.TPESampler(
                    n_startup_trials=self.startup(startup),
                    n_ei_candidates=candidates,
                    seed=seed,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
            case Random():
                return random
            case Grid():
                assert self.points is not None
                index = (number - len(self.known)) % len(self.points)  # after the last point, the first
                return fixed_sampler(self.points[index])
            case CmaEs(startup_trials=startup):
                count = self.startup(startup)
                return optuna.samplers.CmaEsSampler(n_startup_trials=count, seed=seed, independent_sampler=random)
            case Gp(startup_trials=startup):
                return optuna.samplers.GPSampler(n_startup_trials=self.startup(startup), seed=seed)
            case Qmc():
                # One sequence for the whole study; Optuna stores the index of the next point.
                return optuna.samplers.QMCSampler(scramble=True, seed=self.search.seed, independent_sampler=random)
            case _ as never:
                assert_never(never)

    @_experimental()
    def pruner(self) -> BasePruner:
        """The pruner; epochs are counted from 1."""
        match self.search.pruner:
            case Median(startup_trials=startup, min_epochs=min_epochs):
                return optuna.pruners.MedianPruner(self.startup(startup), min_epochs)
            case Percentile(keep=keep, startup_trials=startup, min_epochs=min_epochs):
                return optuna.pruners.PercentilePruner(keep, self.startup(startup), min_epochs)
            case Hyperband(min_epochs=min_epochs, reduction=reduction):
                return optuna.pruners.HyperbandPruner(min_epochs, self.epochs, reduction)
            case Asha(promote=True) | NoPruner():  # paused trials are pruned at the end of the search
                return optuna.pruners.NopPruner()
            case Asha(min_epochs=min_epochs, reduction=reduction):
                return optuna.pruners.SuccessiveHalvingPruner(min_epochs, reduction)
            case Patient(patience=patience, min_delta=delta):
                return optuna.pruners.PatientPruner(None, patience, delta)
            case _ as never:
                assert_never(never)

    def rungs(self) -> Rungs:
        """Where trials are paused; without `promote = true` nowhere."""
        match self.search.pruner:
            case Asha(promote=True, min_epochs=min_epochs, reduction=reduction):
                return Rungs(rungs(min_epochs, reduction, self.epochs), reduction)
        return Rungs()

    def judges(self, config: Config, epoch: int) -> bool:
        """Whether the pruner is asked after this epoch of a trial, from 1. Not after the last one: a trial that is
        trained has its value. Halving stops in the last third, where it would save little and lose a candidate.
        """
        epochs = config.train.epochs
        halving = isinstance(self.search.pruner, Asha | Hyperband)
        return epoch < epochs and not (halving and 3 * epoch > 2 * epochs)

    def chance(self, data: Prepared) -> float | None:
        """The validation accuracy that shows nothing learnt: 1.2 times that of always answering the largest class.

        None if no trial is judged by it: without a pruner, in a grid, with too few validation images of a class, or
        with a class so large that none could be above it.
        """
        counts = data.validation_classes
        judged = not isinstance(self.search.pruner, NoPruner) and not isinstance(self.search.sampler, Grid)
        if not judged or data.largest is None or min(counts) < CHANCE_IMAGES:
            return None
        return chance if (chance := CHANCE_FACTOR * data.largest) < 1 else None

    def at_chance(self, config: Config, epoch: int, accuracy: float, data: Prepared) -> bool:
        """Whether a trial has learnt nothing: the 99% upper bound of its validation accuracy is below `chance`. Warm-up
        and a tenth of the epochs must be over; not after the last epoch.
        """
        schedule, epochs, chance = config.schedule, config.train.epochs, self.chance(data)
        warmup = schedule.kind.rise * epochs if isinstance(schedule.kind, OneCycle) else schedule.warmup
        if chance is None or not (warmup < epoch and epochs / 10 <= epoch < epochs):
            return False
        return Accuracy.of(accuracy, data.validation).upper(CHANCE_LEVEL) < chance

    def ended_by(self, trials: Iterable[Trial]) -> Ending | None:
        """The rule of `[search]` that ends the study, from the trials that ended, by their numbers; None if it goes on.
        So it does not depend on the order of their ends, nor on interruptions.
        """
        target, limit = self.search.target, self.search.stop_after
        if target is None and limit is None:
            return None
        useful = [trial for trial in trials if trial.state in ("complete", "pruned")]
        best = next(iter(ranked(useful)), None)
        if best is None or best.value is None:
            return None
        if target is not None and best.value >= target:
            text = f"search.target = {target:g} is reached by trial {best.number} with {best.value:.4f}"
            return Ending("target", text)
        since = sum(trial.number > best.number for trial in useful)
        if limit is not None and since >= limit:
            text = f"search.stop_after = {limit}: none of {since} trials after trial {best.number} is better"
            return Ending("stop_after", text)
        return None

    def startup(self, trials: int | None) -> int:
        """The start-up trials of a sampler or pruner: those of its key, else a quarter of all, from 4 to 10."""
        return min(10, max(4, self.trials // 4)) if trials is None else trials

    def seed(self, name: int | str) -> int:
        """The 31-bit seed of a trial's proposal and training, by its number; of a fresh training, by another name."""
        sha256 = hashlib.sha256(f"{self.search.seed}/{name}".encode()).digest()
        return int.from_bytes(sha256[:4], "big") >> 1

    def replay(self, number: int, config: Mapping[str, Any]) -> str:
        """A study file that repeats this trial alone."""
        question = f"# Question: does trial {number} of {self.name} give the same again?\n"
        search = {"trials": 1, "seed": self.search.seed, "sampler": "random", "pruner": "none"}
        table = {"name": f"{self.name[:58]}-{number:04d}", "search": search, **config}
        return f"{question}# Run:      searchfm tune FILE\n{tomli_w.dumps(table)}"

    def _check_search(self) -> None:
        """Checks sampler and pruner against the space. Raises ConfigError."""
        leaves, grid = dict(space.leaves(self.tree)), isinstance(self.search.sampler, Grid)
        if grid and self.points is None:
            for name, leaf in leaves.items():
                if leaf.options is None:
                    raise ConfigError(name, "has no step: a grid needs values, choices or stepped ranges")
            raise ConfigError("search.sampler", f"= grid: the space must have at most {space.MAX_POINTS} points")
        if "train.epochs" in leaves and not (grid and isinstance(self.search.pruner, NoPruner)):
            raise ConfigError("train.epochs", "takes a value here; only a grid with pruner = none compares epochs")
        if grid and getattr(self.search.pruner, "promote", False):
            raise ConfigError("search.pruner.promote", "= true: with search.sampler = grid it must be false")
        min_epochs = getattr(self.search.pruner, "min_epochs", 1)
        if min_epochs > self.epochs:
            raise ConfigError("search.pruner.min_epochs", f"= {min_epochs}: must be <= train.epochs = {self.epochs}")


def _models(tree: space.Tree) -> space.Leaf:
    return space.all_leaves(tree)["model.name"]


@dataclass(frozen=True)
class _Misfit:
    """Why a value does not fit."""

    error: ConfigError
    flag: str = ""  # a value that fits, as the end of a message

    @property
    def with_flag(self) -> ConfigError:
        """The error with the flag."""
        return ConfigError(self.error.key, self.error.problem + self.flag)


def _fitting_flag(kind: Model, shape: Shape) -> str:
    """A flag with a value that fits the images, as the end of a message."""
    for value in range(getattr(kind, kind.fits, 1) - 1, 0, -1):
        with suppress(ConfigError):
            replace(kind, **{kind.fits: value}).fit_images(shape)
            return f"; for example --set model.{kind.tag}.{kind.fits}={value}"
    return ""


@_experimental()
def fixed_sampler(params: Mapping[str, Any]) -> BaseSampler:
    """The sampler of a trial whose parameters are known."""
    return optuna.samplers.PartialFixedSampler(dict(params), optuna.samplers.RandomSampler())


def check_name(name: str) -> str:
    """The name, if it is valid in folders and links. Raises StudyError."""
    if not NAME.fullmatch(name):
        raise StudyError(
            f"study name {name[:80]!r}: must be letters, digits, '.', '_' or '-', at most 64, not beginning with a sign"
        )
    return name
