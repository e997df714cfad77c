"""Terminal views: what they print while jobs run, with and without a terminal."""

import math
import re
from collections.abc import Generator
from dataclasses import replace
from io import StringIO

import pytest
import rows
import searched
from optuna.trial import TrialState
from rich.console import Console
from searched import Ending

from searchfm.events import (
    JobEnded,
    JobEpoch,
    JobPlanned,
    JobRetried,
    JobStarted,
    Note,
    RetrainEvent,
    SearchEnded,
    SearchEvent,
    StudyFound,
    StudyOpened,
    TrialEnded,
    TrialEpoch,
    TrialPaused,
    TrialRetried,
    TrialStarted,
    TuneEvent,
)
from searchfm.format import seconds, sentence, short_names, states
from searchfm.home import Home
from searchfm.jobs import Job
from searchfm.records import Final
from searchfm.show.live import Region, follow, open_console
from searchfm.show.progress import RetrainView, TuneView, tune_view
from searchfm.show.schema import Retrained, describe
from searchfm.show.summary import show_end, show_trial, study_page, trial_table
from searchfm.show.terminal import note, show_addresses, show_final


def console(*, terminal: bool = False, width: int = 160) -> Console:
    return Console(file=StringIO(), width=width, force_terminal=terminal, record=True, highlight=False, soft_wrap=True)


def test_the_view_of_a_search_gives_way_to_that_of_its_final_training(home: Home) -> None:
    study = searched.search(home, [Ending(range(30))])
    shown = console()
    events: list[TuneEvent | RetrainEvent] = [
        StudyFound("toy", "How wide?", "digits", resumed=False),
        Note("before"),
        StudyOpened(replace(study, trials=()), 1, ("cpu",)),
        TrialEnded(0, study.trials[0]),
        SearchEnded(study, 1, False, "", "", 0, 1.0, ""),
        Note("40.0 s left"),
        StudyFound("toy", "How wide?", "digits", resumed=True),
        JobEnded(Job("final training", None, "", {}, "final training"), value=0.9),
    ]
    follow(shown, (event for event in events), tune_view)
    text = shown.export_text()
    for line in ("toy on digits: How wide?", "before", "toy: 1 trial on digits", "toy: 40.0 s left", "final training "):
        assert text.count(line) == 1, line
    assert "1/1 trial 0 complete" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_search_prints_a_line_for_each_end(home: Home, terminal: bool) -> None:
    study = searched.search(home, [Ending(range(30)), Ending(state=TrialState.FAIL, epochs=1)])
    first, second = study.trials
    shown = console(terminal=terminal)
    view = TuneView(shown, replace(study, trials=()), 2, ["cpu", "cpu"])
    events: list[SearchEvent] = [
        TrialStarted(0, replace(first, state="running", epochs=())),
        TrialEpoch(0, first.epochs[0]),
        TrialRetried(0, "its worker died"),
        TrialEnded(0, first),
        TrialStarted(1, replace(second, state="running"), "adopted"),
        TrialEnded(1, second),
    ]
    follow(shown, (event for event in events), lambda *_: view)
    text = shown.export_text()
    assert "toy: 2 trials on digits, workers: 2 x cpu\n1,201 images to train on, 212 to validate\n" in text
    assert "trial 0 lost: its worker died" in text
    assert "1/2 trial 0 complete 0.8585 best epoch 4/4" in text
    assert text.count("best epoch") == 1
    assert "trial 1 resumes after epoch 1" in text
    assert "loss is nan in epoch 2" in text
    assert not view.running


def test_a_paused_trial_has_a_row_at_its_pause_and_none_when_it_is_pruned_at_the_end(home: Home) -> None:
    study = searched.search(home, [Ending(range(30)), Ending(state=TrialState.PRUNED, epochs=1)])
    first, second = study.trials
    paused = replace(second, state="running", reason=None, paused=1)
    shown = console()
    view = TuneView(shown, replace(study, trials=(paused,)), 2, ["cpu"])
    shown.print(view.render())
    assert "1/2 1 paused" in shown.export_text(clear=False)
    view.update(TrialStarted(1, paused, "promoted"))
    view.update(TrialPaused(1, paused))
    view.update(TrialEnded(0, first))
    view.update(TrialEnded(1, second))
    shown.print(view.render())
    text = shown.export_text()
    assert "1/2 trial 1 paused " in text
    assert "trial 1 pruned" not in text
    assert "2/2 1 complete, 1 pruned" in text
    page = replace(study, trials=(first, paused))
    assert states(page, zeros=False) == "1 complete, 1 running (1 paused)"
    shown.print(study_page(page, None, 100, {}))
    show_trial(shown, page, paused)
    shown.print(trial_table(page.trials, 100))
    text = shown.export_text()
    assert "1 trial paused, to be continued if among the best" in text
    assert "searchfm tune toy resumes it" in text
    assert "trial 1: paused after epoch 1" in text
    assert re.search(r"^ *1 +paused ", text, re.M)


