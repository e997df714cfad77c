"""Finds and reads study files, applies overrides, and reopens a study that exists already."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from searchfm.config import DATASETS, DEPENDENT, FREE, DataConfig, unknown_data
from searchfm.errors import ConfigError, StudyError, UserError, near
from searchfm.home import Home, shipped, shipped_folder
from searchfm.inputs import DEPTH, parse_toml, read_text
from searchfm.records import StudyRecord
from searchfm.search import first
from searchfm.search.study import NAME, Study, check_name, resolve
from searchfm.tables import below, show

# Names of timm models that are taken for studies; timm itself takes seconds to import.
TIMM = re.compile(r"(resne|wide_res|densenet|efficientnet|mobilenet|regnet|convnext|vit_|deit|swin|beit|vgg)\w*\d")

INDEX = re.compile(r"[0-9]{1,6}")  # of an entry of a list; `isdigit` is true of what `int` refuses
AFRESH = "name another study with --name to begin afresh"  # end of a message
# Defaults of earlier versions, by key: a study that began with one keeps it where its file does not have the key.
FORMER = {"schedule.name": "constant"}  # before 0.4


@dataclass(frozen=True)
class StudyFile:
    """A study file: its `table` without the key `name`, and the name of its study."""

    path: Path
    name: str
    question: str
    table: Mapping[str, Any]
    text: str = ""

    def study(self, overrides: Mapping[str, Any] | None = None, name: str | None = None) -> Study:
        """The study of this file with overrides by dotted key. Its `notes` name tables that no trial enters. On other
        data than the file's, `data.subset` is 1 unless the overrides have it: a file's fraction suits its own data.
        Raises ConfigError, with the line.
        """
        overrides = overrides or {}
        table = apply_overrides(self.table, overrides)
        if "data.subset" not in overrides and _data_name(table) != _data_name(apply_overrides(self.table, {})):
            table = _with(table, ["data", "subset"], 1.0, "data.subset")
        try:
            # Of a built-in file, what the user did not give may be left out.
            given = overrides if shipped_folder() in self.path.parents else None
            chosen = check_name(name or self.name)
            first.check_written(table.get("first", ()))
            study = Study(
                chosen, table, question=self.question, where=self.path.name, given=given, overridden=overrides
            )
            check_data_name(study.data["name"], elsewhere=True)
        except ConfigError as error:
            raise self._located(error, overrides) from None
        _refuse_unused(study.resolved, overrides)
        if unused := list(_unused(self.table, study.resolved)):
            names = " and ".join(f"[{dotted}]" for dotted in unused)
            study.notes.append(f"{self.path.name}: no trial enters {names}")
        return study

    def _located(self, error: ConfigError, overrides: Mapping[str, Any]) -> ConfigError:
        """The error with its place: the command line, or a line of the file."""
        if below(error.key, overrides) or any(below(dotted, [error.key]) for dotted in overrides):
            where = "command line"
        else:
            line = _line(self.text, error.key)
            where = f"{self.path.name}:{line}" if line else self.path.name
        return ConfigError(error.key, error.problem, where)


def find(name: str) -> Path | None:
    """The path of a study file, by path if `name` ends in `.toml`, else by its name in
    `shipped_folder()`. None if missing."""
    if not name.endswith(".toml") and not all(NAME.fullmatch(part) for part in name.split("/")):
        return None
    path = Path(name) if name.endswith(".toml") else shipped_folder() / f"{name}.toml"
    return path if _exists(path) else None


def not_found(name: str, home: Home | None = None) -> StudyError:
    """The error for a name that is no study file and, where a home is given, no study of it."""
    built_in = shipped()
    if TIMM.match(name):
        hint = f"for a timm model: searchfm tune resnet --set model.transfer.model={name}"
    elif meant := near(name, [*(home.studies() if home else ()), *built_in]):
        hint = f"did you mean {meant}?"
    else:
        hint = f"built-in are {', '.join(each for each in built_in if '/' not in each)}"
    where = f", and no study of that name in {home.path}" if home else ""
    return StudyError(f"study {name!r}: no such study file{where}; {hint}")


def read(path: Path) -> StudyFile:
    """Reads a study file, without a check of its tables. Raises StudyError, with the line, for invalid TOML."""
    try:
        text = read_text(path)
        table = parse_toml(text)
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise StudyError(f"{path}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        span = re.search(r"=\s*([\d.e-]*\d)\s*(?:\.\.+|to)\s*([\d.e-]+)", text)
        hint = f"; did you mean {{ low = {span[1]}, high = {span[2]} }}?" if span else ""
        raise StudyError(f"{path}: is not TOML: {error}{hint}") from None
    except ValueError as error:
        raise StudyError(f"{path}: is not TOML that can be read: {error}") from None
    name = table.pop("name", path.stem)
    if not isinstance(name, str):
        raise ConfigError("name", f"= {show(name)}: must be a text", path.name)
    try:
        return StudyFile(path, check_name(name), question(text), table, text)
    except StudyError as error:
        raise StudyError(f"{path.name}: {error}") from None


def read_first(path: Path) -> list[Mapping[str, Any]]:
    """The configurations of a file for --first: see `first.of_file`. Raises StudyError, ConfigError."""
    try:
        return first.of_file(read(path).table)
    except ConfigError as error:
        raise error.at(path.name) from None


def question(text: str) -> str:
    """The text after `# Question:` in the header of a study file, on one line."""
    match = re.search(r"^# Question:\s*(.+(?:\n#  +\S.*)*)", text, re.MULTILINE)
    return re.sub(r"\s*\n#\s*", " ", match[1]).strip() if match else ""


def study_name(argument: str) -> str:
    """`reports/a8-vit-layers` is the study `a8-vit-layers`; `some/vit.toml` is the study that the file names."""
    path = find(argument) if argument.endswith(".toml") else None
    return read(path).name if path else argument.removesuffix(".toml").rpartition("/")[2]


def from_table(table: Mapping[str, Any], name: str | None = None) -> StudyFile:
    """A study file's table, from a program. Raises StudyError, ConfigError where it has no name and none is given."""
    rest = dict(table)
    name = rest.pop("name", None) if name is None else name
    if not isinstance(name, str):
        raise ConfigError("name", "is missing: a study that is a table needs one")
    return StudyFile(Path(f"study {name!r}"), check_name(name), "", rest)  # what errors show in place of a file


