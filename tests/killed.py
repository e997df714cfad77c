"""Coordinators killed at a given write: `main` reads one JSON object a line, runs its search in a child process, and
prints the child's exit status.

A write is a statement that changes the database, or a change to a file below `studies/`; the kill comes just before it.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import sqlalchemy

from searchfm.home import Home
from searchfm.search.storage import open_storage
from tests.driving import let_go, search, toy

FILES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class KillAt:
    """Counts writes, and kills this process before number `at`."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, 0

    def write(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Starts counting, in this process."""

        def on_statement(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
            if not text.lstrip().upper().startswith(("SELECT", "PRAGMA")):
                self.write()

        def on_call(name: str, arguments: tuple[Any, ...]) -> None:
            opened = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
            if (opened or name in FILES) and "/studies/" in os.fsdecode(str(arguments[0])):
                self.write()

        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", on_statement)
        sys.addaudithook(on_call)


def run(spec: dict[str, Any]) -> None:
    kill = KillAt(spec.get("die_at"))
    kill.watch()
    search(Home(Path(spec["home"])), toy(**spec["tables"]), workers=spec["workers"], payload=spec.get("payload"))
    Path(spec["home"], "writes").write_text(str(kill.seen))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # imports happen once, before any child is forked
        let_go(open_storage(Home(Path(folder)), create=True))
    for line in sys.stdin:
        spec = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                run(spec)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