def test_at_80_columns_a_trial_has_one_row_whose_last_param_is_whole(home: Home) -> None:
    reason = "loss is nan in epoch 2: " + "a long sentence of a library " * 5
    study = searched.search(home, [Ending(range(30)), Ending(state=TrialState.FAIL, epochs=1)])
    first = replace(study.trials[0], params={f"model.mlp.a_long_key_{i}": 0.123456 * i for i in range(9)})
    shown = console(width=80)
    view = TuneView(shown, replace(study, trials=()), 2, ["cpu"])
    for trial in (first, replace(study.trials[1], reason=reason)):
        view.update(TrialStarted(trial.number, replace(trial, state="running", epochs=())))
        view.update(TrialEnded(trial.number, trial))
    pruned = replace(first, state="pruned", value=None, reason="pruned by median after epoch 2")
    assert note(pruned, 24) == "median  a_long_key_0=0 …"
    raised = replace(first, state="failed", reason='model.custom.factory = "nets:net": raises ValueError: too wide')
    assert note(raised, 26) == "ValueError: too wide"
    *_, complete, failed = shown.export_text().splitlines()
    assert all(len(row) <= 80 and row.endswith("…") for row in (complete, failed))
    assert complete.split("  ")[-1] == "a_long_key_0=0 …"
    assert "loss is nan in epoch 2" in failed


def test_the_time_left_is_that_of_the_timeout_where_it_ends_the_search_first(home: Home) -> None:
    study = searched.search(home, [Ending(range(30))])
    for left, text in ((3600.0, "about "), (0.0, "timeout in 0.0 s"), (math.inf, "about ")):
        shown = console()
        view = TuneView(shown, replace(study, trials=()), 2, ["cpu"], left)
        shown.print(view.render())
        assert ("timeout in" in shown.export_text(clear=False)) == (left < math.inf)  # no pace is known yet
        view.update(TrialEnded(0, study.trials[0]))
        shown.print(view.render())
        assert text in shown.export_text(clear=False).splitlines()[-3]
        view.update(TrialEnded(1, study.trials[0]))
        shown.print(view.render())
        assert shown.export_text().splitlines()[-3].endswith("2/2 2 complete")


def test_the_account_of_the_images_is_wrapped_with_an_indent(home: Home) -> None:
    study = searched.search(home, [])
    counted = {"available": 1201, "test": 384, "validation_classes": (150, 62), "classes": ("cat", "dog")}
    data = replace(study.data, **counted)  # type: ignore[arg-type]
    shown = console(width=80)
    TuneView(shown, replace(study, data=data), 2, ["cpu"])
    *_, first, second = shown.export_text().splitlines()
    assert first.startswith('always answering "cat", the largest class, is correct for 70.8%')
    assert second.startswith("  ")
    assert max(len(first), len(second)) <= 80


