"""Tables read and write TOML; an error is one line."""

import dataclasses
import math
import tomllib
from typing import Any, Literal

import pytest
import tomli_w

from searchfm.errors import ConfigError
from searchfm.tables import BranchKey, LeafKey, Table, branch, digest, key, show, table


class Plain(Table, tag="plain"):
    """Nothing to set."""


class Fancy(Table, tag="fancy"):
    """Something to set."""

    depth: int = key(2, "how deep", ge=1, le=9)
    fraction: float = key(0.5, "a fraction", gt=0, lt=1)


class Part(Table):
    """A table within a table."""

    count: int = key(2, "entries", ge=0)
    sizes: tuple[int, ...] = key(8, "a size an entry", ge=1, per="count")
    free: tuple[Literal["a", "b"], ...] = key(("a",), "any number of entries")


class Whole(Table):
    """All there is."""

    kind: Plain | Fancy = branch(Plain, "which")
    part: Part = table(Part)
    method: Plain | Fancy = branch(Fancy, "how", inline=True)
    rate: float = key(1e-3, "a rate", gt=0)
    stages: int | Literal["all"] = key(0, "stages", ge=0)
    quick: bool = key(False, "whether")
    label: str = key("x", "a text")
    seed: int | None = key(None, "a seed", ge=0)


def read(text: str) -> Whole:
    return Whole.from_table(tomllib.loads(text))


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_an_empty_table_is_all_defaults() -> None:
    assert read("") == Whole()
    assert Whole().part.sizes == (8, 8)
    assert Whole().kind == Plain()
    assert Whole().method == Fancy(depth=2)
    assert Whole().seed is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        'name = "fancy"\nrate = 1\nstages = "all"\nquick = true\nlabel = "ü\\n\\""\nseed = 7',
        'name = "fancy"\n[fancy]\ndepth = 9\nfraction = 0.25',
        '[part]\ncount = 3\nsizes = [1, 2, 3]\nfree = ["b", "a", "b"]',
        "[part]\ncount = 0",
        'method = { name = "fancy", depth = 5 }',
        'method = "plain"',
        'method = { name = "plain" }',
    ],
)
def test_what_is_written_is_read_back_to_an_equal_object(text: str) -> None:
    once = read(text)
    assert Whole.from_table(once.to_table()) == once
    assert read(tomli_w.dumps(once.to_table())) == once


def test_only_the_chosen_table_of_a_branch_is_read() -> None:
    whole = read('name = "plain"\n[fancy]\ndepth = 3')
    assert whole.kind == Plain()
    assert "fancy" not in whole.to_table()


def test_one_leaf_stands_for_all_entries_and_a_list_is_cut_to_its_length() -> None:
    assert Part(count=3, sizes=5).sizes == (5, 5, 5)  # type: ignore[arg-type]
    assert Part(count=2, sizes=(1, 2, 3)).sizes == (1, 2)
    assert Part(count=2, sizes=(1, 2, -3)).sizes == (1, 2)  # further entries are not checked
    assert Part(count=0).sizes == ()


def test_whole_numbers_are_numbers_but_truth_is_not() -> None:
    rate = read("rate = 3").rate
    assert (rate, type(rate)) == (3.0, float)
    with pytest.raises(ConfigError):
        read("rate = true")
    with pytest.raises(ConfigError):
        read("stages = false")


def test_tables_cannot_be_changed_and_equal_ones_are_equal() -> None:
    whole = Whole()
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.rate = 2.0  # type: ignore[misc]
    assert whole == Whole()
    assert hash(whole) == hash(Whole())


def test_a_schema_has_every_key_with_its_default_and_bounds() -> None:
    assert list(Whole.schema) == ["name", "part", "method", "rate", "stages", "quick", "label", "seed"]
    rate, kind, method = (Whole.schema[name] for name in ("rate", "name", "method"))
    assert isinstance(rate, LeafKey)
    assert (rate.default, rate.bounds) == (1e-3, {"gt": 0})
    assert isinstance(kind, BranchKey)
    assert isinstance(method, BranchKey)
    assert list(kind.options) == list(method.options) == ["plain", "fancy"]
    assert (kind.chooser.default, method.chooser.default) == ("plain", "fancy")


# --- what cannot be ---------------------------------------------------------------------------------------------------

