"""What is public is documented, and what is documented is there: flags, variables, modules, names in MLflow."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import searchfm
from searchfm import cli
from searchfm.show import keys
from tests import mutants, rows
from tests.mutants import MUTANTS
from tests.test_project import ROOT, tracked

PAGES = ("README.md", "docker/README.md", *(name for name in tracked() if re.fullmatch(r"\.github/[A-Z]+\.md", name)))
PAGES = tuple(name for name in PAGES if not name.endswith("CHANGELOG.md"))  # which names what is gone too
VARIABLE = re.compile(r"(?<![A-Z_])SEARCHFM_[A-Z_]+")  # not typer's own, for completion, which begins with "_"
MARKS = (".", "]")  # that end a help text


def text(*names: str) -> str:
    return "\n".join((ROOT / name).read_text("utf-8") for name in names)


def sources(folder: str, *suffixes: str) -> list[str]:
    names = [name for name in tracked() if name.startswith(f"{folder}/") and Path(name).name != Path(__file__).name]
    return [name for name in names if Path(name).suffix in suffixes]


def options() -> Iterator[tuple[str, Any]]:
    """Every option and argument of every command."""
    group: Any = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        yield from ((name, param) for param in command.params)


def test_every_command_option_and_argument_has_a_sentence_and_no_option_is_hidden() -> None:
    group: Any = typer.main.get_command(cli.app)
    assert all(command.help and not command.hidden for command in group.commands.values())
    assert [(name, param.name) for name, param in options() if not (param.help or "").endswith(MARKS)] == []
    assert [(name, param.name) for name, param in options() if getattr(param, "hidden", False)] == []


def test_every_command_is_in_the_readme() -> None:
    listed = re.findall(r"^\| `searchfm (\w+)", text("README.md"), re.MULTILINE)
    assert set(listed) == {name for name, _ in options()}


def test_every_public_function_is_in_the_readme_and_nothing_there_is_missing() -> None:
    functions = {name for name in searchfm.__all__ if name.islower()}
    readme = text("README.md")
    assert {name for name in functions if not re.search(rf"\b{name}\b", readme)} == set()
    assert set(re.findall(r"\bsearchfm\.([A-Za-z_]+)\b", readme)) - {"json"} <= set(searchfm.__all__)  # a file


def test_every_flag_is_used_by_a_test() -> None:
    """Or stands in a command of a page that a test runs."""
    run = re.findall(r"^```sh\n(.*?)^```$", text("README.md", "docker/README.md"), re.DOTALL | re.MULTILINE)
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join([*run, text(*sources("tests", ".py"))])))
    flags = {param.opts[0] for _, param in options() if param.param_type_name == "option"}
    assert len(flags) > 50
    assert sorted(flags - used) == []


def test_every_variable_that_is_read_is_documented_and_every_documented_one_is_read() -> None:
    read = VARIABLE.findall(text(*sources("searchfm", ".py"), *sources("tests", ".py")))
    assert set(read) == set(VARIABLE.findall(text(*PAGES)))


def test_the_architecture_lists_every_module_and_no_other() -> None:
    listed = re.search(r"## The modules.*?^```\n(.*?)^```", text(".github/ARCHITECTURE.md"), re.DOTALL | re.MULTILINE)
    assert listed
    names = set(re.findall(r"\b\w+\.py\b", listed[1])) - {"transfer.py", "custom.py"}  # of the package `models`
    ours = {Path(name).name for name in sources("searchfm", ".py") if "/models/" not in name}
    assert names == ours - {"__init__.py"}


def test_every_test_that_proves_a_promise_of_security_exists() -> None:
    """A promise names a test as `FILE::TEST`."""
    named = re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", text(".github/SECURITY.md"))
    assert len(named) > 15
    for file, name in named:
        assert name, file
        assert re.search(rf"def {name}\(", text(file)), (file, name)


MATRIX = ".github/RELIABILITY.md"


def test_every_test_that_the_matrix_of_faults_names_exists() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", text(MATRIX))
    assert len(named) > 30
    for file, name in named:
        pattern = name or r"test_\w+"
        assert re.search(rf"def {pattern}\(", text(f"tests/{file.removeprefix('tests/')}")), (file, name)


def test_each_fault_has_a_mutant_that_a_test_of_its_row_was_seen_to_find(tmp_path: Path) -> None:
    rows = re.findall(r"^\| ([A-Z]\d+) \| .+ → .+ \| (.+) \| (\d{4}-\d\d-\d\d) \|$", text(MATRIX), re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| [A-Z]\d", text(MATRIX), re.MULTILINE)), "a row has another form"
    named = {row: {f"tests/{name}" for name in re.findall(r"`([^`]+)`", tests)} for row, tests, _ in rows}
    assert len(named) == len(rows)
    assert {mutant.row for mutant in MUTANTS} == set(named)
    for number, mutant in enumerate(MUTANTS):
        assert mutant.test in named[mutant.row], mutant
        source = text(f"searchfm/{mutant.file}")
        assert source.count(mutant.old) == 1, mutant
        (tmp_path / f"mutant_{number}.py").write_text(mutant.apply(source))
    # A change that Python refuses, or that leaves a name undefined, would fail any test.
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select", "F821", str(tmp_path)]
    assert subprocess.run(ruff, capture_output=True, text=True, check=False).stdout == ""


def test_a_fault_without_a_mutant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mutants", "P1", "Z9"])
    with pytest.raises(SystemExit, match=r"^unknown: Z9; rows are P1, P2, "):
        mutants.main()


def test_every_table_of_keys_has_a_meaning() -> None:
    assert [section.name for section in keys.sections() if not section.meaning] == []


def test_every_documented_name_of_mlflow_and_optuna_is_written_by_the_code() -> None:
    """The tests of tracking and registry check the opposite on real runs."""
    code = text(*sources("searchfm", ".py"))
    parts = {part for name in rows.documented_names() for part in re.split(r"[/*]|-STUDY| --json", name) if part}
    assert len(parts) > 50
    assert sorted(part for part in parts if part not in code) == []