@pytest.mark.parametrize("columns", [None, "80"])
def test_nothing_is_wrapped_into_a_pipe(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    shown = open_console()
    with shown.capture() as capture:
        shown.print("a word " * 100, soft_wrap=False)
    assert capture.get().count("\n") == 1


def test_brackets_in_paths_and_addresses_are_no_markup() -> None:
    shown = console()
    region = Region(shown)
    region.phase("reading /data/[old]/[/x]")
    shown.print(region.render())
    show_addresses(shown, False, "http://[fd00::1]:8080/dashboard", "http://[fd00::1]:5000/")
    show_addresses(shown, False, "http://[fd00::1]:8080/dashboard")
    assert re.sub(r"^\S+ ", "", shown.export_text()) == (
        "reading /data/[old]/[/x]\n"
        "optuna-dashboard  http://[fd00::1]:8080/dashboard\nMLflow            http://[fd00::1]:5000/\n"
        "Ctrl-C stops both\nserving at http://[fd00::1]:8080/dashboard\n"
    )


def test_the_end_of_a_search_names_the_next_commands(home: Home) -> None:
    failed = Ending(state=TrialState.FAIL, epochs=1)  # its missing epochs are not pruning's
    study = searched.search(home, [Ending(range(30)), Ending(state=TrialState.PRUNED, epochs=1), failed])
    shown = console()
    show_end(shown, study, trials=5, reason="the space has no further point", missing=1, elapsed=75.0)
    text = shown.export_text()
    assert "1 complete, 1 pruned, 1 failed of 5 in 1 min 15 s; pruning saved 3 of 8 epochs (38%), about 9.0 s" in text
    assert "the space has no further point" in text
    assert "MLflow lacks 1 trial; later: searchfm sync toy --apply" in text
    assert "searchfm retrain toy" in text


def test_a_search_that_leaves_time_for_the_final_training_gives_the_reason_of_its_early_end(home: Home) -> None:
    study, shown = searched.search(home, [Ending(range(30))]), console()
    show_end(shown, study, trials=5, reason="", missing=0, elapsed=75.0, stopped="timeout", last=False)
    expected = "stopped after 1 min 15 s (--timeout, with the rest for the final training); the same command resumes"
    assert expected in shown.export_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_retraining_prints_a_line_for_each_job_and_returns_the_record(home: Home, terminal: bool) -> None:
    study = searched.retrained(home, searched.search(home, [Ending(range(30))]), range(30))
    jobs = [Job(f"job-{i}", None, "none", {}, label=f"trial 0, seed {i} of 3", epochs=2) for i in range(3)]
    epoch = replace(rows.epochs(0, 1)[0], seconds=11.0)

    def steps() -> Generator[RetrainEvent, None, Final]:
        yield Note("workers: 1 x cpu")
        yield JobPlanned(jobs[0])
        yield JobEnded(jobs[1], "found", 0.5)
        yield JobStarted(jobs[0])
        yield JobEpoch(jobs[0], epoch)
        yield JobRetried(jobs[0], "its worker died")
        yield JobEnded(jobs[0], "finished", 0.9123)
        yield JobEnded(jobs[2], "failed", text="loss is nan")
        assert study.final is not None
        return study.final

    shown = console(terminal=terminal)
    view = RetrainView(shown, "toy")
    assert follow(shown, steps(), lambda *_: view) == study.final
    text = shown.export_text()
    assert "toy: workers: 1 x cpu" in text
    assert ("epoch 1/2  11.0 s" in text) is not terminal
    assert "lost: its worker died; goes on from its last checkpoint" in text
    assert "done   0.9123 2 epochs   11.0 s" in text
    assert "earlier 0.5000" in text
    assert "failed" in text


def test_a_final_model_is_shown_with_its_interval(home: Home) -> None:
    final = searched.retrained(home, searched.search(home, [Ending(range(30))]), range(30), reads=2).final
    assert final is not None
    shown = console()
    show_final(shown, final)
    text = shown.export_text()
    assert "Test        90.00% of 300 test images correct; 95% interval 50.00% to 99.00% (Wilson)" in text
    assert "had been read twice by then, this time included" in text
    assert "91.00% of the validation images correct in the search, 90.00% with 3 fresh seeds" in text
    assert "searchfm export toy" in text
    assert sentence(final).startswith("90.00% of 300 test images correct; 95% interval 50.00% to 99.00% (Wilson)")
    keys = ["schema", "study", "finalists", "tie", "winner", "optimism", "default", "validation", "test"]
    assert list(describe(Retrained, final).__struct_fields__) == [*keys, "balanced", "largest", "model", "seconds"]


def test_durations_and_names_are_short() -> None:
    assert [seconds(count) for count in (4.06, 200, 7500)] == ["4.1 s", "3 min 20 s", "2 h 5 min"]
    keys = ["optimizer.name", "optimizer.lr", "model.cnn.filters.1", "model.cnn.filters.2", "train.lr"]
    assert list(short_names(keys).values()) == ["optimizer", "optimizer.lr", "filters.1", "filters.2", "train.lr"]
