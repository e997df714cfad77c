"""Which module may import which. The source is read, not run, so imports in functions and for type checkers count."""

import ast
import graphlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import searchfm
from searchfm.home import Home
from tests import rows
from tests.commands import loaded, loaded_by

PACKAGE = Path(searchfm.__file__).parent

# Modules and packages from below, one layer a row. Each imports from the layers below it and from itself, never from
# others of its layer. The bare package (the version) may be imported from anywhere.
LAYERS = (
    {"errors"},
    {"forkserver"},
    {"stats", "home", "inputs", "stopping"},
    {"tables", "records"},
    {"config", "jobs"},
    {"format"},
    {"events"},
    {"search", "learn", "engines"},
    {"figures", "pool", "forecast"},
    {"tracking"},
    {"coordinator"},
    {"tuning"},
    {"retraining", "upkeep", "check"},
    {"disk", "backup"},
    {"show"},
    {"api", "shell"},
    {"cli"},
    {"__main__", "__init__"},
)
LAYER = {part: layer for layer, modules in enumerate(LAYERS) for part in modules}
STANDARD_LIBRARY_ONLY = {"errors", "stopping", "forkserver", "tables", "config"}
# Libraries that only some modules and packages may import.
ALLOWED = {
    "platformdirs": {"home"},
    "torch": {"learn"},
    "torchvision": {"learn"},
    "timm": {"learn"},
    "optuna": {"search", "coordinator", "show", "tracking", "api", "check"},
    "optuna_dashboard": {"search", "show"},
    "mlflow": {"tracking"},
    "uvicorn": {"show"},
    "starlette": {"show"},
    "a2wsgi": {"show"},
    "pyarrow": {"learn"},
    "ray": {"engines"},
    "matplotlib": {"figures", "show", "api"},
    "pandas": {"api"},
    "IPython": {"show"},
    "typer": {"cli", "shell"},
}
# The only code with the name `load_test`: learn/data.py, which defines it, and the entry that tests a final model.
TEST_READERS = {"searchfm.learn.data:load_test", "searchfm.learn.entries:import", "searchfm.learn.entries:test"}


