"""Known configurations, which are tried before the sampler proposes: read from tables as points of a search space.

A trial whose number is below their count takes its parameters from here (`Study.sampler`), so that order, N and
adoption after a kill follow from the number. Optuna's `enqueue_trial` would make WAITING trials instead: they have
numbers before they run, and start by a second write, whose outcome may be unknown.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from searchfm.config import Config
from searchfm.errors import ConfigError, UnknownKeyError, near
from searchfm.records import DEFAULT, ORIGIN
from searchfm.search import space
from searchfm.tables import LeafKey, below, flatten, show, walk

# Of a trial's config.toml: what a study sets for all of its trials.
IGNORED = ("name", "search", "data", "train.epochs", "train.seed", "train.precision")


@dataclass(frozen=True)
class Known:
    """A point of the space, by dotted name of the leaves that vary."""

    params: Mapping[str, Any]
    origin: str

    def to_table(self) -> dict[str, Any]:
        """As it is stored with the study; `read` gives it back."""
        return {ORIGIN: self.origin, **self.params}


def tables(values: Any) -> list[Mapping[str, Any]]:
    """The tables of `[[first]]`. Raises ConfigError."""
    if not isinstance(values, list | tuple) or not all(isinstance(entry, Mapping) for entry in values):
        raise ConfigError("first", f"= {show(values)}: must be tables, each below a line [[first]]")
    return list(values)


def check_written(values: Any) -> None:
    """Checks the tables of a file as `tables` does; `from` is no key of theirs. Raises ConfigError."""
    for number, table in enumerate(tables(values), 1):
        if ORIGIN in table:
            raise UnknownKeyError(f"first.{number}.{ORIGIN}", "is unknown here")


def of_file(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tables of a file for --first: its `[[first]]`; or the file as one, such as a trial's config.toml, without the
    keys that the study sets for all trials. Raises ConfigError.
    """
    if "first" not in table:
        return [config(table)]
    check_written(table["first"])
    return tables(table["first"])


def config(table: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's config without the keys that a study sets for all of its trials."""
    return {name: value for name, value in flatten(table, entries=True, ranges=True) if not below(name, IGNORED)}


def read(tree: space.Tree, table: Mapping[str, Any], dropped: Collection[str] = ()) -> Known:
    """The point of a table, nested or by dotted names; `from` is its origin. A key that it lacks takes its
    default if the space holds that, else the first choice or the middle of the range.

    dropped: dotted keys whose values need not fit, such as those that the command line overrides: of these a value
    outside the space counts as absent. Raises ConfigError for another such value, for a key that is unknown, and for
    one in a table that this config does not enter.
    """
    given = {name: value for name, value in flatten(table, entries=True, ranges=True) if name != ORIGIN}
    dropped = [name.removesuffix(".name") for name in dropped]  # another branch, whose keys are others
    items = {name: item for name, _, item in walk(Config)}
    params: dict[str, Any] = {}
    used: set[str] = set()

    def ask(name: str, leaf: space.Leaf) -> Any:
        item = items.get(name) or items.get(_base(name))
        value = _find(given, name, used)
        if value is not None:
            value = _member(name, leaf, item, value, lenient=below(name, dropped))
        if value is None:
            value = leaf.default(None if item is None else item.default)
        if len(leaf.ends) > 1:
            params[name] = value
        return value

    space.fill(tree, ask)
    for name in given:
        if name not in used and not below(name, dropped) and _base(name) == name:  # lists may be longer than needed
            raise _unused(name, items)
    return Known(params, str(table.get(ORIGIN, DEFAULT)))


def _member(name: str, leaf: space.Leaf, item: LeafKey | None, value: Any, *, lenient: bool) -> Any:
    """The value as the leaf has it; None for one that does not fit and need not. Raises ConfigError."""
    if isinstance(value, Mapping):
        raise ConfigError(name, f"= {show(value)}: takes a value here, not a range")
    try:
        checked = value if item is None else item.check(value)
        return leaf.member(checked)
    except ConfigError as error:
        if lenient:
            return None
        raise ConfigError(name, error.problem) from None


def _find(given: Mapping[str, Any], name: str, used: set[str]) -> Any:
    """The value for a leaf: of its name; for an entry of a list, of the list as one value; for a list with one leaf, of
    entries that are all equal. None if it is absent. used: takes the names whose values were found.
    """
    if name in given or _base(name) in given:
        name = name if name in given else _base(name)
        used.add(name)
        return given[name]
    values = [value for each, value in given.items() if each != name and _base(each) == name]
    if not values:
        return None
    return values[0] if all(value == values[0] for value in values) else values


def _unused(name: str, items: Mapping[str, LeafKey]) -> ConfigError:
    if name in items:
        return ConfigError(name, "is in a table that this config does not enter, or takes no value here")
    meant = near(name, items)
    return UnknownKeyError(name, "is unknown here" + (f"; did you mean {meant}?" if meant else ""))


def _base(name: str) -> str:
    """The list of an entry; another name as it is."""
    base, _, index = name.rpartition(".")
    return base if index.isdigit() else name
