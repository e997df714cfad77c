"""Notes of optuna-dashboard: a note and pictures for each trial that ended, a note for the study.

Optuna takes no attributes for a trial that has ended, so the dashboard's notes and artifacts stand in attributes of the
study, under keys that hold the trial's id: `dashboard:ID:note_str:0`, `dashboard:artifacts:ID:ARTIFACT`. Artifact ids
are made from the study's uuid, so that writing again changes nothing.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from searchfm.format import escape, plural, states
from searchfm.home import Home, shown, write_whole
from searchfm.records import PICTURES, StudyRecord, Trial
from searchfm.search.storage import open_storage

LONGEST = 2045  # characters that the dashboard puts in one attribute
NOTED = 500  # trials: the dashboard looks through all notes for every trial it lists (1,000: 2 s a page, 2,000: 7 s)
VIEW = "searchfm"  # the view that the table opens with
MODE = "workflowType=machine_learning"  # else MLflow shows its pages for chat traces
OPEN = "/open"  # of MLflow as we serve it: a page that leads to any other, see `show.dashboard`
HERE = "/mlflow"  # `searchfm dashboard` redirects this path of optuna-dashboard to MLflow's pages


def opened(path: str) -> str:
    """The path of a page of MLflow, as a server of ours opens it."""
    return OPEN + path.removeprefix("/")


@dataclass(frozen=True)
class Links:
    """A study's pages in MLflow: the ids of its experiment and runs, as far as they exist."""

    experiment: str | None
    parent: str | None
    runs: Mapping[int, str]

    def table(self, view: str = VIEW) -> str:
        """Path of the study's table, opened with the useful columns, sorted; append it to the server's address."""
        return f"/#/experiments/{self.experiment}/runs?{MODE}&viewStateShareKey={view}"

    def run(self, number: int) -> str:
        """Path of a trial's page."""
        return f"/#/experiments/{self.experiment}/runs/{self.runs[number]}?{MODE}"


class Notes:
    """Writes a study's notes through a storage of its own. For one thread."""

    def __init__(self, home: Home, study: StudyRecord) -> None:
        self._home, self._uuid, self._number = home, study.uuid, study.number
        self._base = web_address(home.tracking_uri) or HERE
        self._storage = open_storage(home)
        self._written = dict(self._storage.get_study_system_attrs(study.number))  # as last seen or written

    def trial(self, trial: Trial, links: Links, *, again: bool = True) -> None:
        """The note and the pictures of a trial that has ended; `again`: also if it has its note. Raises what the
        storage raises.
        """
        if trial.number >= NOTED:
            return
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._number, trial.number)
        if not again and f"dashboard:{trial_id}:note_ver" in self._written:
            return
        pictures = [trial.folder / name for name in PICTURES if (trial.folder / name).is_file()]
        images = []
        for path in pictures:
            copy = picture_copy(self._home, self._uuid, trial.number, path.name)
            write_whole(copy, path.read_bytes())
            artifact = copy.name
            meta = {"artifact_id": artifact, "filename": path.name, "mimetype": "image/png", "encoding": None}
            self._set(f"dashboard:artifacts:{trial_id}:{artifact}", json.dumps(meta))
            images.append(f"![{path.stem}](/artifacts/{self._number}/{trial_id}/{artifact})")
        link = f"[This trial in MLflow]({self._link(links.run(trial.number))})" if trial.number in links.runs else ""
        self._note(f"{trial_id}:", "\n\n".join([*trial_lines(trial), link, *images]))

    def study(self, study: StudyRecord, links: Links) -> None:
        """The study's note: its question, its data, its state. Raises what the storage raises."""
        # Read again each time: a user may just have edited it.
        self._written |= self._storage.get_study_system_attrs(self._number)
        link = f"[All trials in MLflow]({self._link(links.table())})" if links.experiment else ""
        self._note("", "\n\n".join([*study_lines(study), link]))

    def _note(self, prefix: str, body: str) -> None:
        """Version 1 is ours; a person who edits a note in the dashboard makes version 2, which we leave alone."""
        version = f"dashboard:{prefix}note_ver"
        if self._written.get(version, 1) != 1:
            return
        self._set(version, 1)
        self._set(f"dashboard:{prefix}note_str:0", body[:LONGEST])

    def _set(self, key: str, value: Any) -> None:
        if self._written.get(key) != value:
            self._storage.set_study_system_attr(self._number, key, value)
            self._written[key] = value

    def _link(self, path: str) -> str:
        return self._base + (path if self._base != HERE else path.removeprefix("/#"))


def trial_lines(trial: Trial) -> list[str]:
    """A trial in a few lines of Markdown."""
    epochs, result = plural(len(trial.epochs), "epoch"), trial.result
    end = f"**{trial.state}**"
    if trial.value is not None:
        end += f": {trial.value:.2%} of the validation part correct after {epochs}"
    elif trial.accuracy is not None:
        end += f" after {epochs} with {trial.accuracy:.2%}"
    if trial.twin is not None:
        end += f" (not trained again: its config equals that of trial {trial.twin})"
    facts = [] if trial.first is None else [f"known configuration ({trial.first})"]
    if result is not None:
        if result.best_epoch:
            facts.append(f"best epoch {result.best_epoch} ({max(trial.reported.values(), default=0.0):.2%})")
        facts.append(f"{result.parameters:,} parameters")
        if result.flops:
            facts.append(f"{result.flops / 1e6:,.2f} MFLOP an image")
    if trial.epochs:
        facts.append(f"{trial.seconds:.1f} s of training")
    if trial.attempts > 1:
        facts.append(f"{trial.attempts} attempts")
    return [line for line in (end, " · ".join(facts), escape(trial.reason or "")) if line]


def study_lines(study: StudyRecord) -> list[str]:
    """A study in a few lines of Markdown: its question, its data, its state."""
    data, best = study.data, study.best
    lines = [
        f"**{escape(study.question)}**" if study.question else "",
        f"Data: {escape(str(study.resolved['data']['name']))}, {data.train:,} images to train on and "
        f"{data.validation:,} to compare trials with, {len(data.classes)} classes",
        f"{plural(len(study.trials), 'trial')}: {states(study)}",
        f"Best: trial {best.number} with {best.value:.2%} of the validation part correct" if best else "",
    ]
    return [line for line in lines if line]


def artifact_folder(home: Home) -> Path:
    """Where the dashboard's pictures are."""
    return home.path / "optuna-artifacts"


def picture_copy(home: Home, study: str, number: int, name: str) -> Path:
    """The dashboard's own file of a trial's picture. study: its uuid."""
    return artifact_folder(home) / str(uuid.uuid5(uuid.NAMESPACE_URL, f"{study}/{number}/{name}"))


def artifact_files(home: Home, storage: BaseStorage, study: StudyRecord) -> list[Path]:
    """The files that the dashboard keeps of a study: pictures, and what users uploaded."""
    keys = [key for key in storage.get_study_system_attrs(study.number) if key.startswith("dashboard:artifacts:")]
    return [artifact_folder(home) / key.rpartition(":")[2] for key in keys]


def web_address(uri: str) -> str | None:
    """The address of MLflow's pages if `uri` is that of a server, without user and password; None for a database."""
    return shown(uri).rstrip("/") if uri.startswith(("http://", "https://")) else None
