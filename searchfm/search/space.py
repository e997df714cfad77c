"""A search space: the tables of `config.py` whose leaves are values, ranges or choices.

One reader, `fill`, walks the tree and asks for the value of each leaf. Optuna, the grid, the checks before a search and
the replay of a trial all use it, so that they cannot disagree about the space. Parameters are named by their dotted
keys (`model.vit.layers`), entries of a list by their index from 1 (`model.cnn.filters.2`).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property, partial
from itertools import islice
from typing import Any, assert_never, cast

from optuna.trial import BaseTrial

from searchfm.errors import ConfigError
from searchfm.tables import (
    NAMES,
    BranchKey,
    FreeKey,
    LeafKey,
    Table,
    TableKey,
    below,
    read_within,
    refuse_unknown,
    show,
)

MAX_POINTS = 100_000  # of a grid, and of combinations that must agree
MAX_STEPS = 10**15  # of a range: a double counts them


@dataclass(frozen=True)
class Choice:
    """A leaf that is one of several values; one value alone is the same in every trial."""

    options: tuple[Any, ...]

    @classmethod
    def read(cls, item: LeafKey, raw: Mapping[str, Any], error: "Error") -> "Choice":
        """Reads `{ choice = [...] }`. Raises ConfigError."""
        if not isinstance(raw["choice"], list | tuple) or not raw["choice"]:
            raise error("choice must be a list of at least one value")
        values: list[Any] = []
        for entry in raw["choice"]:
            if isinstance(entry, Mapping):
                raise error("a choice is between values, not ranges")
            value = item.check(entry)
            if value in values:
                raise error(f"names {show(value)} twice")
            values.append(value)
        return cls(tuple(values))

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to check: if they are valid, all others are. More than one if the leaf varies."""
        return self.options

    def member(self, value: Any) -> Any:
        """The option that equals a value. Raises ConfigError."""
        for option in self.options:
            if option == value and isinstance(option, bool) == isinstance(value, bool):
                return option
        expected = "one of " * (len(self.options) > 1) + ", ".join(map(show, self.options))
        raise ConfigError("", f"= {show(value)}: must be {expected}")

    def default(self, value: Any) -> Any:
        """The option that equals a value, else the first."""
        return next((option for option in self.options if option == value), self.options[0])

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        """One of the values; the trial suggests it if there are several."""
        return trial.suggest_categorical(name, self.options) if len(self.options) > 1 else self.options[0]

    def to_toml(self) -> Any:
        """The leaf in a study file."""
        return {"choice": list(self.options)} if len(self.options) > 1 else self.options[0]


@dataclass(frozen=True)
class Range:
    """A leaf between two different numbers, both included."""

    low: float
    high: float
    log: bool
    step: float | None  # None: continuous; an integer range always has a step

    @classmethod
    def read(cls, item: LeafKey, raw: Mapping[str, Any], error: "Error") -> "Range":
        """Reads `{ low =, high =, log =, step = }`. Raises ConfigError."""
        low, high = item.check(raw["low"]), item.check(raw["high"])
        log, step = raw.get("log", False), raw.get("step")
        if {type(low), type(high)} == {int, float}:  # of a key that takes both
            low, high = float(low), float(high)
        if type(low) not in (int, float) or type(high) is not type(low):
            raise error("only a number has a range; use { choice = [...] }")
        if type(log) is not bool:
            raise error("log must be true or false")
        if low > high:
            raise error("low must not be above high")
        if log and low <= 0:
            raise error("a log range must be above 0")
        if step is None:
            return cls(low, high, log, 1 if type(low) is int else None)
        if log:
            raise error("has log or step, not both")
        if type(step) not in (int, type(low)) or not 0 < step < math.inf:
            raise error(f"step must be {NAMES[type(low)]} > 0")
        width = Decimal(str(high)) - Decimal(str(low))
        if width / Decimal(str(step)) > MAX_STEPS:
            raise error(f"has more than {MAX_STEPS:,} steps")
        # Optuna would lower `high` to the last step, with a warning; but a range includes both ends.
        if width % Decimal(str(step)):
            raise error("high must be a whole number of steps above low")
        return cls(low, high, log, type(low)(step))

    @property
    def whole(self) -> bool:
        """Whether the leaf is an integer."""
        return isinstance(self.low, int)

    @cached_property
    def options(self) -> Sequence[Any] | None:
        """The numbers of a stepped range, at most one more than `MAX_POINTS`; None without a step."""
        if self.step is None:
            return None
        steps = int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step)))
        return tuple(self._number(i) for i in range(min(steps, MAX_POINTS) + 1))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Low and high."""
        return (self.low, self.high)

    def member(self, value: Any) -> Any:
        """The number of the range that equals a value. Raises ConfigError."""
        number = type(value) in (int, float) and self.low <= value <= self.high and self._nearest(value)
        if number is False or not math.isclose(number, value, rel_tol=1e-9):
            step = "" if self.step in (None, 1) else f" in steps of {show(self.step)}"
            raise ConfigError("", f"= {show(value)}: must be from {show(self.low)} to {show(self.high)}{step}")
        return number

    def default(self, value: Any) -> Any:
        """The number of the range that equals a value, else its middle, of a log range the geometric mean."""
        with suppress(ConfigError):
            return self.member(value)
        return self._nearest(math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2)

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        """A number between low and high."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        number = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return number if self.step is None else self._number(round((number - self.low) / self.step))

    def to_toml(self) -> Any:
        """The leaf in a study file."""
        table = {"low": self.low, "high": self.high} | ({"log": True} if self.log else {})
        return table if self.step is None or (self.whole and self.step == 1) else {**table, "step": self.step}

    def _nearest(self, number: float) -> float:
        return float(number) if self.step is None else self._number(round((number - self.low) / self.step))

    def _number(self, steps: int) -> float:
        # Optuna adds steps up with rounding errors, which would make two configs of one point.
        return type(self.low)(Decimal(str(self.low)) + steps * Decimal(str(self.step)))


