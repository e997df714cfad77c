"""Frozen dataclasses that read and write TOML tables. An error is one line that names the key.

A subclass of `Table` is a table of a study file. Its fields are keys: a leaf (`int`, `float`, `bool`, `str`, a
`Literal`, or a union of these, such as `int | Literal["all"]`), a list of leaves (`tuple[int, ...]`), another table, a
table of names that are not ours (`free`), or a branch. A branch is a union of tables: the key `name` chooses one, and
only the chosen table is read:

    [optimizer]                     class OptimizerConfig(Table):
    name = "sgd"                        lr: float = key(1e-3, "...")
    lr = 0.1                            kind: Sgd | Adam = branch(Adam)
    [optimizer.sgd]
    momentum = 0.9

An inline branch holds its settings beside the name: `sampler = { name = "tpe", startup_trials = 10 }`.
"""

import hashlib
import json
import math
import operator
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

from searchfm.errors import ConfigError, UnknownKeyError, one_of

T = TypeVar("T")
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def key(default: Any, doc: str, *, per: str | None = None, fixed: bool = False, **bounds: float) -> Any:
    """A leaf or list of leaves: its default, its meaning (with units), and its bounds (`ge`, `gt`, `le`, `lt`).

    `per` names an earlier integer key of the same table: the list has that many entries, a single leaf stands for all
    of them, and entries beyond it are ignored. `fixed` keys take a value in a search space, never a range.
    """
    assert bounds.keys() <= SIGNS.keys(), bounds

    def make(name: str, hint: Any) -> LeafKey:
        return LeafKey(name, doc, default, _parts(hint), typing.get_origin(hint) is tuple, per, bounds, fixed)

    return field(default=default, metadata={"key": make})


def table(cls: "type[Table]") -> Any:
    """A table within a table; absent keys have their defaults."""
    return field(default_factory=cls, metadata={"key": lambda name, _: TableKey(name, cls)})


def free(doc: str) -> Any:
    """A table whose keys are arguments of the user's code: numbers, truth values and texts, or lists of them."""
    return field(default_factory=dict, metadata={"key": lambda name, _: FreeKey(name, doc)})


def branch(default: "type[Table]", doc: str = "", *, inline: bool = False, hint: str = "") -> Any:
    """A union of tables, of which the key `name` (or, `inline`, the table's own `name`) chooses one.

    hint: ends the message about another name, which stands for `{}` in it.
    """

    def make(name: str, union: Any) -> BranchKey:
        options = {option.tag: option for option in _parts(union)}
        chooser = LeafKey("name", doc, default.tag, tuple(options), hint=hint)
        return BranchKey(name if inline else "name", name, chooser, options, inline)

    return field(default_factory=default, metadata={"key": make})


@dataclass(frozen=True)
class LeafKey:
    """A key with a value, or with a list of values (`many`)."""

    name: str
    doc: str
    default: Any
    types: tuple[Any, ...]  # int, float, bool, str, and the values of a Literal
    many: bool = False
    per: str | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    fixed: bool = False
    hint: str = ""  # see `branch`

    def check(self, value: Any) -> Any:
        """One value, converted to the key's type: 1 of a float is 1.0, "AdamW" of the texts is "adamw". Raises
        ConfigError with the value and the allowed values.
        """
        if type(value) is int and float in self.types and int not in self.types:
            value = float(value) if abs(value) < 2**1023 else math.inf
        if type(value) is float and float in self.types and not math.isfinite(value):
            raise ConfigError(self.name, f"= {value}: must be a finite number")
        if isinstance(value, str) and str not in self.types:
            value = value.lower() if value.lower() in self.texts else value
        if not self._allows(value):
            raise ConfigError(self.name, f"= {show(value)}: must be {self.expected(value)}")
        return value

    @property
    def texts(self) -> list[str]:
        """The values of a Literal."""
        return [item for item in self.types if isinstance(item, str)]

    def check_all(self, owner: "Table") -> Any:
        """The checked value of this key in a table; a list has as many entries as `per` says."""
        value = getattr(owner, self.name)
        if not self.many:
            return value if value is None and self.default is None else self.check(value)
        length = getattr(owner, self.per) if self.per else None
        if not isinstance(value, list | tuple):
            return (self.check(value),) * (1 if length is None else length)
        if length is not None and len(value) < length:
            raise ConfigError(self.name, f"= {show(list(value))}: must have at least {self.per} = {length} entries")
        return tuple(self.check(entry) for entry in value[:length])

    def _allows(self, value: Any) -> bool:
        if type(value) in self.types:  # not isinstance: bool is a subclass of int
            return all(getattr(operator, name)(value, bound) for name, bound in self.bounds.items())
        return value in self.types

    def expected(self, value: Any = None) -> str:
        """What the key takes, in words; value: what came instead, for a hint."""
        bounds = " and ".join(f"{SIGNS[name]} {bound:g}" for name, bound in self.bounds.items())
        kinds = [f"{NAMES[kind]} {bounds}".rstrip() for kind in self.types if kind in NAMES]
        texts = one_of(value if isinstance(value, str) else "", self.texts, show, self.hint)
        return " or ".join([*kinds, "one of " * (len(self.texts) > 1) + texts] if texts else kinds)


