"""What `--json` prints: documented, checked by its schema, and nothing but JSON."""

import csv
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from optuna.trial import TrialState
from rich.console import Console

from searchfm import tuning
from searchfm.home import Home
from searchfm.search.lock import process_name, study_lock
from searchfm.show import terminal
from searchfm.show.schema import COMMANDS
from tests import json_page
from tests.commands import Done, searchfm_here
from tests.show import searched
from tests.show.searched import Ending

ENDS = [
    Ending(range(30)),
    Ending(range(20)),
    Ending(state=TrialState.PRUNED, epochs=2),
    Ending(state=TrialState.FAIL, epochs=1),
]


@pytest.fixture(autouse=True)
def short_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DRY_RUN_SECONDS", 1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("json") / "home")
    searched.search(made, ENDS)
    return made


def run(home: Home, *arguments: str) -> Done:
    done = searchfm_here(*arguments, SEARCHFM_HOME=str(home.path))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("path", json_page.files(), ids=lambda path: str(path.name))
def test_the_page_and_the_schema_are_made_from_the_classes(path: Path) -> None:
    assert path.read_text("utf-8") == json_page.files()[path], "run: python -m tests.json_page"


def test_every_command_is_documented() -> None:
    """All but `worker`, which prints none."""
    listed = re.findall(r"^[│|] (\w+) ", searchfm_here("--help").stdout, re.MULTILINE)
    assert {name.split()[0] for name in COMMANDS} >= set(listed) - {"worker"}
    assert len(listed) > 10


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("status", "toy"), ("trial", "toy", "2"), ("studies",), ("data",)],
    ids=" ".join,
)
def test_what_a_command_prints_is_documented(home: Home, arguments: tuple[str, ...]) -> None:
    assert "searchfm:" not in run(home, *arguments, "--json").stderr  # what is printed is checked there


def test_a_study_has_its_trials_its_data_and_its_coordinator(home: Home) -> None:
    (every,) = json.loads(run(home, "status", "--json").stdout)
    with study_lock(home, "toy"):
        (one,) = json.loads(run(home, "status", "toy", "--json").stdout)
    assert every["trials"] == {"complete": 2, "pruned": 1, "failed": 1, "total": 4}
    assert (every["planned"], every["running"], every["data"]["train"]) == (4, 0, 1201)
    assert (every["coordinator"], one["coordinator"]) == (None, process_name())
    assert "trial_list" not in every
    assert [(trial["state"], trial["epochs"]) for trial in one["trial_list"]] == [
        ("complete", 4),
        ("complete", 4),
        ("pruned", 2),
        ("failed", 1),
    ]
    failed = one["trial_list"][3]
    assert (failed["value"], failed["reason"]) == (None, "loss is nan in epoch 2")
    assert one["trial_list"][one["best"]["trial"]]["value"] == one["best"]["value"]


@pytest.mark.slow
def test_ranges_are_objects(home: Home) -> None:
    done = run(home, "tune", "mlp", "--dry-run", "--json")
    assert "searchfm:" not in done.stderr
    space = json.loads(done.stdout)["space"]
    assert all(set(leaf) in ({"choice"}, {"low", "high", "log", "step"}) for leaf in space.values())
    assert space["optimizer.lr"]["log"] is True
    assert {"choice"} in [set(leaf) for leaf in space.values()]


def test_a_search_that_ends_before_its_study_is_opened_prints_a_study_without_trials(tmp_path: Path) -> None:
    home = tmp_path / "home"
    arguments = ("tune", "mlp", "--trials", "3", "--timeout", "0", "--dataset", "digits", "--home", str(home))
    done = searchfm_here(*arguments, "--retrain", "--json")  # its keys are checked there
    assert done.returncode == 0
    printed = json.loads(done.stdout)
    assert (printed["study"], printed["planned"], printed["trials"]["total"]) == ("mlp", 3, 0)
    assert (printed["data"], printed["trial_list"], printed["final"]) == (None, [], None)
    assert done.stderr.splitlines()[-1].startswith("searchfm: study 'mlp': the timeout of 0 s was over")
    assert not home.exists()


def test_csv_has_a_line_for_each_trial_and_a_column_for_each_key(home: Home) -> None:
    done = run(home, "status", "toy", "--csv")
    rows = list(csv.DictReader(StringIO(done.stdout)))
    assert not done.stderr
    assert [row["number"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[0]["optimizer.lr"]) > 0
    assert {row["optimizer.sgd.momentum"] == "" for row in rows} == {row["optimizer.name"] != "sgd" for row in rows}


def test_an_error_is_the_same_line(home: Home) -> None:
    outputs = [searchfm_here("trial", "toy", "9", *more, SEARCHFM_HOME=str(home.path)) for more in ((), ("--json",))]
    assert outputs[0] == outputs[1]
    assert outputs[0] == Done(2, "", "searchfm: study 'toy': trial 9 is unknown; may be 0 to 3\n")


def test_addresses_leave_the_token_out_where_no_terminal_shows_it() -> None:
    shown = Console(file=StringIO(), width=200, record=True, soft_wrap=True)
    terminal.show_addresses(shown, True, "http://127.0.0.1:8080/?token=secret", "http://127.0.0.1:5000/")
    output = shown.export_text()
    json_page.check(["dashboard"], output)
    assert "secret" not in output