Leaf = Choice | Range
Ask = Callable[[str, Leaf], Any]  # dotted name, leaf -> value
Options = Callable[[str, Leaf], Sequence[Any]]  # dotted name, leaf -> values to try
Tables = Iterator[tuple[dict[str, Any], dict[str, Any]]]  # (table, leaf values by dotted name)
Error = Callable[[str], ConfigError]  # problem -> error with the leaf's name and value


@dataclass(frozen=True)
class Tree:
    """A table: its keys in the order of the fields."""

    nodes: Mapping[str, "Leaf | tuple[Leaf, ...] | Tree"]  # a list has one leaf per entry, or one for all
    options: Mapping[str, "Tree"]  # of a branch, by tag: the leaf `name` chooses the one to enter
    agree: tuple[tuple[str, ...], ...]  # groups of dotted keys whose combinations must be checked
    per: Mapping[str, str]  # list -> key that holds its length


def parse(cls: type[Table], values: Mapping[str, Any]) -> Tree:
    """Reads a table of a study file; absent keys have their defaults. Raises ConfigError.

    The tree holds only what a trial can enter: other options of a branch are checked and left out.
    """
    refuse_unknown(values, cls)
    nodes: dict[str, Leaf | tuple[Leaf, ...] | Tree] = {}
    options: dict[str, Tree] = {}
    tables: dict[str, Tree] = {}
    for name, item in cls.schema.items():
        match item:
            case BranchKey(chooser=chooser):
                assert not item.inline, "inline branches belong to [search], which takes no ranges"
                nodes["name"] = tags = _leaf(chooser, values.get("name", chooser.default))
                # Check the options that no trial enters, too.
                for tag, option in item.options.items():
                    options[tag] = read_within(tag, partial(parse, option), values.get(tag, {}))
                options = {tag: options[tag] for tag in tags.ends}
            case TableKey(table=table):
                nodes[name] = tables[name] = read_within(name, partial(parse, table), values.get(name, {}))
            case LeafKey():
                raw = values.get(name, item.default)
                if raw is None:
                    continue  # an optional key
                nodes[name] = _leaves(item, raw, many=item.many)
            case FreeKey():
                nodes[name] = read_within(name, partial(_parse_free, item), values.get(name, {}))
            case _:
                assert_never(item)
    per = {name: item.per for name, item in cls.schema.items() if isinstance(item, LeafKey) and item.per}
    below = [(name, group) for name, tree in (options | tables).items() for group in tree.agree]
    agree = (*cls.agree, *(tuple(f"{name}.{key}" for key in group) for name, group in below))
    return Tree(nodes, options, agree, per)


