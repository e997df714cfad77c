"""`searchfm report`: one page with what a study asked, its result, and the uncertainty of each figure."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import tomli_w
from optuna.storages import BaseStorage

from searchfm import figures
from searchfm.config import DataConfig
from searchfm.errors import DataError, StudyError
from searchfm.format import megaflop, plural, seconds, short, short_names, states, times
from searchfm.learn.datasets import training_images
from searchfm.records import EPOCHS, Final, Predictions, StudyRecord, Trial, read_epochs
from searchfm.search.space import leaves
from searchfm.search.study import Study
from searchfm.show import pages
from searchfm.stats import Accuracy, holm, mcnemar

ALPHA = 0.05  # two trials with a p-value of at least this are tied
ENOUGH = 10  # complete trials that importance needs
RANKED = 15  # trials in the figure of ties
KEYS = 10  # axes of the parallel coordinates
TOP = 5  # trials whose curves are in colour
SECTIONS = {
    "history": "The search",
    "tie": "Which trials are better",
    "space": "What mattered",
    "factors": "One key at a time",
    "curves": "Learning curves",
    "errors": "What it gets wrong",
    "trials": "All trials",
    "reproduce": "Reproduce",
}


def report_page(
    study: StudyRecord, storage: BaseStorage, environment: Mapping[str, str], data_dir: Path | None = None
) -> str:
    """The whole page. environment: hardware and versions of the search, as far as known; data_dir: searched first for
    images. Raises StudyError for a study without a complete trial.
    """
    if not study.ranked(twins=False):
        counts = states(study, ("pruned", "failed", "running"))
        raise StudyError(f"study {study.name!r} has no complete trial to report on: {counts}")
    final, best = study.final, study.ranked(twins=False)[0]
    chosen = next(trial for trial in study.trials if trial.number == final.winner) if final else best
    saved = saved_epochs(study)
    values = {
        **_head(study, best, chosen, saved),
        **_search(study),
        **_space(study, best, storage),
        **_curves(study, chosen, saved),
        **_errors(study, chosen, data_dir),
        **_reproduce(study, chosen, environment),
    }
    sections = {name: title for name, title in SECTIONS.items() if name != "factors" or values["factors"]}
    tips = {str(trial.number): _tip(trial) for trial in study.trials}
    return pages.render("report.html.jinja", tips, study=study, chosen=chosen, sections=sections, **values)


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
class Saved:
    """Training that pruning saved."""

    epochs: int  # not trained
    full: int  # that all trained trials would have had
    seconds: float  # that those epochs would have taken, at each trial's own pace

    @property
    def fraction(self) -> float:
        """Epochs not trained, of all."""
        return self.epochs / self.full if self.full else 0.0


@dataclass(frozen=True)
class Confused:
    """One class predicted for another."""

    true: int
    predicted: int
    count: int
    fraction: float  # of the true class's images
    examples: tuple[int, ...]  # indices among the predictions, the most probable mistakes first


def accuracy(study: StudyRecord, trial: Trial) -> Accuracy:
    """The accuracy of a complete trial on the validation part."""
    assert trial.value is not None
    return Accuracy(round(trial.value * study.data.validation), study.data.validation)


def ranks(study: StudyRecord) -> list[Rank]:
    """All complete trials that were trained, the best first, and which of them are tied with it.

    By McNemar's test on the predictions of the same validation images, Holm-corrected for all that are compared; where
    a trial's predictions are not kept, by whether its accuracy lies in the best one's interval. The best of many
    values is too high by selection, so this finds too many differences rather than too few.
    """
    trials = study.ranked(twins=False)
    if not trials:
        return []
    best, top = trials[0], trials[0].value or 0.0
    reference = Predictions.read(best.folder)
    tests: dict[int, float] = {}
    for trial in trials[1:]:
        other = Predictions.read(trial.folder)
        if reference and other and np.array_equal(reference.indices, other.indices):
            tests[trial.number] = mcnemar(reference.correct, other.correct)
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    floor = accuracy(study, best).interval[0]
    ranked = []
    for trial in trials:
        p, value = adjusted.get(trial.number), trial.value or 0.0
        tied = trial is best or (p >= ALPHA if p is not None else value >= floor)
        ranked.append(Rank(trial, accuracy(study, trial), value - top, p, tied))
    return ranked


def saved_epochs(study: StudyRecord) -> Saved:
    """Epochs that pruned trials did not train. Twins, which train nothing, and failed trials are left out."""
    trained = [t for t in study.trials if t.twin is None and t.epochs and t.state in ("complete", "pruned")]
    missing = [trial.planned_epochs - len(trial.epochs) for trial in trained]
    pace = [trial.seconds_per_epoch for trial in trained]
    full = sum(trial.planned_epochs for trial in trained)
    return Saved(sum(missing), full, sum(epochs * each for epochs, each in zip(missing, pace, strict=True)))


def importances(study: StudyRecord, storage: BaseStorage) -> dict[str, float]:
    """How much of the difference between good trials and others each key explains, 0 to 1, the most first (PED-ANOVA:
    Watanabe, Bansal & Hutter 2023, arXiv 2304.10255), from complete trials that were trained themselves.

    Empty where those are fewer than 10, or all of one value.
    """
    trials = study.ranked(twins=False)
    if len(trials) < ENOUGH or len({trial.value for trial in trials}) == 1:
        return {}
    numbers = {trial.number for trial in trials}
    trained = optuna.create_study(direction="maximize")
    trained.add_trials([t for t in storage.get_all_trials(study.number, deepcopy=False) if t.number in numbers])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)  # the report says how few they are
        return optuna.importance.get_param_importances(trained)


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


# --- sentences: each number with its interval, and what that is an interval of ----------------------------------------


def about(study: StudyRecord) -> str:
    """The data, and the state of the search."""
    data = study.data
    return (
        f"{study.resolved['data']['name']}: {data.train:,} images to train on, {data.validation:,} to validate, "
        f"{len(data.classes)} classes. {len(study.trials)} of {study.planned} trials: {states(study, zeros=False)}; "
        f"{seconds(study.seconds)} from the first to the last."
    )


def result_sentences(study: StudyRecord) -> list[str]:
    """The result, the main sentence first."""
    if study.final is not None:
        return _retrained(study.final)
    complete, n = study.ranked(twins=False), study.data.validation
    best = complete[0]
    low, high = accuracy(study, best).interval
    sentences = [
        f"Trial {best.number} classifies {best.value:.2%} of {n:,} validation images correctly "
        f"(95% interval {low:.2%} to {high:.2%}, for this one model on images like these)."
    ]
    if len(complete) > 1:
        sentences.append(
            f"It is the best of {len(complete)} complete trials on these same images, so the figure is optimistic: "
            "expect less of a fresh training."
        )
    return sentences


def _retrained(final: Final) -> list[str]:
    test, validation = final.test, final.validation
    sentences = [
        f"The final model classifies {test.accuracy:.2%} of {test.n:,} test images correctly "
        f"(95% interval {test.low:.2%} to {test.high:.2%}, for this one model on images like these).",
        f"It has the configuration of trial {final.winner}, trained on all training data for "
        f"{plural(final.epochs, 'epoch')}. The studies of this home have read the test part of these data "
        f"{times(test.reads)}, this time included.",
    ]
    if validation.low is not None and final.optimism is not None:
        searched = validation.accuracy + final.optimism
        sentences.append(
            "On the search's own data and epochs, trainings with fresh seeds classify "
            f"{validation.accuracy:.2%} of the validation images correctly on average (95% interval "
            f"{validation.low:.2%} to {validation.high:.2%}, for one more seed). The search gave {searched:.2%}, "
            f"{abs(100 * final.optimism):.2f} points too {'high' if final.optimism >= 0 else 'low'}."
        )
    if final.tie:
        names = ", ".join(str(number) for number in final.tie)
        sentences.append(
            f"Trials {names} cannot be distinguished with fresh seeds; trial {final.winner} has the lowest cost."
        )
    return sentences


def tie(study: StudyRecord, ranked: Sequence[Rank]) -> str:
    """Which trials are tied with the best, and which of those trained fastest."""
    n, tied = study.data.validation, [rank for rank in ranked if rank.tied]
    if len(ranked) == 1:
        return "Only one trial is complete: there is nothing to compare it with."
    if len(tied) == 1:
        return f"No tie: on {n:,} validation images, the best trial differs from every other."
    together = all(rank.tied for rank in ranked[: len(tied)])
    subject = f"The top {len(tied)} are tied" if together else f"{len(tied)} trials are tied, the best among them"
    floor = 100 * -min(rank.difference for rank in tied)
    text = (
        f"{subject}: {n:,} validation images cannot distinguish them, although they differ by up to {floor:.2f} points."
    )
    fast = min((rank.trial for rank in tied if rank.trial.epochs), key=lambda trial: trial.seconds, default=None)
    return text if fast is None else f"{text} Of these, trial {fast.number} trained fastest ({seconds(fast.seconds)})."


def importance_note(study: StudyRecord, available: bool) -> str:
    """What importance is based on, or why there is none."""
    count = len(study.ranked(twins=False))
    if available:
        hint = "" if count >= 10 * ENOUGH else "; with so few it is a hint, not a finding"
        return f"Importance by PED-ANOVA (arXiv 2304.10255) on {count} complete trials{hint}. Pruned ones are left out."
    if count < ENOUGH:
        return f"Importance needs at least {ENOUGH} complete trials; this study has {count}."
    return "All complete trials have one accuracy: no key is more important than another."


# --- sections ---------------------------------------------------------------------------------------------------------


def _head(study: StudyRecord, best: Trial, chosen: Trial, saved: Saved) -> dict[str, Any]:
    final = study.final
    model = final or chosen.result
    facts = [("best in the search", f"{best.value:.2%}", f"trial {best.number}")]
    if final:
        test = final.test
        facts.insert(0, (f"on the test part, reading {test.reads}", f"{test.accuracy:.2%}", f"{test.n:,} images"))
    facts.append(("trained to the end", f"{len(study.ranked(twins=False))}", f"of {len(study.trials)} trials"))
    if saved.epochs:
        facts.append(("epochs saved", f"{saved.fraction:.0%}", "by pruning"))
    if model:
        facts += [("parameters", f"{model.parameters:,}", ""), ("MFLOP an image", megaflop(model.flops), "forward")]
    pace = final.seconds_per_epoch if final else chosen.seconds_per_epoch
    facts.append(("an epoch", seconds(pace), "final training" if final else f"trial {chosen.number}"))
    return {"about": about(study), "result": result_sentences(study), "facts": facts}


def _search(study: StudyRecord) -> dict[str, Any]:
    ranked = ranks(study)
    measured = [
        figures.Measured(f"trial {r.trial.number}", r.trial.value or 0.0, *r.accuracy.interval, tied=r.tied)
        for r in ranked[:RANKED]
    ]
    history = figures.history(study.trials, ranked[0].trial.number, ranked[0].accuracy.interval)
    return {
        "history": pages.embed(history, "history"),
        "ranking": pages.embed(figures.ranking(measured), "ranking"),
        "tie": tie(study, ranked),
        "ranked": ranked[:RANKED],
        "trials": sorted(study.trials, key=lambda trial: (-(trial.value or 0.0), trial.number)),
    }


def _space(study: StudyRecord, best: Trial, storage: BaseStorage) -> dict[str, Any]:
    trials, importance = study.ranked(twins=False), importances(study, storage)
    names = short_names(dict.fromkeys(key for trial in study.trials for key in trial.params))
    values = {key: {trial.params[key] for trial in trials if key in trial.params} for key in names}
    tree = Study(study.name, study.resolved).tree
    space = {key: leaf for key, leaf in leaves(tree) if len(values.get(key, ())) > 1}  # what differs between trials
    keys = sorted(space, key=lambda key: -importance.get(key, 0.0))
    fractions = {names[key]: fraction for key, fraction in list(importance.items())[:KEYS]}
    axes = {key: leaf for key, leaf in space.items() if key in keys[:KEYS]}
    shown = f"{'the' if fractions else 'the first'} {len(axes)}{' most important' if fractions else ''}"
    return {
        "importance": pages.embed(figures.importance(fractions), "importance") if fractions else None,
        "importance_note": importance_note(study, bool(fractions)),
        "parallel": pages.embed(figures.parallel(trials, axes, names), "parallel") if len(axes) > 1 else None,
        "parallel_note": f"Shown are {shown} of {len(space)} keys." if len(axes) < len(space) else "",
        "factors": [
            pages.embed(figures.factor(trials, key, space[key], names[key], f"f{i}", best.number), f"f{i}")
            for i, key in enumerate(keys)
        ],
        "sweep": len(names) == 1,
    }


def _curves(study: StudyRecord, chosen: Trial, saved: Saved) -> dict[str, Any]:
    epochs = read_epochs(study.folder / "final" / EPOCHS) if study.final else ()
    subject = "the final model, trained on all training data" if epochs else f"trial {chosen.number}"
    epochs = epochs or chosen.epochs
    survival = figures.survival(study.trials, int(study.resolved["train"]["epochs"])) if saved.epochs else None
    return {
        "curves": pages.embed(figures.curves(epochs), "curves") if epochs else None,
        "curves_subject": subject,
        "progress": pages.embed(figures.progress(study.trials, study.ranked(twins=False)[:TOP]), "progress"),
        "survival": pages.embed(survival, "survival") if survival else None,
        "saved": saved,
    }


def _errors(study: StudyRecord, chosen: Trial, data_dir: Path | None) -> dict[str, Any]:
    """The final model's predictions on the test part, once there are any; the images are always of the validation part:
    looking at test images before the next change would tune on them.
    """
    validation = Predictions.read(chosen.folder)
    test = Predictions.read(study.folder / "final") if study.final else None
    predictions, names = test or validation, study.data.classes
    pairs = confused(validation) if validation else []
    sources, error = _sources(study, pairs, validation, data_dir) if validation else ({}, "")
    return {
        "tested": test is not None,
        "confusion": pages.embed(figures.confusion(predictions, names), "confusion") if predictions else None,
        "classes": predictions.per_class(names) if predictions else (),
        "pairs": pairs,
        "validation": validation,
        "sources": sources,
        "images_error": error,
    }


def _sources(
    study: StudyRecord, pairs: Sequence[Confused], predictions: Predictions, data_dir: Path | None
) -> tuple[dict[int, str], str]:
    """Each example's image as the source of an `img`; none, and a note why, where the data cannot be read."""
    shown = [index for pair in pairs for index in pair.examples]
    try:
        config, indices = DataConfig.from_table(study.resolved["data"]), predictions.indices[shown].tolist()
        pixels = training_images(config, indices, study.data.fingerprint, data_dir) if shown else ()
    except DataError as error:
        return {}, str(error)
    return {index: pages.data_uri(image) for index, image in zip(shown, pixels, strict=True)}, ""


def _reproduce(study: StudyRecord, chosen: Trial, environment: Mapping[str, str]) -> dict[str, Any]:
    file, resolved = chosen.folder / "config.toml", dict(study.resolved)
    facts = {
        **environment,
        **({"device": chosen.result.device, **chosen.result.versions} if chosen.result else {}),
        "data fingerprint": study.data.fingerprint,
        "study digest": study.digest,
        "seeds": f"search {resolved['search']['seed']}, data {resolved['data']['seed']}, "
        f"trial {chosen.config.get('train', {}).get('seed', '')}",
    }
    return {
        "config": file.read_text("utf-8") if file.is_file() else tomli_w.dumps(dict(chosen.config)),
        "resolved": tomli_w.dumps({"name": study.name, **resolved}),
        "environment": {name: text for name, text in facts.items() if text},
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def _tip(trial: Trial) -> str:
    value = "" if trial.value is None else f" {trial.value:.2%}"
    params = [f"{name} = {short(trial.params[key])}" for key, name in short_names(trial.params).items()]
    return "\n".join([f"trial {trial.number}: {trial.state}{value}", *params])
