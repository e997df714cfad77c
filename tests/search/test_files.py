"""Study files: finding, reading, overriding, and comparing with the stored study."""

from pathlib import Path
from typing import Any

import pytest

from searchfm.errors import ConfigError, StudyError
from searchfm.home import shipped, shipped_folder
from searchfm.records import StudyRecord
from searchfm.search.files import StudyFile, changed, find, get, parse_override, question, read, reopen
from searchfm.search.study import Study
from tests import rows

TEXT = """\
# Question: how deep?
# Run:      searchfm tune deep

[search]
trials = 12
sampler = "random"
pruner = { name = "hyperband", min_epochs = 2 }
[data]
name = "digits"
[model.mlp]
layers = { low = 1, high = 3 }
width = [16, { choice = [32, 64] }, 8]
[optimizer]
lr = { low = 1e-4, high = 0.1, log = true }
[train]
epochs = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep.toml"
    path.write_text(TEXT)
    return path


def begun(study: Study, file: StudyFile) -> StudyRecord:
    """The stored record of a study."""
    plain = file.study(name=study.name).resolved
    header = rows.header(study.resolved, question="how deep?", planned=study.trials)
    return StudyRecord(**vars(header) | {"file": plain}, name=study.name, number=1, folder=Path("x"), trials=())


# --- finding and reading ----------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_name_and_question(path: Path) -> None:
    file = read(path)
    assert (file.name, file.question) == ("deep", "how deep?")
    study = file.study()
    assert (study.name, study.question, study.trials, study.epochs) == ("deep", "how deep?", 12, 4)
    path.write_text('name = "other"\n' + TEXT)
    assert read(path).study().name == "other"
    assert read(path).study(name="third").name == "third"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Question: one?\n# Run: x", "one?"),
        ("# Question: one\n#           and two?\n# Run: x", "one and two?"),
        ("#!/x\n# Question:   one?  \n", "one?"),
        ("# Run: x", ""),
        ("", ""),
        ("x = '# Question: no'", ""),
    ],
)
def test_the_question_is_the_first_comment_on_one_line(text: str, expected: str) -> None:
    assert question(text) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[search\n", "is not TOML: Expected ']'"),
        (b"a = 1\na = 2\n", "is not TOML: "),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"name = 3", "name = 3: must be a text"),
        (b'name = "../../x"', "study name '../../x': must be letters"),
        (b'name = "a\\u0000b"', "must be letters"),
        (b'name = "<b>x</b>"', "must be letters"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises((StudyError, ConfigError)) as caught:
        read(path)
    assert "bad.toml: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"nowhere.toml: cannot be read \(No such file or directory\)"):
        read(tmp_path / "nowhere.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(StudyError, match=r"folder.toml: cannot be read \(Is a directory\)"):
        read(tmp_path / "folder.toml")


def test_a_study_is_found_by_path_or_by_name_among_those_that_ship(path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(path.parent)
    assert find(str(path)) == path
    assert find("deep.toml") == Path("deep.toml")
    assert find("deep") is None  # a user's file is named with its ending
    assert shipped()
    for name in shipped():
        file = find(name)
        assert file is not None
        assert file.is_file()
        assert file.is_relative_to(shipped_folder())


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../mlp",
        "/etc/passwd",
        "reports/../mlp",
        "mlp\0",
        "x" * 600,
        "x" * 600 + ".toml",
        "a\0.toml",
        "<b>",
    ],
)
def test_hostile_names_find_nothing(name: str) -> None:
    assert find(name) is None


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.epochs=3", "train.epochs", 3),
        (" train.epochs = 3 ", "train.epochs", 3),
        ("optimizer.lr={low=1e-4, high=1e-2, log=true}", "optimizer.lr", {"low": 1e-4, "high": 1e-2, "log": True}),
        ("optimizer.name=sgd", "optimizer.name", "sgd"),
        ('optimizer.name="sgd"', "optimizer.name", "sgd"),
        ("data.name=/some/where", "data.name", "/some/where"),
        ("data.name=a=b", "data.name", "a=b"),
        ("model.mlp.batch_norm=true", "model.mlp.batch_norm", True),
        ("model.mlp.width.2=[1, 2]", "model.mlp.width.2", [1, 2]),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_string(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["", "=", "a", "a=", "=3", "a = "])
def test_an_override_without_key_or_value_is_refused_with_the_syntax(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set: .*must be KEY=VALUE, such as optimizer.lr=0.01"):
        parse_override(text)


@pytest.mark.parametrize("value", ["{low=1", "[1, 2", '"x', "{low=1, high}"])
def test_an_override_that_looks_like_toml_must_be_toml(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set: x = .*: is not a TOML value"):
        parse_override(f"x={value}")


def test_overrides_reach_every_kind_of_key(path: Path) -> None:
    study = read(path).study(
        {
            "search.trials": 3,
            "search.sampler": "tpe",
            "search.sampler.startup_trials": 4,
            "search.pruner.reduction": 2,
            "model.mlp.width.2": 128,
            "model.mlp.layers": 2,
            "optimizer.name": {"choice": ["sgd", "adam"]},
            "optimizer.sgd.nesterov": True,
        }
    )
    resolved = study.resolved
    assert resolved["search"]["trials"] == 3
    assert resolved["search"]["sampler"] == {"name": "tpe", "startup_trials": 4, "candidates": 24}
    assert resolved["search"]["pruner"] == {"name": "hyperband", "min_epochs": 2, "reduction": 2}
    assert resolved["model"]["mlp"]["width"] == [16, 128, 8]
    assert resolved["optimizer"]["sgd"]["nesterov"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"modle.name": "mlp"}, "modle is unknown here"),
        ({"model.mlp.depth": 3}, "model.mlp.depth is unknown here; may be one of: layers, width"),
        ({"train.epochs": "many"}, 'train.epochs = "many": must be a whole number >= 1'),
        ({"train.epochs": 1}, "search.pruner.min_epochs = 2: must be <= train.epochs = 1"),
        ({"train.epochs.x": 1}, "train.epochs.x is below epochs = 4, which is not a table"),
        ({"model.mlp.width.4": 1}, "model.mlp.width.4 has entries 1 to 3"),
        ({"model.mlp.width.0": 1}, "model.mlp.width.0 has entries 1 to 3"),
        ({"model.cnn.stages": 3}, "model.cnn.stages is in a table that no trial of this study enters"),
        ({"optimizer.sgd.momentum": 0.5}, "optimizer.sgd.momentum is in a table that no trial of this study enters"),
        ({"data.subset": {"low": 0.1, "high": 1.0}}, "data.subset = { low = 0.1, high = 1.0 }: takes a value here"),
    ],
)
def test_an_override_that_cannot_be_is_named(path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(path).study(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_means_the_same_from_everywhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    Path("photos").mkdir()
    Path("hub").mkdir()
    Path("weights.safetensors").touch()
    assert read(path).study({"data.name": "photos"}).data["name"] == str(path.parent / "photos")
    transfer = {"model.name": "transfer", "model.transfer.weights": "weights.safetensors"}
    assert read(path).study(transfer).transfers() == [("resnet18", str(path.parent / "weights.safetensors"))]
    assert read(path).study({**transfer, "model.transfer.weights": "hub"}).transfers() == [("resnet18", "hub")]
    for name in ("x" * 600, "a\0b", "~nobody-of-that-name/x", "digit"):
        with pytest.raises(ConfigError, match=r"command line: data.name = .* must be one of fashion-mnist"):
            read(path).study({"data.name": name})
    elsewhere = "/a/folder/of/another/node"
    assert read(path).study({"data.name": elsewhere}).data["name"] == elsewhere
    assert read(path).study({"data.name": "MNIST"}).data["name"] == "mnist"


def test_on_other_data_the_subset_is_all_unless_it_is_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(TEXT.replace('name = "digits"', 'name = "digits"\nsubset = 0.2'))
    file = read(path)
    for overrides, subset in (
        ({}, 0.2),
        ({"data.name": "digits"}, 0.2),
        ({"data.name": "mnist"}, 1.0),
        ({"data.name": "mnist", "data.subset": 0.1}, 0.1),
        ({"data.name": "mnist", "data.size": 14}, 1.0),
    ):
        assert file.study(overrides).data["subset"] == subset, overrides
    # The same command again resumes; a study that was begun with another subset keeps it.
    other = {"data.name": "mnist"}
    assert reopen(file, begun(file.study(other), file), other).data["subset"] == 1.0
    assert reopen(file, begun(file.study({**other, "data.subset": 0.2}), file), other).data["subset"] == 0.2
    monkeypatch.chdir(path.parent)
    Path("photos").mkdir()
    path.write_text(TEXT.replace('name = "digits"', 'name = "photos"\nsubset = 0.2'))
    assert read(path).study({"data.name": str(path.parent / "photos")}).data["subset"] == 0.2, "the same folder"
    path.write_text(TEXT.replace('[data]\nname = "digits"\n', "[data]\nsubset = 0.2\n"))
    assert read(path).study({"data.name": "fashion-mnist"}).data["subset"] == 0.2, "the default, named"


# --- differences ------------------------------------------------------------------------------------------------------


def test_what_changed_is_named_leaf_by_leaf() -> None:
    before = {"a": {"x": 1, "y": {"low": 1, "high": 2}}, "b": {"name": "p", "p": {"q": 1}}, "c": [1, 2]}
    after = {"a": {"x": 2, "y": {"low": 1, "high": 3}}, "b": {"name": "r"}, "c": [1, 2], "d": 4}
    assert changed(before, before) == []
    assert changed(before, after) == [
        ("a.x", 1, 2),
        ("a.y", {"low": 1, "high": 2}, {"low": 1, "high": 3}),
        ("b.name", "p", "r"),
        ("b.p", {"q": 1}, None),
        ("d", None, 4),
    ]
    assert changed({"y": 1}, {"y": {"choice": [1, 2]}}) == [("y", 1, {"choice": [1, 2]})]


def test_keys_are_looked_up_by_their_dots() -> None:
    table = {"a": {"b": [10, {"choice": [1]}]}}
    assert get(table, "a.b.1") == 10
    assert get(table, "a.b.2") == {"choice": [1]}
    for missing in ("a.b.0", "a.b.3", "a.b.x", "a.c", "a.b.1.c", "x"):
        assert get(table, missing) is None


# --- going on with what was begun -------------------------------------------------------------------------------------


def test_absent_overrides_are_those_the_study_was_begun_with(path: Path) -> None:
    file = read(path)
    study = file.study({"train.epochs": 3, "data.subset": 0.5, "search.trials": 9})
    for again in (reopen(file, begun(study, file), {}), reopen(None, begun(study, file), {})):
        assert again.resolved == study.resolved
        assert (again.name, again.question, again.epochs, again.trials) == ("deep", "how deep?", 3, 9)


def test_repeated_overrides_may_be_equal(path: Path) -> None:
    file = read(path)
    overrides = {
        "train.epochs": 3,
        "search.sampler": "tpe",
        "optimizer.lr": {"low": 0.01, "high": 1},  # a whole number, where 1.0 is meant
        "model.mlp.width.2": 128,
    }
    study = file.study(overrides)
    assert reopen(file, begun(study, file), overrides).resolved == study.resolved
    assert reopen(file, begun(study, file), {"search.sampler.name": "tpe"}).resolved == study.resolved


def test_overrides_that_fit_only_together_may_be_repeated_one_by_one(path: Path) -> None:
    file = read(path)
    overrides: dict[str, Any] = {
        "search.sampler": "grid",
        "search.pruner": "none",
        "optimizer.lr": 0.01,
        "train.epochs": {"choice": [1, 2]},
    }
    study = file.study(overrides)
    for key, value in overrides.items():
        assert reopen(file, begun(study, file), {key: value}).resolved == study.resolved


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("train.epochs", 5, "train.epochs = 5: study 'deep' was begun with 3"),
        ("train.epochs", 1, "train.epochs = 1: study 'deep' was begun with 3"),  # too few for the pruner, too
        ("search.seed", 1, "search.seed = 1: study 'deep' was begun with 0"),
        ("search.sampler", "tpe", 'search.sampler = { name = "tpe", '),
        ("search.sampler.name", "tpe", 'search.sampler.name = "tpe": study \'deep\' was begun with "random"'),
        ("search.pruner.name", "none", 'search.pruner.name = "none": study \'deep\' was begun with "hyperband"'),
        ("data.name", "mnist", 'data.name = "mnist": study \'deep\' was begun with "digits"'),
        ("model.name", "cnn", 'model.name = "cnn": study \'deep\' was begun with "mlp"'),
        (
            "optimizer.lr",
            0.1,
            "optimizer.lr = 0.1: study 'deep' was begun with { low = 0.0001, high = 0.1, log = true }",
        ),
        ("model.mlp.width.2", 7, "model.mlp.width.2 = 7: study 'deep' was begun with { choice = [32, 64] }"),
    ],
)
def test_another_value_is_refused_by_name(path: Path, key: str, value: Any, shown: str) -> None:
    file = read(path)
    stored = begun(file.study({"train.epochs": 3}), file)
    for source in (file, None):
        with pytest.raises(ConfigError) as caught:
            reopen(source, stored, {"search.trials": 99, key: value})
        assert str(caught.value).startswith(shown)
        assert str(caught.value).endswith("; name another study with --name to begin afresh")


def test_a_rule_that_the_file_drops_holds_no_more(path: Path) -> None:
    file = read(path)
    table = {**file.table, "search": {**file.table["search"], "target": 0.9}}
    study = StudyFile(path, "deep", "", table).study()
    stored = begun(study, StudyFile(path, "deep", "", table))
    assert reopen(file, stored, {}).search.target is None
    assert reopen(file, begun(file.study({"search.target": 0.8}), file), {}).search.target == 0.8, "an override stays"


def test_start_up_trials_of_an_older_study_stay_where_the_file_does_not_name_them(path: Path) -> None:
    """Studies begun when these keys had numbers as defaults hold these numbers."""
    file = read(path)
    older = {"name": "tpe", "startup_trials": 10, "candidates": 24}
    table = {**file.table, "search": {**file.table["search"], "sampler": older}}
    stored = begun(StudyFile(path, "deep", "", table).study(), StudyFile(path, "deep", "", table))
    now = StudyFile(path, "deep", "", {**table, "search": {**table["search"], "sampler": "tpe"}})
    for overrides in ({}, {"search.sampler": "tpe"}):
        assert reopen(now, stored, overrides).resolved["search"]["sampler"] == older
    with pytest.raises(ConfigError, match=r"search.sampler.startup_trials = 4: study 'deep' was begun with 10"):
        reopen(now, stored, {"search.sampler.startup_trials": 4})


def test_a_study_begun_before_a_key_existed_goes_on_with_its_default(path: Path) -> None:
    file = read(path)
    table = {**file.table, "search": {**file.table["search"], "pruner": "asha"}}
    now = StudyFile(path, "deep", "", table)
    stored = begun(now.study(), now)
    for kept in (stored.resolved, stored.file):
        del kept["search"]["pruner"]["promote"]  # type: ignore[index]
    for overrides in ({}, {"search.pruner.promote": False}):
        assert reopen(now, stored, overrides).resolved["search"]["pruner"]["promote"] is False
    with pytest.raises(ConfigError, match=r"search.pruner.promote = true: study 'deep' was begun with false"):
        reopen(now, stored, {"search.pruner.promote": True})


def test_an_unknown_key_is_unknown_also_later(path: Path) -> None:
    file = read(path)
    with pytest.raises(ConfigError, match=r"model.mlp.depth is unknown here"):
        reopen(file, begun(file.study(), file), {"model.mlp.depth": 3})
    for key in ("search.trials", "train.epochs"):
        with pytest.raises(ConfigError, match=rf"command line: {key} = \"x\": must be a whole number"):
            reopen(file, begun(file.study(), file), {key: "x"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.trials", 15),
        ("search.target", 0.9),
        ("search.stop_after", 5),
        ("search.keep", 1),
        ("search.retries", 0),
        ("search.checkpoint_seconds", 1.5),
        ("search.hang_seconds", 30.0),
    ],
)
def test_how_far_a_search_goes_may_change_by_override_or_in_the_file(path: Path, key: str, value: Any) -> None:
    file = read(path)
    study = file.study({"train.epochs": 3})
    expected = {**study.resolved, "search": {**study.resolved["search"], key.partition(".")[2]: value}}
    again = reopen(file, begun(study, file), {key: value})
    assert again.resolved == expected
    assert reopen(file, begun(again, file), {}).resolved == expected  # and stays so
    edited = StudyFile(
        path, "deep", "", {**file.table, "search": {**file.table["search"], key.partition(".")[2]: value}}
    )
    assert reopen(edited, begun(study, file), {}).resolved == expected


def test_names_in_another_case_are_the_same_on_resume(path: Path) -> None:
    file = read(path)
    overrides = {"search.sampler.name": "TPE", "optimizer.name": "SGD", "data.name": "Digits"}
    study = file.study(overrides)
    assert reopen(file, begun(study, file), overrides).resolved == study.resolved


def test_a_file_that_changed_is_refused_naming_the_key(path: Path) -> None:
    file = read(path)
    stored = begun(file.study({"train.epochs": 3}), file)
    path.write_text(TEXT.replace("high = 3", "high = 4").replace("8]", "8, 8]"))
    with pytest.raises(ConfigError) as caught:
        reopen(read(path), stored, {})
    assert str(caught.value).startswith(
        "deep.toml: model.mlp.layers = { low = 1, high = 4 }: study 'deep' was begun with { low = 1, high = 3 }; "
    )
    path.write_text("# another comment\n" + TEXT.replace("epochs = 4", "epochs   = 4 # the same"))
    assert reopen(read(path), stored, {}).epochs == 3


def test_the_environment_is_no_part_of_a_study(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(path).study().resolved
    monkeypatch.setenv("SEARCHFM_STORAGE", "postgresql://somebody:secret@nowhere/x")
    assert read(path).study().resolved == before
    assert "secret" not in str(read(path).study().resolved)


def test_a_wrong_key_is_located_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.toml"
    for text, line in (
        ("[train]\n# epochs\nepochs = 3\nbatch = 3\n", 4),
        ("[model]\nname = 'vit'\nvit.heads = 3\n", 3),
        ("[model]\nname = 'vit'\n\n[model.vit]\nheads = 3\n", 5),
        ("[model]\nname = 'vit'\n\n[model.vit]\npatch_size = 7\n[train]\nepochs = 'x'\n", 7),
        ("\n[search]\nsampler = 'tpee'\n", 3),
        ("[model]\nname = 'cnn'\n[model.cnn]\nfilters = [\n  1,\n  0,\n]\n", 4),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read(path).study()
        assert str(caught.value).startswith(f"lines.toml:{line}: ")


def test_tables_that_no_trial_enters_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "unused.toml"
    path.write_text(
        "[model]\nname = { choice = ['cnn', 'mlp'] }\n[model.vit]\nlayers = 3\nheads = 2\n[model.cnn]\nstages = 1\n"
        "[optimizer]\nname = 'AdamW'\n[optimizer.sgd]\nmomentum = 0.1\n"
    )
    assert read(path).study().notes == ["unused.toml: no trial enters [model.vit] and [optimizer.sgd]"]
    assert not [name for name in shipped() if read(shipped_folder() / f"{name}.toml").study().notes]


def test_a_range_in_words_that_are_not_toml_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "dots.toml"
    path.write_text("[optimizer]\nlr = 0.01..0.1\n")
    with pytest.raises(StudyError, match=r"line 2, column 10\); did you mean { low = 0.01, high = 0.1 }\?"):
        read(path)


def built_in(name: str, **overrides: Any) -> Study:
    path = find(name)
    assert path is not None
    return read(path).study({key.replace("__", "."): value for key, value in overrides.items()})


def test_values_of_a_built_in_study_that_do_not_fit_the_images_are_left_out() -> None:
    study = built_in("vit", data__name="digits")
    assert study.notes == ["model.vit.patch_size = 7 must divide the images' side of 8 pixels (1, 2, 4, 8): left out"]
    assert study.resolved["model"]["vit"]["patch_size"] == 4
    any_ = built_in("any", data__name="/elsewhere")
    any_.check_images((3, 30, 30))
    assert any_.resolved["model"]["name"] == {"choice": ["mlp", "cnn", "residual", "transfer"]}
    assert len(any_.notes) == 1
    tiny = built_in("any", data__name="/elsewhere")
    tiny.check_images((3, 2, 2))
    assert tiny.resolved["model"]["cnn"]["stages"] == 1
    assert tiny.resolved["model"]["residual"]["stages"] == 2
    assert all(config.fit_images((3, 2, 2)) is None for config in tiny.samples(20))


def test_a_value_that_the_user_gave_is_refused_with_one_that_fits() -> None:
    for value in (7, {"choice": [4, 7]}):
        with pytest.raises(ConfigError, match=r"8 pixels \(1, 2, 4, 8\); for example --set model.vit.patch_size=4$"):
            built_in("vit", data__name="digits", model__vit__patch_size=value)
    study = built_in("any", data__name="/elsewhere", model__name={"choice": ["mlp", "vit"]})
    with pytest.raises(ConfigError, match=r"; for example --set model.vit.patch_size=3$"):
        study.check_images((3, 30, 30))


def test_frozen_stages_of_random_weights_are_left_out_or_named() -> None:
    study = built_in("resnet", model__transfer__weights="none")
    assert study.resolved["model"]["transfer"]["tuned_blocks"] == "all"
    (note,) = study.notes
    assert note.startswith('model.transfer.tuned_blocks = 0 with model.transfer.weights = "none" keeps random weights')
    assert note.endswith('; "all" trains them: left out, as are 1, 2, 3, 4')
    own = built_in("resnet", model__transfer__weights="none", model__transfer__tuned_blocks=2)
    assert own.resolved["model"]["transfer"]["tuned_blocks"] == 2
    assert len(own.notes) == 1
    assert not built_in("resnet", model__transfer__weights="none", model__transfer__tuned_blocks="all").notes
