"""What is being done, with the seconds it has taken, from a command's first moment on; below it a view of a search.

Imports nothing but rich, so that it can show that torch, Optuna or MLflow are being imported.
"""

import io
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any, Protocol, Self, TextIO, TypeVar, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

Ended = TypeVar("Ended")

REFRESH_SECONDS = 0.25
SLOW_SECONDS = 2.0  # of a phase that gets a line where there is no live region
SLOW_IMPORTS = ("optuna", "torch", "mlflow", "matplotlib", "sklearn", "timm", "ray")
NOTEBOOK_WIDTH = 110  # characters
UNLIMITED = 1000  # characters: a file or a pipe has every row whole, whatever COLUMNS is


class View(Protocol):
    """What shows the events of a search or a final training."""

    def update(self, event: Any, /) -> None:
        """Takes an event, and prints lines that stay."""

    def render(self) -> RenderableType:
        """The state, for the live region."""


class Region:
    """A live region of a terminal or a notebook, while it is entered.

    lines: whether a phase of more than two seconds gets a line where the output is neither. redirect: whether what
    others print comes above the region.
    """

    def __init__(self, console: Console, text: str = "starting", *, lines: bool = False, redirect: bool = True) -> None:
        self.console = console
        self.view: View | None = None
        self._lines = lines and not console.is_terminal and not _in_notebook()
        self._timer = threading.Timer(0, lambda: None)
        self._text, self._began, self._spinner = text, time.monotonic(), Spinner("dots")
        self._live: Live | _Cell
        if _in_notebook():
            self._live = _Cell(self.render)
        else:
            self._live = Live(
                get_renderable=self.render,
                console=console,
                refresh_per_second=1 / REFRESH_SECONDS,
                transient=True,
                redirect_stdout=redirect,
                redirect_stderr=redirect,
            )

    def __enter__(self) -> Self:
        self._live.__enter__()
        self._live.refresh()  # at once: rich waits until the next of its regular times
        return self

    def __exit__(self, *error: Any) -> None:
        self._timer.cancel()
        self._live.__exit__(*error)

    def phase(self, text: str) -> None:
        """Shows what is being done from now on; nothing: no phase."""
        self._text, self._began = text, time.monotonic()
        self._timer.cancel()
        if text and self._lines:
            self._timer = threading.Timer(SLOW_SECONDS, self.console.print, [Text(text, "dim")])
            self._timer.daemon = True
            self._timer.start()

    @property
    def lock(self) -> Any:
        """Held while lines are printed above the region. If rich's thread draws the region while a line is on its way,
        and its height has changed, lines above it are erased: 16 of 400 with a height that changes each time.
        """
        return self._live._lock if isinstance(self._live, Live) else nullcontext()

    def render(self) -> RenderableType:
        """The view, and below it the phase."""
        parts: list[RenderableType] = [] if self.view is None else [self.view.render()]
        if self._text:
            seconds = int(time.monotonic() - self._began)
            text = " · ".join([self._text, *(f"importing {name}" for name in _importing())])
            self._spinner.update(text=Text(f"{text}{f'  {seconds} s' if seconds else ''}"))
            parts.append(self._spinner)
        return Group(*parts)


def _importing() -> list[str]:
    """The slow libraries that are being imported."""
    specs = {name: getattr(sys.modules.get(name), "__spec__", None) for name in SLOW_IMPORTS}
    return [name for name, spec in specs.items() if getattr(spec, "_initializing", False)]


class Status:
    """A line on standard error with what is being done and the seconds, which the first output of the command ends.

    Nothing without a text, and where the output is no terminal, since a program may read it.
    """

    def __init__(self, text: str) -> None:
        self._region: Region | None = None
        if text and sys.stdout.isatty() and sys.stderr.isatty():
            self._streams = sys.stdout, sys.stderr
            self._region = Region(Console(file=sys.stderr, highlight=False), text, redirect=False).__enter__()
            sys.stdout, sys.stderr = (cast(TextIO, _First(stream, self.end)) for stream in self._streams)

    def end(self) -> None:
        """Removes the line."""
        region, self._region = self._region, None
        if region is not None:
            sys.stdout, sys.stderr = self._streams
            region.__exit__(None, None, None)


class _First:
    """A stream whose first output is announced."""

    def __init__(self, stream: TextIO, announce: Callable[[], None]) -> None:
        self._stream, self._announce = stream, announce

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "writelines", "buffer"):
            self._announce()
        return getattr(self._stream, name)


def follow(
    console: Console | None,
    events: Generator[Any, None, Ended],
    view_of: Callable[[Console, Any, View | None], View | None],
) -> Ended:
    """Shows events until they end; returns what their generator returns. console: None shows nothing.

    view_of: called with each event and the view so far, returns the view that this event updates.
    """
    with Region(console, lines=True) if console else nullcontext() as region:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                ended: Ended = end.value
                return ended
            if region is not None:
                with region.lock:
                    region.phase(event.text if event.kind == "phase" else "")
                    region.view = view_of(region.console, event, region.view)
                    if region.view is not None:
                        region.view.update(event)


def open_console(*, stderr: bool = False) -> Console:
    """Standard output or error; in a notebook as plain lines."""
    if _in_notebook():
        return Console(highlight=False, force_jupyter=False, force_terminal=False, width=NOTEBOOK_WIDTH)
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)  # a path stays whole, for the terminal to wrap
    if not console.file.isatty():
        console.width = UNLIMITED
    return console


def notify(*lines: str) -> None:
    """Lines for the user, on standard error."""
    for line in lines:
        print(f"searchfm: {line}", file=sys.stderr, flush=True)


def _in_notebook() -> bool:
    return Console().is_jupyter


class _Cell:
    """A live region below a notebook's cell. rich's own needs ipywidgets, and shows nothing without them."""

    def __init__(self, render: Callable[[], RenderableType]) -> None:
        self._render, self._html, self._ended = render, "", threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="progress", daemon=True)

    def __enter__(self) -> Self:
        from IPython.display import HTML, display

        self._handle = display(HTML(""), display_id=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._show("")

    def _refresh(self) -> None:
        while not self._ended.wait(2 * REFRESH_SECONDS):
            self.refresh()

    def refresh(self) -> None:
        """Shows the state as it is now."""
        page = Console(file=io.StringIO(), record=True, width=NOTEBOOK_WIDTH, force_jupyter=False, highlight=False)
        page.print(self._render())
        self._show(page.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))

    def _show(self, html: str) -> None:
        from IPython.display import HTML

        if html != self._html:
            self._html = html
            self._handle.update(HTML(html))
