"""Numbers and names as text, for the terminal, pages, notes and MLflow."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from searchfm.records import Final, State, StudyRecord, Trial

STATES: tuple[State, ...] = ("complete", "pruned", "failed", "running")


def escape(text: str) -> str:
    """The text as Markdown shows it, on one line, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(text.split()))


def seconds(count: float) -> str:
    """A duration: 4.1 s, 3 min 20 s, 2 h 5 min."""
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def times(number: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def plural(number: int, noun: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


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
    """What a search chose, on one line, keys by their shortest endings: `lr=0.01 optimizer=sgd`."""
    return " ".join(f"{name}={short(params[key])}" for key, name in short_names(params).items())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys by their shortest endings: `optimizer.lr` is `lr` where no other key ends so."""
    keys = list(keys)
    names: dict[str, str] = {}
    for key in keys:
        parts = key.removesuffix(".name").split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not parts[-count].isdigit() and not any(k != key and f".{k}".endswith(f".{ending}") for k in keys):
                names[key] = ending
                break
        else:
            names[key] = key
    return names


def state(trial: Trial) -> str:
    """A trial's state, and whose twin it is."""
    return trial.state if trial.twin is None else f"{trial.state} (twin of {trial.twin})"


def states(study: StudyRecord, shown: Iterable[State] = STATES, *, zeros: bool = True) -> str:
    """How many trials are in each state: `2 complete, 1 pruned`."""
    counts = ((len(study.of(state)), state) for state in shown)
    return ", ".join(f"{count} {state}" for count, state in counts if zeros or count)


def sentence(final: Final) -> str:
    """The accuracy of a final model, and what its interval is an interval of."""
    test = final.test
    return (
        f"{test.accuracy:.2%} of {test.n:,} test images correct; 95% interval {test.low:.2%} to {test.high:.2%} "
        f"(Wilson), for this one model on images like these. "
        f"The test part of these data had been read {times(test.reads)} by then, this time included."
    )
