"""What the models of a study cost, counted once and kept in the cache folder: to count takes torch, and 4 s of CPU."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from searchfm.config import Config, Shape
from searchfm.errors import StorageError
from searchfm.home import cache_folder, write_json
from searchfm.tables import digest

MODELS = Path(__file__).parent / "models"


def kept_costs(configs: Sequence[Config], shape: Shape, classes: int) -> dict[str, tuple[int, int]]:
    """Minimum and maximum cost over the configs, as `models.costs` counts them; not for the user's code, which may
    change.

    shape: of an image, (C, H, W). Kept by configs, shape, classes, and the code that makes models: ours, torch, timm.
    """
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(MODELS.glob("*.py")))).hexdigest()
    code = {"models": sources, "torch": version("torch"), "timm": version("timm")}
    tables = [config.to_table()["model"] for config in configs]
    key = digest({"configs": tables, "shape": list(shape), "classes": classes, **code})
    path = cache_folder() / "costs" / f"{key[:32]}.json"
    with suppress(OSError, ValueError, TypeError):
        return {name: (int(low), int(high)) for name, (low, high) in json.loads(path.read_text()).items()}
    from searchfm.learn.models import costs

    counted = costs(configs, shape, classes)
    with suppress(StorageError, OSError):  # a cache alone
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, counted)
    return counted
