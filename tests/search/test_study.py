"""A checked study: samplers, pruners, and errors before a search starts."""

import tomllib
from functools import partial
from typing import Any

import optuna
import pytest
from optuna.trial import FixedTrial, TrialState

from searchfm.config import Config, SearchConfig
from searchfm.errors import ConfigError, StudyError
from searchfm.records import Prepared
from searchfm.search import files, space
from searchfm.search.study import Study, check_name
from searchfm.tables import BranchKey
from tests import toys
from tests.driving import TABLES, toy

optuna.logging.set_verbosity(optuna.logging.ERROR)

OPTIONS = {item.name: list(item.options) for item in SearchConfig.schema.values() if isinstance(item, BranchKey)}
SAMPLERS, PRUNERS = OPTIONS["sampler"], OPTIONS["pruner"]
GRIDDED = {  # 24 points, of a space with a branch
    "model": {"mlp": {"layers": {"low": 1, "high": 2}, "width": {"choice": [4, 8, 16]}}},
    "optimizer": {"name": {"choice": ["sgd", "adam"]}, "lr": 0.01, "sgd": {"momentum": {"choice": [0.0, 0.5, 0.9]}}},
}
OPEN = {**GRIDDED, "optimizer": {**GRIDDED["optimizer"], "lr": {"low": 1e-4, "high": 0.1, "log": True}}}


def tune(study: Study, trials: int) -> optuna.Study:
    """The whole search in one process, as the coordinator would drive it with one worker."""
    record = optuna.create_study(study_name=study.name, direction="maximize", pruner=study.pruner())
    for number in range(trials):
        record.sampler = study.sampler(number)
        trial = record.ask()
        config = study.sample(trial).to_table()
        for index in range(1, study.epochs + 1):
            trial.report(toys.curve(config, index), index)
            if study.judges(study.sample(FixedTrial(trial.params)), index) and trial.should_prune():
                record.tell(trial, state=TrialState.PRUNED)
                break
        else:
            record.tell(trial, toys.curve(config, study.epochs))
    return record


def search(sampler: str, pruner: str, **settings: Any) -> dict[str, Any]:
    quick = {"startup_trials": 5} if sampler in ("tpe", "cmaes") else {"startup_trials": 12} if sampler == "gp" else {}
    return {"sampler": {"name": sampler, **quick}, "pruner": {"name": pruner}, **settings}


# --- samplers and pruners ---------------------------------------------------------------------------------------------


# Samplers and pruners are independent, except for hyperband, which limits TPE to the trials of one bracket.
@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [*((name, "none") for name in SAMPLERS), *(("random", name) for name in PRUNERS), ("tpe", "hyperband")],
)
def test_every_sampler_and_every_pruner_search(sampler: str, pruner: str) -> None:
    study = toy(search=search(sampler, pruner), train={"epochs": 4}, **(GRIDDED if sampler == "grid" else OPEN))
    record = tune(study, 15)
    assert len(record.trials) == 15
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in record.trials)
    assert record.get_trials(states=(TrialState.COMPLETE,))
    if pruner == "none":
        assert len(record.get_trials(states=(TrialState.COMPLETE,))) == 15


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_proposals_depend_on_the_seed_and_the_number_alone(sampler: str) -> None:
    def proposals(seed: int) -> list[Any]:
        study = toy(search=search(sampler, "none", seed=seed), train={"epochs": 2}, **OPEN)
        return [trial.params for trial in tune(study, 13).trials]

    first = proposals(0)
    assert proposals(0) == first
    assert proposals(1) != first
    assert len({str(params) for params in first}) == 13  # no number repeats another's


def test_a_model_of_the_results_proposes_better_than_chance() -> None:
    def last(sampler: str) -> float:
        study = toy(search=search(sampler, "none"), train={"epochs": 1}, **OPEN)
        return sum(trial.value or 0.0 for trial in tune(study, 40).trials[-15:]) / 15

    assert last("tpe") > last("random") + 0.05


