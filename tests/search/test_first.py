"""Known configurations: how tables become points of a search space, and what studies keep of them."""

import re
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FixedTrial

from searchfm.config import Config
from searchfm.errors import ConfigError, StudyError
from searchfm.records import StudyRecord
from searchfm.search import files
from searchfm.search.study import Study
from searchfm.tuning import add_best, add_file
from tests import rows

TEXT = """\
[search]
trials = 12
[data]
name = "digits"
[model.mlp]
layers = { low = 1, high = 3 }
width = [16, { choice = [32, 64] }, 8]
[optimizer]
name = { choice = ["sgd", "adamw"] }
lr = { low = 1e-4, high = 0.1, log = true }
weight_decay = { low = 0.25, high = 0.75, step = 0.25 }
[optimizer.sgd]
momentum = { low = 0.5, high = 0.7 }
"""
FIRST = """
[[first]]
optimizer.name = "sgd"

[[first]]
[first.optimizer]
lr = 0.01
[first.model.mlp]
layers = 2
width = [16, 64]
"""


def study(tmp_path: Path, first: str = FIRST, overrides: dict[str, Any] | None = None, text: str = TEXT) -> Study:
    path = tmp_path / "deep.toml"
    path.write_text(text + first)
    return files.read(path).study(overrides)


def begun(study: Study, tmp_path: Path) -> StudyRecord:
    header = rows.header(study.resolved, planned=study.trials)
    plain = files.read(tmp_path / "deep.toml").study().resolved
    return StudyRecord(**vars(header) | {"file": plain}, name=study.name, number=1, folder=Path("x"), trials=())


