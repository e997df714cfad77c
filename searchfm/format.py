"""Numbers, names and results as text, for the terminal, pages, notes and MLflow."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from searchfm.config import Asha, SearchConfig, rungs
from searchfm.records import Final, Forecast, State, StudyRecord, Trial, trained

INTERVAL_SEEDS = 3  # with fewer the interval of a further seed spans nearly everything
STATES: tuple[State, ...] = ("complete", "pruned", "failed", "running")
HALF = 0.5  # of the images in one class of imbalanced data: above, accuracy misleads
LARGER = 1.5  # times the mean of the other classes: above, the largest class makes the data imbalanced
NOT_CHAMPION = ", not better than the champion on the same test part, which stays; --promote changes that"


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def escape(text: str) -> str:
    """The text on one line, escaped for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(text.split()))


def seconds(count: float) -> str:
    """A duration: 0.034 s, 4.1 s, 3 min 20 s, 2 h 5 min."""
    if count < 60:
        return f"{count:.2g} s" if 0 < count < 0.95 else f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes: 390 MB, 1.2 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 1):.0f} MB"


def forecast_range(forecast: Forecast) -> str:
    """The time of a search, from that with the assumed pruning to that without: 40.0 s to 1 min 5 s."""
    low, high = seconds(forecast.pruned), seconds(forecast.seconds)
    return high if low == high else f"{low} to {high}"


def forecast_sentence(study: StudyRecord) -> str:
    """What the search was forecast to take, and what it took; nothing where both cannot be compared: there is no
    forecast, trials are missing, or the search was interrupted.
    """
    forecast = study.forecast
    ended = sum(trial.state != "running" for trial in study.trials)
    if forecast is None or ended != forecast.trials or interrupted(study):
        return ""
    workers = plural(forecast.workers, "worker")
    return f"forecast {forecast_range(forecast)} on {workers}; took {seconds(study.seconds)}"


def interrupted(study: StudyRecord) -> set[int]:
    """The trials that began again after their worker died or was stopped. A promotion is an attempt more too."""
    pruner, default, pauses = SearchConfig.from_table(study.resolved["search"]).pruner, study.default, list[int]()
    if isinstance(pruner, Asha) and pruner.promote:
        pauses = rungs(pruner.min_epochs, pruner.reduction, study.resolved["train"]["epochs"])

    def promotions(trial: Trial) -> int:
        return 0 if trial.number == default else sum(len(trial.epochs) > epoch for epoch in pauses)

    return {trial.number for trial in study.trials if trial.attempts > 1 + promotions(trial)}


def times(number: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def plural(number: int, noun: str) -> str:
    """1 epoch, 2 epochs, 2 studies."""
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("dy") else f"{noun}s"
    return f"{number:,} {noun}"


def p_value(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def megaflop(flops: int) -> str:
    """Floating point operations in millions, without the unit."""
    return f"{flops / 1e6:,.3g}"


def short(value: Any) -> str:
    """A value of a config, numbers with three digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_params(params: Mapping[str, Any]) -> str:
    """Params on one line, keys by their shortest endings: `lr=0.01 optimizer=sgd`."""
    return " ".join(param_texts(params))


def param_texts(params: Mapping[str, Any]) -> list[str]:
    """Each param with its key's shortest ending: `lr=0.01`."""
    return [f"{name}={short(params[key])}" for key, name in short_names(params).items()]


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float, high: float, width: int) -> str:
    """A curve as blocks, low at the bottom; of more values than `width` the last of each part."""
    step = max(len(values) / width, 1)
    shown = [values[min(math.ceil((i + 1) * step), len(values)) - 1] for i in range(math.ceil(len(values) / step))]
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((min(max(value, low), high) - low) * scale)] for value in shown)


