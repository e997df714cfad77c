"""Optuna's storage in a database: its trials are read as rows, and on PostgreSQL its calls survive dropped connections.

Through Optuna's objects of SQLAlchemy, 10,000 trials of a toy study take 5.5 s of CPU to read, as rows 0.8 s.

A connection can be lost between a commit and its answer, so the outcome of a write may be unknown. What repeats it
finds out first, inside the transaction that would write, after a lock on the row of the study or the trial: until an
earlier attempt has been committed or rolled back, it waits there. A new trial is recognised by a nonce, the end of a
trial by its state and values. All other writes set a value under a key, and may be repeated.
"""

import gc
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import datetime
from functools import cache
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import ColumnElement, Connection, select

from searchfm.search.database import CONNECT_ARGS, POOL_EVENTS, retry

P = ParamSpec("P")
T = TypeVar("T")

NONCE = "searchfm:nonce"  # system attribute of a trial
EPOCH = datetime(1970, 1, 1)
TRIAL = models.TrialModel
Rows = dict[int, list[Any]]  # by trial


class RowStorage(RDBStorage):
    """Reads the same trials as Optuna's own methods. Wrap it with `get_storage`."""

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """One trial. Raises KeyError for an unknown one."""
        trials = self._read(TRIAL.trial_id == trial_id)
        return trials[0] if trials else super().get_trial(trial_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """The study's record, and hundreds of notes. Raises KeyError for an unknown study."""
        table = models.StudySystemAttributeModel
        with self.engine.connect() as connection:
            query = select(table.key, table.value_json).where(table.study_id == study_id)
            attrs = {key: _decode(text) for key, text in connection.execute(query).all()}
        if not attrs:
            self.get_study_name_from_id(study_id)  # raises KeyError for an unknown study
        return attrs

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """The trials of those ids, and all with greater ones, in the order of their ids."""
        chosen = TRIAL.trial_id.in_(included_trial_ids) | (TRIAL.trial_id > trial_id_greater_than)
        trials = self._read((TRIAL.study_id == study_id) & chosen)
        if not trials:
            self.get_study_name_from_id(study_id)  # raises KeyError for an unknown study
        return [trial for trial in trials if states is None or trial.state in states]

    def _read(self, chosen: ColumnElement[bool]) -> list[FrozenTrial]:
        """The trials first, then what belongs to them: an end that is read has all that was written before it."""
        with self.engine.connect() as connection:
            columns = (
                TRIAL.trial_id,
                TRIAL.number,
                TRIAL.state,
                TRIAL._datetime_start_utc,
                TRIAL._datetime_complete_utc,
            )
            trials = connection.execute(select(*columns).where(chosen).order_by(TRIAL.trial_id)).all()
            params = _rows(connection, chosen, models.TrialParamModel, "param_name", "param_value", "distribution_json")
            values = _rows(connection, chosen, models.TrialValueModel, "objective", "value", "value_type")
            user = _rows(connection, chosen, models.TrialUserAttributeModel, "key", "value_json")
            system = _rows(connection, chosen, models.TrialSystemAttributeModel, "key", "value_json")
            columns_of_reports = ("step", "intermediate_value", "intermediate_value_type")
            reports = _rows(connection, chosen, models.TrialIntermediateValueModel, *columns_of_reports)
        value_of = models.TrialValueModel.stored_repr_to_value
        report_of = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
        return [
            FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=[value_of(value, kind) for _, value, kind in sorted(values[id_])] or None,
                datetime_start=_local(start),
                datetime_complete=_local(complete),
                params={name: _distribution(text).to_external_repr(value) for name, value, text in params[id_]},
                distributions={name: _distribution(text) for name, _, text in params[id_]},
                user_attrs={key: _decode(text) for key, text in user[id_]},
                system_attrs={key: _decode(text) for key, text in system[id_]},
                intermediate_values={step: report_of(value, kind) for step, value, kind in reports[id_]},
                trial_id=id_,
            )
            for id_, number, state, start, complete in trials
        ]


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection while many objects are made that stay: it takes a quarter of the time of 10,000 trials."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rows(connection: Connection, chosen: ColumnElement[bool], model: Any, *names: str) -> Rows:
    """These columns of a table, by trial, in the order of writing."""
    columns = [getattr(model, name) for name in names]
    (key,) = sqlalchemy.inspect(model).primary_key
    rows: Rows = defaultdict(list)
    query = select(model.trial_id, *columns).join(TRIAL, TRIAL.trial_id == model.trial_id).where(chosen).order_by(key)
    for trial_id, *row in connection.execute(query).all():  # one by one they take twice as long
        rows[trial_id].append(row)
    return rows