def config_of(study: Study, number: int) -> Config:
    return study.sample(FixedTrial(dict(study.known[number].params)))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_an_absent_key_has_its_default_else_the_first_choice_or_the_middle(tmp_path: Path) -> None:
    first, second = study(tmp_path).known
    assert first.params == {
        "model.mlp.layers": 2,  # the default, which the space holds
        "model.mlp.width.2": 32,  # the first choice
        "optimizer.name": "sgd",
        "optimizer.lr": 0.001,
        "optimizer.sgd.momentum": 0.6,  # the middle
        "optimizer.weight_decay": 0.5,
    }
    assert second.params["optimizer.lr"] == 0.01
    assert second.params["model.mlp.width.2"] == 64
    assert study(tmp_path, "[[first]]\noptimizer.lr = 1e-4").known[0].params["optimizer.name"] == "adamw"
    wide = TEXT.replace("low = 1e-4", "low = 1e-2").replace("high = 0.1", "high = 1")
    assert study(tmp_path, "[[first]]", text=wide).known[0].params["optimizer.lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("optimizer.lr = 1.0", "deep.toml:17: first.2.optimizer.lr = 1.0: must be from 0.0001 to 0.1"),
        ("optimizer.lr = true", "deep.toml:17: first.2.optimizer.lr = true: must be a number"),
        ("optimizer.lr = { low = 0.01, high = 0.02 }", "takes a value here, not a range"),
        ("optimizer.weight_decay = 0.3", "must be from 0.25 to 0.75 in steps of 0.25"),
        ('optimizer.name = "adam"', 'must be one of "sgd", "adamw"'),
        ("model.mlp.width = [16, 48]", "first.2.model.mlp.width.2 = 48: must be one of 32, 64"),
        ("optimizer.lrr = 1.0", "first.2.optimizer.lrr is unknown here; did you mean optimizer.lr?"),
        ("model.cnn.stages = 2", "first.2.model.cnn.stages is in a table that this config does not enter"),
        ('from = "paper"', "first.2.from is unknown here"),
    ],
)
def test_a_table_outside_the_space_is_refused_with_its_line_and_what_may_come(
    tmp_path: Path, key: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        study(tmp_path, f"\n[[first]]\n\n[[first]]\n{key}\n".replace("\n\n", "\n"))


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be tables, each below a line"):
        files.from_table({"name": "x", "first": 3}).study()


def test_the_command_line_wins_over_a_table(tmp_path: Path) -> None:
    fixed = study(tmp_path, overrides={"optimizer.lr": 0.02, "model.mlp.layers": 3})
    assert [set(known.params) & {"optimizer.lr", "model.mlp.layers"} for known in fixed.known] == [set(), set()]
    narrow = study(tmp_path, overrides={"optimizer.lr": {"low": 0.005, "high": 0.02}})
    assert narrow.known[1].params["optimizer.lr"] == 0.01, "a value that fits stays"
    other = study(tmp_path, overrides={"model.name": "cnn"})
    assert len(other.known) == 2
    assert study(tmp_path, overrides={"first": []}).known == []
    alike = (
        '\n[[first]]\noptimizer = { name = "sgd", lr = 0.01 }\n[[first]]\noptimizer = { name = "adamw", lr = 0.01 }\n'
    )
    assert len(study(tmp_path, alike).known) == 2
    assert len(study(tmp_path, alike, {"optimizer.name": "sgd"}).known) == 1, "they differ in what is overridden"


def test_a_choice_that_does_not_fit_the_images_is_dropped_from_a_built_in_study_and_its_tables() -> None:
    path = files.shipped_folder() / "x.toml"
    table = {"data": {"name": "digits"}, "model": {"name": "vit", "vit": {"patch_size": {"choice": [4, 7]}}}}
    made = files.StudyFile(path, "x", "", {**table, "first": [{"model": {"vit": {"patch_size": 7}}}]}).study()
    assert made.known[0].params == {}
    assert made.example.model.kind.to_table()["patch_size"] == 4


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_stored_study_gives_the_same_configurations(tmp_path: Path) -> None:
    made = study(tmp_path)
    stored = begun(made, tmp_path)
    for again in (files.reopen(files.read(tmp_path / "deep.toml"), stored, {}), files.reopen(None, stored, {})):
        assert (again.known, again.default, again.resolved) == (made.known, True, made.resolved)
    assert files.reopen(None, stored, {"search.trials": 30}).known == made.known
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.5: study 'deep' was begun with"):
        files.reopen(None, stored, {"optimizer.lr": 0.5})


def test_other_tables_are_refused_and_a_study_begun_without_any_goes_on_without(tmp_path: Path) -> None:
    stored = begun(study(tmp_path), tmp_path)
    path = tmp_path / "deep.toml"
    for text in (TEXT, TEXT + FIRST.replace("0.01", "0.02")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"first differs from what study 'deep' was begun with"):
            files.reopen(files.read(path), stored, {})
    without = begun(study(tmp_path, ""), tmp_path)
    path.write_text(TEXT + FIRST)
    assert files.reopen(files.read(path), without, {}).known == []


# --- a file, and an older study ---------------------------------------------------------------------------------------


def test_a_file_adds_its_tables_or_a_trials_config(tmp_path: Path) -> None:
    made = study(tmp_path)
    config = config_of(made, 0).to_table()
    own = tmp_path / "config.toml"
    own.write_text(made.replay(7, {**config, "optimizer": {**config["optimizer"], "lr": 0.03}}))
    add_file(made, own, begun=False)
    assert [known.origin for known in made.known] == ["study file", "study file", "file config.toml"]
    assert made.known[2].params == {**made.known[0].params, "optimizer.lr": 0.03}
    add_file(made, own, begun=True)
    assert len(made.known) == 3, "an equal one is not tried again"
    own.write_text("[[first]]\noptimizer.lr = 0.04\n[[first]]\noptimizer.lr = 0.05")
    with pytest.raises(StudyError, match=r"^--first config.toml: study 'deep' was begun without this .*; name another"):
        add_file(study(tmp_path), own, begun=True)
    only = study(tmp_path, "")
    add_file(only, own, begun=False)
    assert len(only.known) == 2
    assert not only.default, "a default is of the study file"
    own.write_text("[optimizer]\nlr = 7.0")
    with pytest.raises(ConfigError, match=r"^--first config.toml: optimizer.lr = 7.0: must be from"):
        add_file(only, own, begun=False)


def test_the_best_trials_of_an_older_study_that_fit_are_tried_first(tmp_path: Path) -> None:
    made = study(tmp_path)
    config = config_of(made, 1).to_table()
    old = {**config, "optimizer": {**config["optimizer"], "lr": 0.5}}
    near = {**config, "optimizer": {**config["optimizer"], "lr": 0.05}, "data": {"name": "mnist"}}
    trials = tuple(
        rows.trial(number=i, value=v, config=c) for i, (v, c) in enumerate([(0.5, config), (0.9, old), (0.7, near)])
    )
    record = StudyRecord(**vars(rows.header({})), name="old", number=1, folder=Path("x"), trials=trials)
    add_best(made, record)
    assert [known.origin for known in made.known[2:]] == ["trial 2 of old"]
    assert made.notes[-2].startswith("--warm-start old: trial 1 does not fit: optimizer.lr = 0.5: must be from")
    assert made.notes[-1] == "--warm-start old: trials 2 (0.7000), 0 (0.5000) are tried first"
