"""Trains rows of the reports, as many studies side by side as there are cores: python -m tests.reports [ROW ...].

Each study is a `searchfm tune` on one core, in a home in the user's cache folder. A run that
`studies/reports/results/ROW.json` holds is not trained again. Ctrl-C or SIGTERM stops; the same command resumes from
the checkpoints.
"""

import argparse
import threading
from collections.abc import Iterator

import searchfm
from searchfm.format import plural
from searchfm.records import FINAL
from tests.bench import _common as common
from tests.reports import page
from tests.reports.results import Result, retrained_of, run_of
from tests.reports.rows import ROWS, Row
from tests.side_by_side import SideBySide
from tests.weights import LITE0_FILE, lite0_file

LOCK = threading.Lock()  # of the results and pages


def name_of(row: str, seed: int) -> str:
    """The study of a row's seed. The first has the row's name, so that `searchfm compare` shows it."""
    return f"{row}-seed{seed}" if seed else row


def train(runner: SideBySide, row: str, seed: int) -> bool:
    """Trains one study of a row; whether it is complete. Keeps the trials that have ended, in any case."""
    if runner.stopped.is_set():
        return False
    name, settings = name_of(row, seed), ROWS[row].settings
    options = [f"--set={key}={lite0_file() if value == LITE0_FILE else value}" for key, value in settings.items()]
    common.progress(f"{name} begins")
    done = runner.call("tune", f"reports/{row}", "--name", name, "--seed", str(seed), "--workers", "1", *options)
    if not (runner.home / "studies" / name).is_dir():
        return done
    study = searchfm.open_study(name).record
    runs = [run_of(trial, seed, study.data, common.today(), runner.jobs) for trial in study.of("complete")]
    with LOCK:
        if runs:
            (Result.load(row) or Result(row, settings, [])).with_runs(runs).write()
            page.write()
    best = max((run.value for run in runs), default=0)
    common.progress(
        f"{name}: {plural(len(runs), 'run')}, the best {best:.4f}" + ("" if done else "; it is not complete")
    )
    return done


def retrain(runner: SideBySide, row: str) -> None:
    """Trains a row's best point on all data, and tests it once."""
    result = Result.load(row)
    assert result is not None
    if result.retrained:
        return
    best = max(result.runs, key=lambda run: run.value)
    name = name_of(row, best.study_seed)
    if not (runner.home / "studies" / name).is_dir() and not train(runner, row, best.study_seed):  # on a new machine
        return
    study = searchfm.open_study(name).record
    assert study.best is not None
    if runner.call("retrain", name, "--trial", str(study.best.number)):
        study = searchfm.open_study(name).record
        assert study.final is not None
        classes = list(study.data.classes)
        final = retrained_of(study.final, study.folder / FINAL, best.study_seed, classes, common.today())
        Result(row, result.settings, result.runs, final).write()
        page.write()


def missing(row: str, plan: Row) -> Iterator[tuple[str, int]]:
    """The studies of a row that have fewer runs than their grid has points."""
    result = Result.load(row)
    runs = result.runs if result else []
    points = page.points(row, plan.settings)
    yield from ((row, seed) for seed in plan.seeds if sum(run.study_seed == seed for run in runs) < points)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reports", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--jobs", type=int, default=common.usable(), help="studies side by side; default: cores")
    arguments = parser.parse_args()
    rows = arguments.rows or list(ROWS)
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for row in rows:
        result = Result.load(row)
        if result and result.settings != ROWS[row].settings:
            parser.error(
                f"{row} was trained with {result.settings}, now has {ROWS[row].settings}: remove its JSON first"
            )
    todo = [entry for row in rows for entry in missing(row, ROWS[row])]
    runner = SideBySide("reports", arguments.jobs)
    done = runner.map(lambda entry: train(runner, *entry), todo)
    for row in rows:
        if ROWS[row].retrain and all(ok for ok, entry in zip(done, todo, strict=True) if entry[0] == row):
            retrain(runner, row)
    runner.end(done)


if __name__ == "__main__":
    main()
