"""From a finished search to one model, step by step. Every part is a job whose folder says when it is done, so the same
command after a crash goes on.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from searchfm.coordinator import TRIAL, WEIGHTS
from searchfm.engines import Engine
from searchfm.errors import DataError, WorldError
from searchfm.home import Home
from searchfm.job import Result
from searchfm.retrain.batch import Batch, Errand, Step
from searchfm.retrain.finalists import Verdict, choose, read
from searchfm.retrain.plan import Plan, Wish, anew, make_plan
from searchfm.retrain.record import FOLDER, Final, count_read, draw, install, keep, record
from searchfm.search.files import reopen
from searchfm.search.history import StudyRow, TrialRow, read_epochs
from searchfm.search.storage import failures, load_study, open_storage, study_lock
from searchfm.search.study import Study
from searchfm.tracking.registry import publish
from searchfm.tuning import choose_devices, prepare

FIT = "searchfm.learn.entries:fit"
TEST = "searchfm.learn.entries:test"


def retrain(
    wish: Wish, engine: Callable[[Sequence[str]], Engine], stopping: Callable[[], bool]
) -> Generator[Step, None, Final]:
    """Brings a study to its final model; yields news for a person, returns what is kept as the study's `final`.

    Raises StudyError, DataError and other UserErrors before anything is begun, WorldError where every finalist or the
    final training fails, and KeyboardInterrupt once all jobs have left, if told to stop.
    """
    began = time.monotonic()
    home = wish.home
    load_study(open_storage(home), home, wish.name)  # an unknown study is refused before its lock makes a folder
    with failures(f"study {wish.name!r}"), study_lock(home, wish.name) as check_lock:
        row = load_study(open_storage(home), home, wish.name)
        plan = make_plan(row, wish)
        final = row.final
        there = (row.folder / FOLDER / WEIGHTS[0]).is_file()
        if final is None or final["plan"] != plan.record() or not there:
            if final is not None and there:
                yield Step("said", text=anew(final, plan))
            study = reopen(None, row, {})
            with closing(engine(["cpu"])) as workers:
                devices = _prepare(row, study, workers, wish, stopping)
                yield Step("said", text=f"workers: {', '.join(f'{n} x {d}' for d, n in Counter(devices).items())}")
                batch = Batch(workers, study.search.retries, stopping, check_lock)
                work = _Work(home, row, study, plan, batch, len(devices), wish.data_dir)
                verdict = (yield from work.finalists()) if plan.contested else None
                final = yield from work.final(verdict)
            final |= {"seconds": round(time.monotonic() - began, 3), "plan": plan.record()}
            keep(home, row, final)
        if final["model"] is None or (wish.promote and not final["model"]["champion"]):
            yield Step("said", text="registering the model with MLflow")
            model = publish(home, row, final, row.folder / FOLDER, promote=wish.promote)
            final = {**final, "model": model}
            keep(home, row, final)
    return final


@dataclass(frozen=True)
class _Work:
    """One retraining under way."""

    home: Home
    row: StudyRow
    study: Study
    plan: Plan
    batch: Batch
    workers: int
    data_dir: Path | None

    def finalists(self) -> Generator[Step, None, Verdict]:
        """Trains every finalist with every fresh seed, and chooses the winner."""
        plan, errands = self.plan, {}
        for number in plan.trials:
            for k in range(1, plan.seeds + 1):
                errands[number, k] = self._errand(
                    f"trial {number}, seed {k} of {plan.seeds}", number, _seed(self.study, number, plan.round, k)
                )
        yield from self.batch.run(errands.values())
        for errand in errands.values():
            for name in WEIGHTS:  # what they answered is all that is needed of them
                (errand.folder / name).unlink(missing_ok=True)
        found, reason = [], ""
        for number in plan.trials:
            mine = [errands[number, k] for k in range(1, plan.seeds + 1)]
            failed = [self.batch.failures[errand.label] for errand in mine if errand.label in self.batch.failures]
            if failed:
                reason = failed[0]
                yield Step("said", text=f"trial {number} is no finalist: with a fresh seed, {reason}")
            else:
                seeds = [errand.payload["config"]["train"]["seed"] for errand in mine]
                results = [self.batch.results[errand.label] for errand in mine]
                found.append(read(self._trial(number), seeds, [errand.folder for errand in mine], results))
        if not found:
            raise WorldError(f"study {self.row.name!r}: every finalist failed, the last with: {reason}")
        return choose(found)

    def final(self, verdict: Verdict | None) -> Generator[Step, None, dict[str, Any]]:
        """Trains the winner on all training data, then reads the test part with it, and writes it all down."""
        number = self.plan.trials[0] if verdict is None else verdict.winner.trial
        trial, seed = self._trial(number), _seed(self.study, number, self.plan.round, 0)
        config = _with(trial.config, seed, self.plan.epochs)
        done, coming = self.row.folder / FOLDER, self.row.folder / f"{FOLDER}-{number:04d}-{seed}"
        identity = f"{self.row.uuid}/{number}/final/{seed}/{config['train']['epochs']}"
        fit = self._job("final training", identity, done, FIT, config, record="fit.json")
        if fit.result() is None:
            fit = self._job("final training", identity, coming, FIT, config, record="fit.json")
            coming.mkdir(parents=True, exist_ok=True)
            (coming / "config.toml").write_text(_header(self.row, number) + tomli_w.dumps(config))
        fitted = yield from self._one(fit)
        test = Errand(
            label="test",
            identity=f"{identity}/{fitted['files'][WEIGHTS[0]]}",
            folder=fit.folder,
            record="test.json",
            entry=TEST,
            payload={"model": str(fit.folder), "files": fitted["files"], "data_dir": self._data_dir},
        )
        reads = count_read(self.home, self.row, number, test.identity)
        tested = yield from self._one(test)
        epochs = read_epochs(fit.folder / "epochs.csv")
        draw(fit.folder, epochs, self.row.data["classes"])
        if fit.folder == coming:
            install(coming, done)
        return record(self.row, trial, verdict, epochs, fitted, tested, reads)

    def _one(self, errand: Errand) -> Generator[Step, None, Result]:
        yield from self.batch.run([errand])
        if errand.label in self.batch.failures:
            raise WorldError(f"study {self.row.name!r}: {errand.label}: {self.batch.failures[errand.label]}")
        return self.batch.results[errand.label]

    def _errand(self, label: str, number: int, seed: int) -> Errand:
        config = _with(self._trial(number).config, seed)
        folder = self.row.folder / "finalists" / f"{number:04d}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(self.study.replay(number, config))
        return self._job(label, f"{self.row.uuid}/{number}/{seed}", folder, TRIAL, config, record="result.json")

    def _job(
        self, label: str, identity: str, folder: Path, entry: str, config: Mapping[str, Any], record: str
    ) -> Errand:
        payload = {
            "config": config,
            "identity": identity,
            "data_dir": self._data_dir,
            "fingerprint": self.row.data["fingerprint"],
            "checkpoint_seconds": self.study.search.checkpoint_seconds,
            "threads": self.workers,  # of the final training, which no other keeps company
        }
        return Errand(label, identity, folder, record, entry, payload, config["train"]["epochs"])

    @property
    def _data_dir(self) -> str | None:
        return str(self.data_dir) if self.data_dir else None

    def _trial(self, number: int) -> TrialRow:
        return next(trial for trial in self.row.trials if trial.number == number)


def _prepare(row: StudyRow, study: Study, engine: Engine, wish: Wish, stopping: Callable[[], bool]) -> list[str]:
    """Sees that the data are those of the search, and gives the engine its workers."""
    found = prepare(study, engine, wish.data_dir, stopping)
    if found["fingerprint"] != row.data["fingerprint"]:
        raise DataError(
            f"{study.data['name']}: the data have changed since study {row.name!r} was begun; put them back"
        )
    devices = choose_devices(wish.device, wish.workers, found["devices"])
    engine.resize(devices)
    return devices


def _seed(study: Study, number: int, round_: int, k: int) -> int:
    """A 31-bit seed that the search did not use: of fresh seed k of a finalist, from 1, or (0) of the final model."""
    words = hashlib.sha256(f"{study.search.seed}/{number}/fresh/{round_}/{k}".encode()).digest()
    return int.from_bytes(words[:4], "big") >> 1


def _with(config: Mapping[str, Any], seed: int, epochs: int | None = None) -> dict[str, Any]:
    """A trial's config with another seed, and other epochs if there are some."""
    train = {**config["train"], "seed": seed}
    return {**config, "train": train | ({} if epochs is None else {"epochs": epochs})}


def _header(row: StudyRow, number: int) -> str:
    return (
        f"# The final training of study {row.name}, after its trial {number}: on all training and validation data,\n"
        "# whatever `subset` and `validation` say here.\n"
    )
