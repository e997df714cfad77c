"""Rows to figures, without pyplot's global state: one function a picture, for tracking and for everything that shows.

A function takes plain rows or arrays and returns a `Figure`; `png` makes a file's bytes of it, `svg` a part of a page.
"""

from searchfm.plots.front import Measured, front
from searchfm.plots.study import factor, history, importance, parallel, progress, ranking, survival
from searchfm.plots.style import png, svg
from searchfm.plots.trial import PREDICTIONS, confusion, curves, draw, read_predictions

__all__ = [
    "PREDICTIONS",
    "Measured",
    "confusion",
    "curves",
    "draw",
    "factor",
    "front",
    "history",
    "importance",
    "parallel",
    "png",
    "progress",
    "ranking",
    "read_predictions",
    "survival",
    "svg",
]
