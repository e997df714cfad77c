"""The fork server that a command starts before it knows what there is to train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from searchfm import forkserver

HEAD = """
import sys
from pathlib import Path
import psutil
def servers():
    children = psutil.Process().children()
    return [child.pid for child in children if "multiprocessing.forkserver" in "".join(child.cmdline())]
"""

REFUSED = """
import searchfm
from searchfm import StudyError
seen = []
def refuse(*_):
    seen.extend(servers())
    raise StudyError("refused")
import searchfm.tuning
searchfm.tuning.find_study = refuse
for call in (searchfm.tune, searchfm.tune):
    try:
        call("mlp", home=Path(sys.argv[1]), progress=False)
    except StudyError:
        assert not servers()
assert len(set(seen)) == 2, seen
"""

USED = """
from searchfm import forkserver
from searchfm.engines.local import LocalEngine
from searchfm.jobs import Finished, Job
with forkserver.ahead("slurm"):
    assert not servers()
with forkserver.ahead("local"), forkserver.ahead("local"):
    [server] = servers()
    engine = LocalEngine(["cpu"])
    engine.submit(Job("devices", None, "searchfm.learn.entries:devices", {}, attempt=1))
    event = None
    while event is None:
        event = engine.next_event(timeout=10)
    engine.close()
assert isinstance(event, Finished), event
with forkserver.ahead("local"):
    pass
assert servers() == [server]
"""


def run(program: str, home: Path) -> None:
    subprocess.run([sys.executable, "-c", HEAD + program, str(home)], check=True, timeout=120)


def test_a_refused_study_leaves_no_process_and_the_next_call_starts_another(tmp_path: Path) -> None:
    run(REFUSED, tmp_path / "home")
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_server_that_forked_a_worker_stays_for_further_searches(tmp_path: Path) -> None:
    run(USED, tmp_path / "home")


@pytest.mark.parametrize(
    ("given", "waiting"),
    [
        ({}, ("passive", "1000")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
    ],
)
def test_threads_of_workers_spin_briefly_unless_the_user_says_otherwise(
    given: dict[str, str], waiting: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever it was
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    forkserver.context()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == waiting
