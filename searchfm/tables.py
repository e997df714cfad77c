"""Frozen dataclasses that read and write TOML tables, and say in one line what is wrong with one.

A class below `Table` is a table of a study file. Its fields are keys: a leaf (`int`, `float`, `bool`, `str`, or one of
these or a word, such as `int | Literal["all"]`), a list of leaves (`tuple[int, ...]`), another table, or a branch. A
branch is a union of tables: the key `name` chooses one, and only the chosen one's own table is read:

    [optimizer]                     class OptimizerConfig(Table):
    name = "sgd"                        lr: float = key(1e-3, "...")
    lr = 0.1                            kind: Sgd | Adam = branch(Adam)
    [optimizer.sgd]
    momentum = 0.9

An inline branch carries its settings beside the name: `sampler = { name = "tpe", startup_trials = 10 }`.
"""

import hashlib
import json
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, cast, dataclass_transform

from searchfm.errors import ConfigError

COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def key(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    per: str | None = None,
    fixed: bool = False,
) -> Any:
    """A leaf or list of leaves: its default, what it means (with units), and the bounds of its values.

    `per` names an earlier integer key of the same table: the list has that many entries, a single leaf stands for all
    of them, and entries beyond it are not looked at. `fixed` keys take a value, never a range.
    """
    bounds = {sign: bound for sign, bound in ((">=", ge), (">", gt), ("<=", le), ("<", lt)) if bound is not None}
    return field(default=default, metadata={"doc": doc, "bounds": bounds, "per": per, "fixed": fixed})


def table(cls: "type[Table]", doc: str = "") -> Any:
    """A table within a table, all defaults unless its keys are given."""
    return field(default_factory=cls, metadata={"doc": doc})


def branch(default: "type[Table]", doc: str = "", *, inline: bool = False, fixed: bool = False) -> Any:
    """A union of tables, of which the key `name` (or, `inline`, the table's own `name`) chooses one."""
    return field(default_factory=default, metadata={"doc": doc, "inline": inline, "fixed": fixed})


@dataclass(frozen=True)
class Key:
    """One field of a table, as its readers see it. Exactly one of `types`, `table` and `options` is not empty."""

    name: str
    doc: str
    default: Any
    types: tuple[Any, ...] = ()  # of a leaf: int, float, bool, str or a word (Literal)
    many: bool = False  # a list of such leaves
    per: str | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    fixed: bool = False
    table: "type[Table] | None" = None
    options: "Mapping[str, type[Table]]" = field(default_factory=dict)
    inline: bool = False

    def check(self, value: Any) -> Any:
        """The leaf's value as its own type. Raises ConfigError with what came and what may come."""
        for kind in self.types:
            if kind is float and type(value) is int:
                value = float(value) if abs(value) < 2**1023 else math.inf
            # bool is an int to Python, but never to a person.
            if (isinstance(kind, type) and type(value) is kind) or (not isinstance(kind, type) and value == kind):
                break
        else:
            raise ConfigError(self.name, f"= {show(value)}: must be {self._expected()}")
        if type(value) is float and not math.isfinite(value):
            raise ConfigError(self.name, f"= {value}: must be a finite number")
        if type(value) in (int, float):
            for sign, bound in self.bounds.items():
                if not COMPARE[sign](value, bound):
                    raise ConfigError(self.name, f"= {show(value)}: must be {self._expected()}")
        return value

    def _expected(self) -> str:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        words = [f'"{kind}"' for kind in self.types if not isinstance(kind, type)]
        plain = [names[kind] for kind in self.types if isinstance(kind, type)]
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in self.bounds.items())
        text = plain[0] + (f" {bounds}" if bounds else "") if plain else ""
        one_of = "one of " * (len(words) > 1) + ", ".join(words)
        return " or ".join([part for part in (text, one_of) if part])


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(key, table, branch))
class Table:
    """A table of a study file. Subclasses are frozen, keyword-only dataclasses whose fields are made by `key`,
    `table` and `branch`; `tag` is what chooses one in a branch.
    """

    tag: ClassVar[str] = ""
    _keys: ClassVar[Mapping[str, Key]]  # what `schema` has read, kept
    agree: ClassVar[tuple[tuple[str, ...], ...]] = ()  # groups of discrete keys of which not all values fit: see `fit`

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for item in schema(type(self)).values():
            if item.types:
                value = getattr(self, item.name)
                if item.many:
                    value = spread(item, value, getattr(self, item.per) if item.per else None)
                elif value is not None or item.default is not None:
                    value = item.check(value)
                object.__setattr__(self, item.name, value)  # frozen for everyone else
        self.fit()

    def fit(self) -> None:
        """Checks beyond the bounds of each key; raises ConfigError. What it compares is a group in `agree`."""

    @classmethod
    def from_table(cls, values: Mapping[str, Any]) -> Self:
        """Reads a table without ranges. Raises ConfigError for unknown keys, wrong types and impossible values."""
        known = schema(cls)
        refuse_unknown(values, known)
        ready: dict[str, Any] = {}
        for item in known.values():
            if item.options and not item.inline:
                chosen = values.get("name", item.default.tag)
                option = choose(item, chosen)
                ready["kind"] = _within(chosen, option, values.get(chosen, {}))
            elif item.name not in values:
                continue
            elif item.options:
                given = values[item.name]
                given = {"name": given} if isinstance(given, str) else expect_table(item.name, given)
                option = choose(item, given.get("name", item.default.tag), f"{item.name}.")
                ready[item.name] = _within(item.name, option, {k: v for k, v in given.items() if k != "name"})
            elif item.table is not None:
                ready[item.name] = _within(item.name, item.table, values[item.name])
            else:
                ready[item.name] = values[item.name]
        return cls(**ready)

    def to_table(self) -> dict[str, Any]:
        """The table that `from_table` reads back to an equal object; keys whose value is None are left out."""
        values: dict[str, Any] = {}
        for item in schema(type(self)).values():
            if item.options:
                kind = getattr(self, item.name if item.inline else "kind")
                settings = kind.to_table()
                if item.inline:
                    values[item.name] = {"name": kind.tag, **settings}
                else:
                    values |= {"name": kind.tag} | ({kind.tag: settings} if settings else {})
                continue
            value = getattr(self, item.name)
            if isinstance(value, Table):
                values[item.name] = value.to_table()
            elif value is not None:
                values[item.name] = list(value) if item.many else value
        return values