def overrides(options: Mapping[str, Any], more: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Overrides by dotted key, from options (None: absent) and `--set`: one text, several, or their values by key.
    Raises ConfigError, UserError for a repeat.
    """
    values = {key: value for key, value in options.items() if value is not None}
    texts = [more] if isinstance(more, str) else more
    pairs = texts.items() if isinstance(texts, Mapping) else [parse_override(text) for text in texts]
    for key, value in pairs:
        if key in values:
            raise UserError(f"--set {key}: is given twice")
        values[key] = value
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `KEY=VALUE` of the command line: a dotted key, and a TOML value or a bare word. Raises ConfigError."""
    dotted, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not dotted or not value:
        raise ConfigError(
            text, 'must be KEY=VALUE, such as optimizer.lr=0.01 or "optimizer.lr={low=0.001, high=0.1}"', "--set"
        )
    try:
        table = parse_toml(f"value = {value}")
    except ValueError as error:
        if value[0] in "[{\"'":
            raise ConfigError(dotted, f"= {value}: is not a TOML value: {error}", "--set") from None
        return dotted, value  # a word or a path
    if len(table) > 1:
        raise ConfigError(dotted, f"= {value}: is more than one value", "--set")
    return dotted, table["value"]


def changed(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, before, after) of every leaf that differs between two resolved studies; None for a missing leaf."""
    differences: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        # A range is a leaf; a table is not, and its keys are compared.
        if isinstance(old, Mapping) and isinstance(new, Mapping) and not {"low", "choice"} & (set(old) | set(new)):
            differences += changed(old, new, f"{prefix}{name}.")
        elif old != new:
            differences.append((prefix + name, old, new))
    return differences


def get(table: Mapping[str, Any], dotted: str) -> Any:
    """The leaf or table at a dotted key; None if it is missing."""
    node: Any = table
    for name in dotted.split("."):
        if isinstance(node, list | tuple) and INDEX.fullmatch(name):
            node = node[int(name) - 1] if 0 < int(name) <= len(node) else None
        else:
            node = node.get(name) if isinstance(node, Mapping) else None
    return node


def apply_overrides(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table with overrides by dotted key, and with absolute paths. Raises ConfigError."""
    for dotted, value in overrides.items():
        if dotted.count(".") >= DEPTH:
            raise ConfigError(dotted, f"has more than {DEPTH} parts", "--set")
        table = _with(table, dotted.split("."), value, dotted)
    for dotted in ("data.name", "model.transfer.weights"):
        value = get(table, dotted)
        names = DATASETS if dotted == "data.name" else ("hub", "none")
        if isinstance(value, str) and value not in names:
            if _exists(Path(value)):
                # Absolute, so that the study can be resumed from another folder.
                table = _with(table, dotted.split("."), str(Path(value).expanduser().absolute()), dotted)
            elif value.lower() in names:
                table = _with(table, dotted.split("."), value.lower(), dotted)
    return table


def check_data_name(name: str, *, elsewhere: bool = False) -> None:
    """Raises ConfigError unless a data set or a file has the name. elsewhere: absolute paths may be another node's."""
    if name not in DATASETS and not (elsewhere and Path(name).is_absolute()) and not _exists(Path(name)):
        raise ConfigError("data.name", unknown_data(name))


def _line(text: str, dotted: str) -> int:
    """The line of a study file that sets a dotted key, or else begins a table around it; 0 if there is none."""
    table, longest, found = "", 0, 0
    arrays: dict[str, int] = {}  # tables so far of [[NAME]]
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[+)\s*([\w.-]+)\s*\]", line):
            name, _, rest = header[2].partition(".")
            if header[1] == "[[":
                arrays[name] = arrays.get(name, 0) + 1
            table = written = ".".join(filter(None, (name, str(arrays.get(name, "")), rest)))
        elif pair := re.match(r"\s*([\w.-]+)\s*=", line):
            written = f"{table}.{pair[1]}".lstrip(".")
        else:
            continue
        if below(dotted, [written]) and len(written) > longest:
            longest, found = len(written), number
    return found


