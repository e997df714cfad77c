"""The formats of exported models, and the file that an export writes. No torch: a mistake is refused at once."""

from collections.abc import Callable
from pathlib import Path

from searchfm.errors import UserError, one_of

FORMATS = ("onnx", "pt2", "safetensors")


def target(kind: str | None, output: str | None) -> Callable[[str], Path]:
    """The file for a model of a name, in the format that `--format` and `--output` name. A folder that ends with a
    slash is made. Raises UserError.
    """
    path = Path(output or "")
    made = bool(output) and str(output).endswith("/")
    folder = path.is_dir() or made
    kind = kind or ("" if folder else path.suffix.removeprefix(".")) or "onnx"
    if kind not in FORMATS:
        raise UserError(f"format {kind!r}: must be one of {one_of(kind, FORMATS)}")
    if not folder and path.suffix != f".{kind}":
        raise UserError(f"--output {path}: must be a folder (a new one ends with /), or end in .{kind}")
    if made and not (path.is_dir() or (path.parent.is_dir() and not path.exists())):
        raise UserError(f"--output {output}: cannot be made, there is no folder {path.parent}")

    def file(name: str) -> Path:
        if made:
            path.mkdir(exist_ok=True)
        return path / f"{name}.{kind}" if folder else path

    return file
