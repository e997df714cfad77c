"""Search spaces: one reader for sampling, grids, checks and replay."""

import itertools
import random
import time
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import optuna
import pytest
import tomli_w

from searchfm.config import Config
from searchfm.errors import ConfigError
from searchfm.search import space
from searchfm.tables import Table, branch, key, table

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Bare(Table, tag="bare"):
    """Nothing to set."""


class Stack(Table, tag="stack"):
    """Lists whose length is another key."""

    layers: int = key(1, "layers", ge=0, le=4)
    width: tuple[int, ...] = key(8, "a width a layer", ge=1, per="layers")
    kind: tuple[Literal["a", "b", "c"], ...] = key("a", "a kind a layer", per="layers")


class Pair(Table, tag="pair"):
    """Keys of which not all values fit."""

    agree = (("whole", "part"), ("odd",))
    whole: int = key(12, "what is divided", ge=1)
    part: int = key(2, "what divides", ge=1)
    odd: int = key(3, "an odd number", ge=1)

    def check(self) -> None:
        """Part divides whole."""
        if self.whole % self.part:
            raise ConfigError("part", f"= {self.part} must divide {self.whole}")
        if self.odd % 2 == 0:
            raise ConfigError("odd", f"= {self.odd}: must be odd")


class Pace(Table):
    """A branch beside a number that only some of its options allow."""

    agree = (("name", "rise"),)
    kind: Bare | Stack = branch(Bare, "which")
    rise: float = key(0.0, "only bare ones rise", ge=0)

    def check(self) -> None:
        """Stacks do not rise."""
        if self.rise and isinstance(self.kind, Stack):
            raise ConfigError("rise", "= not 0: must be 0 for a stack")


class Space(Table):
    """All of it."""

    kind: Bare | Stack | Pair = branch(Bare, "which")
    pace: Pace = table(Pace)
    rate: float = key(0.1, "a rate", gt=0)
    flag: bool = key(False, "whether")
    blocks: int | Literal["all"] = key(0, "blocks", ge=0)
    data: str = key("x", "for all of a study", fixed=True)


# --- spaces at random, and what they are by brute force ---------------------------------------------------------------


def some(rng: random.Random, values: list[Any]) -> Any:
    """One of the values, or a choice between several."""
    chosen = rng.sample(values, rng.randint(1, min(3, len(values))))
    return chosen[0] if len(chosen) == 1 and rng.random() < 0.7 else {"choice": chosen}


def whole(rng: random.Random, low: int, high: int) -> Any:
    a, b = sorted((rng.randint(low, high), rng.randint(low, high)))
    return rng.choice([a, {"low": a, "high": b}, some(rng, list(range(low, high + 1)))])


def per_layer(rng: random.Random, leaf: Any, layers: Any) -> Any:
    """One leaf for all layers, or one each."""
    most = max(values_of(layers))
    return leaf() if rng.random() < 0.5 or not most else [leaf() for _ in range(most + rng.randint(0, 1))]


def stack(rng: random.Random) -> dict[str, Any]:
    layers = whole(rng, 0, 2)
    return {
        "layers": layers,
        "width": per_layer(rng, lambda: some(rng, [4, 8, 16]), layers),
        "kind": per_layer(rng, lambda: some(rng, ["a", "b"]), layers),
    }


def space_at_random(rng: random.Random) -> dict[str, Any]:
    toml: dict[str, Any] = {
        "name": some(rng, ["bare", "stack", "pair"]),
        "pace": {"name": some(rng, ["bare", "stack"]), "rise": some(rng, [0.0, 1.0])},
        "rate": rng.choice([0.1, {"low": 0.1, "high": 0.3, "step": 0.1}, some(rng, [0.1, 0.25])]),
        "blocks": some(rng, [0, 2, "all"]),
    }
    if rng.random() < 0.7:
        toml["stack"] = stack(rng)
    if rng.random() < 0.7:
        toml["pair"] = {
            "whole": whole(rng, 1, 6),
            "part": whole(rng, 1, 3),
            "odd": rng.choice([1, 3, whole(rng, 1, 3)]),
        }
    return toml


def values_of(leaf: Any) -> list[Any]:
    """All values of a leaf, read from TOML alone."""
    if not isinstance(leaf, Mapping):
        return [leaf]
    if "choice" in leaf:
        return list(leaf["choice"])
    count = round((leaf["high"] - leaf["low"]) / leaf.get("step", 1)) + 1
    return [round(leaf["low"] + i * leaf.get("step", 1), 6) for i in range(count)]


