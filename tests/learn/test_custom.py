"""Models of the user's own code: what may run where, and the check that users run on theirs."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import searchfm
from searchfm.config import Config, Custom
from searchfm.engines import EngineOptions
from searchfm.engines.remote import worker_command
from searchfm.errors import CodeError, ConfigError, ModelError
from searchfm.jobs import Context
from searchfm.learn.entries import prepare
from searchfm.learn.models.custom import NO_CODE, Code, build, source_sha256
from searchfm.search.study import Study
from tests.learn.toys import drain

SHAPE = (1, 8, 8)
SMALL = Custom(factory="tests.learn.nets:small", params={"width": 4, "sizes": [3, 5]})
STUDY = {
    "data": {"name": "digits"},
    "model": {
        "name": "custom",
        "custom": {
            "factory": "tests.learn.nets:small",
            "params": {"width": {"low": 4, "high": 8}, "sizes": [3, {"choice": [3, 5]}], "dropout": 0.5},
        },
    },
}


def test_params_are_values_lists_and_ranges() -> None:
    study = Study("mine", STUDY)
    config = study.samples(1)[0]
    assert Config.from_table(config.to_table()) == config
    assert Study("mine", study.resolved).resolved == study.resolved
    ends = [table["params"] for table in study.customs()]
    assert {(params["width"], tuple(params["sizes"])) for params in ends} == {(4, (3, 3)), (8, (3, 3)), (4, (3, 5))}
    assert {params["dropout"] for params in ends} == {0.5}


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ({}, r'model.custom.factory = "": must be "package.module:function"'),
        ({"factory": "nets"}, r'model.custom.factory = "nets": must be "package.module:function"'),
        ({"factory": {"choice": ["a:b", "a:c"]}}, "takes a value here, not a range"),
        ({"factory": "a:b", "params": {"a-b": 1}}, "model.custom.params.a-b must be the name of an argument"),
        ({"factory": "a:b", "params": {"a": {"low": 1}}}, "model.custom.params.a = { low = 1 }: must be a value"),
        ({"factory": "a:b", "params": {"a": {"low": True, "high": 3}}}, "only a number has a range"),
        ({"factory": "a:b", "params": 3}, "model.custom.params = 3: must be a table"),
        ({"factory": "a:b", "width": 3}, "model.custom.width is unknown here; may be one of: factory, params"),
    ],
)
def test_a_mistake_in_the_table_names_its_key(custom: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{ low", r"\{ low")):
        Study("mine", {"model": {"name": "custom", "custom": custom}})


def test_a_range_from_a_whole_number_to_a_fraction_is_continuous() -> None:
    custom = {"factory": "a:b", "params": {"dropout": {"low": 0, "high": 0.5}}}
    study = Study("mine", {"model": {"name": "custom", "custom": custom}})
    assert all(type(config.model.kind.params["dropout"]) is float for config in study.samples(4))


def test_nothing_is_imported_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    config = Custom(factory="own_trap:net")
    with pytest.raises(CodeError, match=r"own_trap:net.*is code: a host runs it only with --allow-code"):
        build(config, SHAPE, 10, NO_CODE)
    with pytest.raises(CodeError, match="its code has changed"):
        build(config, SHAPE, 10, Code(allowed=True, sha256="0" * 64))
    source_sha256("own_trap:net")
    assert "own_trap" not in sys.modules


def test_code_is_found_in_the_folder_of_the_command_and_has_one_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(__file__).with_name("nets.py"), tmp_path / "own_nets.py")
    config = Custom(factory="own_nets:small")
    with pytest.raises(CodeError, match="there is no module own_nets in"):
        build(config, SHAPE, 10, Code(allowed=True))
    monkeypatch.chdir(tmp_path)
    sha256 = source_sha256(config.factory)
    assert build(config, SHAPE, 10, Code(allowed=True, sha256=sha256))
    assert str(tmp_path) not in sys.path
    with pytest.raises(CodeError, match=r"own_nets.py has no nope"):
        build(Custom(factory="own_nets:nope"), SHAPE, 10, Code(allowed=True))
    with (tmp_path / "own_nets.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(CodeError, match=f"its code has changed .*was {sha256[:12]}"):
        build(config, SHAPE, 10, Code(allowed=True, sha256=sha256))
    with pytest.raises(CodeError, match="has changed since this process imported it"):
        build(config, SHAPE, 10, Code(allowed=True))


def test_the_hash_of_a_package_covers_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_package" / "parts").mkdir(parents=True)
    for name in ("__init__.py", "nets.py", "parts/layers.py"):
        (tmp_path / "own_package" / name).touch()
    before = source_sha256("own_package.nets:net")
    (tmp_path / "own_package" / "parts" / "layers.py").write_text("WIDTH = 3\n")
    assert source_sha256("own_package.nets:net") != before
    assert source_sha256("own_package.other:net") == source_sha256("own_package.nets:net")


@pytest.mark.parametrize(
    ("factory", "params", "message"),
    [
        ("small", {"depth": 3}, "raises TypeError: small\\(\\) got an unexpected keyword argument 'depth'"),
        ("raises", {}, "raises KeyError: 'depth"),
        ("no_module", {}, "returns str, must return a torch.nn.Module"),
        ("wrong_shape", {}, r"returns torch.float32 \(2, 11\), must return torch.float32 \(2, 10\)"),
        ("Infinite", {}, "numbers that are not finite"),
        ("OwnSeed", {}, "equal seeds make different weights"),
        ("Untrained", {}, "has no parameter to train"),
        ("Unused", {}, "a trained parameter gets no gradient"),
        ("Mixing", {}, "logits of an image depend on the other images"),
        ("Noisy", {}, "logits differ between two calls"),
        ("Hidden", {}, "state_dict does not hold all of the model"),
        ("Branching", {}, "the outputs of torch.export differ"),
    ],
)
def test_check_model_names_what_is_wrong(factory: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f'"tests.learn.nets:{factory}": .*{message}') as caught:
        searchfm.check_model(f"tests.learn.nets:{factory}", SHAPE, 10, **params)
    assert "\n" not in str(caught.value)


def test_check_model_passes_a_model_that_is_right() -> None:
    searchfm.check_model("tests.learn.nets:small", (3, 12, 8), 7, width=4, sizes=[3, 5], dropout=0.5)


def job(**changes: Any) -> dict[str, Any]:
    return {"data": {"name": "digits"}, "models": [], "data_dir": None, "custom": [SMALL.to_table()]} | changes


def test_a_node_runs_code_only_where_it_was_started_so(tmp_path: Path) -> None:
    def context(*, allowed: bool) -> Context:
        return Context(tmp_path, (), "cpu", lambda: None, allowed)

    with pytest.raises(CodeError, match="a host runs it only with --allow-code"):  # whatever the job asks for
        drain(prepare(job(allow_code=True), context(allowed=False)))
    _, result = drain(prepare(job(), context(allowed=True)))
    assert result["data"]["code"] == source_sha256(SMALL.factory)
    with pytest.raises(CodeError, match="its code has changed"):
        drain(prepare(job(code="0" * 64), context(allowed=True)))
    with pytest.raises(ModelError, match=r"returns torch.float32 \(2, 11\)"):
        drain(prepare(job(custom=[{"factory": "tests.learn.nets:wrong_shape"}]), context(allowed=True)))


def test_a_worker_that_a_search_starts_elsewhere_has_the_permission_of_its_command() -> None:
    def command(*, allow: bool) -> list[str]:
        return worker_command(EngineOptions(name="slurm", allow_code=allow), Path("/home"), "h:1")

    assert "--allow-code" in command(allow=True)
    assert "--allow-code" not in command(allow=False)
