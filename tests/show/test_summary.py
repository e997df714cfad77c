"""Studies and trials on the terminal: `status`, `trial` and the end of `tune`."""

import random
import re
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import rows
import searched
from optuna.trial import TrialState
from rich.console import Console, RenderableType
from rich.text import Text
from searched import Ending

from searchfm.errors import UserError
from searchfm.events import Note
from searchfm.format import sparkline
from searchfm.home import Home
from searchfm.records import StudyRecord, Trial
from searchfm.search.lock import holder, process_name, study_lock
from searchfm.show import live, progress
from searchfm.show.summary import overview, show_end, show_trial, sort_trials, study_page, study_table, trial_table

ENDS = [
    Ending(range(30)),
    Ending(range(20)),
    Ending(range(30), twin=0),
    Ending(state=TrialState.PRUNED, epochs=2),
    Ending(state=TrialState.FAIL, epochs=1),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    return searched.search(Home(tmp_path_factory.mktemp("summary")), ENDS)


def console(width: int, *, terminal: bool = False) -> Console:
    return Console(file=StringIO(), width=width, record=True, highlight=False, soft_wrap=True, force_terminal=terminal)


def text(shown: RenderableType, width: int) -> str:
    drawn = console(width)
    drawn.print(shown, soft_wrap=False)
    return drawn.export_text()


def wide(count: int, keys: int) -> list[Trial]:
    """Trials with many keys, of which the first has one value."""
    return [
        rows.trial(
            number=number,
            value=0.9 - number / 100,
            params={"train.epochs": 3} | {f"model.mlp.a_key_with_a_name_{key}": number + key for key in range(keys)},
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("width", [80, 140])
def test_a_table_has_the_columns_that_fit_and_names_the_keys_that_do_not(width: int) -> None:
    shown = text(trial_table(wide(5, 40), width), width).splitlines()
    assert all(len(line) <= width for line in shown)
    assert len([line for line in shown if line.startswith("    ") and line.split()[0].isdigit()]) == 5, (
        "one row a trial"
    )
    assert [line for line in shown if line.startswith("all")] == ["all     epochs=3"]
    assert "a_key_with_a_name_39" not in " ".join(shown)
    assert shown[-1].startswith("also    differ: a_key_with_a_name_")
    assert shown[-1].endswith("…")


def test_without_a_width_every_key_is_a_column_with_its_name_on_one_line() -> None:
    header, *_ = text(trial_table(wide(5, 20), 1000), 1000).splitlines()
    assert len([name for name in header.split() if name.startswith("a_key")]) == 20


def test_the_most_important_key_is_the_first_column() -> None:
    trials, key = wide(5, 20), "model.mlp.a_key_with_a_name_17"
    header = text(trial_table(trials, 1000, importance={key: 0.9}), 1000).splitlines()[0].split()
    assert next(name for name in header if name.startswith("a_key")) == "a_key_with_a_name_17"


def test_a_key_that_chooses_a_table_stands_before_the_keys_of_that_table() -> None:
    chosen = [
        {"optimizer.lr": 0.1, "model.mlp.layers": 1, "model.name": "mlp"},
        {"optimizer.lr": 0.2, "model.name": "cnn"},
    ]
    trials = [rows.trial(number=i, value=0.5, params=params) for i, params in enumerate(chosen)]
    shown = text(trial_table(trials, 80, importance={"model.mlp.layers": 0.9, "optimizer.lr": 0.1}), 80)
    assert shown.splitlines()[0].split()[-3:] == ["model", "layers", "lr"]


def test_the_name_of_a_column_has_few_lines() -> None:
    name = "a_rather_long_name_of_many_short_words_for_the_key_of_a_space"
    trials = [rows.trial(number=i, value=0.5, params={name: i, "other": "x" * 60 + str(i)}) for i in range(2)]
    lines = text(trial_table(trials, 80), 80).splitlines()
    heading = lines[: next(i for i, line in enumerate(lines) if line.startswith("trial")) + 1]
    assert len(heading) == 4
    assert "".join(line.split()[-1] for line in heading) == name


def test_a_twin_is_marked_and_explained(study: StudyRecord) -> None:
    shown = text(trial_table(study.trials, 120), 120)
    assert "complete =0" in shown
    assert "=N: a twin of trial N" in shown


def test_the_end_of_a_search_fits_one_screen_with_the_best_in_full(study: StudyRecord) -> None:
    many = {f"model.mlp.key_{i}": 0.1234 * i for i in range(20)}
    trials = tuple(replace(trial, params={**trial.params, **many}, twin=None) for trial in study.trials)
    shown = console(80)
    show_end(shown, replace(study, trials=trials), trials=5, reason="", missing=0, elapsed=75.0)
    lines = shown.export_text().splitlines()
    assert len(lines) < 24
    assert all(len(line) <= 80 for line in lines)
    best = " ".join(lines[:8])
    assert "trial 1 with 0.9057, 4 epochs" in best
    assert all(f"key_{i}={0.1234 * i:.3g}" in best for i in range(20))


def test_a_page_of_a_study_has_its_best_its_failures_and_who_runs_it(study: StudyRecord) -> None:
    running = replace(study.trials[3], number=5, state="running", epochs=study.trials[3].epochs[:])
    trials = (*study.trials, running, *(replace(study.trials[4], number=n) for n in range(6, 20)))
    shown = text(study_page(replace(study, trials=trials), "process 7 on host", 80, {"optimizer.lr": 0.75}), 80)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "trials 4, 6, 7, 8, 9, 10, 11, 12, 13, 14 …: loss is nan in epoch 2" in shown
    assert "importance  lr 75%" in shown
    assert "5        2/4" in shown
    assert "held by process 7 on host" in shown
    idle = text(study_page(replace(study, trials=trials), None, 80, {}), 80)
    assert "5 trials' pictures are not drawn yet; searchfm dashboard or" in text(study_page(study, None, 80, {}), 80)
    assert "pictures" not in text(study_page(study, "process 7 on host", 80, {}), 80), "its search draws some"
    assert "no process runs it; searchfm tune toy resumes it" in idle


def test_a_page_of_a_study_has_its_final_model(tmp_path: Path) -> None:
    home = Home(tmp_path)
    retrained = searched.retrained(home, searched.search(home, ENDS[:2]), range(30))
    assert retrained.final is not None
    page = text(study_page(retrained, None, 80, {}), 80)
    assert (
        f"final   trial 0, {retrained.final.test.accuracy:.2%} of {retrained.final.test.n} test images correct" in page
    )


def test_a_long_name_is_wrapped_at_its_signs(study: StudyRecord) -> None:
    name = "a-very-long-study-name-that-goes-on-for-a-while-and-has-64-signs"
    narrow = text(study_table([replace(study, name=name)], 80), 80)
    assert name in "".join(line.split()[0] for line in narrow.splitlines()[1:])
    assert "digits" not in narrow
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert f"{name}  5/5" in text(study_table([replace(study, name=name)], 140), 140)


def test_trials_are_sorted_by_value_or_a_key(study: StudyRecord) -> None:
    by_value, key = sort_trials(study.trials, "value")
    assert ([trial.number for trial in by_value], key) == ([1, 0, 2, 3, 4], None)
    by_rate, key = sort_trials(study.trials, "lr")
    assert key == "optimizer.lr"
    rates = [trial.params["optimizer.lr"] for trial in by_rate]
    assert rates == sorted(rates)
    assert len(sort_trials(study.trials, "momentum")[0]) == 5, "a key that not all trials have"
    with pytest.raises(UserError, match="--sort lrr: must be one of value, number"):
        sort_trials(study.trials, "lrr")


def test_a_trial_has_its_config_curves_log_files_and_the_next_commands(study: StudyRecord) -> None:
    best = study.trials[1]
    (best.folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    shown = console(80)
    show_trial(shown, study, best)
    page = re.sub(" +", " ", shown.export_text())
    assert "toy, trial 1: complete, value 0.9057 (1 of 3)" in page
    assert f"optimizer.name {best.params['optimizer.name']}" in page
    assert "train.epochs=4" in page
    assert "validation ▁" in page
    assert "line 29" in page
    assert "line 19" not in page
    assert "config.toml" in page
    assert "searchfm retrain toy --trial 1" in page
    assert "IMAGE" not in page, "without weights nothing can be predicted"


def test_a_failed_trial_says_why_and_a_twin_names_the_trial_that_was_trained(study: StudyRecord) -> None:
    failed, twin = console(80), console(80)
    show_trial(failed, study, replace(study.trials[4], epochs=()))
    show_trial(twin, study, study.trials[2])
    assert "loss is nan in epoch 2" in failed.export_text(clear=False)
    assert "no epoch was trained" in failed.export_text()
    assert "searchfm trial toy 0" in twin.export_text()


def test_the_log_of_a_running_trial_is_that_of_its_latest_attempt(study: StudyRecord) -> None:
    trial = study.trials[3]
    (trial.folder / "log.txt").write_text("old\n")
    (trial.folder / "attempt-2").mkdir()
    (trial.folder / "attempt-2" / "log.txt").write_text("new\n")
    assert trial.log(5) == ["new"]


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_shows_each_change_until_ctrl_c(
    study: StudyRecord, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(progress, "WATCH_SECONDS", 0.0)

    def steps() -> Iterator[list[StudyRecord]]:
        yield [replace(study, trials=study.trials[:1])]
        yield [replace(study, trials=study.trials[:1])]
        yield [study]
        raise KeyboardInterrupt

    shown = console(100, terminal=terminal)
    progress.watch(shown, steps(), lambda drawn, studies: overview(Home(study.folder), None, drawn, studies))
    lines = shown.export_text().splitlines()
    if not terminal:
        assert lines == [
            "toy: 1 complete of 5; best 0.8585 (trial 0)",
            "toy: 3 complete, 1 pruned, 1 failed of 5; best 0.9057 (trial 1)",
        ]


def test_the_holder_of_a_lock_is_known_without_the_lock(any_home: Home) -> None:
    rows.begin(any_home)
    assert holder(any_home, "toy") is None
    with study_lock(any_home, "toy"):
        assert holder(any_home, "toy") == process_name()
    assert holder(any_home, "toy") is None
    rows.forget(any_home)


def test_a_killed_process_of_this_host_holds_nothing(home: Home) -> None:
    owner = home.study("toy") / "owner"
    owner.parent.mkdir(parents=True)
    owner.write_text(f"process 4194999 {process_name().partition(' on ')[1].strip()} {process_name().split()[-1]}")
    assert holder(home, "toy") is None
    owner.write_text("process 7 on another-host")
    assert holder(home, "toy") == "process 7 on another-host"


def test_a_curve_has_its_last_value_and_at_most_the_width() -> None:
    assert sparkline([0.0, 0.5, 1.0], 0.0, 1.0, 10) == "▁▅█"
    assert len(sparkline([i / 100 for i in range(100)], 0.0, 1.0, 30)) == 30
    assert sparkline([0.1] * 99 + [1.0], 0.0, 1.0, 8).endswith("█")
    assert sparkline([0.3], 0.3, 0.3, 8) == "▁"


def test_lines_above_a_live_region_whose_height_changes_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = (tmp_path / "screen").open("w+")
    monkeypatch.setenv("TERM", "xterm-256color")
    drawn = Console(file=output, force_terminal=True, width=80, height=2000, highlight=False, force_interactive=True)
    events, heights = 500, random.Random(0)

    class Changing:
        height = 1

        def update(self, event: Note) -> None:
            self.height = heights.randint(1, 6)
            drawn.print(event.text)

        def render(self) -> RenderableType:
            return Text("\n".join("live" for _ in range(self.height)))

    def steps() -> Generator[Note, None, None]:
        for number in range(events):
            yield Note(f"line {number}")
            time.sleep(0.002)

    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.0005)
    sys.setswitchinterval(1e-6)
    view = Changing()
    try:
        live.follow(drawn, steps(), lambda *_: view)
    finally:
        sys.setswitchinterval(0.005)
        output.close()
    rows, row = dict[int, str](), 0  # what a terminal of 2000 rows shows
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\n|[^\x1b\r\n]+", (tmp_path / "screen").read_bytes().decode()):
        match token[-1], token[2:-1]:
            case "\n", _:
                row += 1
            case "A", count if token[0] == "\x1b":
                row -= int(count or 1)
            case "K", _ if token[0] == "\x1b":
                rows[row] = ""
            case _ if token[0] != "\x1b":
                rows[row] = token.strip()
    assert [rows[number] for number in sorted(rows) if rows[number]] == [f"line {number}" for number in range(events)]
