"""Finished searches on digits without training: predictions as the test asks, everything else as a search leaves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import rows
from numpy.typing import NDArray
from optuna.trial import TrialState

from searchfm.config import Config, DataConfig
from searchfm.home import Home
from searchfm.learn import datasets
from searchfm.learn.data import split
from searchfm.records import (
    EPOCHS,
    Epoch,
    Final,
    FinalPlan,
    Predictions,
    StudyRecord,
    TestFigures,
    TrainResult,
    Validation,
    write_epochs,
)
from searchfm.search.storage import create_study, load_study, open_storage, write_record
from searchfm.search.study import Study
from searchfm.tables import digest
from tests.programs import screenshot

DIGITS = [str(digit) for digit in range(10)]
TABLES: dict[str, Any] = {
    "search": {"trials": 20, "pruner": {"name": "median"}},
    "data": {"name": "digits"},
    "model": {"name": "mlp", "mlp": {"layers": {"low": 1, "high": 3}, "dropout": {"choice": [0.0, 0.25]}}},
    "optimizer": {
        "name": {"choice": ["sgd", "adamw"]},
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "sgd": {"momentum": {"low": 0.0, "high": 0.99}},
    },
    "train": {"epochs": 4},
}


@dataclass(frozen=True)
class Ending:
    """How a trial is to end."""

    wrong: Sequence[int] = ()  # indices of the validation images it gets wrong
    state: TrialState = TrialState.COMPLETE
    epochs: int = 4
    twin: int | None = None
    kept: bool = True  # its predictions
    params: Mapping[str, Any] | None = None  # instead of the sampler's


@cache
def validation() -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """Fingerprint, and indices and labels (N,) of digits' validation part."""
    from safetensors.numpy import load_file

    config = DataConfig(name="digits")
    part = datasets.parsed(config, "train")
    labels = load_file(part.path)["labels"]
    _, held = split(labels, DIGITS, config)
    return part.fingerprint, held, labels[held]


