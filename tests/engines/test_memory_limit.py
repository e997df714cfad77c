"""Workers that the kernel kills, because a control group limits their memory: that of a container, or of SLURM."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

LIMIT = 1_800_000_000  # bytes: command, fork server, tracking process and two small workers take half of it

FILE = """
# Question: does the kernel end the study?
[search]
trials = 3
sampler = "grid"
pruner = "none"
retries = 1
[data]
name = "digits"
subset = 0.2
[model.mlp]
layers = 2
width = { choice = [8, 24_000, 16] }
[train]
epochs = 2
"""  # the second layer of 24,000 units takes 2.3 GB


def own_groups() -> Iterator[Path]:
    """The folders in which a control group with a limit of memory may be made: the own one, and that around it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):  # of version 2 and 1
            own = Path("/sys/fs/cgroup", controllers, name.lstrip("/"))
            yield from (own, own.parent)


def limit(group: Path) -> None:
    """Raises OSError where the group has no limits."""
    names = ("memory.max", "memory.swap.max") if (group / "memory.max").exists() else ("memory.limit_in_bytes",)
    for name, value in zip(names, (LIMIT, 0), strict=False):
        (group / name).write_text(str(value))


def killed(group: Path) -> int:
    """How many processes of the group the kernel has killed."""
    events = group / "memory.events"
    text = (events if events.exists() else group / "memory.oom_control").read_text()
    return int(dict(line.split() for line in text.splitlines())["oom_kill"])


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a limit of memory. What still runs in it at the end is killed."""
    for folder in own_groups():
        group = folder / f"searchfm-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:  # not root, or a file system that cannot be written
            continue
        try:
            limit(group)
            break
        except OSError:
            group.rmdir()
    else:
        # In CI too: of version 2, a container whose processes are in its own root cannot limit some of them.
        pytest.skip("no control group with a limit of memory can be made here")
    yield group
    until = time.monotonic() + 60
    while pids := (group / "cgroup.procs").read_text().split():
        assert time.monotonic() < until, pids
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).kill()
        time.sleep(0.05)
    group.rmdir()


@pytest.mark.slow(seconds=30)
def test_a_trial_whose_worker_the_kernel_kills_fails_and_the_study_goes_on(group: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.toml"
    file.write_text(FILE)
    home = ("--home", str(tmp_path / "home"))
    done = subprocess.run(
        [sys.executable, "-m", "searchfm", "tune", str(file), "--workers", "2", "--device", "cpu", "--json", *home],
        env={**os.environ, "SEARCHFM_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert killed(group) >= 2
    trials = {trial["params"]["model.mlp.width"]: trial for trial in json.loads(done.stdout)["trial_list"]}
    assert {width: trial["state"] for width, trial in trials.items()} == {
        8: "complete",
        24_000: "failed",
        16: "complete",
    }
    assert trials[24_000]["reason"] == "its worker died (signal SIGKILL: the memory may have run out), 2 times"