def _decode(text: str) -> Any:
    """Python's JSON holds NaN, which msgspec, three times as fast, refuses."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)


@cache
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _local(utc: datetime | None) -> datetime | None:
    """Optuna keeps times in UTC, and its trials have local ones, both without a zone."""
    return None if utc is None else datetime.fromtimestamp((utc - EPOCH).total_seconds())


def _repeated(
    method: Callable[Concatenate["ReconnectingStorage", P], T],
) -> Callable[Concatenate["ReconnectingStorage", P], T]:
    """The method, repeated while the connection is lost."""

    def call(self: "ReconnectingStorage", /, *arguments: P.args, **more: P.kwargs) -> T:
        return self._retry(lambda _: method(self, *arguments, **more))

    return call


class ReconnectingStorage(RowStorage):
    """Optuna's storage, whose calls are repeated after a lost connection: see `database.retry`.

    The methods are those that `_CachedStorage` calls: wrap it with `get_storage`.
    """

    def __init__(self, url: sqlalchemy.URL, *, stopping: Callable[[], bool], check_lock: Callable[[], None]) -> None:
        super().__init__(
            url.render_as_string(hide_password=False),
            engine_kwargs={"connect_args": CONNECT_ARGS, "pool_events": POOL_EVENTS},
        )
        self._where = url.render_as_string(hide_password=True)
        self._stopping, self._check_lock = stopping, check_lock
        self._asked: set[str] = set()  # nonces of trials that may have been created

    def _retry(self, call: Callable[[bool], T]) -> T:
        return retry(call, self._where, self._stopping, self._check_lock)

    create_new_study = _repeated(RDBStorage.create_new_study)  # repeated, it may raise DuplicatedStudyError
    delete_study = _repeated(RDBStorage.delete_study)  # repeated, it may raise KeyError
    set_study_user_attr = _repeated(RDBStorage.set_study_user_attr)
    set_study_system_attr = _repeated(RDBStorage.set_study_system_attr)
    get_study_id_from_name = _repeated(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _repeated(RDBStorage.get_study_name_from_id)
    get_study_directions = _repeated(RDBStorage.get_study_directions)
    get_study_user_attrs = _repeated(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _repeated(RowStorage.get_study_system_attrs)
    get_all_studies = _repeated(RDBStorage.get_all_studies)
    get_trial_id_from_study_id_trial_number = _repeated(RDBStorage.get_trial_id_from_study_id_trial_number)
    get_trial = _repeated(RowStorage.get_trial)
    set_trial_intermediate_value = _repeated(RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _repeated(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _repeated(RDBStorage.set_trial_system_attr)
    _set_trial_param = _repeated(RDBStorage._set_trial_param)
    _get_trials = _repeated(RowStorage._get_trials)
    _get_best_trial_id = _repeated(RDBStorage._get_best_trial_id)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """Creates a trial once. Optuna itself repeats this call too, without a look at what an attempt has left."""
        trial = copy(template_trial) if template_trial else create_trial(state=TrialState.RUNNING)
        nonce = uuid.uuid4().hex
        trial.system_attrs = {**trial.system_attrs, NONCE: nonce}
        try:
            return self._retry(lambda _: super(ReconnectingStorage, self)._create_new_trial(study_id, trial))
        finally:
            self._asked.discard(nonce)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: sqlalchemy.orm.Session
    ) -> models.TrialModel:
        """The trial of an earlier attempt, else a new one; the caller has locked the study's row."""
        assert template_trial is not None
        nonce = template_trial.system_attrs[NONCE]
        if nonce in self._asked:
            self._check_lock()
            attribute = models.TrialSystemAttributeModel
            query = session.query(models.TrialModel).join(attribute).filter(models.TrialModel.study_id == study_id)
            trial = query.filter(attribute.key == NONCE, attribute.value_json == json.dumps(nonce)).one_or_none()
            if trial is not None:
                return trial
        self._asked.add(nonce)
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Ends a trial, or starts a waiting one, once."""

        def call(repeated: bool) -> bool:
            try:
                changed = super(ReconnectingStorage, self).set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if repeated and self._has(trial_id, state, values):
                    return True
                raise
            return changed or (repeated and self._has(trial_id, state, values))

        return self._retry(call)

    def _has(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = self.get_trial(trial_id)
        return (trial.state, trial.values or []) == (state, list(values or []))