def test_tpe_models_all_parameters_of_a_branch_together() -> None:
    """Univariate, or multivariate without groups, it would model a branch's parameters one by one."""
    study = toy(search=search("tpe", "none"), **OPEN)
    record = tune(study, 20)
    record.ask()
    together = study.sampler(20).infer_relative_search_space(record, record.trials[-1])
    always = {"model.mlp.layers", "model.mlp.width", "optimizer.name", "optimizer.lr"}
    assert set(together) == always | {"optimizer.sgd.momentum"}


def test_tpe_takes_trials_that_other_workers_run_into_account() -> None:
    study = toy(search=search("tpe", "none"), **OPEN)

    def proposals(*, running: bool) -> list[dict[str, Any]]:
        record, params = tune(study, 20), []
        for number in range(20, 28):
            record.sampler = study.sampler(number)
            trial = record.ask()
            study.sample(trial)
            params.append(trial.params)
            if not running:
                record.tell(trial, state=TrialState.FAIL)  # counts for nothing
        return params

    alone, beside = proposals(running=False), proposals(running=True)
    assert alone[0] == beside[0], "the same results, the same proposal"
    assert alone != beside


@pytest.mark.parametrize("pruner", ["median", "percentile", "hyperband", "asha"])
@pytest.mark.parametrize("minimum", [1, 2, 3])
def test_every_trial_trains_its_minimum_of_epochs_and_pruned_ones_no_more(pruner: str, minimum: int) -> None:
    settings = {"name": pruner, "min_epochs": minimum}
    study = toy(search={"sampler": {"name": "random"}, "pruner": settings}, train={"epochs": 9}, **OPEN)
    record = tune(study, 30)
    pruned = [trial.last_step for trial in record.get_trials(states=(TrialState.PRUNED,))]
    assert min(pruned) == minimum


@pytest.mark.parametrize("pruner", ["hyperband", "asha"])
def test_no_rung_is_in_the_last_third_of_the_epochs(pruner: str) -> None:
    settings = {"name": pruner, "min_epochs": 2, "reduction": 3}
    record = tune(toy(search={"pruner": settings}, train={"epochs": 7}, **OPEN), 30)
    assert {trial.last_step for trial in record.trials} == {2, 7}, "6 would be the next"
    config = toy(search={"pruner": settings}, train={"epochs": 6}).example
    judged = [
        index for index in range(1, 7) if toy(search={"pruner": settings}, train={"epochs": 6}).judges(config, index)
    ]
    assert judged == [1, 2, 3, 4]
    assert toy(search={"pruner": "median"}, train={"epochs": 6}).judges(config, 5), (
        "this one stops a trial at any epoch"
    )


@pytest.mark.parametrize(("trials", "expected"), [(1, 4), (12, 4), (20, 5), (50, 10), (1000, 10)])
def test_start_up_trials_are_a_quarter_of_all_from_four_to_ten(trials: int, expected: int) -> None:
    study = toy(search={"trials": trials, "sampler": "tpe", "pruner": "median"}, **OPEN)
    assert study.sampler(0)._n_startup_trials == expected  # type: ignore[attr-defined]
    assert study.pruner()._n_startup_trials == expected  # type: ignore[attr-defined]
    named = toy(search={"trials": trials, "pruner": {"name": "median", "startup_trials": 0}})
    assert named.pruner()._n_startup_trials == 0  # type: ignore[attr-defined]


def counted(*counts: int) -> Prepared:
    return Prepared("f", (1, 8, 8), tuple(map(str, counts)), 100, sum(counts), counts)


def test_at_chance_means_that_the_bound_is_below_that_of_the_largest_class() -> None:
    study, even = toy(search={"pruner": "median"}, train={"epochs": 30}), counted(*[100] * 10)
    judged = partial(study.at_chance, study.example, 3, data=even)
    assert study.chance(even) == pytest.approx(0.12)
    assert judged(accuracy=0.096)  # whose exact bound is 0.1198
    assert not judged(accuracy=0.097)
    assert study.chance(counted(300, 100)) == pytest.approx(0.9)
    assert study.chance(counted(9, 10)) is None
    assert study.chance(counted()) is None


