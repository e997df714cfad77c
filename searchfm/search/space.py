"""A search space: the tables of `config.py` whose leaves are values, ranges or choices.

One reader, `fill`, walks the tree and asks for each leaf's value; Optuna, the grid, the checks before a search and the
replay of a trial all answer it, so that they cannot disagree about what a space is. Parameters are named by their
dotted keys (`model.vit.layers`); entries of a list by their place from 1 (`model.cnn.filters.2`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, partial
from typing import Any, Protocol, assert_never

from searchfm.errors import ConfigError
from searchfm.tables import BranchKey, LeafKey, Table, TableKey, read_within, refuse_unknown, show

MOST_POINTS = 100_000  # of a grid, and of combinations that must agree: more is a mistake, not a plan


class Suggester(Protocol):
    """The part of `optuna.Trial` and `optuna.trial.FixedTrial` that a space needs."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...  # noqa: D102
    def suggest_float(  # noqa: D102
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class Value:
    """A leaf that is the same in every trial."""

    value: Any

    @property
    def options(self) -> Sequence[Any] | None:
        """All that the leaf can be, or None where that is not finite."""
        return (self.value,)

    @property
    def ends(self) -> tuple[Any, ...]:
        """What must be checked for all the rest to be possible."""
        return (self.value,)

    def suggest(self, trial: Suggester, name: str) -> Any:
        """The value; the trial is not asked."""
        return self.value

    def to_toml(self) -> Any:
        """As a study file writes it."""
        return self.value


@dataclass(frozen=True)
class Choice:
    """A leaf that is one of several values."""

    values: tuple[Any, ...]

    @property
    def options(self) -> Sequence[Any] | None:
        """All values."""
        return self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def suggest(self, trial: Suggester, name: str) -> Any:
        """One of the values."""
        return trial.suggest_categorical(name, self.values)

    def to_toml(self) -> Any:
        """As a study file writes it."""
        return {"choice": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A leaf between two numbers, both included."""

    low: float
    high: float
    log: bool
    step: float | None  # None: any number between, which a whole number never is

    @property
    def whole(self) -> bool:
        """Whether the leaf is a whole number."""
        return isinstance(self.low, int)

    @cached_property
    def options(self) -> Sequence[Any] | None:
        """The numbers of a stepped range, without rounding noise, as far as anybody counts; None without a step."""
        if self.step is None:
            return None
        if self.whole:
            return range(int(self.low), int(self.high) + 1, int(self.step))
        return tuple(self._stop(i) for i in range(min(self._stops, MOST_POINTS + 1)))

    @property
    def _stops(self) -> int:
        assert self.step is not None
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step))) + 1

    def _stop(self, i: int) -> float:
        return float(Decimal(str(self.low)) + i * Decimal(str(self.step)))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Low and high."""
        return (self.low, self.high)

    def suggest(self, trial: Suggester, name: str) -> Any:
        """A number between low and high."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        number = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        # Optuna adds steps up with rounding noise, which would make two configs of one point.
        return number if self.step is None else self._stop(round((number - self.low) / self.step))

    def to_toml(self) -> Any:
        """As a study file writes it."""
        table: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.log:
            table["log"] = True
        if self.step is not None and not (self.whole and self.step == 1):
            table["step"] = self.step
        return table


Leaf = Value | Choice | Range
Ask = Callable[[str, Leaf], Any]  # dotted name, leaf -> value


@dataclass(frozen=True)
class Leaves:
    """A list with a leaf an entry, of which the first `per` are looked at (all, where `per` is None)."""

    entries: tuple[Leaf, ...]
    per: str | None


@dataclass(frozen=True)
class Branch:
    """A union of tables: `choose` says which one is entered."""

    choose: Leaf
    options: Mapping[str, "Tree"]


@dataclass(frozen=True)
class Tree:
    """A table, key by key in the order of its fields."""

    nodes: Mapping[str, "Leaf | Leaves | Branch | Tree"]
    agree: tuple[tuple[str, ...], ...] = ()  # groups of keys whose combinations must be checked
    per: Mapping[str, str] = field(default_factory=dict)  # leaf that stands for a list -> key with the list's length


def parse(cls: type[Table], values: Mapping[str, Any]) -> Tree:
    """Reads a table of a study file; what is not given has its default. Raises ConfigError.

    Only what a trial can enter is kept: the other options of a branch are checked and left out.
    """
    refuse_unknown(values, cls)
    nodes: dict[str, Leaf | Leaves | Branch | Tree] = {}
    per: dict[str, str] = {}
    for name, item in cls.schema.items():
        match item:
            case BranchKey(chooser=chooser, options=options):
                assert not item.inline, "inline branches belong to [search], which takes no ranges"
                tags = _leaf(chooser, values.get("name", chooser.default))
                # Options that no trial enters are read too: a mistake in one is a mistake.
                trees = {tag: _tree(tag, option, values.get(tag, {})) for tag, option in options.items()}
                nodes["name"] = Branch(tags, {tag: trees[tag] for tag in tags.ends})
            case TableKey(table=table):
                nodes[name] = _tree(name, table, values.get(name, {}))
            case LeafKey():
                raw = values.get(name, item.default)
                if raw is None:
                    continue  # a key that may be absent, and is
                if item.many and isinstance(raw, list | tuple):
                    nodes[name] = Leaves(tuple(_leaf(item, entry, i) for i, entry in enumerate(raw, 1)), item.per)
                else:
                    nodes[name] = _leaf(item, raw)
                    if item.per:
                        per[name] = item.per
            case _:
                assert_never(item)
    return Tree(nodes, cls.agree, per)


def fill(tree: Tree, ask: Ask, prefix: str = "") -> dict[str, Any]:
    """Walks the tree, asking for each leaf in turn; returns the table that `Config.from_table` reads."""
    table: dict[str, Any] = {}
    for name, node in tree.nodes.items():
        path = prefix + name
        match node:
            case Value() | Choice() | Range():
                if name not in tree.per or table[tree.per[name]]:  # a list of no entries asks for none
                    table[name] = ask(path, node)
            case Leaves(entries, per):
                count = len(entries) if per is None else min(table[per], len(entries))
                table[name] = [ask(f"{path}.{i}", entry) for i, entry in enumerate(entries[:count], 1)]
            case Branch(chooser, options):
                chosen = ask(path, chooser)
                table["name"] = chosen
                settings = fill(options[chosen], ask, f"{prefix}{chosen}.")
                if settings:
                    table[chosen] = settings
            case Tree():
                table[name] = fill(node, ask, f"{path}.")
            case _:
                assert_never(node)
    return table


def sample(trial: Suggester, tree: Tree) -> dict[str, Any]:
    """The table of one trial. `FixedTrial(best.params)` gives that trial's table again."""
    return fill(tree, lambda name, leaf: leaf.suggest(trial, name))


def to_toml(tree: Tree) -> dict[str, Any]:
    """The tree as a study file writes it, defaults and all; `parse` reads it back to an equal tree."""
    table: dict[str, Any] = {}
    for name, node in tree.nodes.items():
        match node:
            case Value() | Choice() | Range():
                table[name] = node.to_toml()
            case Leaves(entries, _):
                table[name] = [entry.to_toml() for entry in entries]
            case Branch(chooser, options):
                table["name"] = chooser.to_toml()
                table |= {word: to_toml(option) for word, option in options.items() if option.nodes}
            case Tree():
                table[name] = to_toml(node)
            case _:
                assert_never(node)
    return table


def walk(tree: Tree, options: Callable[[str, Leaf], Sequence[Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every way through the tree, as (table, leaf values by dotted name); `options` says what to try for a leaf.

    An odometer over `fill` itself: the last leaf turns fastest, and a branch's leaves exist only where it is entered.
    """
    taken: list[int] = []
    while True:
        wheel: list[int] = []  # how many options each leaf of this pass has
        values: dict[str, Any] = {}

        def turn(name: str, leaf: Leaf, wheel: list[int] = wheel, values: dict[str, Any] = values) -> Any:
            allowed = options(name, leaf)
            place = taken[len(wheel)] if len(wheel) < len(taken) else 0  # noqa: B023 - `taken` is one list for all passes
            wheel.append(len(allowed))
            values[name] = allowed[place]
            return allowed[place]

        yield fill(tree, turn), values
        taken += [0] * (len(wheel) - len(taken))
        while taken and taken[-1] + 1 == wheel[len(taken) - 1]:
            taken.pop()
        if not taken:
            return
        taken[-1] += 1


def points(tree: Tree, most: int = MOST_POINTS) -> list[dict[str, Any]] | None:
    """Every point of a finite space, by dotted name and without the fixed leaves, the first leaf turning slowest.

    None for a space without end, or of more than `most` points.
    """
    free = dict(leaves(tree))
    if any(leaf.options is None for leaf in free.values()):
        return None
    ways = walk(tree, lambda _, leaf: leaf.options or ())
    found = [
        {name: value for name, value in values.items() if name in free}
        for _, values in itertools.islice(ways, most + 1)
    ]
    return found if len(found) <= most else None


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Choice | Range]]:
    """The leaves that a search chooses, by dotted name, those of every option included."""
    for name, node in tree.nodes.items():
        path = prefix + name
        match node:
            case Value():
                pass
            case Choice() | Range():
                yield path, node
            case Leaves(entries, _):
                for i, entry in enumerate(entries, 1):
                    if not isinstance(entry, Value):
                        yield f"{path}.{i}", entry
            case Branch(chooser, options):
                if isinstance(chooser, Choice):
                    yield path, chooser
                for word, option in options.items():
                    yield from leaves(option, f"{prefix}{word}.")
            case Tree():
                yield from leaves(node, f"{path}.")
            case _:
                assert_never(node)


def corners(tree: Tree) -> Iterator[dict[str, Any]]:
    """The tables that must be possible for every table of the space to be.

    Each end of each leaf once, in every option of every branch, the other leaves at their first end; and every
    combination of the discrete keys that a table says must agree. Raises ConfigError where those are too many.
    """
    seen: set[str] = set()
    waiting: list[dict[str, Any]] = [{}]
    while waiting:
        forced = waiting.pop()
        met: dict[str, Leaf] = {}

        def first(name: str, leaf: Leaf, forced: dict[str, Any] = forced, met: dict[str, Leaf] = met) -> Any:
            met[name] = leaf
            return forced.get(name, leaf.ends[0])

        yield fill(tree, first)
        new = {name: leaf for name, leaf in met.items() if name not in seen}
        seen |= new.keys()
        waiting += [{**forced, name: end} for name, leaf in new.items() for end in leaf.ends[1:]]
        # Keys that must agree are tried together as soon as the table that holds them is entered.
        for group in _agreeing(tree):
            if any(_below(leaf, group) for leaf in new):
                yield from _agreements(tree, group, forced)


def _agreements(tree: Tree, group: tuple[str, ...], forced: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    def options(name: str, leaf: Leaf) -> Sequence[Any]:
        if _below(name, group):
            return leaf.options or leaf.ends
        return (forced.get(name, leaf.ends[0]),)

    for count, (table, _) in enumerate(walk(tree, options)):
        if count == MOST_POINTS:
            raise ConfigError(
                ", ".join(group), f"have more combinations to check than {MOST_POINTS}; give one of them fewer values"
            )
        yield table


def _agreeing(tree: Tree, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """The dotted names of the keys that must agree, a group a table."""
    for group in tree.agree:
        yield tuple(prefix + name for name in group)
    for name, node in tree.nodes.items():
        if isinstance(node, Tree):
            yield from _agreeing(node, f"{prefix}{name}.")
        elif isinstance(node, Branch):
            for word, option in node.options.items():
                yield from _agreeing(option, f"{prefix}{word}.")


def _below(name: str, group: tuple[str, ...]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in group)


def _tree(name: str, cls: type[Table], values: Any) -> Tree:
    return read_within(name, partial(parse, cls), values)


def _leaf(item: LeafKey, raw: Any, place: int | None = None) -> Leaf:
    """A value, `{ choice = [...] }` or `{ low =, high =, log =, step = }`, each value checked as the key's own."""
    name = item.name if place is None else f"{item.name}.{place}"
    if not isinstance(raw, Mapping):
        return Value(item.check(raw))
    if item.fixed:
        raise ConfigError(name, f"= {show(raw)}: takes a value here, not a range")
    if set(raw) == {"choice"}:
        return _choice(item, name, raw["choice"])
    if not {"low", "high"} <= set(raw) <= {"low", "high", "log", "step"}:
        raise ConfigError(
            name,
            f"= {show(raw)}: must be a value, {{ choice = [...] }} or {{ low = ..., high = ... }} with log or step",
        )
    low, high = (item.check(raw[end]) for end in ("low", "high"))
    if type(low) not in (int, float) or type(high) is not type(low):
        raise ConfigError(name, f"= {show(raw)}: only a number has a range; use {{ choice = [...] }}")
    log, step = raw.get("log", False), raw.get("step")
    if type(log) is not bool:
        raise ConfigError(name, f"= {show(raw)}: log must be true or false")
    if low > high:
        raise ConfigError(name, f"= {show(raw)}: low must not be above high")
    if log and low <= 0:
        raise ConfigError(name, f"= {show(raw)}: a log range must be above 0")
    if step is not None:
        if log:
            raise ConfigError(name, f"= {show(raw)}: has log or step, not both")
        if type(step) not in ((int,) if type(low) is int else (int, float)) or not 0 < step < math.inf:
            raise ConfigError(
                name, f"= {show(raw)}: step must be {'a whole number' if type(low) is int else 'a number'} > 0"
            )
        # Optuna would lower `high` to the last step, with a warning; a range means both of its ends.
        if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
            raise ConfigError(name, f"= {show(raw)}: high must be a whole number of steps above low")
    if low == high:
        return Value(low)
    if type(low) is int:
        return Range(low, high, log, step or 1)
    return Range(low, high, log, None if step is None else float(step))


def _choice(item: LeafKey, name: str, given: Any) -> Leaf:
    if not isinstance(given, list | tuple) or not given:
        raise ConfigError(name, f"= {show({'choice': given})}: choice must be a list of at least one value")
    values = []
    for entry in given:
        if isinstance(entry, Mapping):
            raise ConfigError(name, f"= {show({'choice': given})}: a choice is between values, not ranges")
        value = item.check(entry)
        if value in values:
            raise ConfigError(name, f"= {show({'choice': given})}: names {show(value)} twice")
        values.append(value)
    return Value(values[0]) if len(values) == 1 else Choice(tuple(values))
