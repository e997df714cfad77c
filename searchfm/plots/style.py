"""What all pictures share: colours, a blank figure, plain axes, and the ways out to a file and to a page.

Every trial is drawn, so time counts: figures are laid out by hand, since `tight_layout`, `constrained_layout` and
titles that look for their own height (`y=None`) each cost as much as drawing.
"""

import io
import re
import warnings

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 110

# One meaning, one colour, in every figure.
INK = "#1f2933"
SOFT = "#52606d"
QUIET = "#9aa5b1"
TRAIN = "#8fb3d9"
VALIDATION = "#1f5fa8"
MARK = "#d1495b"


def blank(width: float, height: float) -> Figure:
    """A white figure, in inches, that needs no pyplot."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes, title: str) -> None:
    """Axes without ornaments, named at the upper left."""
    axes.set_title(title, loc="left", y=1.0, pad=4, color=INK, fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)


def short(name: str, most: int = 24) -> str:
    """A name, whatever is in it, on one line of at most so many characters."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= most else name[: most - 1] + "…"


def percent(share: float, _: object = None) -> str:
    """A share as a tick says it."""
    return f"{100 * share:.4g}%"


def png(figure: Figure) -> bytes:
    """The figure as a PNG. Little compression: a trial's pictures are small, and time is what they cost."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands for it
        figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def svg(figure: Figure, salt: str) -> str:
    """The figure as an element of a page, its texts as texts. salt: unique in the page; it goes into the inner ids.

    Of the ids that artists were given (`gid`), those that begin with `trial-` stay.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser has other fonts
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    # Groups are numbered from 1 in every figure, and nobody refers to them.
    return re.sub(r' id="(?!trial-)[a-z][\w.]*_\d+"', "", text)