def product(toml: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every table there is if each leaf takes each of its values, whether or not a trial reads it."""
    parts: list[list[Any]] = []
    for entry in toml.values():
        if isinstance(entry, list):
            parts.append([list(way) for way in itertools.product(*map(values_of, entry))])
        elif isinstance(entry, Mapping) and not {"low", "choice"} & set(entry):
            parts.append(list(product(entry)))
        else:
            parts.append(values_of(entry))
    for way in itertools.product(*parts):
        yield dict(zip(toml, way, strict=True))


def possible(values: Mapping[str, Any]) -> Space | None:
    try:
        return Space.from_table(values)
    except ConfigError:
        return None


SPACES = [space_at_random(random.Random(seed)) for seed in range(60)]
FITTING = [toml for toml in SPACES if all(map(possible, product(toml)))]


def test_the_spaces_at_random_are_of_both_kinds() -> None:
    assert 15 < len(FITTING) < 50


@pytest.mark.parametrize("toml", FITTING)
def test_the_points_of_a_space_equal_those_of_brute_force_each_once(toml: dict[str, Any]) -> None:
    tree = space.parse(Space, toml)
    points = space.points(tree)
    assert points is not None
    configs = [Space.from_table(space.sample(optuna.trial.FixedTrial(point), tree)) for point in points]
    assert len(set(configs)) == len(configs)
    assert set(configs) == set(map(possible, product(toml)))


@pytest.mark.parametrize("toml", SPACES)
def test_edge_cases_are_possible_exactly_if_all_of_the_space_is(toml: dict[str, Any]) -> None:
    cases = list(space.edge_cases(space.parse(Space, toml)))
    assert all(map(possible, cases)) == all(map(possible, product(toml)))


@pytest.mark.parametrize("toml", SPACES)
def test_a_space_is_written_as_toml_and_read_back_equal(toml: dict[str, Any]) -> None:
    tree = space.parse(Space, toml)
    assert space.parse(Space, space.to_toml(tree)) == tree
    assert space.parse(Space, tomllib.loads(tomli_w.dumps(space.to_toml(tree)))) == tree


@pytest.mark.parametrize("toml", FITTING[:20])
def test_a_trials_parameters_give_its_config_again(toml: dict[str, Any]) -> None:
    tree = space.parse(Space, toml)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(5):
        trial = study.ask()
        drawn = space.sample(trial, tree)
        assert space.sample(optuna.trial.FixedTrial(trial.params), tree) == drawn
        assert set(trial.params) <= {name for name, _ in space.leaves(tree)}
        assert Space.from_table(drawn) in set(map(possible, product(toml)))


# --- real spaces ------------------------------------------------------------------------------------------------------

REAL = """
[model]
name = { choice = ["mlp", "cnn"] }
[model.mlp]
layers = { low = 0, high = 3 }
width = { low = 16, high = 256, log = true }
dropout = { low = 0.0, high = 0.5 }
[model.cnn]
stages = { choice = [1, 2] }
filters = [16, { choice = [32, 64] }]
pool = [{ choice = ["max", "none"] }, "max"]
[optimizer]
name = { choice = ["sgd", "adamw"] }
lr = { low = 1e-4, high = 1e-1, log = true }
[optimizer.sgd]
momentum = { low = 0.0, high = 0.9, step = 0.3 }
[train]
batch_size = { low = 32, high = 128, step = 32 }
"""


def real(text: str = REAL) -> space.Tree:
    return space.parse(Config, tomllib.loads(text))


def test_only_entered_leaves_are_asked_for_by_dotted_name() -> None:
    tree = real()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(3))
    seen: set[str] = set()
    for _ in range(60):
        trial = study.ask()
        config = Config.from_table(space.sample(trial, tree))
        names = set(trial.params)
        seen |= names
        other = "cnn" if config.model.kind.tag == "mlp" else "mlp"
        assert not any(name.startswith(f"model.{other}.") for name in names)
        assert ("optimizer.sgd.momentum" in names) == (config.optimizer.kind.tag == "sgd")
        if config.model.kind.tag == "mlp":  # a list of no entries asks for none
            assert ("model.mlp.width" in names) == (trial.params["model.mlp.layers"] > 0)
        else:
            assert ("model.cnn.filters.2" in names) == (trial.params["model.cnn.stages"] == 2)
    assert seen == {name for name, _ in space.leaves(tree)} == {
        "model.name", "model.mlp.layers", "model.mlp.width", "model.mlp.dropout", "model.cnn.stages",
        "model.cnn.filters.2", "model.cnn.pool.1", "optimizer.name", "optimizer.lr", "optimizer.sgd.momentum",
        "train.batch_size",
    }  # fmt: skip


def test_stepped_numbers_come_without_rounding_noise() -> None:
    tree = real("[optimizer]\nname = 'sgd'\nsgd = { momentum = { low = 0.0, high = 0.9, step = 0.1 } }")
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    momenta = set()
    for _ in range(60):
        trial = study.ask()
        momenta.add(space.sample(trial, tree)["optimizer"]["sgd"]["momentum"])
        study.tell(trial, 0.0)
    assert momenta <= {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
    points = space.points(tree)
    assert points is not None
    assert [point["optimizer.sgd.momentum"] for point in points] == [i / 10 for i in range(10)]


def test_the_first_leaf_of_a_grid_varies_slowest_and_branches_have_points_of_their_own() -> None:
    text = REAL.replace("low = 0, high = 3", "low = 0, high = 1").replace(
        "low = 16, high = 256, log = true", "choice = [8, 9]"
    )
    text = text.replace("{ low = 0.0, high = 0.5 }", "0.1").replace("lr = { low = 1e-4, high = 1e-1, log = true }", "")
    points = space.points(real(text))
    assert points is not None
    mlp = 1 + 2  # no layer, one layer of either width
    cnn = 2 + 2 * 2  # one stage, two stages
    assert len(points) == (mlp + cnn) * (4 + 1) * 4
    assert points[0] == {
        "model.name": "mlp", "model.mlp.layers": 0, "optimizer.name": "sgd", "optimizer.sgd.momentum": 0.0,
        "train.batch_size": 32,
    }  # fmt: skip
    assert [point["train.batch_size"] for point in points[:5]] == [32, 64, 96, 128, 32]
    assert [point["model.name"] for point in points] == ["mlp"] * mlp * 20 + ["cnn"] * cnn * 20


def test_an_infinite_space_or_one_with_too_many_points_has_no_list_of_them() -> None:
    assert space.points(real()) is None
    infinite = "[optimizer]\nlr = { low = 0.1, high = 1 }\n[train]\nbatch_size = { low = 1, high = 1000000000000 }"
    began = time.monotonic()
    assert space.points(real(infinite)) is None
    assert space.points(real("train.batch_size = { low = 1, high = 1000000000000 }"), most=1000) is None
    assert space.points(real("optimizer.lr = { low = 1e-9, high = 1, step = 1e-9 }"), most=1000) is None
    assert time.monotonic() - began < 5
    points = space.points(real("train.batch_size = { low = 1, high = 1000 }"), most=1000)
    assert points is not None
    assert len(points) == 1000


def test_a_space_of_one_point_has_one() -> None:
    assert space.points(real("")) == [{}]
    assert space.points(real("optimizer.lr = { low = 0.1, high = 0.1 }\nmodel.name = { choice = ['mlp'] }")) == [{}]


# --- edge cases of real spaces ----------------------------------------------------------------------------------------


def broken(text: str) -> str:
    """The error of the first invalid edge case."""
    try:
        for values in space.edge_cases(real(text)):
            Config.from_table(values).fit_images((1, 28, 28))
    except ConfigError as error:
        return str(error)
    raise AssertionError("every edge case is possible")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model.name = 'vit'\nmodel.vit = { hidden_dim = { choice = [8, 12, 16] }, heads = { choice = [2, 3] } }",
            "model.vit.heads = 3 must divide hidden_dim = 8",
        ),
        ("model.name = { choice = ['mlp', 'vit'] }\nmodel.vit.patch_size = { choice = [4, 7, 5] }", "patch_size = 5"),
        ("model.name = 'cnn'\nmodel.cnn.kernel = { low = 1, high = 5 }", "model.cnn.kernel = 2: must be odd"),
        (
            "model.name = 'cnn'\nmodel.cnn = { stages = { low = 1, high = 6 } }",
            "pool halves images of 28x28 pixels 5 times",
        ),
        (
            "model.name = 'cnn'\nmodel.cnn.stages = 5\n"
            "model.cnn.pool = ['max', 'max', { choice = ['none', 'max'] }, 'max', 'max']",
            "pool halves images of 28x28 pixels 5 times",
        ),
        (
            "optimizer.name = { choice = ['adam', 'sgd'] }\n"
            "optimizer.sgd = { momentum = { low = 0.0, high = 0.9 }, nesterov = { choice = [false, true] } }",
            "optimizer.sgd.nesterov = true needs momentum > 0",
        ),
        (
            "schedule = { name = { choice = ['constant', 'one-cycle'] }, warmup = { choice = [0.0, 1.0] } }",
            "schedule.warmup = 1: must be 0",
        ),
        (
            "model.name = { choice = ['mlp', 'residual'] }\nmodel.residual.stages = { low = 1, high = 6 }",
            "model.residual.stages = 6: halves images",
        ),
    ],
)
def test_an_impossible_combination_is_refused_before_anything_starts(text: str, message: str) -> None:
    assert message in broken(text)


def test_both_ends_of_every_range_are_tried_in_every_branch() -> None:
    met: dict[str, set[Any]] = {}
    tree = real()
    for values in space.edge_cases(tree):
        flat = Config.from_table(values).to_table()
        met.setdefault("lr", set()).add(flat["optimizer"]["lr"])
        met.setdefault("optimizer", set()).add(flat["optimizer"]["name"])
        if flat["optimizer"]["name"] == "sgd":
            met.setdefault("momentum", set()).add(flat["optimizer"]["sgd"]["momentum"])
        if flat["model"]["name"] == "mlp":
            met.setdefault("dropout", set()).add(flat["model"]["mlp"]["dropout"])
            met.setdefault("widths", set()).add(tuple(flat["model"]["mlp"]["width"]))
    assert met["lr"] == {1e-4, 1e-1}
    assert met["optimizer"] == {"sgd", "adamw"}
    assert met["momentum"] == {0.0, 0.3, 0.6, 0.9}  # it must agree with nesterov, so all of it
    assert met["dropout"] == {0.0, 0.5}
    assert {(16,) * 3, (256,) * 3} <= met["widths"]


def test_too_many_combinations_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model.name = 'vit'\nmodel.vit = { hidden_dim = { low = 1, high = 100000 }, heads = { choice = [1, 2] } }"
    monkeypatch.setattr(space, "MAX_POINTS", 1000)
    with pytest.raises(ConfigError, match=r"model.vit.hidden_dim, model.vit.heads have more combinations .* 1000;"):
        list(space.edge_cases(real(text)))


# --- what cannot be ---------------------------------------------------------------------------------------------------

WRONG = [
    ("optimizer.lr = { low = 0.1, high = 0.01 }", "lr", "low must not be above high"),
    ("optimizer.lr = { low = 0, high = 0.01 }", "lr", "= 0.0: must be a number > 0"),
    ("optimizer.weight_decay = { low = 0, high = 0.01, log = true }", "weight_decay", "a log range must be above 0"),
    ("optimizer.lr = { low = 0.1, high = 1, log = 1 }", "lr", "log must be true or false"),
    ("optimizer.lr = { low = 0.1, high = 1, log = true, step = 0.1 }", "lr", "has log or step, not both"),
    ("optimizer.lr = { low = 0.1, high = 1, step = 0.4 }", "lr", "high must be a whole number of steps above low"),
    ("optimizer.lr = { low = 0.1, high = 1, step = -0.1 }", "lr", "step must be a number > 0"),
    ("optimizer.lr = { low = 0.1, high = 1, step = 'x' }", "lr", "step must be a number > 0"),
    ("optimizer.lr = { low = 0.1, high = 1, step = nan }", "lr", "step must be a number > 0"),
    ("optimizer.lr = { low = 0.1 }", "lr", "{ low = 0.1 }: must be a value, { choice = [...] } or { low = ..., high"),
    ("optimizer.lr = { low = 0.1, high = 1, steps = 3 }", "lr", "must be a value, { choice"),
    ("optimizer.lr = { low = 0.1, high = 'x' }", "lr", '= "x": must be a number > 0'),
    ("optimizer.lr = { low = 0.1, high = inf }", "lr", "= inf: must be a finite number"),
    ("optimizer.lr = { choice = [] }", "lr", "choice must be a list of at least one value"),
    ("optimizer.lr = { choice = 3 }", "lr", "choice must be a list of at least one value"),
    ("optimizer.lr = { choice = [0.1, 0.1] }", "lr", "names 0.1 twice"),
    ("optimizer.lr = { choice = [0.1, -1] }", "lr", "= -1.0: must be a number > 0"),
    ("optimizer.lr = { choice = [{ low = 0.1, high = 1 }] }", "lr", "a choice is between values, not ranges"),
    ("train.batch_size = { low = 1, high = 9, step = 0.5 }", "batch_size", "step must be a whole number > 0"),
    ("train.batch_size = { low = 1.5, high = 9 }", "batch_size", "= 1.5: must be a whole number >= 1"),
    ("train.seed = { low = 1, high = 9 }", "seed", "takes a value here, not a range"),
    ("data.subset = { choice = [0.1, 0.2] }", "subset", "takes a value here, not a range"),
    ("model.name = { low = 'cnn', high = 'mlp' }", "name", "only a number has a range; use { choice = [...] }"),
    ("model.name = { choice = ['cnn', 'cnm'] }", "name", '= "cnm": must be one of "mlp", "cnn", "vit"'),
    ("model.name = { choice = ['cnn', 'cnn'] }", "name", 'names "cnn" twice'),
    ("model.name = 3", "name", '= 3: must be one of "mlp", "cnn"'),
    ("model.cnn.filters = [8, { low = 9, high = 8 }]\nmodel.name = 'cnn'", "filters.2", "low must not be above high"),
    ("model.cnn.filters = [0, 8]\nmodel.name = 'cnn'", "filters", "= 0: must be a whole number >= 1"),
    ("model.cnn.kernels = 3", "kernels", "is unknown here; may be one of: stages, filters"),  # of no branch entered
    ("optimizer.lrr = 0.1", "lrr", "clip, sgd, adagrad, rmsprop, adam, adamw; did you mean lr?"),
    ("optimizer.name = 'sdg'", "name", '"adam", "adamw"; did you mean "sgd"?'),
    ("model.name = 'resnet18'", "name", 'is model.name = "transfer" with model.transfer.model = "resnet18"'),
    ("optimizer.lr = [0.1, 0.01]", "lr", "= [0.1, 0.01]: must be a number > 0; did you mean { choice = [0.1, 0.01] }?"),
    ("optimizer.lr = [0.1, -0.01]", "lr", "= [0.1, -0.01]: must be a number > 0"),
    ("optimizer.lr = '0.1..1e-3'", "lr", "did you mean { low = 0.001, high = 0.1, log = true }?"),
    ("train.batch_size = '8..64'", "batch_size", "did you mean { low = 8, high = 64 }?"),
    ("optimizer.lr = { min = 0.1, max = 1 }", "lr", "did you mean { low = 0.1, high = 1 }?"),
    ("optimizer.name = ['sgd', 'AdamW']", "name", 'did you mean { choice = ["sgd", "AdamW"] }?'),
    ("model = 3", "model", "= 3: must be a table"),
    ("model.cnn = 3", "cnn", "= 3: must be a table"),
    ("augment.flip = true", "flip", "= true: must be a number >= 0 and <= 1"),
]


@pytest.mark.parametrize(("text", "name", "problem"), WRONG)
def test_an_invalid_range_is_named_with_its_value_and_the_valid_ones(text: str, name: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        real(text)
    assert caught.value.key.endswith(name)
    assert problem in caught.value.problem
    assert "\n" not in str(caught.value)


def test_texts_of_a_choice_are_read_in_any_case() -> None:
    table = space.to_toml(
        real("optimizer.name = { choice = ['AdamW', 'SGD'] }\nmodel.name = 'CNN'\nmodel.cnn.pool = 'Max'")
    )
    assert table["optimizer"]["name"] == {"choice": ["adamw", "sgd"]}
    assert table["model"]["name"] == "cnn"
    assert table["model"]["cnn"]["pool"] == "max"
    assert 'names "cnn" twice' in broken("model.name = { choice = ['cnn', 'CNN'] }")


def test_lists_with_too_few_entries_for_the_longest_trial_are_refused_by_the_edge_cases() -> None:
    text = "model.name = 'cnn'\nmodel.cnn = { stages = { low = 1, high = 3 }, filters = [8, 8] }"
    assert "model.cnn.filters = [8, 8]: must have at least stages = 3 entries" in broken(text)


def test_every_table_of_a_config_can_be_a_space() -> None:
    tree = space.parse(Config, {})
    assert Config.from_table(space.sample(optuna.trial.FixedTrial({}), tree)) == Config()
    assert set(tree.nodes) == set(Config.schema)


def test_a_space_without_a_value_has_all_others() -> None:
    text = (
        "model.name = { choice = ['vit', 'mlp'] }\nmodel.vit.patch_size = { low = 2, high = 5 }\nmodel.mlp.layers = 2"
    )

    def left(*values: int) -> Any:
        tree: space.Tree | None = real(text)
        for value in values:
            assert tree is not None
            tree = space.without(tree, ["model", "vit", "patch_size"], value)
        assert tree is not None
        return space.to_toml(tree)["model"]

    assert left(5)["vit"]["patch_size"] == {"low": 2, "high": 4}
    assert left(3)["vit"]["patch_size"] == {"choice": [2, 4, 5]}
    assert left(2, 3, 4)["vit"]["patch_size"] == 5
    assert left(2, 3, 4, 5)["name"] == "mlp"
    assert "vit" not in left(2, 3, 4, 5)
    assert space.without(real("model.mlp.layers = 2"), ["model", "mlp", "layers"], 2) is None
