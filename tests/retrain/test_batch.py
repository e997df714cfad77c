"""A set of jobs is brought to its ends: nothing done twice, nothing given up too soon. Toy jobs, real workers."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from searchfm.engines.local import LocalEngine
from searchfm.retrain.batch import Batch, Errand, Step
from searchfm.search.history import read_epochs
from tests.driving import LIGHT
from tests.toys import curve

pytestmark = pytest.mark.usefixtures("cold_forkserver")


@pytest.fixture(scope="module")
def engine(cold_forkserver: None) -> Iterator[LocalEngine]:
    opened = LocalEngine(["cpu"] * 2, warm=LIGHT)
    yield opened
    opened.close()


def errand(folder: Path, number: int, *, epochs: int = 3, identity: str = "", **more: Any) -> Errand:
    config = {
        "optimizer": {"lr": 0.01},
        "model": {"mlp": {"layers": 1, "width": [8 + number]}},
        "train": {"epochs": epochs},
    }
    payload = {"config": config, "identity": f"u/{number}", **more}
    name = f"job {number}"
    return Errand(name, identity or name, folder / str(number), "result.json", "tests.toys:trial", payload, epochs)


def batch(engine: LocalEngine, stopping: Callable[[], bool] = lambda: False, retries: int = 2) -> Batch:
    return Batch(engine, retries, stopping, check_lock=lambda: None)


def kinds(steps: Sequence[Step]) -> list[str]:
    return [step.kind for step in steps if step.kind != "epoch"]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_all_jobs_end_and_leave_their_records(engine: LocalEngine, tmp_path: Path) -> None:
    errands = [errand(tmp_path, number) for number in range(5)]
    mine = batch(engine)
    steps = list(mine.run(errands))
    assert sorted(kinds(steps)) == ["done"] * 5 + ["planned"] * 5 + ["started"] * 5
    for one in errands:
        assert mine.results[one.label]["value"] == curve(one.payload["config"], 3)
        assert [epoch.index for epoch in read_epochs(one.folder / "epochs.csv")] == [1, 2, 3]
        assert one.result() == mine.results[one.label]
    assert not list(tmp_path.rglob("attempt-*"))
    assert left(tmp_path / "0") == {"done", "epochs.csv", "log.txt", "model.json", "result.json", "weights.safetensors"}


def test_what_is_done_is_known_again_unless_something_else_is_asked(engine: LocalEngine, tmp_path: Path) -> None:
    list(batch(engine).run([errand(tmp_path, 0)]))
    again = batch(engine)
    assert kinds(list(again.run([errand(tmp_path, 0), errand(tmp_path, 1)]))) == ["found", "planned", "started", "done"]
    assert again.results.keys() == {"job 0", "job 1"}
    other = batch(engine)
    assert "done" in kinds(list(other.run([errand(tmp_path, 0, identity="of another study")])))
    (tmp_path / "1" / "result.json").write_text('{"cut')
    assert errand(tmp_path, 1).result() is None


def test_a_job_whose_worker_died_goes_on_from_where_it_was(engine: LocalEngine, tmp_path: Path) -> None:
    one = errand(tmp_path, 0, kill={"0": 2})
    mine = batch(engine)
    assert kinds(list(mine.run([one]))) == ["planned", "started", "lost", "started", "lost", "started", "done"]
    assert [epoch.index for epoch in read_epochs(one.folder / "epochs.csv")] == [1, 2, 3]


def test_a_job_that_kills_every_worker_is_given_up_and_the_others_go_on(engine: LocalEngine, tmp_path: Path) -> None:
    mine = batch(engine, retries=1)
    steps = list(mine.run([errand(tmp_path, 0, kill={"0": 9}), errand(tmp_path, 1)]))
    assert kinds(steps).count("failed") == 1
    assert "SIGKILL" in mine.failures["job 0"]
    assert mine.results.keys() == {"job 1"}


def test_a_job_that_raises_fails_with_its_reason(engine: LocalEngine, tmp_path: Path) -> None:
    mine = batch(engine)
    list(mine.run([errand(tmp_path, 0, fail=[0])]))
    assert mine.failures == {"job 0": "ValueError: made to fail"}
    assert not mine.results
    assert errand(tmp_path, 0).result() is None


def test_told_to_stop_everybody_leaves_and_the_same_batch_goes_on(engine: LocalEngine, tmp_path: Path) -> None:
    errands = [errand(tmp_path, number, epochs=4, ticks=20, seconds=0.005) for number in range(3)]
    seen: list[Step] = []
    stopped = batch(engine, lambda: any(step.epoch and step.epoch.index == 2 for step in seen))
    with pytest.raises(KeyboardInterrupt):
        seen.extend(stopped.run(errands))
    assert not engine.busy
    assert not list(tmp_path.rglob("result.json"))
    mine = batch(engine)
    list(mine.run(errands))
    assert len(mine.results) == 3
    for one in errands:
        times = [epoch.time for epoch in read_epochs(one.folder / "epochs.csv")]
        assert times == sorted(times)
        assert len(times) == 4
    assert json.loads((tmp_path / "0" / "result.json").read_text())["identity"] == "job 0"