WRONG = [
    ("rats = 1", "rats", "is unknown here; may be one of: name, part, method, rate, stages, quick, label, seed, fancy"),
    ("plain = {}", "plain", "is unknown here; may be one of: name, part, "),  # it has nothing to set
    ('name = "fancy"\n[fancy]\nheight = 1', "fancy.height", "is unknown here; may be one of: depth, fraction"),
    ('name = "other"', "name", '= "other": must be one of "plain", "fancy"'),
    ("name = 3", "name", '= 3: must be one of "plain", "fancy"'),
    ('name = ["plain"]', "name", '= ["plain"]: must be one of "plain", "fancy"'),
    ('name = "fancy"\nfancy = 3', "fancy", "= 3: must be a table"),
    ('method = "other"', "method.name", '= "other": must be one of "plain", "fancy"'),
    ("method = { name = 3 }", "method.name", '= 3: must be one of "plain", "fancy"'),
    ("method = { depth = 0 }", "method.depth", "= 0: must be a whole number >= 1 and <= 9"),
    ('method = { name = "plain", depth = 1 }', "method.depth", "is unknown here; may be one of: nothing"),
    ("method = 3", "method", "= 3: must be a table"),
    ("part = 3", "part", "= 3: must be a table"),
    ("part = [1]", "part", "= [1]: must be a table"),
    ("rate = 0", "rate", "= 0.0: must be a number > 0"),
    ("rate = -1.5", "rate", "= -1.5: must be a number > 0"),
    ('rate = "fast"', "rate", '= "fast": must be a number > 0'),
    ("rate = nan", "rate", "= nan: must be a finite number"),
    ("rate = inf", "rate", "= inf: must be a finite number"),
    (f"rate = {10**400}", "rate", "= inf: must be a finite number"),
    ("rate = { low = 1 }", "rate", "= { low = 1 }: must be a number > 0"),
    ("rate = 2024-01-01", "rate", "= 2024-01-01: must be a number > 0"),
    ("stages = -1", "stages", '= -1: must be a whole number >= 0 or "all"'),
    ('stages = "none"', "stages", '= "none": must be a whole number >= 0 or "all"'),
    ("stages = 1.0", "stages", '= 1.0: must be a whole number >= 0 or "all"'),
    ("quick = 1", "quick", "= 1: must be true or false"),
    ("label = 1", "label", "= 1: must be a text"),
    ("seed = -1", "seed", "= -1: must be a whole number >= 0"),
    ("part.count = 3\npart.sizes = [1, 2]", "part.sizes", "= [1, 2]: must have at least count = 3 entries"),
    ("part.sizes = [1, 0]", "part.sizes", "= 0: must be a whole number >= 1"),
    ('part.free = ["a", "c"]', "part.free", '= "c": must be one of "a", "b"'),
    ("[fancy]\ndepth = 99\n[part]\ncoun = 1", "part.coun", "is unknown here; may be one of: count, sizes, free"),
]


@pytest.mark.parametrize(("text", "name", "problem"), WRONG)
def test_an_error_is_one_line_that_names_the_key_its_value_and_the_valid_ones(
    text: str, name: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    error = caught.value.at("study.toml")
    assert error.key == name
    assert error.problem.startswith(problem)
    assert str(error).startswith(f"study.toml: {name} {problem}")
    assert "\n" not in str(error)
    assert error.exit_code == 2


def test_bounds_hold_on_both_sides_of_each() -> None:
    for good in (math.nextafter(0, 1), 0.5, math.nextafter(1, 0)):
        assert Fancy(fraction=good).fraction == good
    for bad in (0.0, 1.0):
        with pytest.raises(ConfigError, match="must be a number > 0 and < 1"):
            Fancy(fraction=bad)
    assert [Fancy(depth=depth).depth for depth in (1, 9)] == [1, 9]
    for depth in (0, 10):
        with pytest.raises(ConfigError, match="must be a whole number >= 1 and <= 9"):
            Fancy(depth=depth)


def test_an_error_keeps_its_first_origin() -> None:
    error = ConfigError("heads", "= 3").under("vit").under("model").at("vit.toml").at("elsewhere")
    assert str(error) == "vit.toml: model.vit.heads = 3"
    assert str(ConfigError("heads", "= 3").under("")) == "heads = 3"


# --- digests and texts ------------------------------------------------------------------------------------------------


def test_a_digest_depends_on_values_and_not_on_their_order() -> None:
    assert digest({"a": 1, "b": {"c": [1, 2]}}) == digest({"b": {"c": [1, 2]}, "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({"a": 1}) != digest({"a": 1.0})
    assert len(digest({})) == 64


@pytest.mark.parametrize(
    "value",
    [True, 3, 1e-4, "a \"b\" \\ 'c' ü", [1, 2], {"low": 0.1, "high": 1.0, "log": True}, {"choice": ["a", 1]}],
)
def test_values_are_shown_as_toml_writes_them(value: Any) -> None:
    assert tomllib.loads(f"x = {show(value)}") == {"x": value}
