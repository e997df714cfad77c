"""The fork server that a command starts before it knows what there is to train."""

import subprocess
import sys
from pathlib import Path

import pytest

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