@pytest.mark.parametrize(
    ("epochs", "schedule", "first"),
    [
        (5, {}, 1),
        (10, {}, 1),
        (25, {}, 3),
        (10, {"warmup": 1.0}, 2),
        (10, {"warmup": 2.5}, 3),
        (10, {"name": "one-cycle"}, 4),
        (10, {"warmup": 9.0}, None),
    ],
)
def test_a_trial_is_not_at_chance_in_warm_up_nor_after_its_last_epoch(
    epochs: int, schedule: dict[str, Any], first: int | None
) -> None:
    study = toy(search={"pruner": "median"}, train={"epochs": epochs}, schedule=schedule)
    judged = [i for i in range(1, epochs + 1) if study.at_chance(study.example, i, 0.05, counted(*[100] * 10))]
    assert judged == ([] if first is None else list(range(first, epochs)))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *(("sampler", "tpe.startup_trials", 7), ("sampler", "tpe.candidates", 48)),
        *(("sampler", "cmaes.startup_trials", 7), ("sampler", "gp.startup_trials", 7)),
        *(("pruner", "median.startup_trials", 7), ("pruner", "median.min_epochs", 3)),
        *(("pruner", "percentile.keep", 40.0), ("pruner", "percentile.startup_trials", 7)),
        *(("pruner", "percentile.min_epochs", 3), ("pruner", "hyperband.min_epochs", 3)),
        *(("pruner", "hyperband.reduction", 2), ("pruner", "asha.min_epochs", 3), ("pruner", "asha.reduction", 2)),
        *(("pruner", "patient.patience", 7), ("pruner", "patient.min_delta", 0.25)),
    ],
)
def test_every_setting_of_a_sampler_or_pruner_reaches_optuna(kind: str, key: str, value: float) -> None:
    name, _, setting = key.partition(".")
    study = toy(search={kind: {"name": name, setting: value}}, train={"epochs": 9}, **OPEN)
    assert value in vars(study.sampler(0) if kind == "sampler" else study.pruner()).values()


def test_no_setting_of_a_sampler_or_pruner_is_untested() -> None:
    (mark,) = test_every_setting_of_a_sampler_or_pruner_reaches_optuna.pytestmark  # type: ignore[attr-defined]
    branches = {name: item for name, item in SearchConfig.schema.items() if isinstance(item, BranchKey)}
    settings = {
        (kind, f"{tag}.{key}")
        for kind, item in branches.items()
        for tag in item.options
        for key in item.options[tag].schema
    }
    assert {(kind, key) for kind, key, _ in mark.args[1]} == settings - {("pruner", "asha.promote")}, "that is ours"


def test_asha_continues_one_of_each_reduction() -> None:
    settings = {"name": "asha", "reduction": 3}
    record = tune(toy(search={"pruner": settings}, train={"epochs": 9}, **OPEN), 40)
    reached = [trial.last_step or 0 for trial in record.trials]
    assert sum(step >= 9 for step in reached) < sum(step >= 3 for step in reached) < len(reached) / 2


def test_the_patient_pruner_waits_while_a_trial_is_worse_than_its_best() -> None:
    study = toy(search={"pruner": {"name": "patient", "patience": 2}}, train={"epochs": 9})
    record = optuna.create_study(direction="maximize", pruner=study.pruner())
    trial = record.ask()
    values = [0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 0.2]
    decisions = []
    for index, value in enumerate(values, 1):
        trial.report(value, index)
        decisions.append(trial.should_prune())
    assert decisions.index(True) == 5  # two worse epochs are waited for, and the third decides


def test_a_grid_is_a_function_of_the_number() -> None:
    study = toy(search=search("grid", "none"), train={"epochs": 1}, **GRIDDED)
    record = tune(study, 24)
    assert [trial.params for trial in record.trials] == study.points
    for number in (23, 0, 11):
        later = optuna.create_study(sampler=study.sampler(number))
        for _ in range(number):
            later.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
        trial = later.ask()
        study.sample(trial)
        assert trial.params == record.trials[number].params


