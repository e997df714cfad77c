"""From what a person calls a model to its files: a study's champion, a version in MLflow's registry, or a file."""

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchfm.errors import ModelError, StorageError, StudyError
from searchfm.home import Home
from searchfm.search.history import StudyRow
from searchfm.search.storage import load_study, open_storage
from searchfm.tracking import record
from searchfm.tracking.client import connect, database, reaching, shown

log = logging.getLogger("searchfm")

CHAMPION = "champion"
FILES = "extra_files"  # where MLflow keeps files beside a model of its own format
SUFFIXES = (".onnx", ".safetensors")
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's words for a model that is not there


@dataclass(frozen=True)
class Found:
    """A model's files."""

    name: str  # what files made of it are called
    path: Path  # an exported file, or a folder with weights.safetensors and model.json


@contextmanager
def find(home: Home, model: str) -> Iterator[Found]:
    """The files of a model while the body runs; its weights are those that were registered, by their hash.

    model: the name of a study (its champion), `models:/NAME@ALIAS`, `models:/NAME/VERSION`, an exported file, or a
    folder with weights.safetensors and model.json, as trials leave them.
    Raises StudyError for a study that is unknown or was not retrained, ModelError for what is not there or damaged,
    StorageError where MLflow cannot be reached.
    """
    path = Path(model)
    if model.startswith("models:"):
        version = _version(home, model)
        with _fetched(home, version, model) as folder:
            yield Found(version.name, folder)
    elif path.suffix in SUFFIXES or path.is_file():
        yield Found(path.stem, path)
    elif (path / record.WEIGHTS[1]).is_file():
        here = path.absolute()
        yield Found(here.parent.name if here.name == "final" else f"{here.parent.name}-{here.name}", path)
    else:
        study = load_study(open_storage(home), home, path.name)
        with _champion(home, study) as folder:
            yield Found(study.name, folder)


@contextmanager
def _champion(home: Home, study: StudyRow) -> Iterator[Path]:
    """The version that wears the alias, which may be older than the final model; that one where MLflow says nothing."""
    if study.final is None:
        raise StudyError(
            f"study {study.name!r}: was not retrained, so it has no model; first: searchfm retrain {study.name}"
        )
    folder, ours = study.folder / "final", study.final["weights"]
    uri = f"models:/searchfm-{study.name}@{CHAMPION}"
    try:
        version = _version(home, uri)
    except (ModelError, StorageError) as error:
        log.warning("%s; %s is used instead", error, folder)
        version = None
    if version is None or version.tags.get("weights") == ours:
        _check(folder, ours)
        yield folder
    elif version.tags.get("fingerprint") != study.data["fingerprint"]:
        # Homes that share a server of MLflow share its names too.
        raise ModelError(
            f"{uri}: version {version.version} was trained on other data than study {study.name!r} here; "
            f"may be {folder}, models:/searchfm-{study.name}/VERSION, or first: searchfm retrain {study.name} --promote"
        )
    else:
        with _fetched(home, version, uri) as fetched:
            yield fetched


def _version(home: Home, uri: str) -> Any:
    """MLflow's record of a registered version."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise ModelError(f"{uri}: must be models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    where = f"MLflow at {shown(home.tracking_uri)}"
    if (file := database(home)) is not None and not file.is_file():
        raise ModelError(f"{uri}: {where} is not there yet; begin with `searchfm tune`, or name another --home")
    with reaching(home):
        client = connect(home)
        try:
            return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        except Exception as error:
            if getattr(error, "error_code", None) in _UNKNOWN:
                raise ModelError(f"{uri}: {where} has no such model") from None
            raise


@contextmanager
def _fetched(home: Home, version: Any, uri: str) -> Iterator[Path]:
    """A folder with the files of a version, copied from wherever MLflow keeps them."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    with tempfile.TemporaryDirectory(prefix="searchfm-") as place:
        with reaching(home):
            source = f"{connect(home).get_model_version_download_uri(version.name, version.version)}/{FILES}"
            there = {item.path.rpartition("/")[2] for item in list_artifacts(source, tracking_uri=home.tracking_uri)}
            if there.issuperset(record.WEIGHTS):
                download_artifacts(source, dst_path=place, tracking_uri=home.tracking_uri)
        if not there.issuperset(record.WEIGHTS):
            wanted = " and ".join(record.WEIGHTS)
            raise ModelError(
                f"{uri}: version {version.version} carries no {wanted}; must be one that `searchfm retrain` registered"
            )
        folder = Path(place) / FILES
        _check(folder, version.tags.get("weights"))
        yield folder


def _check(folder: Path, expected: str | None) -> None:
    path = folder / record.WEIGHTS[0]
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if expected is not None and found != expected:
        raise ModelError(f"{path}: damaged, its sha256 is {found[:12]}..., not {expected[:12]}...")
