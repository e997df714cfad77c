"""Writes `.github/JSON.md` and `.github/json-schema.json` from `searchfm/show/schema.py`: python -m tests.json_page."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from searchfm.show.schema import COMMANDS, SCHEMA, json_schema

FOLDER = Path(__file__).parent.parent / ".github"
HEAD = f"""# What `--json` prints
Made by `python -m tests.json_page` from `searchfm/show/schema.py`; [json-schema.json](json-schema.json) is the same as
a JSON Schema. This is schema {SCHEMA}: an object alone, and each row of a list, begins with `"schema": {SCHEMA}`.

- Standard output has one JSON value and nothing else; progress, warnings and errors go to standard error. An error is
  the same line as without `--json`, with the same exit code.
- Within a schema a key keeps its name, its meaning and its unit. New keys may be added: ignore unknown ones.
- One name for one thing: `value` is what a study maximises, the validation accuracy of a trial after its last epoch; an
  `accuracy` is measured on the part that is named beside it. Both are fractions, 0 to 1. `flops` counts floating-point
  operations of one image's forward pass. Seconds are seconds.
- `searchfm status STUDY --csv` has the keys of [Trial](#trial) but `params`, then a column for each key of the search
  space. `searchfm predict --csv` has the columns `image`, `class` and `probability`, with `--top` also `class_2`,
  `probability_2` and so on, and `error`, which is empty for an image that can be read.
- `searchfm worker` and `searchfm status --watch` print no JSON.

"""


def page() -> str:
    """The page as Markdown."""
    schema = json_schema()
    lines = ["| command | prints |", "|---|---|"]
    lines += [f"| `searchfm {command}` | {_kind(kind)} |" for command, kind in schema["properties"].items()]
    return HEAD + "\n".join([*lines, "", *_objects(schema["$defs"])])


def _objects(kinds: Mapping[str, Any]) -> Iterator[str]:
    for name, kind in kinds.items():
        yield f"## {name}"
        yield kind["description"]
        yield ""
        yield from ("| key | type | meaning |", "|---|---|---|")
        for key, value in kind["properties"].items():
            may = "" if key in kind.get("required", ()) else "may be absent: "
            yield f"| `{key}` | {_kind(value)} | {may}{value['description']} |"
        yield ""


def _kind(kind: Mapping[str, Any]) -> str:
    """A type in words."""
    if "$ref" in kind:
        name = kind["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in kind:
        return " or ".join(map(_kind, kind["anyOf"]))
    if "enum" in kind:
        return ", ".join(f"`{json.dumps(value)}`" for value in kind["enum"])
    if kind.get("type") == "array":
        if "prefixItems" in kind:
            return f"list of {len(kind['prefixItems'])}: {_kind(kind['prefixItems'][0])}"
        return f"list of {_kind(kind['items'])}" if kind.get("items") else "list"
    if kind.get("type") == "object":
        more = kind.get("additionalProperties")
        return f"object of {_kind(more)}" if isinstance(more, dict) and more else "object"
    return str(kind.get("type", "any"))


def files() -> dict[Path, str]:
    """Both files, by path."""
    schema = json.dumps(json_schema(), indent=1) + "\n"
    return {FOLDER / "JSON.md": page(), FOLDER / "json-schema.json": schema}


@functools.cache
def _strict() -> dict[str, Any]:
    """The schema without room for keys that it does not name."""
    schema = json_schema()
    for kind in schema["$defs"].values():
        kind["additionalProperties"] = False
    return schema


def check(arguments: Sequence[str], output: str) -> None:
    """Checks the output of a command with `--json`, which may have no undocumented key. Raises ValidationError."""
    command, named = arguments[0], len(arguments) > 1 and not arguments[1].startswith("-")
    if "--dry-run" in arguments:
        command += " --dry-run"
    elif named and f"{command} NAME" in COMMANDS:
        command += " NAME"
    schema = _strict()
    kind = {"$defs": schema["$defs"], **schema["properties"][command]}
    jsonschema.Draft202012Validator(kind).validate(json.loads(output))


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, "utf-8")
