"""`searchfm report`: one page with what a study asked, its result, and the uncertainty of each figure."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from matplotlib.figure import Figure
from optuna.storages import BaseStorage

from searchfm import figures
from searchfm.config import DataConfig
from searchfm.errors import DataError, StudyError, UserError
from searchfm.format import (
    accuracy_sentence,
    final_sentences,
    forecast_sentence,
    plural,
    saved_epochs,
    seconds,
    short,
    short_names,
    states,
)
from searchfm.learn.datasets import training_images
from searchfm.records import EPOCHS, Final, Predictions, StudyRecord, Trial, read_epochs, searched_keys
from searchfm.search.importance import ENOUGH, importances
from searchfm.search.space import leaves
from searchfm.search.study import Study
from searchfm.show import pages
from searchfm.stats import Accuracy, holm, mcnemar

ALPHA = 0.05  # two trials with a p-value of at least this are tied
RANKED = 15  # trials in the figure of ties
KEYS = 10  # axes of the parallel coordinates
IMPORTANT = 0.05  # fraction of the differences that a key explains, to be shown without unfolding
ROW = 3  # figures of keys side by side
TOP = 5  # trials whose curves are in colour
FIGURES = ("history", "importance", "slice", "parallel", "progress", "ranking", "survival", "curves", "confusion")
DRAWN = 300  # trials in a figure or table: each costs 2 ms a figure, and 10,000 made a page of 14 MB


def report_page(study: StudyRecord, storage: BaseStorage, environment: Mapping[str, str], data_dir: Path | None) -> str:
    """The whole page. environment: hardware and versions of the search, as far as known; data_dir: searched first for
    images. Raises StudyError for a study without a complete trial.
    """
    if not study.ranked(twins=False):
        counts = states(study, ("pruned", "failed", "running"))
        raise StudyError(f"study {study.name!r} has no complete trial to report on: {counts}")
    final, best = study.final, study.ranked(twins=False)[0]
    chosen = next(trial for trial in study.trials if trial.number == final.winner) if final else best
    shown = drawn(study, chosen)
    return pages.render(
        "report.html.jinja",
        tips={str(trial.number): _tip(trial) for trial in shown},
        study=study,
        drawn=len(shown),
        chosen=chosen,
        best=best,
        enough=ENOUGH,
        compared=len(study.compared),
        result=result_sentences(study),
        **_search(study, shown),
        **_space(study, storage, shown),
        **_curves(study, chosen, shown),
        **_errors(study, chosen, data_dir),
        **_reproduce(study, chosen, environment),
    )


def drawn(study: StudyRecord, chosen: Trial) -> list[Trial]:
    """The trials that figures and tables show, by number: all, or of many the best and others at even distances."""
    if len(study.trials) <= DRAWN:
        return list(study.trials)
    best = {trial.number for trial in [chosen, *study.ranked(twins=False)[: DRAWN // 3]]}
    others = [trial for trial in study.trials if trial.number not in best]
    count = DRAWN - len(best)
    even = {others[index * len(others) // count].number for index in range(count)}
    return [trial for trial in study.trials if trial.number in best | even]


# --- findings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """A complete trial, compared with the best."""

    trial: Trial
    accuracy: Accuracy  # on the validation part
    difference: float  # its value less the best trial's: 0 or less
    p: float | None  # of McNemar's test against the best, Holm-corrected; None for the best, or without predictions
    tied: bool  # not distinguishable from the best


@dataclass(frozen=True)
class Confused:
    """One class predicted for another."""

    true: int
    predicted: int
    count: int
    fraction: float  # of the true class's images
    examples: tuple[int, ...]  # indices among the predictions, the most probable mistakes first


def ranks(study: StudyRecord) -> list[Rank]:
    """All complete trials that were trained, at least one, the best first, and which of them are tied with it.

    By McNemar's test on the predictions of the same validation images, Holm-corrected for all that are compared; where
    a trial's predictions are not kept, by whether its accuracy lies in the best one's interval. The best of many
    values is too high by selection, so this finds too many differences rather than too few.
    """
    best, *others = study.ranked(twins=False)
    reference = Predictions.read(best.folder)
    tests: dict[int, float] = {}
    for trial in others:
        predictions = Predictions.read(trial.folder)
        if reference and predictions and np.array_equal(reference.indices, predictions.indices):
            tests[trial.number] = mcnemar(reference.correct, predictions.correct)
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    top = study.accuracy(best)
    ranked = [Rank(best, top, 0.0, None, tied=True)]
    for trial in others:
        measured, p = study.accuracy(trial), adjusted.get(trial.number)
        tied = p >= ALPHA if p is not None else measured.fraction >= top.interval[0]
        ranked.append(Rank(trial, measured, measured.fraction - top.fraction, p, tied))
    return ranked


def confused(predictions: Predictions, *, most: int = 6, each: int = 6) -> list[Confused]:
    """The pairs of classes confused most often, at most `most`, with at most `each` examples."""
    labels, predicted = predictions.labels, predictions.predicted
    wrong = np.flatnonzero(~predictions.correct)
    ordered = wrong[np.argsort(-predictions.probabilities[wrong, predicted[wrong]], kind="stable")]
    examples: dict[tuple[int, int], list[int]] = {}
    for index in ordered.tolist():
        examples.setdefault((int(labels[index]), int(predicted[index])), []).append(index)
    totals = np.bincount(labels)
    pairs = sorted(examples.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:most]
    return [
        Confused(true, other, len(indices), len(indices) / int(totals[true]), tuple(indices[:each]))
        for (true, other), indices in pairs
    ]


# --- sentences --------------------------------------------------------------------------------------------------------


def result_sentences(study: StudyRecord) -> list[str]:
    """The result, the main sentence first."""
    if study.final is not None:
        return [sentence for sentences in final_sentences(study.final).values() for sentence in sentences]
    complete = study.ranked(twins=False)
    best = study.accuracy(complete[0])
    measured = accuracy_sentence(best.fraction, best.n, "validation", *best.interval)
    sentences = [f"Trial {complete[0].number}: {measured}"]
    if len(complete) > 1:
        sentences.append(
            f"It is the best of {len(complete)} complete trials on these same images, so the figure is optimistic: "
            "expect less of a fresh training."
        )
    return sentences


def tie(study: StudyRecord, ranked: Sequence[Rank]) -> str:
    """Which trials are tied with the best, as they were trained in the search, and which of those trained fastest."""
    n, tied = study.data.validation, [rank for rank in ranked if rank.tied]
    if len(ranked) == 1:
        return "Only one trial is complete: there is nothing to compare it with."
    if len(tied) == 1:
        text = f"As trained in the search, the best trial differs from every other on {n:,} validation images."
    else:
        together = all(rank.tied for rank in ranked[: len(tied)])
        subject = f"the top {len(tied)} are tied" if together else f"{len(tied)} trials are tied, the best among them"
        floor = 100 * -min(rank.difference for rank in tied)
        text = f"As trained in the search, {subject}: {n:,} validation images cannot distinguish them"
        text += f", although they differ by up to {floor:.2f} points." if floor >= 0.005 else "."
        fast = min((rank.trial for rank in tied if rank.trial.epochs), key=lambda trial: trial.seconds, default=None)
        if fast is not None:
            text += f" Of these, trial {fast.number} trained fastest ({seconds(fast.seconds)})."
    if study.final is not None and len(study.final.finalists) > 1:
        text += f" {_fresh(study.final)}"
    return text


def _fresh(final: Final) -> str:
    """What fresh seeds say of the finalists. It counts more than one training each."""
    seeds = plural(final.plan.seeds, "fresh seed")
    if not final.tie:
        return f"Trained again with {seeds}, trial {final.winner} is better than the other finalists."
    numbers = ", ".join(map(str, final.tie))
    return f"Trained again with {seeds}, trials {numbers} cannot be distinguished: that result counts more."


# --- sections ---------------------------------------------------------------------------------------------------------


def _search(study: StudyRecord, drawn: Sequence[Trial]) -> dict[str, Any]:
    ranked = ranks(study)
    best, shown = ranked[0], ranked[:RANKED]
    tied = {rank.trial.number for rank in shown if rank.tied}
    return {
        "history": figures.history(
            study.trials, best.trial.number, best.accuracy.interval, {trial.number for trial in drawn}
        ),
        "ranking": figures.ranking({rank.trial.number: rank.accuracy for rank in shown}, tied),
        "tie": tie(study, ranked),
        "ranked": shown,
        "trials": sorted(drawn, key=lambda trial: (-(trial.value or 0.0), trial.number)),
    }


def _space(study: StudyRecord, storage: BaseStorage, drawn: Sequence[Trial]) -> dict[str, Any]:
    trials, importance = study.compared, importances(study, storage)
    names = short_names(searched_keys(study.trials))
    values = {key: {trial.params[key] for trial in trials if key in trial.params} for key in names}
    tree = Study(study.name, study.resolved).tree
    space = {key: leaf for key, leaf in leaves(tree) if len(values.get(key, ())) > 1}  # what differs between trials
    keys = sorted(space, key=lambda key: -importance.get(key, 0.0))
    fractions = {names[key]: fraction for key, fraction in list(importance.items())[:KEYS]}
    axes = {key: space[key] for key in keys[:KEYS]}
    important = sum(importance.get(key, 0.0) >= IMPORTANT for key in keys)
    numbers, best = {trial.number for trial in drawn}, study.ranked(twins=False)[0].number
    lines = [trial for trial in trials if trial.number in numbers]
    return {
        "importance": figures.importance(fractions) if fractions else None,
        "parallel": figures.parallel(lines, axes, names) if len(axes) > 1 else None,
        "axes": len(axes),
        "keys": len(space),
        "factors": [
            figures.factor(trials, key, space[key], names[key], f"f{i}", best, numbers) for i, key in enumerate(keys)
        ],
        "open": max(ROW, -(-important // ROW) * ROW) if importance else 2 * ROW,
        "sweep": len(names) == 1,
    }


def _curves(study: StudyRecord, chosen: Trial, drawn: Sequence[Trial]) -> dict[str, Any]:
    fitted = read_epochs(study.final_folder / EPOCHS) if study.final else ()
    epochs, saved = fitted or chosen.epochs, saved_epochs(study)
    return {
        "curves": figures.curves(epochs, figures.WIDE) if epochs else None,
        "fitted": fitted,
        "progress": figures.progress(drawn, study.ranked(twins=False)[:TOP]),
        "survival": figures.survival(study.trials, int(study.resolved["train"]["epochs"])) if saved.epochs else None,
        "saved": saved,
        "forecast": forecast_sentence(study),
    }


def _errors(study: StudyRecord, chosen: Trial, data_dir: Path | None) -> dict[str, Any]:
    """The final model's predictions on the test part, once there are any; the images are always of the validation part:
    looking at test images before the next change would tune on them.
    """
    validation = Predictions.read(chosen.folder)
    test = Predictions.read(study.final_folder) if study.final else None
    predictions, names = test or validation, study.data.classes
    pairs = confused(validation) if validation else []
    shown = [index for pair in pairs for index in pair.examples]
    sources, error = {}, ""  # each example's image as the source of an `img`; or why there are none
    if validation and shown:
        try:
            config, indices = DataConfig.from_table(study.resolved["data"]), validation.indices[shown].tolist()
            images = training_images(config, indices, study.data.fingerprint, data_dir)
            sources = {index: pages.data_uri(image) for index, image in zip(shown, images, strict=True)}
        except DataError as unreadable:
            error = str(unreadable)
    return {
        "tested": test is not None,
        "confusion": figures.confusion(predictions, names) if predictions else None,
        "classes": predictions.per_class(names) if predictions else (),
        "pairs": pairs,
        "validation": validation,
        "sources": sources,
        "images_error": error,
    }


def _reproduce(study: StudyRecord, chosen: Trial, environment: Mapping[str, str]) -> dict[str, Any]:
    file, resolved = chosen.folder / "config.toml", dict(study.resolved)
    facts = {
        **environment,
        **({"device": chosen.result.device, **chosen.result.versions} if chosen.result else {}),
        "data fingerprint": study.data.fingerprint,
        "study digest": study.digest,
        "precision": chosen.result.precision if chosen.result else "",
        "numerics": ", ".join(map(str, chosen.result.numerics if chosen.result else ())),
        "seeds": f"search {resolved['search']['seed']}, data {resolved['data']['seed']}, "
        f"trial {chosen.config.get('train', {}).get('seed', '')}",
    }
    return {
        "config": file.read_text("utf-8") if file.is_file() else tomli_w.dumps(dict(chosen.config)),
        "resolved": tomli_w.dumps({"name": study.name, **resolved}),
        "environment": {name: text for name, text in facts.items() if text},
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


# --- a single figure --------------------------------------------------------------------------------------------------


def study_figure(
    study: StudyRecord, storage: BaseStorage, kind: str, *, key: str | None = None, trial: int | None = None
) -> Figure:
    """One figure of the page. kind: see `FIGURES`; key: of "slice"; trial: of "curves" and "confusion".

    Raises StudyError where the trials do not suffice for it, UserError for an unknown kind, key or trial.
    """
    complete = study.ranked(twins=False)
    if kind not in FIGURES:
        raise UserError(f"figure {kind!r}: must be one of {', '.join(FIGURES)}")
    if trial is not None and not 0 <= trial < len(study.trials):
        raise UserError(f"trial {trial}: study {study.name!r} has {len(study.trials)} trials, counted from 0")
    if not complete and trial is None:
        raise StudyError(f"study {study.name!r} has no complete trial to draw")
    chosen = study.trials[trial] if trial is not None else complete[0]
    shown = drawn(study, chosen)
    made: Figure | None
    match kind:
        case "curves":
            made = figures.curves(chosen.epochs) if chosen.epochs else None
        case "confusion":
            predictions = Predictions.read(chosen.folder)
            made = figures.confusion(predictions, study.data.classes) if predictions else None
        case "slice":
            made = _slice(study, storage, key)
        case "history" | "ranking":
            made = _search(study, shown)[kind]
        case "importance" | "parallel":
            made = _space(study, storage, shown)[kind]
        case _:
            made = _curves(study, chosen, shown)[kind]
    if made is None:
        raise StudyError(f"study {study.name!r}: its trials do not suffice for the figure {kind!r}")
    return made


def _slice(study: StudyRecord, storage: BaseStorage, key: str | None) -> Figure | None:
    """Accuracy over one key of the space, by default the most important, else the first that differs."""
    trials = study.compared
    space = dict(leaves(Study(study.name, study.resolved).tree))
    keys = [name for name in space if len({trial.params.get(name) for trial in trials}) > 1]
    if key is not None and key not in space:
        raise UserError(f"key {key!r}: must be one of {', '.join(space)}")
    importance = importances(study, storage)
    first = max(keys, key=lambda name: importance.get(name, 0.0), default=None)
    if (name := key or first) is None:
        return None
    best = study.ranked(twins=False)[0].number
    return figures.factor(trials, name, space[name], short_names(space)[name], "slice", best)


def _tip(trial: Trial) -> str:
    value = "" if trial.accuracy is None else f" {trial.accuracy:.2%}"
    params = [f"{name} = {short(trial.params[key])}" for key, name in short_names(trial.params).items()]
    return "\n".join([f"trial {trial.number}: {trial.state}{value}", *params])