@dataclass(frozen=True)
class TableKey:
    """A key with a table."""

    name: str
    table: "type[Table]"


@dataclass(frozen=True)
class FreeKey:
    """A key with a table of names that are not ours."""

    name: str
    doc: str

    def leaf(self, name: str) -> LeafKey:
        """The key of one name. Raises ConfigError where that cannot be an argument of a function."""
        if not name.isidentifier():
            raise ConfigError(name, "must be the name of an argument: letters, digits and _")
        return LeafKey(name, "", None, (int, float, bool, str))

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The checked values by name; a list becomes a tuple. Raises ConfigError."""
        return {name: self._value(self.leaf(name), value) for name, value in values.items()}

    def _value(self, leaf: LeafKey, value: Any) -> Any:
        return tuple(map(leaf.check, value)) if isinstance(value, list | tuple) else leaf.check(value)


@dataclass(frozen=True)
class BranchKey:
    """A key that chooses one of several tables by its tag."""

    name: str  # in TOML: "name", or the field's name if inline
    field: str
    chooser: LeafKey  # of the tag
    options: "Mapping[str, type[Table]]"  # by tag
    inline: bool

    def read(self, values: Mapping[str, Any]) -> "Table":
        """The chosen table. Raises ConfigError."""
        tag = self.chooser.check(values.get("name", self.chooser.default))
        if self.inline:
            return self.options[tag].from_table({name: value for name, value in values.items() if name != "name"})
        return read_within(tag, self.options[tag].from_table, values.get(tag, {}))


Key = LeafKey | TableKey | FreeKey | BranchKey


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(key, table, branch))
class Table:
    """A table of a study file. Subclasses are frozen, keyword-only dataclasses with fields from `key`, `table` and
    `branch`. A branch chooses an option by its `tag`, an argument of the class statement.
    """

    tag: ClassVar[str]
    schema: ClassVar[Mapping[str, Key]] = {}  # by name in TOML, in the order of the fields
    agree: ClassVar[tuple[tuple[str, ...], ...]] = ()  # groups of discrete keys that `check` compares

    def __init_subclass__(cls, tag: str = "") -> None:
        cls.tag = tag
        dataclass(frozen=True, kw_only=True)(cls)
        hints = typing.get_type_hints(cls)
        keys = [item.metadata["key"](item.name, hints[item.name]) for item in fields(cast(Any, cls))]
        cls.schema = {item.name: item for item in keys}

    def __post_init__(self) -> None:
        for item in self.schema.values():
            if isinstance(item, LeafKey):
                object.__setattr__(self, item.name, item.check_all(self))  # the dataclass is frozen
            elif isinstance(item, FreeKey):
                object.__setattr__(self, item.name, read_within(item.name, item.read, getattr(self, item.name)))
        self.check()

    def check(self) -> None:
        """Checks beyond the bounds of each key. Keys that it compares are a group in `agree`. Raises ConfigError."""

    @classmethod
    def from_table(cls, values: Mapping[str, Any]) -> Self:
        """Reads a table without ranges. Raises ConfigError for unknown keys, wrong types and invalid values."""
        refuse_unknown(values, cls)
        arguments: dict[str, Any] = {}
        for name, item in cls.schema.items():
            match item:
                case LeafKey():
                    arguments |= {name: values[name]} if name in values else {}
                case TableKey(table=table):
                    arguments[name] = read_within(name, table.from_table, values.get(name, {}))
                case FreeKey():
                    arguments[name] = values.get(name, {})
                case BranchKey(inline=True):
                    inner = values.get(name, {})
                    arguments[name] = read_within(name, item.read, {"name": inner} if isinstance(inner, str) else inner)
                case BranchKey():
                    arguments[item.field] = item.read(values)
        return cls(**arguments)

    def to_table(self) -> dict[str, Any]:
        """The object as a table, without keys that are None; `from_table` reads it back to an equal object."""
        table: dict[str, Any] = {}
        for name, item in self.schema.items():
            value = getattr(self, item.field if isinstance(item, BranchKey) else name)
            match item:
                case LeafKey():
                    table |= {} if value is None else {name: list(value) if item.many else value}
                case TableKey():
                    table[name] = value.to_table()
                case FreeKey():
                    plain = {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in value.items()}
                    table |= {name: plain} if plain else {}
                case BranchKey(inline=True):
                    table[name] = {"name": value.tag, **value.to_table()}
                case BranchKey():
                    table |= {"name": value.tag} | ({value.tag: settings} if (settings := value.to_table()) else {})
        return table


def walk(cls: type[Table], prefix: str = "") -> Iterator[tuple[str, type[Table], LeafKey]]:
    """(dotted key, its table, the key) of every leaf, in every option of every branch. Two options of an inline branch
    may have the same dotted key.
    """
    for name, item in cls.schema.items():
        match item:
            case LeafKey():
                yield prefix + name, cls, item
            case TableKey(table=table):
                yield from walk(table, f"{prefix}{name}.")
            case FreeKey(doc=doc):
                yield f"{prefix}{name}.NAME", cls, replace(item.leaf("NAME"), doc=doc)
            case BranchKey(chooser=chooser, inline=inline):
                yield f"{prefix}{name}{'.name' * inline}", cls, chooser
                for tag, option in item.options.items():
                    yield from walk(option, f"{prefix}{name if inline else tag}.")


def flatten(
    table: Mapping[str, Any], prefix: str = "", *, entries: bool = False, ranges: bool = False
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables. entries: those of a list one by one, counted from 1, in place of the list;
    ranges: a range or choice is a value, not a table.
    """
    for name, value in table.items():
        if isinstance(value, Mapping) and not (ranges and {"choice", "low"} & set(value)):
            yield from flatten(value, f"{prefix}{name}.", entries=entries, ranges=ranges)
        elif entries and isinstance(value, list | tuple):
            yield from ((f"{prefix}{name}.{i}", entry) for i, entry in enumerate(value, 1))
        else:
            yield prefix + name, value


