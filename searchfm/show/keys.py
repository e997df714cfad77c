"""The keys of study files and engine files, as a table, as a page, and as a JSON Schema for editors.

Read from the dataclasses of `config.py` and `engines/`, which hold each key's meaning, bounds and default. No Optuna.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from searchfm.config import Config, SearchConfig
from searchfm.engines import EngineOptions
from searchfm.errors import UserError, one_of
from searchfm.tables import BranchKey, FreeKey, LeafKey, Table, TableKey, below, show

HEAD = """# Keys of a study file
Made by `searchfm keys --markdown > .github/KEYS.md` from `searchfm/config.py` and `searchfm/engines/__init__.py`.

A key takes a value, `{ choice = [...] }` or `{ low = ..., high = ... }` with `log = true` or `step = ...`; those with
"fixed" take a value alone. A list takes one of them, or one an entry. `--set TABLE.KEY=VALUE` overrides a key. The last
tables, `[engine]`, are those of a file for `--engine`. A study file may also have `name`, the name of its study; the
default is the file's.

Tables `[[first]]` are configurations that are tried before the sampler proposes, with the keys of this page as values:
`optimizer.lr = 0.01` below a line `[[first]]`. The first of them is the study's default. A key that is absent has the
default of this page if the search space holds that, else the first choice or the middle of the range.
"""
SIGNS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


@dataclass(frozen=True)
class Row:
    """A key."""

    key: str
    default: str  # as TOML; "" for none
    values: str  # what may stand there
    meaning: str
    fixed: bool  # takes no range


@dataclass(frozen=True)
class Section:
    """A table, or an option of a branch."""

    name: str  # dotted
    meaning: str
    rows: tuple[Row, ...]


def sections(table: str | None = None) -> list[Section]:
    """All tables; or one with those below it; or one key. Raises UserError."""
    roots: list[tuple[str, type[Table], bool]] = [("search", SearchConfig, True)]
    roots += [(name, item.table, False) for name, item in Config.schema.items() if isinstance(item, TableKey)]
    roots += [("engine", EngineOptions, True)]
    every = [section for root in roots for section in _sections(*root)]
    if table is None:
        return every
    name = table.strip("[]")
    chosen = [each for each in every if below(each.name, [name])]
    if not chosen:
        rows = [(each, row) for each in every for row in each.rows if f"{each.name}.{row.key}" == name]
        chosen = [Section(each.name, each.meaning, (row,)) for each, row in rows]
    if not chosen:
        names = list(dict.fromkeys(each.name for each in every))
        raise UserError(f"keys {table}: is no table; may be one of: {one_of(name, names)}")
    return chosen


def _sections(name: str, cls: type[Table], fixed: bool) -> Iterator[Section]:
    rows: list[Row] = []
    below: list[tuple[str, type[Table], bool]] = []
    for key, item in cls.schema.items():
        match item:
            case LeafKey():
                rows.append(_row(key, item, fixed))
            case FreeKey():
                rows.append(Row(f"{key}.NAME", "", item.leaf("NAME").expected(), item.doc, False))
            case TableKey():
                below.append((f"{name}.{key}", item.table, fixed))
            case BranchKey():
                rows.append(_row(key, item.chooser, fixed))
                tags = item.options.items()
                below += [(f"{name}.{key if item.inline else tag}", option, fixed) for tag, option in tags]
    title = f'with name = "{cls.tag}": ' if fixed and cls.tag else ""
    yield Section(name, title + _meaning(cls), tuple(rows))
    for each in below:
        yield from _sections(*each)


def _meaning(cls: type[Table]) -> str:
    """The docstring on one line, without the name of the table that begins it."""
    return re.sub(r"^`\[\w+\]`[:.] ?", "", " ".join((cls.__doc__ or "").split()))


def _row(name: str, key: LeafKey, fixed: bool) -> Row:
    values = key.expected().removeprefix("one of ")
    if key.many:
        values += f"; a list of {key.per} entries, or one for all" if key.per else "; a list of them"
    default = "" if key.default is None else show(key.default)
    return Row(name, default, values, key.doc, key.fixed or fixed)


def show_keys(console: Console, chosen: list[Section]) -> None:
    """Prints tables of keys."""
    for section in chosen:
        console.print(f"[bold]\\[{escape(section.name)}][/]  {escape(section.meaning)}", soft_wrap=False)
        grid = Grid(box=None, padding=(0, 2, 0, 2), show_header=False)
        for style in ("cyan", "green", ""):
            grid.add_column(style=style, overflow="fold")
        for row in section.rows:
            grid.add_row(escape(row.key), escape(row.default), escape(f"{row.meaning} ({row.values})"))
        if section.rows:
            console.print(grid)
        console.print()


def page() -> str:
    """The page of all keys, as Markdown."""
    lines = [HEAD]
    for section in sections():
        lines += [f"## [{section.name}]", section.meaning, ""]
        if section.rows:
            lines += ["| key | default | values | meaning |", "|---|---|---|---|"]
        for row in section.rows:
            values = row.values + (
                "; fixed" if row.fixed and section.name.partition(".")[0] not in ("search", "engine") else ""
            )
            cells = [f"`{row.key}`", f"`{row.default}`" if row.default else "", values, row.meaning]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines += [""] if section.rows else []
    return "\n".join(lines).rstrip() + "\n"


# --- a schema for editors ---------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """A JSON Schema of study files, by which an editor completes and checks them."""
    text = {"type": "string", "description": "name of the study; default: the file's"}
    search = _object(SearchConfig, ranges=False)
    config = _object(Config, ranges=True)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A study file of searchfm",
        **config,
        "properties": {"name": text, "search": search, **config["properties"], "first": _first()},
    }


def _first() -> dict[str, Any]:
    point = _object(Config, ranges=False)
    described = {**point, "description": "a configuration of the search space; absent keys have their defaults"}
    return {"type": "array", "description": "configurations to try before the sampler proposes", "items": described}


def _object(cls: type[Table], *, ranges: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, item in cls.schema.items():
        match item:
            case LeafKey():
                properties[name] = _leaf(item, ranges=ranges)
            case FreeKey():
                leaf = _leaf(item.leaf("NAME"), ranges=ranges)
                many = {"anyOf": [leaf, {"type": "array", "items": leaf}]}
                properties[name] = {"type": "object", "description": item.doc, "additionalProperties": many}
            case TableKey(table=table):
                properties[name] = _object(table, ranges=ranges)
            case BranchKey(inline=True):
                properties[name] = {"description": item.chooser.doc, "anyOf": [_value(item.chooser), *_inline(item)]}
            case BranchKey():
                properties[name] = _leaf(item.chooser, ranges=ranges)
                options = item.options.items()
                properties |= {tag: _object(option, ranges=ranges) for tag, option in options if option.schema}
    return {"type": "object", "description": _meaning(cls), "properties": properties, "additionalProperties": False}


def _inline(item: BranchKey) -> Iterator[dict[str, Any]]:
    for tag, option in item.options.items():
        kind = _object(option, ranges=False)
        yield {**kind, "properties": {"name": {"const": tag}, **kind["properties"]}, "required": ["name"]}


def _leaf(key: LeafKey, *, ranges: bool) -> dict[str, Any]:
    value = _value(key)
    forms = [value]
    if ranges and not key.fixed:
        choice = {"type": "array", "items": value, "minItems": 1}
        forms.append(_form({"choice": choice}, ["choice"]))
        if {int, float} & set(key.types):
            ends = {"low": value, "high": value, "log": {"type": "boolean"}, "step": {"type": "number"}}
            forms.append(_form(ends, ["low", "high"]))
    if key.many:
        forms.append({"type": "array", "items": forms[0] if len(forms) == 1 else {"anyOf": list(forms)}})
    default = {} if key.default is None else {"default": key.default}
    return {"description": key.doc, **default, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}


def _form(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def _value(key: LeafKey) -> dict[str, Any]:
    bounds = {SIGNS[name]: bound for name, bound in key.bounds.items()}
    forms: list[dict[str, Any]] = [
        {"type": TYPES[kind], **(bounds if kind in (int, float) else {})} for kind in key.types if kind in TYPES
    ]
    forms += [{"enum": key.texts}] if key.texts else []
    return forms[0] if len(forms) == 1 else {"anyOf": forms}
