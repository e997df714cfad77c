"""Self-contained pages: style, script, figures and texts in one file that opens anywhere, offline.

Names come from users and folders, and go into a page as text alone: templates escape all values, and the page's own
policy runs no script but ours, and fetches nothing.
"""

import base64
import hashlib
import io
import re
from functools import cache
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from searchfm import __version__, figures
from searchfm.format import data_lines, megaflop, p_value, seconds, show_params, state, states

LARGEST = 96  # side in pixels of an image of the data in a page


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder. Of the values, `tips` are texts by trial number, shown as tooltips."""
    script = _templates().get_template("page.js").render()
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{fingerprint}'"
    page = _templates().get_template(template)
    return page.render(policy=policy, script=Markup(script), version=__version__, **values)


def embed(figure: Any, name: str) -> Markup:
    """A figure as an element of a page, its texts escaped. name: unique in the page."""
    return Markup(figures.svg(figure, name))


def unbroken(text: str) -> Markup:
    """The text as an element of a page, in which a line does not end inside an option such as `--set data.size=64`."""
    return Markup(re.sub(r"--\S+( \S+=\S+)?", r'<span class="unbroken">\g<0></span>', str(escape(text))))


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image (C, H, W) uint8 of the data as the source of an `img`: grey, or in colour with three channels.

    A larger image is scaled down to a side of 96 pixels.
    """
    pixels = image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((LARGEST, LARGEST))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("searchfm.show", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (data_lines, embed, megaflop, p_value, seconds, show_params, state, states, unbroken)
    templates.filters |= {function.__name__: function for function in functions}
    return templates