def below(dotted: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of the keys, or in a table or list that is."""
    return any(f"{dotted}.".startswith(f"{key}.") for key in keys)


def refuse_unknown(values: Mapping[str, Any], cls: type[Table]) -> None:
    """Raises ConfigError for the first unknown key, with the allowed keys."""
    allowed = list(cls.schema)
    for item in cls.schema.values():
        if isinstance(item, BranchKey) and not item.inline:
            allowed += [tag for tag, option in item.options.items() if option.schema]
    for name in values:
        if name not in allowed:
            raise UnknownKeyError(name, f"is unknown here; may be one of: {one_of(name, allowed) or 'nothing'}")


def read_within(name: str, read: Callable[[Mapping[str, Any]], T], values: Any) -> T:
    """Reads a table within another, `name` in front of the keys in its errors. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(name, f"= {show(values)}: must be a table")
    try:
        return read(values)
    except ConfigError as error:
        raise error.under(name) from None


def show(value: Any) -> str:
    """A value as TOML, for messages."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + " }"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Iterable):
        return "[" + ", ".join(show(entry) for entry in value) + "]"
    return str(value)


def digest(values: Mapping[str, Any]) -> str:
    """sha256 of a table, as 64 hexadecimal digits; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types and literal values in a union, a Literal or `tuple[X, ...]`, without None."""
    arguments = typing.get_args(hint)
    if not arguments:
        return () if hint in (type(None), ...) else (hint,)
    return tuple(part for argument in arguments for part in _parts(argument))
