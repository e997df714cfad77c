"""Self-contained pages: style, script, pictures and texts in one file that opens anywhere, offline.

Names come from users and folders, and go into a page as text alone: templates escape what they are given, and the
page's own policy lets no script run but ours, and nothing be fetched from anywhere.
"""

import base64
import hashlib
import io
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

import searchfm
from searchfm.errors import UserError

LARGEST = 96  # side in pixels of an image of the data in a page


def render(template: str, trials: Mapping[str, str], **values: Any) -> str:
    """A page from a template of `pages/`. trials: what a trial's number stands for, told under the pointer."""
    script, style = _text("page.js"), _text("page.css")
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{fingerprint}'"
    own = {"policy": policy, "script": Markup(script), "style": Markup(style), "version": searchfm.__version__}
    return _templates().get_template(template).render(**own, trials=dict(trials), **values)


def drawn(svg: str) -> Markup:
    """A picture that `plots` made, to be put into a page as it is: its texts are escaped already."""
    return Markup(svg)


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image (C, H, W) uint8 of the data, as what an `img` shows: grey, or colours where there are three channels.

    Larger ones are made smaller, to a side of 96 pixels at most.
    """
    pixels = image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((LARGEST, LARGEST))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def write(path: Path, content: str | bytes) -> None:
    """Writes a page or a picture, whole or not at all, making its folder. Raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.tmp")
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("searchfm.show", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    return (files("searchfm.show") / "pages" / name).read_text("utf-8")