def _unused(table: Mapping[str, Any], resolved: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a file's outermost tables that no trial enters."""
    for name, value in table.items():
        inner = resolved.get(name)
        if isinstance(value, Mapping) and value and inner is None:
            yield prefix + name
        elif isinstance(value, Mapping) and isinstance(inner, Mapping):
            yield from _unused(value, inner, f"{prefix}{name}.")


def _data_name(table: Mapping[str, Any]) -> Any:
    name = get(table, "data.name")
    return DataConfig.from_table({}).name if name is None else name


def _with(table: Mapping[str, Any], path: list[str], value: Any, dotted: str) -> dict[str, Any]:
    """The table with one key set; list indices start at 1. Raises ConfigError."""
    name, rest = path[0], path[1:]
    if not rest:
        return {**table, name: value}
    inner = table.get(name, {})
    if isinstance(inner, str):
        inner = {"name": inner}  # sampler = "tpe"
    if isinstance(inner, list) and len(rest) == 1 and INDEX.fullmatch(rest[0]):
        index = int(rest[0])
        if not 1 <= index <= len(inner):
            raise ConfigError(dotted, f"has entries 1 to {len(inner)}", "--set")
        return {**table, name: [*inner[: index - 1], value, *inner[index:]]}
    if not isinstance(inner, Mapping):
        raise ConfigError(dotted, f"is below {name} = {show(inner)}, which is not a table", "--set")
    return {**table, name: _with(inner, rest, value, dotted)}


def with_former(file: StudyFile, stored: StudyRecord) -> StudyFile:
    """The file with those defaults of earlier versions that the study began with, of keys that the file lacks."""
    begun = _completed(stored.file)
    former = {key: old for key, old in FORMER.items() if get(begun, key) == old and get(file.table, key) is None}
    return replace(file, table=apply_overrides(file.table, former))


def reopen(file: StudyFile | None, stored: StudyRecord, overrides: Mapping[str, Any]) -> Study:
    """The stored study with new values of the keys that may change (`FREE`), from the file and the overrides.

    Raises ConfigError, with the key, if the file has changed in another key or an override differs in one.
    """
    where = file.path.name if file else ""
    search = dict(stored.resolved["search"])
    begun, tables = _completed(stored.file), stored.file.get("first")
    if file is not None:
        table = resolve(apply_overrides(file.table, {}), where)
        if table.pop("first", None) != tables and "first" in stored.resolved:  # a study begun without goes on without
            raise ConfigError("first", f"differs from what study {stored.name!r} was begun with; {AFRESH}", where)
        search |= _free_changes(stored.name, changed(begun, table), where)
    if overrides:
        # Names first: another sampler's name with the settings of this one cannot be resolved.
        names = [name for name in ("search.sampler.name", "search.pruner.name") if name in overrides]
        before = _completed(stored.resolved)
        _free_changes(stored.name, [(name, get(before, name), _lower(overrides[name])) for name in names])
        table = resolve(apply_overrides(before, overrides), "command line")
        _refuse_unused(table, overrides)
        pairs = [(dotted, get(before, dotted), get(table, dotted)) for dotted in overrides]
        search |= _free_changes(stored.name, pairs)
    return Study(stored.name, {**stored.resolved, "search": search}, question=stored.question, where=where)


def _completed(table: Mapping[str, Any]) -> dict[str, Any]:
    """A stored table without its known configurations, with the defaults of keys that came after its version."""
    return resolve({name: value for name, value in table.items() if name != "first"})


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _free_changes(study: str, differences: Iterable[tuple[str, Any, Any]], where: str = "") -> dict[str, Any]:
    """The new values of the keys that may change, from (dotted key, old, new). Raises ConfigError for other keys."""
    search: dict[str, Any] = {}
    for dotted, old, new in differences:
        if dotted in FREE:
            # Without a number of trials in the file, that of the study stays.
            search |= {} if new is None and dotted == "search.trials" else {dotted.removeprefix("search."): new}
        elif old != (new := _as_begun(dotted, old, new)):
            after, before = ("nothing" if value is None else show(value) for value in (new, old))
            raise ConfigError(
                dotted,
                f"= {after}: study {study!r} was begun with {before}; {AFRESH}",
                where,
            )
    return search


def _as_begun(dotted: str, old: Any, new: Any) -> Any:
    """The new value; where it lacks a key of `DEPENDENT`, with that of the study as it was begun."""
    if new is None and dotted in DEPENDENT:
        return old
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("name") == new.get("name"):
        return {**{name: old[name] for name in old if f"{dotted}.{name}" in DEPENDENT}, **new}
    return new


def _refuse_unused(resolved: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError for an override in a table that no trial enters. A file may have such a table."""
    for dotted in overrides:
        if get(resolved, dotted) is None and dotted != "first":  # which may be empty
            raise ConfigError(dotted, "is in a table that no trial of this study enters", "--set")


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # names too long, with a NUL, of an unknown user
        return False
