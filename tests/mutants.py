"""Takes each defence out of the code, and checks that its test fails: `python -m tests.mutants [ROW ...]`.

A row is one of the matrix in `.github/RELIABILITY.md`. The sources are changed in a copy. Each test must pass there
before the change, and fail after it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A defence, taken out: `old` becomes `new` in a file of searchfm; then `test` fails."""

    row: str
    test: str
    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The changed text of the file."""
        assert text.count(self.old) == 1, f"{self.row}: {text.count(self.old)} times in {self.file}: {self.old}"
        return text.replace(self.old, self.new)


COORDINATOR, TRACKING = "tests/test_coordinator.py", "tests/test_tracking.py"
CHECKPOINT, DATASETS = "tests/learn/test_checkpoint.py", "tests/learn/test_datasets.py"
MUTANTS = (
    Mutant(
        "P1",
        f"{COORDINATOR}::test_a_trial_whose_worker_was_killed_goes_on_from_its_last_epoch",
        "engines/worker.py",
        "earlier = tuple(path for path in paths if path.is_dir())",
        "earlier = ()",
    ),
    Mutant(
        "P2",
        f"{COORDINATOR}::test_after_six_kills_another_coordinator_completes_the_study",
        "coordinator.py",
        "yield from self._adopt()",
        "pass",
    ),
    Mutant(
        "P3",
        "tests/test_leaving.py::test_what_hangs_while_a_command_leaves_is_killed",
        "stopping.py",
        "EXIT_SECONDS, KILL_SECONDS = 8.0, 9.0",
        "EXIT_SECONDS, KILL_SECONDS = 8.0, 900.0",
    ),
    Mutant(
        "P4",
        "tests/test_leaving.py::test_a_second_signal_ends_the_command_and_its_workers_at_once",
        "stopping.py",
        "    forkserver.kill()\n",
        "    pass\n",
    ),
    Mutant(
        "P5",
        f"{COORDINATOR}::test_late_and_repeated_events_change_nothing",
        "pool.py",
        " and self._running[event.job].attempt == event.attempt",
        "",
    ),
    Mutant(
        "P6",
        f"{COORDINATOR}::test_the_last_worker_dies_in_the_last_epoch_of_the_last_trial",
        "pool.py",
        "if job.lost > self.retries:",
        "if job.lost > 0:",
    ),
    Mutant(
        "P7",
        f"{COORDINATOR}::test_a_trial_that_kills_its_worker_every_time_fails_and_the_study_goes_on",
        "pool.py",
        "if job.lost > self.retries:",
        "if job.lost > self.retries + 1:",
    ),
    Mutant(
        "P8",
        "tests/engines/test_local.py::test_a_fork_server_that_is_killed_while_a_worker_starts_is_replaced_once",
        "engines/local.py",
        "for _ in range(2):",
        "for _ in range(1):",
    ),
    Mutant(
        "P8",
        "tests/engines/test_local.py::test_a_fork_server_that_is_killed_again_is_one_line",
        "engines/local.py",
        "for _ in range(2):",
        "for _ in range(3):",
    ),
    Mutant(
        "S1",
        "tests/search/test_storage.py::test_many_processes_begin_in_a_fresh_home_at_once",
        "search/storage.py",
        'with FileLock(path.with_suffix(".lock")):',
        "with suppress():",
    ),
    Mutant(
        "S2",
        f"{COORDINATOR}::test_a_database_locked_by_another_process_only_delays_the_study",
        "search/database.py",
        "BUSY_SECONDS = 60.0",
        "BUSY_SECONDS = 0.1",
    ),
    Mutant(
        "S2",
        "tests/test_dropped.py::test_a_study_whose_connections_are_dropped_at_random_moments_goes_on",
        "search/database.py",
        "            if not is_lost(error):\n                raise\n",
        "            raise\n",
    ),
    Mutant(
        "S3",
        f"{CHECKPOINT}::test_weights_on_a_full_disk_leave_the_ones_before",
        "home.py",
        'partial = path.with_name(f".{path.name[:100]}.tmp")',
        "partial = path",
    ),
    Mutant(
        "S4",
        f"{CHECKPOINT}::test_a_process_killed_while_writing_leaves_the_old_file_and_the_next_write_no_other",
        "home.py",
        'partial = path.with_name(f".{path.name[:100]}.tmp")',
        "partial = path",
    ),
    Mutant(
        "S5",
        f"{CHECKPOINT}::test_a_damaged_one_is_refused_and_the_one_before_serves",
        "learn/checkpoint.py",
        "    sha = file_sha256(path)\n",
        "    sha = match[2]\n",
    ),
    Mutant(
        "S7",
        "tests/test_crash_points.py",
        "pool.py",
        "    if attempts and keep:\n        flush(folder)",
        "    if False:\n        flush(folder)",
    ),
    Mutant(
        "S6",
        f"{COORDINATOR}::test_a_database_that_disappears_stops_the_study_and_is_not_created_again",
        "search/lock.py",
        'raise StorageError(f"{database}: the database is gone")',
        "pass",
    ),
    Mutant(
        "S6",
        "tests/test_check.py",
        "search/storage.py",
        "    if not names or url.get_backend_name()",
        "    if True or url.get_backend_name()",
    ),
    Mutant(
        "S6",
        "tests/test_check.py",
        "search/storage.py",
        '    sqlalchemy.event.listen(storage.engine, "handle_error", name_damage)\n',
        "",
    ),
    Mutant(
        "T1",
        f"{TRACKING}::test_a_server_that_dies_and_comes_back_misses_nothing",
        "tracking/follow.py",
        "            self._unreachable = subject\n            return False\n",
        "            raise\n",
    ),
    Mutant(
        "T2",
        f"{TRACKING}::test_without_mlflow_a_search_does_not_block_and_one_line_says_so",
        "tracking/follow.py",
        "self._relay.start()",
        "self._relay.start(); self._relay.join(1.0)",
    ),
    Mutant(
        "T2",
        f"{TRACKING}::test_a_search_gives_up_at_its_end_on_an_mlflow_that_does_not_answer",
        "tracking/follow.py",
        ">= GIVE_UP_SECONDS:",
        ">= 10 * GIVE_UP_SECONDS:",
    ),
    Mutant(
        "T2",
        "tests/test_leaving.py::test_a_server_that_does_not_answer_is_not_waited_for",
        "stopping.py",
        "EXIT_SECONDS, KILL_SECONDS = 8.0, 9.0",
        "EXIT_SECONDS, KILL_SECONDS = 800.0, 900.0",
    ),
    Mutant(
        "T3",
        f"{TRACKING}::test_five_faults_are_five_differences",
        "tracking/mirror.py",
        "            self.client.restore_run(run.id)\n",
        "",
    ),
    Mutant(
        "T4",
        f"{TRACKING}::test_a_process_that_dies_is_replaced",
        "tracking/follow.py",
        "for last in (False, True):",
        "for last in (True,):",
    ),
    Mutant(
        "D1",
        f"{DATASETS}::test_cifar100_is_downloaded_once_and_refused_when_corrupt",
        "learn/datasets.py",
        "hexdigest()) != expected:",
        "hexdigest()) == 0:",
    ),
    Mutant(
        "D2",
        f"{DATASETS}::test_many_that_need_it_at_once_download_it_once",
        "learn/datasets.py",
        "with FileLock(path):",
        "with suppress():",
    ),
    Mutant(
        "D4",
        "tests/test_tuning.py::test_data_that_changed_since_are_refused_and_the_study_stays_as_it_was",
        "tuning.py",
        "before.fingerprint != result.data.fingerprint:",
        "before.fingerprint == 0:",
    ),
    Mutant(
        "D3",
        "tests/test_inputs.py::test_hostile_files_are_one_line_and_take_little",
        "learn/images.py",
        "PIXELS = 50_000_000",
        "PIXELS = 50_000_000_000",
    ),
    Mutant(
        "D3",
        "tests/test_inputs.py::test_hostile_files_are_one_line_and_take_little",
        "learn/images.py",
        "if not all(isinstance(side, int) for side in sides):",
        "if False:",
    ),
    Mutant(
        "N1",
        f"{COORDINATOR}::test_trials_that_raise_or_have_no_value_fail_and_the_study_goes_on",
        "coordinator.py",
        "if not isinstance(value, float) or not math.isfinite(value):",
        "if not isinstance(value, float):",
    ),
    Mutant(
        "N2",
        f"{COORDINATOR}::test_a_study_whose_every_trial_fails_stops_early_and_resumes_once_the_cause_is_fixed",
        "coordinator.py",
        "HOPELESS = 3",
        "HOPELESS = 300",
    ),
    Mutant(
        "R1",
        "tests/learn/test_entries.py::test_the_error_begins_with_out_of_memory_and_the_next_trial_is_trained",
        "learn/entries.py",
        """ and "can't allocate memory" not in str(error):""",
        ":",
    ),
    Mutant(
        "R2",
        "tests/engines/test_memory_limit.py::test_a_trial_whose_worker_the_kernel_kills_fails_and_the_study_goes_on",
        "pool.py",
        "                if job.lost > self.retries:",
        "                if False:",
    ),
    Mutant(
        "R3",
        "tests/engines/test_local.py::test_a_worker_that_hangs_is_ended_and_its_job_lost_but_not_before_its_first_tick",
        "engines/local.py",
        "worker.silence += waited",
        "worker.silence += 0.0",
    ),
    Mutant(
        "R4",
        "tests/test_clock.py::test_a_search_whose_clock_jumps_is_the_same_search",
        "show/summary.py",
        'f"ended {datetime.fromtimestamp(trial.ended):%Y-%m-%d %H:%M:%S}"',
        'f"ended after {seconds(trial.ended - (trial.started or 0))}"',
    ),
    Mutant(
        "U1",
        "tests/test_cli.py::test_a_broken_study_file_is_one_line_and_leaves_nothing",
        "errors.py",
        "    exit_code = 2\n",
        "",
    ),
    Mutant(
        "U1",
        "tests/test_tuning.py::test_a_mistake_is_refused_before_anything_is_written",
        "tuning.py",
        "        self.home.probe()\n",
        "        open_storage(self.home, create=True)\n",
    ),
    Mutant(
        "U2",
        "tests/search/test_files.py::test_another_value_is_refused_by_name",
        "search/files.py",
        "elif old != (new := _as_begun(dotted, old, new)):",
        "elif old != (new := _as_begun(dotted, old, new)) and False:",
    ),
    Mutant(
        "X1",
        "tests/show/test_guard_attacked.py",
        "show/guard.py",
        "if host is None or host[1] not in self.allowed:",
        "if host is None:",
    ),
    Mutant(
        "X2",
        "tests/search/test_study.py::test_names_that_no_folder_should_have",
        "search/study.py",
        "    if not NAME.fullmatch(name):",
        "    if not name:",
    ),
    Mutant(
        "X3",
        f"{CHECKPOINT}::test_a_hostile_pickle_runs_no_code",
        "learn/checkpoint.py",
        '    with safetensors.safe_open(path, "pt") as opened:\n',
        '    with contextlib.suppress(Exception):\n        __import__("pickle").loads(path.read_bytes())\n'
        '    with safetensors.safe_open(path, "pt") as opened:\n',
    ),
    Mutant(
        "X3",
        f"{DATASETS}::test_a_hostile_file_runs_no_code",
        "learn/datasets.py",
        "hexdigest()) != expected:",
        "hexdigest()) == 0:",
    ),
    Mutant(
        "X4",
        "tests/test_canary.py",
        "home.py",
        '        return match[1] + match[2]\n    return f"{uri.partition',
        '        return uri\n    return f"{uri.partition',
    ),
    Mutant(
        "C1",
        "tests/test_simulation.py::test_schedules",
        "coordinator.py",
        "self.asked < self.trials and",
        "self.asked <= self.trials and",
    ),
    Mutant(
        "C2",
        f"{COORDINATOR}::test_the_same_search_again_trains_nothing_and_three_more_trials_are_three",
        "coordinator.py",
        "self.asked = len(stored.trials)",
        "self.asked = 0",
    ),
    Mutant(
        "C3",
        f"{COORDINATOR}::test_a_second_coordinator_is_refused_while_the_first_goes_on",
        "search/lock.py",
        "        lock.acquire(timeout=0)\n",
        "",
    ),
    Mutant(
        "V1",
        "tests/test_older_home.py",
        "records.py",
        "                for upgrade in cls.upgrades[number - 1 :]:\n",
        "                for upgrade in ():\n",
    ),
    Mutant(
        "V1",
        "tests/test_older_home.py",
        "search/storage.py",
        "isinstance(shown.get(key), dict) and key not in attrs}",
        "False}",
    ),
)


def reason(folder: Path, test: str) -> str:
    """Why a test fails: its first lines of errors. Empty if it passes."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", "-m", "not nightly", "-p", "no:cacheprovider", test],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout[-3000:]
    errors = [line[1:].strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    return " ".join(errors[:2])[:200] or "fails" if done.returncode else ""


def main() -> None:
    """Exits with 1 unless each test passes, then fails; with a text for rows that are unknown."""
    rows = sys.argv[1:] or [mutant.row for mutant in MUTANTS]
    if unknown := set(rows) - {mutant.row for mutant in MUTANTS}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; rows are {', '.join(dict.fromkeys(m.row for m in MUTANTS))}")
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("tests", "studies", "docker", ".github", ".ci"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, folder)
        for mutant in MUTANTS:
            if mutant.row not in rows:
                continue
            shutil.rmtree(folder / "searchfm", ignore_errors=True)
            shutil.copytree(ROOT / "searchfm", folder / "searchfm", ignore=shutil.ignore_patterns("__pycache__"))
            before = reason(folder, mutant.test)
            path = folder / "searchfm" / mutant.file
            path.write_text(mutant.apply(path.read_text("utf-8")), "utf-8")
            after = reason(folder, mutant.test)
            wrong += bool(before) or not after
            shown = f"FAILS ({before})" if before else "passes"
            print(f"{mutant.row} {mutant.test}: {shown}, then {after or 'PASSES'}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