def fill(tree: Tree, ask: Ask, prefix: str = "", *, every: bool = False) -> dict[str, Any]:
    """Walks the tree and asks for each leaf in turn; returns a table for `Config.from_table`.

    With `every`, the table has every option of every branch and every entry of every list.
    """
    table: dict[str, Any] = {}
    for name, node in tree.nodes.items():
        path = prefix + name
        length = table[tree.per[name]] if name in tree.per and not every else None
        match node:
            case Choice() | Range():
                if length != 0:  # an empty list asks for no leaf
                    table[name] = ask(path, node)
            case tuple():
                table[name] = [ask(f"{path}.{i}", leaf) for i, leaf in enumerate(node[:length], 1)]
            case Tree():
                table[name] = fill(node, ask, f"{path}.", every=every)
            case _:
                assert_never(node)
        if name == "name" and tree.options:
            for tag in tree.options if every else (table["name"],):
                if settings := fill(tree.options[tag], ask, f"{prefix}{tag}.", every=every):
                    table[tag] = settings
    return table


def sample(trial: BaseTrial, tree: Tree) -> dict[str, Any]:
    """The table of one trial. With `FixedTrial(trial.params)` it is the table of an earlier trial."""
    return fill(tree, lambda name, leaf: leaf.suggest(trial, name))


def to_toml(tree: Tree) -> dict[str, Any]:
    """The tree as a table of a study file, defaults included; `parse` reads it back to an equal tree."""
    return fill(tree, lambda _, leaf: leaf.to_toml(), every=True)


def enumerate_tables(tree: Tree, options: Options) -> Tables:
    """Every table of the tree, from the `options` of each leaf.

    The last leaf varies fastest. The leaves of a branch's option exist only in tables that enter it.
    """
    tried: dict[str, Sequence[Any]] = {}  # options of each leaf
    indices: dict[str, int] = {}  # option of each leaf of the current table, in the order of asking

    def ask(name: str, leaf: Leaf) -> Any:
        tried[name] = options(name, leaf)
        return tried[name][indices.setdefault(name, 0)]

    while True:
        yield fill(tree, ask), {name: tried[name][index] for name, index in indices.items()}
        # The last leaf with another option takes it; the leaves after it restart at their first.
        while indices:
            name, index = indices.popitem()
            if index + 1 < len(tried[name]):
                indices[name] = index + 1
                break
        else:
            return


def points(tree: Tree, most: int = MAX_POINTS) -> list[dict[str, Any]] | None:
    """Every point of a finite space, by dotted name and without the fixed leaves; the first leaf varies slowest.

    None for an infinite space, or one of more than `most` points.
    """
    free = dict(leaves(tree))
    if any(leaf.options is None or len(leaf.options) > most for leaf in free.values()):
        return None
    tables = enumerate_tables(tree, lambda _, leaf: leaf.options or ())
    points = [{name: values[name] for name in values if name in free} for _, values in islice(tables, most + 1)]
    return points if len(points) <= most else None


def leaves(tree: Tree) -> Iterator[tuple[str, Leaf]]:
    """The leaves that a search varies, by dotted name, in every option of every branch."""
    return ((name, leaf) for name, leaf in all_leaves(tree).items() if len(leaf.ends) > 1)


def all_leaves(tree: Tree) -> dict[str, Leaf]:
    """Every leaf by its dotted name, in every option of every branch."""
    leaves: dict[str, Leaf] = {}
    fill(tree, leaves.setdefault, every=True)
    return leaves


def without(tree: Tree, path: Sequence[str], value: Any) -> Tree | None:
    """The tree without one value of a leaf with options. Where none is left it lacks the option of the branch that has
    the leaf; None where there is no other option. path: the leaf's dotted key, split.
    """
    name, *below = path
    if below:
        inner = without(tree.options[name] if name in tree.options else cast(Tree, tree.nodes[name]), below, value)
        if name not in tree.options:
            return inner and replace(tree, nodes={**tree.nodes, name: inner})
        options = {tag: inner if tag == name else option for tag, option in tree.options.items()}
        left = {tag: option for tag, option in options.items() if option is not None}
        return replace(tree, nodes={**tree.nodes, "name": Choice(tuple(left))}, options=left) if left else None
    leaf = cast(Leaf, tree.nodes[name])
    rest = [each for each in leaf.options or () if each != value]
    if not rest:
        return None
    if isinstance(leaf, Range) and len(rest) > 1 and value in leaf.ends:
        return replace(tree, nodes={**tree.nodes, name: replace(leaf, low=rest[0], high=rest[-1])})
    return replace(tree, nodes={**tree.nodes, name: Choice(tuple(rest))})