def predict(folder: Path, wrong: Sequence[int], indices: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Writes predictions, the next class at the `wrong` indices; the probability rises with the index."""
    predicted = labels.copy()
    predicted[list(wrong)] = (labels[list(wrong)] + 1) % 10
    top = np.linspace(0.6, 0.9, len(labels), dtype=np.float32)
    probabilities = np.repeat(((1 - top) / 9)[:, None], 10, axis=1)
    probabilities[np.arange(len(labels)), predicted] = top
    Predictions(indices, labels, probabilities).write(folder)


def search(
    home: Home,
    trials: Sequence[Ending],
    name: str = "toy",
    *,
    question: str = "How deep?",
    classes: Sequence[str] = DIGITS,
    fingerprint: str | None = None,
    tables: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> StudyRecord:
    """A study whose trials ended as given, in a real database, with the files that trials leave."""
    study = Study(name, {**TABLES, **(tables or {})}, question=question)
    own, indices, labels = validation()
    header = rows.header(
        study.resolved,
        uuid_=f"uuid-{name}",
        question=question,
        digest=digest(study.resolved),
        planned=len(trials),
        fingerprint=fingerprint or own,
        shape=(1, 8, 8),
        classes=tuple(classes),
        train=1201,
        validation=len(labels),
    )
    storage = open_storage(home, create=True)
    create_study(storage, name, header)
    opened = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed))
    for number, ending in enumerate(trials):
        if ending.params is not None:
            opened.enqueue_trial(dict(ending.params))
        trial = opened.ask()
        config = study.sample(trial)
        trial.set_user_attr("config", config.to_table())
        trial.set_user_attr("digest", config.digest())
        _end(home, study, trial, config, ending, number, indices, labels)
        value = round(1 - len(ending.wrong) / len(labels), 6) if ending.state is TrialState.COMPLETE else None
        opened.tell(trial, value, ending.state)
    return load_study(storage, home, name)


def _end(
    home: Home,
    study: Study,
    trial: optuna.Trial,
    config: Config,
    ending: Ending,
    number: int,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> None:
    folder = home.trial(study.name, number)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(study.replay(number, config.to_table()))
    accuracy = 1 - len(ending.wrong) / len(labels)
    trained = [
        Epoch(i, 2.0 / i, accuracy, 2.1 / i, round(accuracy * (1 - 0.5**i), 6), 1e-3, 2.0 + number, 500.0, 1.79e9 + i)
        for i in range(1, ending.epochs + 1)
    ]
    write_epochs(folder / EPOCHS, trained)
    for epoch in trained:
        assert epoch.val_accuracy is not None
        trial.report(epoch.val_accuracy, epoch.index)
    if ending.twin is not None:
        trial.set_user_attr("twin", ending.twin)
    if ending.state is TrialState.FAIL:
        trial.set_user_attr("reason", "loss is nan in epoch 2")
    if ending.state is TrialState.COMPLETE:
        result = TrainResult(accuracy, parameters=1000 + number, flops=2_000_000, seconds=9.0, device="cpu")
        trial.set_user_attr("result", result.to_json())
        if ending.kept:
            predict(folder, ending.wrong, indices, labels)


def retrained(home: Home, study: StudyRecord, wrong: Sequence[int], *, winner: int = 0, reads: int = 1) -> StudyRecord:
    """The study with a final model that gets these places of a test part of 300 images wrong."""
    folder = study.folder / "final"
    folder.mkdir()
    predict(folder, wrong, np.arange(300), np.arange(300) % 10)
    write_epochs(folder / EPOCHS, [Epoch(1, 1.0, 0.9, None, None, 1e-3, 5.0, 400.0, 1.79e9)])
    final = Final(
        study=study.name,
        plan=FinalPlan(trials=(0, 1), top=2, seeds=3, trial=None, epochs=None, round=0),
        finalists=(),
        tie=(0, 1),
        winner=winner,
        optimism=0.01,
        validation=Validation(0.9, 0.88, 0.92, 0.01, 212),
        test=TestFigures(1 - len(wrong) / 300, 0.5, 0.99, 300, reads, "t"),
        per_class=(),
        model=None,
        seconds=None,
        seconds_per_epoch=5.0,
        training_seconds=5.0,
        parameters=777,
        flops=3_000_000,
        epochs=1,
        fingerprint=study.data.fingerprint,
        time=1.79e9,
        params={},
        weights="0" * 64,
    )
    storage = open_storage(home)
    write_record(storage, study.number, final)
    return load_study(storage, home, study.name)


CUT = """
for (const frame of document.querySelectorAll("iframe")) {
  const [page, view] = [frame.contentDocument, frame.contentWindow], found = [];
  const style = (element) => view.getComputedStyle(element);
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  if (page.documentElement.scrollWidth > view.innerWidth) found.push("the page scrolls");
  for (const element of page.querySelectorAll("body *:not(svg *)")) {
    const name = `${element.tagName} ${element.className} ${element.textContent.trim().slice(0, 40)}`;
    const hidden = element.scrollWidth > element.clientWidth + 1 && style(element).overflowX !== "visible";
    if (hidden && !element.matches("svg, figure, pre")) found.push(`scrolls: ${name}`);
    let around = element.parentElement;
    while (around !== page.body && style(around).overflowX === "visible") around = around.parentElement;
    const { left, right, width } = element.getBoundingClientRect();
    if (width && around === page.body && (left < 0 || right > view.innerWidth + 0.5)) found.push(`outside: ${name}`);
  }
  for (const text of page.querySelectorAll("svg text")) {
    const [inner, outer] = [text, text.closest("svg")].map((element) => element.getBoundingClientRect());
    if (inner.left < outer.left - 2 || inner.right > outer.right + 2) found.push(`cut: ${text.textContent}`);
  }
  document.body.append(...found.map((line) => `\n@${view.innerWidth} ${line}\n`));
}
document.querySelectorAll("iframe, script").forEach((element) => element.remove());
"""


def cut(page: Path, folder: Path, widths: Sequence[int]) -> list[str]:
    """What a reader cannot see of the page, all unfolded, in windows of these widths in pixels.

    That is: elements outside the window, tables that scroll, and texts of a figure outside it. Figures and listings
    may scroll. Headless Chromium has no window below 500 pixels, so each width is a frame.
    """
    frames = [
        f'<iframe style="width: {width}px" srcdoc="{escape(page.read_text("utf-8"))}"></iframe>' for width in widths
    ]
    script = f'<script>addEventListener("load", () => {{{CUT}}});</script>'
    framed = folder / f"{page.stem}-framed.html"
    framed.write_text(f'<!doctype html><meta charset="utf-8"><body>{"".join(frames)}{script}', "utf-8")
    dom, _ = browse(framed, folder)
    assert "<iframe" not in dom  # the script has run
    return [unescape(line) for line in dom.splitlines() if line.startswith("@")]


def browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page in headless Chromium without a network: its DOM, and the lines of its console.

    The whole page is also drawn, into `page`.png, for a person to see.
    """
    proxy = "--proxy-server=127.0.0.1:9"  # nothing listens there
    return screenshot(page.as_uri(), folder / f"{page.stem}.png", proxy, size=(1120, 5000), seconds=5)
