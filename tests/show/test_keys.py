"""The keys of study files: all of them, with a schema that takes every study that ships and no mistyped one."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from searchfm.config import Config, SearchConfig
from searchfm.engines import EngineOptions
from searchfm.errors import UserError
from searchfm.home import shipped, shipped_folder
from searchfm.show import keys
from searchfm.tables import walk
from tests.commands import searchfm_here

ROOT = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft7Validator(keys.json_schema())


def test_every_key_is_listed_with_its_meaning() -> None:
    listed = [f"{section.name}.{row.key}" for section in keys.sections() for row in section.rows]
    roots = (*walk(SearchConfig, "search."), *walk(Config), *walk(EngineOptions, "engine."))
    expected = [dotted for dotted, _, _ in roots]
    for branch in ("sampler", "pruner"):  # in a list of keys, an inline branch is the key itself
        expected[expected.index(f"search.{branch}.name")] = f"search.{branch}"
    assert sorted(listed) == sorted(expected)
    assert all(row.meaning and row.values for section in keys.sections() for row in section.rows)


def test_a_table_or_a_key_can_be_chosen() -> None:
    assert keys.sections("[schedule]")[0].name == "schedule"
    assert len(keys.sections("search.pruner")) > 3
    ((row,),) = [section.rows for section in keys.sections("optimizer.lr")]
    assert (row.default, row.values) == ("0.001", "a number > 0")
    with pytest.raises(UserError, match=r"did you mean optimizer\?"):
        keys.sections("optimiser")


def test_the_page_is_current() -> None:
    """`searchfm keys --markdown > .github/KEYS.md` makes it."""
    done = searchfm_here("keys", "--markdown")
    assert done.stdout == (ROOT / ".github" / "KEYS.md").read_text("utf-8")


def test_keys_are_printed_as_a_table_as_json_and_as_a_schema() -> None:
    assert "maximum learning rate (a number > 0)" in searchfm_here("keys", "optimizer").stdout
    (row,) = json.loads(searchfm_here("keys", "train.epochs", "--json").stdout)
    assert (row["table"], row["key"], row["default"], row["fixed"]) == ("train", "epochs", "10", False)
    assert json.loads(searchfm_here("keys", "--schema").stdout) == keys.json_schema()
    assert searchfm_here("keys", "optimizer", "--schema").returncode == 2


@pytest.mark.parametrize("name", shipped())
def test_the_schema_takes_a_study_that_ships(name: str) -> None:
    VALIDATOR.validate(tomllib.loads((shipped_folder() / f"{name}.toml").read_text("utf-8")))


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("name = 'x'\nsearch = { sampler = 'grid', pruner = { name = 'asha', reduction = 3 } }", True),
        ("model = { name = 'custom', custom = { factory = 'a:b', params = { width = { low = 1, high = 3 } } } }", True),
        ("optimizer.lr = { low = 0.1, high = 1, log = true }", True),
        ("model.cnn.filters = [{ choice = [8, 16] }, 3]", True),
        ("model.transfer.tuned_blocks = { choice = [0, 'all'] }", True),
        ("optimizer.lrr = 0.1", False),
        ("optimizer.lr = -1", False),
        ("optimizer.lr = [0.1, 0.2]", False),
        ("optimizer.lr = { low = 0.1 }", False),
        ("optimizer.name = 'sdg'", False),
        ("data.seed = { choice = [1, 2] }", False),
        ("search.sampler = { name = 'random', startup_trials = 3 }", False),
        ("search.trials = { choice = [1, 2] }", False),
        ("train.batch_size = 0.5", False),
        ("modell = {}", False),
    ],
)
def test_the_schema_refuses_what_a_study_refuses(text: str, valid: bool) -> None:
    assert VALIDATOR.is_valid(tomllib.loads(text)) is valid


def test_the_schema_is_one() -> None:
    schema: dict[str, Any] = keys.json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["properties"]["optimizer"]["properties"]["lr"]["default"] == 1e-3
    assert "maximum learning rate" in schema["properties"]["optimizer"]["properties"]["lr"]["description"]