def edge_cases(tree: Tree) -> Iterator[dict[str, Any]]:
    """The tables to check; if they are valid, every table of the space is.

    Each end of each leaf once, in every option of every branch, with the other leaves at their first end; and every
    combination of the discrete keys that must agree (`Table.agree`). Raises ConfigError for too many combinations.
    """
    leaves = all_leaves(tree)
    seen: set[str] = set()
    waiting: list[dict[str, Any]] = [{}]  # values that differ from the first end, by dotted name
    while waiting:
        values = waiting.pop()
        table, entered = next(_combinations(tree, (), values))
        yield table
        new = [name for name in entered if name not in seen]
        seen.update(new)
        waiting += [{**values, name: end} for name in new for end in leaves[name].ends[1:]]
        # Combine keys that must agree as soon as their table is entered.
        for group in tree.agree:
            if any(below(name, group) for name in new):
                yield from (table for table, _ in _combinations(tree, group, values))


def _combinations(tree: Tree, group: Sequence[str], values: Mapping[str, Any]) -> Tables:
    """Combines the keys of the group; other leaves have their value in `values`, else their first end."""

    def options(name: str, leaf: Leaf) -> Sequence[Any]:
        return (leaf.options or leaf.ends) if below(name, group) else (values.get(name, leaf.ends[0]),)

    for count, pair in enumerate(enumerate_tables(tree, options)):
        if count == MAX_POINTS:
            raise ConfigError(
                ", ".join(group), f"have more combinations to check than {MAX_POINTS}; give one of them fewer values"
            )
        yield pair


def _parse_free(item: FreeKey, values: Mapping[str, Any]) -> Tree:
    """A table of names that are not ours: each a leaf, or a list of leaves."""
    return Tree({name: _leaves(item.leaf(name), raw, many=True) for name, raw in values.items()}, {}, (), {})


def _leaves(item: LeafKey, raw: Any, *, many: bool) -> Leaf | tuple[Leaf, ...]:
    """A leaf, or where a list may stand the leaves of its entries."""
    if many and isinstance(raw, list | tuple):
        return tuple(_leaf(item, entry, i) for i, entry in enumerate(raw, 1))
    return _leaf(item, raw)


def _leaf(item: LeafKey, raw: Any, index: int | None = None) -> Leaf:
    """Reads a value, `{ choice = [...] }` or `{ low =, high =, log =, step = }`; checks each value against the key."""

    def error(problem: str) -> ConfigError:
        return ConfigError(item.name if index is None else f"{item.name}.{index}", f"= {show(raw)}: {problem}")

    if not isinstance(raw, Mapping):
        try:
            return Choice((item.check(raw),))
        except ConfigError as problem:
            raise ConfigError(problem.key, problem.problem + _meant(item, raw)) from None
    if item.fixed:
        raise error("takes a value here, not a range")
    leaf: Leaf
    if set(raw) == {"choice"}:
        leaf = Choice.read(item, raw, error)
    elif {"low", "high"} <= set(raw) <= {"low", "high", "log", "step"}:
        leaf = Range.read(item, raw, error)
    else:
        raise error(
            "must be a value, { choice = [...] } or { low = ..., high = ... } with log or step" + _meant(item, raw)
        )
    return leaf if leaf.ends[0] != leaf.ends[-1] else Choice(leaf.ends[:1])


def _meant(item: LeafKey, raw: Any) -> str:
    """What a wrong leaf probably means, as the end of a message: a range or choice in the words of others."""
    meant: dict[str, Any]
    if isinstance(raw, Mapping):
        words = {"min": "low", "max": "high", "from": "low", "to": "high", "values": "choice", "choices": "choice"}
        meant = {words.get(str(name), str(name)): value for name, value in raw.items()}
    elif isinstance(raw, str) and (ends := re.fullmatch(r"(-?[\d.e-]*\d)(?:\.\.+|:| to )(-?[\d.e-]+)", raw)):
        low, high = sorted(json.loads(end) for end in ends.groups())
        meant = {"low": low, "high": high} | ({"log": True} if float in item.types and 0 < 10 * low <= high else {})
    else:
        meant = {"choice": raw}
    with suppress(ConfigError, ValueError):
        if meant != raw:
            _leaf(item, meant)
            return f"; did you mean {show(meant)}?"
    return ""