def short_path(text: str, width: int) -> str:
    """A path in so many characters: its last parts after `…/`. A last part that is longer loses its middle."""
    if len(text) <= width:
        return text
    parts = text.rstrip("/").split("/")
    endings = ("…/" + "/".join(parts[first:]) for first in range(1, len(parts)))
    last = parts[-1]
    cut = f"{last[: (width - 1) // 2]}…{last[len(last) - width // 2 :]}" if len(last) > width else last
    return next((ending for ending in endings if len(ending) <= width), cut)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys by their shortest endings: `optimizer.lr` is `lr` where no other key ends so."""
    keys = list(keys)
    names: dict[str, str] = {}
    for key in keys:
        parts = key.removesuffix(".name").split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1) if not parts[-count].isdigit())
        others = [f".{other}" for other in keys if other != key]
        names[key] = next((e for e in endings if not any(other.endswith(f".{e}") for other in others)), key)
    return names


def state(trial: Trial) -> str:
    """A trial's state, and whose twin it is."""
    if trial.paused is not None:
        return f"paused after epoch {trial.paused}"
    return trial.state if trial.twin is None else f"{trial.state} (twin of {trial.twin})"


def states(study: StudyRecord, shown: Iterable[State] = STATES, *, zeros: bool = True) -> str:
    """How many trials are in each state: `2 complete, 1 pruned, 3 running (2 paused)`."""
    counts = ((len(study.of(state)), state) for state in shown)
    paused = f" ({len(study.paused)} paused)" if study.paused else ""
    return ", ".join(
        f"{count} {state}{paused if state == 'running' else ''}" for count, state in counts if zeros or count
    )


def data_lines(study: StudyRecord) -> list[str]:
    """How the images of a study are divided and resized, and of imbalanced ones the accuracy of always answering the
    largest class.

    Studies begun before 0.4 know less, until `tune` opens them again.
    """
    data = study.data
    if data.available is None or data.test is None:
        return [f"{data.train:,} images to train on, {data.validation:,} to validate"]
    total = data.test + data.validation + data.available
    tested = "" if study.final else " (not read)"
    line = f"{total:,} images: {data.test:,} test{tested}, {data.validation:,} validation"
    line += f", {data.available:,} training"
    if data.train != data.available:
        line += f", of which {data.train:,} (subset {study.resolved['data']['subset']:g})"
    lines = [line]
    height, width = data.shape[1:]
    if data.sides is not None and data.sides != (min(height, width), max(height, width)):
        low, high = data.sides
        sides = f"{low:,} to {high:,} pixels" if low != high else f"{low:,} pixels"
        other = 64 if height == 128 else 128
        lines.append(f"sides of {sides}, resized to {height}x{width}; another size: --set data.size={other}")
    if data.largest is not None:
        most = data.classes[data.validation_classes.index(max(data.validation_classes))]
        text = largest_sentence(f'"{most}", the largest class,', data.largest, len(data.classes), "validation")
        lines += [f"{text}; retrain prints balanced accuracy" if data.largest > HALF else text] if text else []
    return lines


def imbalanced(fraction: float, classes: int) -> bool:
    """Whether data are imbalanced: their largest class, with this fraction of the images, has more than 1.5 times as
    many as the other classes have on average. So it is above 60% of two classes, above 14.3% of ten.
    """
    return fraction * (classes - 1) > LARGER * (1 - fraction)


def largest_sentence(subject: str, fraction: float, classes: int, part: str) -> str:
    """Of imbalanced data the accuracy of always answering the largest class, as a baseline; above one half, that
    accuracy misleads. Empty for balanced data.
    """
    if not imbalanced(fraction, classes):
        return ""
    text = f"always answering {subject} is correct for {fraction:.1%} of the {part} images"
    return f"{text}: accuracy misleads" if fraction > HALF else text


@dataclass(frozen=True)
class Saved:
    """Training that pruning saved."""

    epochs: int  # not trained
    full: int  # that all trained trials would have had
    seconds: float  # that those epochs would have taken, at each trial's own pace

    def __str__(self) -> str:
        fraction = self.epochs / max(self.full, 1)
        return f"{self.epochs:,} of {self.full:,} epochs ({fraction:.0%}), about {seconds(self.seconds)} of training"


def saved_epochs(study: StudyRecord) -> Saved:
    """Epochs that pruned trials did not train."""
    trials = trained(study.trials)
    missing = [trial.planned_epochs - len(trial.epochs) for trial in trials]
    time = sum(count * trial.seconds_per_epoch for count, trial in zip(missing, trials, strict=True))
    return Saved(sum(missing), sum(trial.planned_epochs for trial in trials), time)


