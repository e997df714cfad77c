"""What a command line asks of a finished search, and what will be trained for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from searchfm.errors import StudyError, UserError
from searchfm.home import Home
from searchfm.retrain.record import Final
from searchfm.search.history import StudyRow

TOP, SEEDS = 3, 3  # finalists, and fresh seeds of each, unless told otherwise


@dataclass(frozen=True)
class Wish:
    """What a command line asks; None is what was asked before, else the default."""

    home: Home
    name: str
    top: int | None = None
    seeds: int | None = None
    trial: int | None = None
    epochs: int | None = None
    again: bool = False  # train all of it anew, with seeds that were never used
    promote: bool = False  # the model becomes the champion whatever it is compared with
    device: str = "auto"
    workers: int | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What will be trained: equal plans give the same final model."""

    trials: tuple[int, ...]  # the finalists; the winner, where there is one only and no fresh seed for it
    top: int
    seeds: int  # fresh ones of each finalist
    trial: int | None  # chosen by a person
    epochs: int | None  # of the final training, where they are not the trial's own
    round: int  # how often all was asked for anew

    def record(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self) | {"trials": list(self.trials)}

    @property
    def contested(self) -> bool:
        """Whether finalists are trained at all."""
        return self.trial is None and (self.top, self.seeds) != (1, 1)


def make_plan(row: StudyRow, wish: Wish) -> Plan:
    """What a command line asks of a study as it stands. Raises StudyError, UserError."""
    contest = wish.top is not None or wish.seeds is not None
    if wish.trial is not None and contest:
        raise UserError(f"--trial {wish.trial}: names the winner; --top and --seeds are for finalists")
    before: Mapping[str, Any] = row.final["plan"] if row.final else {}
    chosen = wish.trial if wish.trial is not None or contest else before.get("trial")
    top, seeds = wish.top or before.get("top", TOP), wish.seeds or before.get("seeds", SEEDS)
    ranked = row.ranked(twins=False)
    if not ranked:
        raise StudyError(f"study {row.name!r}: has no complete trial; go on with `searchfm tune {row.name}`")
    if chosen is not None:
        complete = sorted(trial.number for trial in ranked)
        if chosen not in complete:
            raise StudyError(f"study {row.name!r}: trial {chosen} is {_state(row, chosen)}; may be {_some(complete)}")
        trials: tuple[int, ...] = (chosen,)
    elif running := row.of("running"):
        raise StudyError(
            f"study {row.name!r}: is unfinished, {len(running)} of its trials still run; "
            f"go on with `searchfm tune {row.name}`, or choose a trial with --trial"
        )
    else:
        trials = tuple(trial.number for trial in ranked[:top])
    epochs = wish.epochs if wish.epochs is not None else before.get("epochs")
    return Plan(trials, top, seeds, chosen, epochs, before.get("round", 0) + wish.again)


def anew(final: Final, plan: Plan) -> str:
    """Why what was found before does not stand."""
    before = final["plan"]
    if plan.round != before["round"]:
        return "all of it is trained again, with seeds that were not used before"
    if list(plan.trials) != before["trials"] and plan.trial is None and before["trial"] is None:
        return f"the finalists are trials {_some(plan.trials)} now, and were {_some(before['trials'])}"
    return f"trial {final['winner']} won under other settings; what they change is trained anew"


def _state(row: StudyRow, number: int) -> str:
    for trial in row.trials:
        if trial.number == number:
            return f"a twin of trial {trial.twin}" if trial.twin is not None else trial.state
    return "not there"


def _some(numbers: Sequence[int], most: int = 12) -> str:
    text = ", ".join(map(str, numbers[:most]))
    return text + (" ..." if len(numbers) > most else "")