# --- what a study is --------------------------------------------------------------------------------------------------


def test_the_resolved_study_is_the_same_study() -> None:
    study = toy(**OPEN)
    again = Study(study.name, study.resolved)
    assert again.resolved == study.resolved
    assert toy(search={"seed": 1}, **OPEN).resolved != study.resolved
    assert set(study.resolved) == {"search", *Config.schema}
    assert study.resolved["train"]["batch_size"] == 128  # defaults and all


def test_a_trials_parameters_give_its_config_again() -> None:
    study = toy(**OPEN)
    for trial in tune(study, 10).trials:
        config = study.sample(FixedTrial(trial.params))
        assert study.sample(FixedTrial(trial.params)) == config
        assert config.train.seed is None
        flat = {"model.mlp.layers": config.model.kind.layers, "optimizer.name": config.optimizer.kind.tag}  # type: ignore[union-attr]
        assert flat.items() <= trial.params.items()


def test_the_replay_of_a_trial_is_a_study_of_its_config_alone() -> None:
    study = toy(name="x" * 64, **OPEN)
    config = {**study.sample(FixedTrial(tune(study, 1).trials[0].params)).to_table()}
    text = study.replay(1234, config)
    table = tomllib.loads(text)
    again = Study(table.pop("name"), table)
    assert check_name(again.name) == "x" * 58 + "-1234"
    assert (again.trials, len(space.points(again.tree, 1) or ())) == (1, 1)
    assert again.example.to_table() == config
    assert files.question(text) == f"does trial 1234 of {'x' * 64} give the same again?"


def test_seeds_differ_by_trial_and_by_study_and_fit_everywhere() -> None:
    studies = [toy(search={"seed": seed}) for seed in range(20)]
    seeds = {study.seed(number) for study in studies for number in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert toy().seed(7) == toy(name="other").seed(7)


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ({}, 20),
        ({"trials": 7}, 7),
        ({"sampler": "grid", "pruner": "none"}, 24),
        ({"sampler": "grid", "pruner": "none", "trials": 3}, 3),
    ],
)
def test_trials_are_those_named_else_a_grids_points_else_twenty(settings: dict[str, Any], trials: int) -> None:
    assert Study("x", {"search": settings, "data": {"name": "digits"}, **GRIDDED}).trials == trials


def test_epochs_are_the_most_a_trial_has() -> None:
    grid = {"sampler": {"name": "grid"}, "pruner": {"name": "none"}}
    assert toy(search=grid, **GRIDDED, train={"epochs": {"choice": [5, 2]}}).epochs == 5
    assert toy(search=grid, **GRIDDED, train={"epochs": {"low": 2, "high": 8, "step": 2}}).epochs == 8


def test_samples_are_all_points_or_as_many_as_asked_for() -> None:
    few = toy(**GRIDDED).samples(24)
    assert len({config.digest() for config in few}) == 24
    assert len(toy(**GRIDDED).samples(10)) == 10
    assert len({config.digest() for config in toy(**OPEN).samples(16)}) == 16


def test_pretrained_models_that_a_trial_may_ask_for_are_listed() -> None:
    assert toy().transfers() == []
    transfer = {"model": {"choice": ["resnet18", "resnet34"]}, "weights": {"choice": ["hub", "none"]}}
    study = toy(model={"name": {"choice": ["mlp", "transfer"]}, "transfer": transfer})
    assert sorted(study.transfers()) == [(m, w) for m in ("resnet18", "resnet34") for w in ("hub", "none")]


# --- what cannot be ---------------------------------------------------------------------------------------------------