def schema(cls: type[Table]) -> Mapping[str, Key]:
    """The keys of a table, in the order of its fields; a branch that is not inline stands under `name`."""
    known: Mapping[str, Key] | None = cls.__dict__.get("_keys")
    if known is not None:
        return known
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(cls)
    for item in fields(cast(Any, cls)):
        hint, meta = hints[item.name], item.metadata
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
        if typing.get_origin(hint) is Literal:
            parts = (hint,)
        tables = [part for part in parts if isinstance(part, type) and issubclass(part, Table)]
        if "inline" in meta:
            name = item.name if meta["inline"] else "name"
            options = {part.tag: part for part in tables}
            default = item.default_factory
            keys[name] = Key(name, meta["doc"], default, options=options, inline=meta["inline"], fixed=meta["fixed"])
        elif tables:
            keys[item.name] = Key(item.name, meta["doc"], item.default_factory, table=tables[0])
        else:
            many = typing.get_origin(hint) is tuple
            if many:
                parts = (parts[0],)
            leaves = [
                leaf
                for part in parts
                if part is not types.NoneType
                for leaf in (typing.get_args(part) if typing.get_origin(part) is Literal else (part,))
            ]
            assert item.default is not MISSING, item.name
            keys[item.name] = Key(
                item.name,
                meta["doc"],
                item.default,
                types=tuple(leaves),
                many=many,
                per=meta["per"],
                bounds=meta["bounds"],
                fixed=meta["fixed"],
            )
    cls._keys = keys
    return keys


def choose(item: Key, chosen: Any, prefix: str = "") -> type[Table]:
    """The option of a branch by its name. Raises ConfigError naming the options."""
    word: str = chooser(item, prefix).check(chosen)
    return item.options[word]


def chooser(item: Key, prefix: str = "") -> Key:
    """The leaf that chooses an option of a branch."""
    return Key(f"{prefix}name", item.doc, None, types=tuple(item.options))


def spread(item: Key, value: Any, length: int | None) -> tuple[Any, ...]:
    """A list of leaves with `length` entries: a single leaf repeated, or the first of those given."""
    if not isinstance(value, list | tuple):
        return (item.check(value),) * (1 if length is None else max(length, 0))
    if length is not None and len(value) < length:
        raise ConfigError(item.name, f"= {show(list(value))}: must have at least {item.per} = {length} entries")
    return tuple(item.check(entry) for entry in value[:length])


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Key]) -> None:
    """Raises ConfigError for the first key that the table does not have, naming those it has."""
    allowed = list(known)
    for item in known.values():
        if item.options and not item.inline:
            allowed += [name for name, option in item.options.items() if schema(option)]
    for name in values:
        if name not in allowed:
            raise ConfigError(name, f"is unknown here; may be one of: {', '.join(allowed) or 'nothing'}")


def expect_table(name: str, value: Any) -> Mapping[str, Any]:
    """The value, if it is a table. Raises ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(name, f"= {show(value)}: must be a table")
    return value


def show(value: Any) -> str:
    """A value as TOML writes it, for messages."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Iterable):
        return "[" + ", ".join(show(entry) for entry in value) + "]"
    return str(value)


def digest(values: Mapping[str, Any]) -> str:
    """sha256, as 64 hexadecimal digits, of a table, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _within(name: str, cls: type[Table], values: Any) -> Table:
    try:
        return cls.from_table(expect_table(name, values))
    except ConfigError as error:
        # A table that is no table already names itself.
        raise error if not isinstance(values, Mapping) else error.under(name) from None
