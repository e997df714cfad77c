"""The pytest plugin of `.ci/run --nightly`: writes each nightly test that passed into .github/NIGHTLY.md.

Tests give their figures with `record_property("figures", text)`. The row of a test that failed does not change, so its
date is when it last passed.
"""

import datetime
import os
import platform
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / ".github" / "NIGHTLY.md"
HEAD = """# Nightly tests

`bash .ci/run --nightly` writes this page, and nothing else does. A test passed on the date of its row, at that commit.

| test | passed | commit | machine | seconds | figures |
|---|---|---|---|---|---|
"""
ROW = re.compile(r"^\| `(.+?)` \|.*\|$", re.MULTILINE)

_seconds: Counter[str] = Counter()
_figures: dict[str, str] = {}


def _commit() -> str:
    """The commit under test; `+` where files other than pages differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!.github/*.md")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


COMMIT = _commit()  # at the start: a checkout may move on while tests run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if report.when == "call" and report.passed:
        properties = dict(report.user_properties)
        assert "figures" in properties, f"{report.nodeid} records no figures"
        _figures[report.nodeid] = str(properties["figures"])
    elif report.failed:  # the teardown, too
        _figures.pop(report.nodeid, None)


def pytest_sessionfinish() -> None:
    if not _figures:
        return
    rows = {row[1]: row[0] for row in ROW.finditer(PAGE.read_text("utf-8"))} if PAGE.exists() else {}
    today = datetime.datetime.now(datetime.UTC).date()
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    for test, figures in _figures.items():
        facts = (f"`{test}`", today, COMMIT, machine, f"{_seconds[test]:.0f}", figures)
        rows[test] = "| " + " | ".join(str(fact).replace("|", "/") for fact in facts) + " |"
    PAGE.write_text(HEAD + "".join(f"{rows[test]}\n" for test in sorted(rows)), "utf-8")