GRID = "search = { sampler = 'grid', pruner = 'none' }\n"
WRONG = [
    ("train.epochs = { choice = [1, 2] }", "train.epochs takes a value here; only a grid with pruner = none"),
    ("search.sampler = 'grid'\ntrain.epochs = { choice = [1, 2] }", "train.epochs takes a value here; only a grid"),
    ("search.pruner = 'none'\ntrain.epochs = { low = 1, high = 2 }", "train.epochs takes a value here; only a grid"),
    (
        "search.pruner = { name = 'asha', promote = true }\ntrain.epochs = { low = 3, high = 9 }",
        "train.epochs takes a value here; only a grid with pruner = none",
    ),
    (
        "search = { sampler = 'grid', pruner = { name = 'asha', promote = true } }",
        "search.pruner.promote = true: with search.sampler = grid it must be false",
    ),
    (GRID + "optimizer.lr = { low = 0.1, high = 1 }", "optimizer.lr has no step: a grid needs values, choices or"),
    (GRID + "train.batch_size = { low = 1, high = 1000000 }", "search.sampler = grid: the space must have at most 100"),
    (
        "search.pruner = { name = 'asha', min_epochs = 4 }\ntrain.epochs = 3",
        "min_epochs = 4: must be <= train.epochs = 3",
    ),
    ("search.pruner = { name = 'none', min_epochs = 4 }", "search.pruner.min_epochs is unknown here; may be one of: n"),
    (
        "search.sampler = 'tpee'",
        'search.sampler.name = "tpee": must be one of "tpe", "random", "grid", "cmaes", "gp", ',
    ),
    ("search.trials = 0", "search.trials = 0: must be a whole number >= 1"),
    ("search.trials = { choice = [1, 2] }", "search.trials = { choice = [1, 2] }: must be a whole number >= 1"),
    (
        "search.tirals = 1",
        "search.tirals is unknown here; may be one of: trials, target, stop_after, seed, sampler, pruner, keep",
    ),
    ("train.lr = 0.1", "precision, seed; did you mean optimizer.lr?"),
    ("optimizer.learning_rate = 0.1", "adamw; did you mean optimizer.lr?"),
    ("n_trials = 10", "did you mean search.trials?"),
    ("search = 3", "search = 3: must be a table"),
    ("model = 3", "model = 3: must be a table"),
    (
        "modell = {}",
        "modell is unknown here; may be one of: name, search, first, data, model, optimizer, schedule, augment, t",
    ),
    ("data.name = { choice = ['digits', 'mnist'] }", "data.name = { choice = "),
    (
        "model.name = 'vit'\nmodel.vit.patch_size = 3",
        "model.vit.patch_size = 3 must divide the images' side of 8 pixels",
    ),
    (
        "model.name = 'cnn'\nmodel.cnn.stages = { low = 1, high = 4 }",
        "model.cnn.pool halves images of 8x8 pixels 4 times",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_study_that_cannot_be_is_refused_in_one_line_that_names_its_file(text: str, message: str) -> None:
    table = {"data": {"name": "digits"}, **tomllib.loads(text)}
    with pytest.raises(ConfigError) as caught:
        Study("x", table, where="x.toml")
    assert str(caught.value).startswith("x.toml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_of_a_folder_are_checked_once_their_size_is_read() -> None:
    model = {"name": {"choice": ["mlp", "vit"]}, "vit": {"patch_size": {"choice": [4, 7]}}}
    study = toy(data={"name": "some/folder"}, model=model)
    study.check_images((3, 28, 28))
    with pytest.raises(ConfigError, match=r"model.vit.patch_size = 7 must divide the images' side of 32 pixels"):
        study.check_images((3, 32, 32))


@pytest.mark.parametrize("name", ["a", "0", "vit", "a8-vit-layers", "x" * 64, "A.b_c-9"])
def test_names_that_a_folder_can_have(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../../x", "/etc/x", "a/b", "a\\b", "a b", "a\0b", "a\n", "<b>x</b>", "-x", "_x", ".x"),
        *("x" * 65, "x" * 600, "é", "a\N{RIGHT-TO-LEFT OVERRIDE}b", "con:", "a%2fb", "$(x)", "'; DROP TABLE x; --"),
    ],
)
def test_names_that_no_folder_should_have(name: str) -> None:
    with pytest.raises(StudyError) as caught:
        check_name(name)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert "must be letters, digits" in str(caught.value)


def test_the_tables_of_toys_are_a_study() -> None:
    assert Study("toy", TABLES).resolved == toy().resolved