def accuracy_sentence(accuracy: float, n: int, part: str, low: float, high: float) -> str:
    """An accuracy on a part of the data, and what its interval is an interval of."""
    return (
        f"{accuracy:.2%} of {n:,} {part} images correct; 95% interval {low:.2%} to {high:.2%} (Wilson), "
        "for this one model on images like these."
    )


def _optimism(searched: float, fresh: float) -> str:
    """The search's accuracy against that of fresh trainings, by the figures as they are shown."""
    points = round(100 * searched, 2) - round(100 * fresh, 2)
    if abs(points) < 0.005:
        return "no difference"
    return f"the search was {abs(points):.2f} points too {'optimistic' if points > 0 else 'pessimistic'}"


def sentence(final: Final) -> str:
    """The accuracy of a final model on the test part, and how often that part has been read."""
    return " ".join(final_sentences(final)["Test"])


def final_sentences(final: Final) -> dict[str, list[str]]:
    """The result of `retrain` by subject; every interval says what it is an interval of."""
    test, validation, model = final.test, final.validation, final.model
    tested = [
        accuracy_sentence(test.accuracy, test.n, "test", test.low, test.high),
        f"The test part of these data had been read {times(test.reads)} by then, this time included.",
    ]
    if final.balanced is not None and final.largest is not None:
        balanced = f"Balanced accuracy, the mean recall of the classes, is {final.balanced:.2%}"
        largest = largest_sentence("the largest class", final.largest, len(final.per_class), "test")
        tested.append(f"{'; '.join(filter(None, (balanced, largest)))}.")
    fitted = [
        f"The final model has the configuration of trial {final.winner}, trained on all training data for "
        f"{plural(final.epochs, 'epoch')} of {seconds(final.seconds_per_epoch)}; "
        f"{final.parameters:,} parameters, {megaflop(final.flops)} MFLOP an image."
    ]
    if model is not None:
        fitted.append(f"It is registered as {model.uri}{', the champion' if model.champion else NOT_CHAMPION}.")
    if final.optimism is None and not final.finalists:
        searched = [f"{validation.accuracy:.2%} of the validation images correct in the search; no fresh seed trained."]
    elif final.optimism is None:
        missing = "the winner, the study's default, was not trained to its end in the search"
        trained = f"correct with {plural(final.plan.seeds, 'fresh seed')}"
        searched = [f"{validation.accuracy:.2%} of the validation images {trained}; {missing}."]
    else:
        found = validation.accuracy + final.optimism
        searched = [
            f"{found:.2%} of the validation images correct in the search, {validation.accuracy:.2%} with "
            f"{plural(final.plan.seeds, 'fresh seed')}: {_optimism(found, validation.accuracy)}."
        ]
    if (final.finalists or final.optimism is not None) and final.plan.seeds < INTERVAL_SEEDS:
        few = f"{plural(final.plan.seeds, 'seed')} {'is' if final.plan.seeds == 1 else 'are'} too few"
        searched.append(f"{few} for an interval of a further one; --seeds 5 gives it.")
    elif validation.low is not None and validation.high is not None and validation.spread is not None:
        searched.append(
            f"A further seed would give {validation.low:.2%} to {validation.high:.2%} (95% prediction interval, on the "
            f"search's data and epochs and the same {validation.n:,} images); seeds vary by "
            f"{100 * validation.spread:.2f} points (standard deviation)."
        )
    if final.tie:
        searched.append(
            f"Trials {', '.join(map(str, final.tie))} cannot be distinguished with fresh seeds (paired test, Holm): "
            f"the lowest cost wins, trial {final.winner}."
        )
    if (compared := _default_sentence(final)) is not None:
        searched.append(compared)
    return {"Test": tested, "Model": fitted, "Validation": searched}


def _default_sentence(final: Final) -> str | None:
    """The accuracy of the study's default with fresh seeds; None where it is no finalist."""
    mean = next((one.mean for one in final.finalists if one.trial == final.default), None)
    if mean is None:
        return None
    if final.winner == final.default:
        return f"The winner is the study's default, trial {final.default}."
    points = round(100 * final.validation.accuracy, 2) - round(100 * mean, 2)  # as shown
    compared = f"{abs(points):.2f} points {'below' if points >= 0 else 'above'} the winner"
    equal = ", which cannot be distinguished from it" if final.default in final.tie else ""
    return f"The study's default, trial {final.default}, has {mean:.2%} with fresh seeds: {compared}{equal}."
