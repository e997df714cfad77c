"""What optuna-dashboard shows beside its own: a note and pictures for each trial that ended, a note for the study.

Optuna takes no attributes for a trial that has ended, so the dashboard's notes and artifacts stand in attributes of the
study, under keys that hold the trial's id: `dashboard:ID:note_str:0`, `dashboard:artifacts:ID:ARTIFACT`. Artifact ids
are made from the study's uuid, so that writing again changes nothing.
"""

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from optuna.storages import BaseStorage

from searchfm.home import Home
from searchfm.search.history import StudyRow, TrialRow
from searchfm.search.storage import open_storage

PICTURES = ("curves.png", "confusion.png")
LONGEST = 2045  # characters that the dashboard puts in one attribute
NOTED = 500  # trials: the dashboard looks through all notes for every trial it lists (1,000: 2 s a page, 2,000: 7 s)
VIEW = "searchfm"  # the view that the table opens with
MODE = "workflowType=machine_learning"  # else MLflow shows its pages for chat traces
HERE = "/mlflow"  # `searchfm dashboard` leads this path of optuna-dashboard on to where MLflow's pages are just now


@dataclass(frozen=True)
class Links:
    """Where a study's pages in MLflow are: the ids of its experiment and runs, as far as they are there."""

    experiment: str | None
    parent: str | None
    runs: Mapping[int, str]

    def table(self) -> str:
        """Path of the study's table, opened with the useful columns, sorted; append it to the server's address."""
        return f"/#/experiments/{self.experiment}/runs?{MODE}&viewStateShareKey={VIEW}"

    def run(self, number: int) -> str:
        """Path of a trial's page."""
        return f"/#/experiments/{self.experiment}/runs/{self.runs[number]}?{MODE}"


class Notes:
    """Writes a study's notes through a storage of its own, which it opens when first asked. For one thread."""

    def __init__(self, home: Home, study: StudyRow) -> None:
        self._home, self._uuid, self._number = home, study.uuid, study.number
        self._opened: BaseStorage | None = None
        self._written: dict[str, Any] = {}  # attributes as last seen or written
        self._base = web_address(home.tracking_uri) or HERE

    def has(self, row: TrialRow) -> bool:
        """Whether the trial has its note, or never gets one."""
        if row.number >= NOTED:
            return True
        storage = self._storage
        return f"dashboard:{self._id(storage, row)}:note_ver" in self._written

    def trial(self, row: TrialRow, links: Links) -> None:
        """The note and the pictures of a trial that has ended. Raises what the storage raises."""
        if row.number >= NOTED:
            return
        storage = self._storage
        trial_id = self._id(storage, row)
        pictures = [row.folder / name for name in PICTURES if (row.folder / name).is_file()]
        shown = []
        for path in pictures:
            artifact = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self._uuid}/{row.number}/{path.name}"))
            target = artifact_folder(self._home) / artifact
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".tmp")
            shutil.copyfile(path, partial)
            partial.replace(target)
            meta = {"artifact_id": artifact, "filename": path.name, "mimetype": "image/png", "encoding": None}
            self._set(f"dashboard:artifacts:{trial_id}:{artifact}", json.dumps(meta))
            shown.append(f"![{path.stem}](/artifacts/{self._number}/{trial_id}/{artifact})")
        link = f"[This trial in MLflow]({self._link(links.run(row.number))})" if row.number in links.runs else ""
        self._note(str(trial_id) + ":", "\n\n".join([*trial_lines(row), link, *shown]))

    def study(self, study: StudyRow, links: Links) -> None:
        """The study's note: its question, its data, where it stands. Raises what the storage raises."""
        # Afresh each time: somebody may just have edited it.
        self._written |= self._storage.get_study_system_attrs(self._number)
        link = f"[All trials in MLflow]({self._link(links.table())})" if links.experiment else ""
        self._note("", "\n\n".join([*study_lines(study), link]))

    @property
    def _storage(self) -> BaseStorage:
        if self._opened is None:
            self._opened = open_storage(self._home)
            self._written = dict(self._opened.get_study_system_attrs(self._number))
        return self._opened

    def _id(self, storage: BaseStorage, row: TrialRow) -> int:
        return storage.get_trial_id_from_study_id_trial_number(self._number, row.number)

    def _note(self, prefix: str, body: str) -> None:
        """Version 1 is ours; a person who edits a note in the dashboard makes version 2, which we leave alone."""
        version = f"dashboard:{prefix}note_ver"
        if self._written.get(version, 1) != 1:
            return
        self._set(version, 1)
        self._set(f"dashboard:{prefix}note_str:0", body[:LONGEST])

    def _set(self, key: str, value: Any) -> None:
        storage = self._storage
        if self._written.get(key) != value:
            storage.set_study_system_attr(self._number, key, value)
            self._written[key] = value

    def _link(self, path: str) -> str:
        return self._base + (path if self._base != HERE else path.removeprefix("/#"))


def trial_lines(row: TrialRow) -> list[str]:
    """A trial in a few lines of Markdown."""
    result = row.result
    epochs = f"{len(row.epochs)} epoch{'s' * (len(row.epochs) != 1)}"
    end = f"**{row.state}**"
    if row.value is not None:
        end += f": {row.value:.2%} of the validation part right after {epochs}"
    elif row.reported:
        end += f" after {epochs} with {list(row.reported.values())[-1]:.2%}"
    if row.twin is not None:
        end += f" (not trained again: its config equals that of trial {row.twin})"
    facts = []
    if result.get("best_epoch"):
        best = max(row.reported.values(), default=0.0)
        facts.append(f"best epoch {result['best_epoch']} ({best:.2%})")
    if "parameters" in result:
        facts.append(f"{result['parameters']:,} parameters")
    if result.get("flops"):
        facts.append(f"{result['flops'] / 1e6:,.2f} MFLOP a sample")
    if row.epochs:
        facts.append(f"{sum(epoch.seconds for epoch in row.epochs):.1f} s of training")
    if row.attempts > 1:
        facts.append(f"{row.attempts} attempts")
    lines = [end, " · ".join(facts), escape(row.reason or "")]
    return [line for line in lines if line]


def study_lines(study: StudyRow) -> list[str]:
    """A study in a few lines of Markdown: its question, its data, where it stands."""
    data, asked = study.data, study.resolved.get("data", {})
    counts = ", ".join(f"{len(study.of(state))} {state}" for state in ("complete", "pruned", "failed", "running"))
    lines = [
        f"**{escape(study.question)}**" if study.question else "",
        f"Data: {escape(str(asked.get('name', '')))}, {data.get('train', 0):,} images to train on and "
        f"{data.get('validation', 0):,} to compare trials with, {len(data.get('classes', ()))} classes",
        f"{len(study.trials)} trials: {counts}",
    ]
    if study.best is not None:
        lines.append(f"Best: trial {study.best.number} with {study.best.value:.2%} of the validation part right")
    return [line for line in lines if line]


def escape(text: str) -> str:
    """The text as Markdown shows it, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(text.split()))


def artifact_folder(home: Home) -> Path:
    """Where the dashboard's pictures are."""
    return home.path / "optuna-artifacts"


def web_address(uri: str) -> str | None:
    """The address of MLflow's pages if `uri` is that of a server, without user and password; None for a database."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