@dataclass(frozen=True)
class Import:
    module: str  # that imports
    target: str  # that is imported, as a dotted name; of our own package always a module
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def read(package: Path) -> dict[str, ast.Module]:
    """Module names and their syntax trees; a package's own module ends in `.__init__`."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def imports(trees: Mapping[str, ast.Module]) -> Iterator[Import]:
    for module, tree in trees.items():
        for node in ast.walk(tree):
            match node:
                case ast.Import(names):
                    targets = [alias.name for alias in names]
                case ast.ImportFrom(str(source), names, level=0):
                    # `from package import module` means the module, `from module import name` the module too.
                    named = [f"{source}.{alias.name}" for alias in names]
                    targets = [name if {name, f"{name}.__init__"} & trees.keys() else source for name in named]
                case ast.ImportFrom():
                    raise AssertionError(f"{module}:{node.lineno} imports relatively; ours are absolute")
                case _:
                    continue
            for target in targets:
                package = f"{target}.__init__"
                yield Import(module, package if package in trees else target, node.lineno)


def part(module: str) -> str:
    return module.split(".")[1]


def faults(trees: Mapping[str, ast.Module]) -> list[str]:
    """One line for each import that is not allowed."""
    problems = [f"{module} is in no layer" for module in trees if part(module) not in LAYER]
    for item in imports(trees):
        here, package = part(item.module), item.target.split(".")[0]
        if package == "searchfm":
            there = "" if item.target == "searchfm.__init__" else part(item.target)
            if there and there != here and LAYER.get(there, -1) >= LAYER.get(here, -1):
                problems.append(f"{item}: not below")
        elif here in STANDARD_LIBRARY_ONLY and package not in sys.stdlib_module_names:
            problems.append(f"{item}: {here} is standard library only")
        elif here not in ALLOWED.get(package, {here}):
            problems.append(f"{item}: only {', '.join(sorted(ALLOWED[package]))} may")
    return problems


def uses(target: str, trees: Mapping[str, ast.Module]) -> set[str]:
    """`module:function` (or class) whose code has the target as a name, an attribute, an import or a whole string;
    `module:import` and `module:` for statements outside of both.
    """

    def matches(node: ast.AST) -> bool:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.FunctionDef(name=name):
                return name == target
            case ast.Constant(value=str(text)):  # getattr(data, "load_test"), "searchfm.learn.data:load_test"
                return text == target or text.endswith((f":{target}", f".{target}"))
        return False

    def owner(node: ast.stmt) -> str:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                return name
        return "import" if isinstance(node, ast.Import | ast.ImportFrom) else ""

    return {
        f"{module}:{owner(statement)}"
        for module, tree in trees.items()
        for statement in tree.body
        if any(matches(node) for node in ast.walk(statement))
    }


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return read(PACKAGE)


def test_imports_run_downward_and_stay_inside_their_packages(trees: dict[str, ast.Module]) -> None:
    assert not faults(trees)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("searchfm.learn.planted", "import optuna"),
        ("searchfm.learn.planted", "from mlflow.entities import Metric"),
        ("searchfm.learn.planted", "from searchfm.search.study import Study"),
        ("searchfm.search.planted", "import torch.nn.functional as F"),
        ("searchfm.search.planted", "def f():\n    from searchfm.learn import data"),
        ("searchfm.engines.planted", "from optuna.trial import TrialState"),
        ("searchfm.engines.planted", "from searchfm import tracking"),
        ("searchfm.coordinator", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("searchfm.coordinator", "import searchfm.cli"),
        ("searchfm.show.planted", "import mlflow"),
        ("searchfm.config", "import numpy"),
        ("searchfm.errors", "from searchfm.jobs import Job"),
        ("searchfm.utilities", ""),
    ],
)
def test_a_forbidden_import_is_detected(trees: dict[str, ast.Module], module: str, line: str) -> None:
    (fault,) = faults(trees | {module: ast.parse(line)})  # the package itself has none, see above
    assert fault.startswith(module)


def test_there_is_no_import_cycle(trees: dict[str, ast.Module]) -> None:
    ours = [item for item in imports(trees) if item.target in trees and item.target != "searchfm.__init__"]
    graph = {module: {item.target for item in ours if item.module == module} for module in trees}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_only_the_final_test_reads_the_test_part(trees: dict[str, ast.Module]) -> None:
    assert uses("load_test", trees) == TEST_READERS


@pytest.mark.parametrize(
    "line",
    ["from searchfm.learn.data import load_test", "data.load_test(config)", 'getattr(data, "load_test")'],
)
def test_another_reader_of_the_test_part_is_detected(trees: dict[str, ast.Module], line: str) -> None:
    for module, code in (("planted", line), ("entries", f"def trial(config, data):\n    {line}")):
        assert not uses("load_test", {f"searchfm.learn.{module}": ast.parse(code)}) <= TEST_READERS


HEAVY = {"torch", "torchvision", "timm", "mlflow", "matplotlib", "plotly", "sklearn", "pandas", "pyarrow"}


def test_help_loads_nothing_heavy() -> None:
    modules = loaded_by("--help")
    assert "typer" in modules
    assert not (HEAVY | {"optuna", "scipy", "numpy", "sqlalchemy", "searchfm.config"}) & modules


@pytest.mark.slow
def test_commands_that_list_load_optuna_alone(home: Home) -> None:
    rows.four(home)
    for words in (["status"], ["status", "toy"], ["trial", "toy", "3"]):
        modules = loaded_by(*words, "--home", str(home.path))
        assert "optuna" in modules
        assert not (HEAVY | {"scipy", "alembic"}) & modules, words


@pytest.mark.slow  # two commands of three import torch
def test_a_study_file_is_shown_without_torch_once_its_costs_were_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path))
    assert "torch" in loaded_by("studies", "mlp")
    assert not HEAVY & loaded_by("studies", "mlp")
    (kept,) = (tmp_path / "costs").iterdir()
    kept.write_text("damaged")
    assert "torch" in loaded_by("studies", "mlp"), "counted again"
    assert json.loads(kept.read_text()).keys() == {"parameters", "flops"}


def test_the_coordinator_starts_without_torch_and_mlflow() -> None:
    modules = loaded("import searchfm.cli, searchfm.tuning, searchfm.tracking.registry, searchfm.show.terminal")
    assert "optuna" in modules
    assert not HEAVY & modules
