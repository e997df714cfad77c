"""Makes the pictures of README.md from a real search, in about two minutes on two cores: python -m tests.pictures.

Needs tmux, whose screen is the picture of the terminal, and Chromium, which draws the pages.
"""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from searchfm.home import HOME, STORAGE, TRACKING, Home
from tests.programs import screenshot
from tests.serving import Served

FOLDER = Path(__file__).parents[1] / ".github" / "images"
STUDY, TRIALS = "mlp", 12
TUNE = ["tune", STUDY, "--trials", str(TRIALS), "--subset", "0.1", "--epochs", "3"]  # README's first command
COLUMNS, LINES = 104, 30
PAGE, SCALE = (1400, 1050), 6 / 7  # CSS pixels, and pixels of a picture for each of them
COLOURS = 256  # of a picture of a page, so that it takes 30 to 70 kB
# Else there is no pointer that hovers, and plotly draws its buttons over each figure.
MOUSE = "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"


def near_the_end(home: Home) -> str:
    """Searches in a terminal. Returns the last screen before the last two trials ended, with its ANSI codes."""
    tmux = [
        "tmux",
        "-L",
        f"searchfm-{os.getpid()}",
        "-f",
        "/dev/null",
    ]  # a server of our own, without a user's settings
    options = ["set", "-g", "status", "off", ";", "set", "-g", "default-terminal", "tmux-256color", ";"]
    session = ["new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES)]
    command = shlex.join([sys.executable, "-m", "searchfm", *TUNE])
    environment = {**os.environ, HOME: str(home.path), "COLORTERM": "truecolor"}
    subprocess.run([*tmux, "start-server", ";", *options, *session, command], env=environment, check=True)
    last = ""
    while True:  # until the command ends, and with it the server
        captured = subprocess.run([*tmux, "capture-pane", "-e", "-p"], capture_output=True, text=True)
        if captured.returncode:
            break
        shown = Text.from_ansi(captured.stdout).plain
        ended = f"{TRIALS - 1}/{TRIALS} trial" in shown  # its row precedes the bar's next refresh
        if re.search(rf"^trials .* {TRIALS - 2}/{TRIALS} ", shown, re.MULTILINE) and not ended:
            last = captured.stdout
        time.sleep(0.1)
    assert last, f"{command}: no screen shows {TRIALS - 2} trials"
    return last


def svg(screen: str, title: str) -> str:
    """A screen with ANSI codes as SVG, which loads nothing and whose box characters join in any font."""
    console = Console(width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor", record=True)
    console.print(Text.from_ansi(screen.rstrip()), "", sep="\n", soft_wrap=True)  # an SVG cuts off its last line's _
    drawn = console.export_svg(title=title, unique_id="searchfm")
    drawn = re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # fonts of a web server
    drawn = drawn.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")
    return drawn.replace("textLength=", 'lengthAdjust="spacingAndGlyphs" textLength=')


def draw(address: str, name: str) -> None:
    """Draws a page into a small PNG."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        screenshot(address, picture, MOUSE, f"--force-device-scale-factor={SCALE}", size=PAGE)
        with Image.open(picture) as drawn:
            # Other methods lose rare colours or the greys: a channel is off by 38 to 95 of 255, with this one by 12.
            few = drawn.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
            few.save(FOLDER / name, optimize=True)


def main() -> None:
    """Searches, retrains, and writes all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name in (STORAGE, TRACKING):  # not the user's databases
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        (FOLDER / "terminal.svg").write_text(svg(near_the_end(home), f"searchfm {shlex.join(TUNE)}"), "utf-8")
        for command in ("retrain", "report"):
            subprocess.run([sys.executable, "-m", "searchfm", command, STUDY, "--home", folder], check=True)
        draw((home.study(STUDY) / "report.html").as_uri(), "report.png")
        served = Served(home)
        try:
            draw(served.dashboard, "optuna-dashboard.png")
            draw(served.mlflow, "mlflow.png")
        finally:
            served.end(signal.SIGTERM)


if __name__ == "__main__":
    main()
