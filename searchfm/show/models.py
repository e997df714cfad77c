"""What `predict` and `export` print."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from searchfm.show.terminal import _table

if TYPE_CHECKING:
    from searchfm.learn.export import Exported
    from searchfm.learn.predict import Prediction


def describe_prediction(row: "Prediction", top: int) -> dict[str, Any]:
    """What a model said of an image as plain values: what `predict --json` prints."""
    if row.error:
        return {"image": row.image, "error": row.error}
    ranked = [{"class": name, "probability": round(share, 6)} for name, share in row.top]
    return {"image": row.image, **ranked[0], **({"top": ranked} if top > 1 else {})}


def prediction_csv(rows: "Sequence[Prediction]", top: int) -> str:
    """A line an image: the likeliest classes, each with its probability, or why there are none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = ["", *(f"_{place}" for place in range(2, top + 1))]
    writer.writerow(["image", *(f"{word}{number}" for number in numbers for word in ("class", "probability")), "error"])
    for row in rows:
        cells = [cell for name, share in row.top for cell in (name, f"{share:.6f}")]
        writer.writerow([row.image, *cells, *[""] * (2 * top - len(cells)), row.error])
    return text.getvalue()


def prediction_table(rows: "Sequence[Prediction]", top: int) -> Table:
    """A line an image: its class and how probable that is, then the next ones."""
    table = _table("image", "class", "probability", *(["then"] if top > 1 else []))
    for row in rows:
        if row.error:
            table.add_row(escape(row.image), Text(f"cannot be read: {row.error}", "red"))
            continue
        (name, share), *rest = row.top
        then = [escape(", ".join(f"{other} {part:.4f}" for other, part in rest))] if top > 1 else []
        table.add_row(escape(row.image), escape(name), f"{share:.4f}", *then)
    return table


def describe_export(done: "Exported") -> dict[str, Any]:
    """An exported file as plain values: what `export --json` prints, the model's name apart."""
    return {"format": done.format, "path": str(done.path), "bytes": done.bytes, "difference": done.difference}


def show_export(console: Console, done: "Exported") -> None:
    """What `export` wrote, and how near it is to the model."""
    console.print(
        f"{escape(str(done.path))}: {done.bytes:,} bytes; largest difference of a probability {done.difference:.1e}",
        highlight=False,
        soft_wrap=True,
    )
