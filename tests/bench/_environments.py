"""Environments of the peers, in the user's cache folder: made by uv at the first use, kept while what they need stays.

Packages that searchfm has too are of the same version, and on the disk once: uv links files from its cache.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import platformdirs

from tests.bench import _common as common

COMPLETE = "complete.json"  # what was installed; written last


@dataclass(frozen=True)
class Environment:
    """Requirements; `shared` packages in searchfm's own version; the variables of its processes."""

    requirements: tuple[str, ...]
    shared: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def packages(self) -> list[str]:
        return [*self.requirements, *(f"{name}=={version(name).partition('+')[0]}" for name in self.shared)]


ENVIRONMENTS = {
    "searchfm": Environment(()),  # the one that runs the bench: it has all that Optuna's example needs
    "keras-tuner": Environment(
        ("keras-tuner>=1.4.8", "tensorflow-cpu>=2.21", "tensorboard>=2.20"), variables={"KERAS_BACKEND": "tensorflow"}
    ),
    "ray": Environment(("ray[tune]>=2.60", "psutil>=6.0"), ("torch", "torchvision")),
}


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made unless it is complete. Ends the bench where that fails."""
    environment = ENVIRONMENTS[name]
    if not environment.requirements:
        return Path(sys.executable)
    folder = Path(platformdirs.user_cache_dir("searchfm-bench")) / name
    packages, marker, python = environment.packages, folder / COMPLETE, folder / "bin" / "python"
    if not marker.is_file() or json.loads(marker.read_text()) != packages:
        common.progress(f"makes the environment {folder} with {', '.join(packages)}")
        _uv("venv", "--clear", "--python", sys.executable, str(folder))
        _uv("pip", "install", "--compile-bytecode", "--python", str(python), *packages)
        marker.write_text(json.dumps(packages))
    return python


def _uv(*arguments: str) -> None:
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv is needed to make the environments of the peers: it must be on PATH")
    result = subprocess.run([uv, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()[-8:]
        hint = "The environment of this peer needs a package registry, once; --peer optuna needs none."
        sys.exit("\n".join([f"uv {' '.join(arguments)} ended with {result.returncode}:", *lines, hint]))
