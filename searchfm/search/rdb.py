"""Optuna's storage in a database: its trials are read and written as rows, and on PostgreSQL its calls survive dropped
connections.

Through Optuna's objects of SQLAlchemy, 10,000 trials of a toy study take 5.5 s of CPU to read, as rows 0.8 s.

A connection can be lost between a commit and its answer, so the outcome of a write may be unknown. What repeats it
finds out first, inside the transaction that would write, after a lock on the row of the study or the trial: until an
earlier attempt has been committed or rolled back, it waits there. A new trial is recognised by a nonce, the end of a
trial by its state and values. All other writes set a value under a key, and may be repeated.
"""

import gc
import importlib
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import msgspec
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from searchfm.search.database import CONNECT_ARGS, POOL_EVENTS, retry, shown_url

P = ParamSpec("P")
T = TypeVar("T")

NONCE = "searchfm:nonce"  # system attribute of a trial
EPOCH = datetime(1970, 1, 1)
TRIAL = models.TrialModel
REPORT, VALUE = models.TrialIntermediateValueModel, models.TrialValueModel
Rows = dict[int, list[Any]]  # by trial


@dataclass(frozen=True)
class Content:
    """What Optuna's tables hold of a trial beside its state, values and times. Its mappings are its own."""

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    user_attrs: Mapping[str, Any]
    system_attrs: Mapping[str, Any]
    reports: Mapping[int, float]  # by step

    @classmethod
    def of(cls, trial: FrozenTrial) -> Self:
        """That of a trial now. `optuna.Trial` changes mappings in place, also those of its trials before."""
        params, distributions, reports = dict(trial.params), dict(trial.distributions), dict(trial.intermediate_values)
        return cls(params, distributions, dict(trial.user_attrs), dict(trial.system_attrs), reports)

    def since(self, before: Self) -> Self:
        """The entries that `before` lacks, or has with other values."""
        return type(self)(*map(_new, vars(self).values(), vars(before).values()))


def _new(now: Mapping[Any, Any], old: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in now.items() if key not in old or old[key] != value}


class RowStorage(RDBStorage):
    """Reads and writes the same trials as Optuna's own methods. Wrap it with `get_storage`.

    check: whether the tables may be missing, or of another Optuna. Optuna's own check imports alembic, which takes 0.12
    s of CPU, a sixth of `status`; without it this object lacks Optuna's version manager alone.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any], *, check: bool = True) -> None:
        if check:
            super().__init__(url, engine_kwargs)
            return
        self.url, self.engine_kwargs = url, engine_kwargs
        self.skip_compatibility_check = True
        self.heartbeat_interval = self.grace_period = None
        self.failed_trial_callback = self.heartbeat_stale_trial_callback = None
        self.engine = sqlalchemy.create_engine(url, **engine_kwargs)
        self.scoped_session = sqlalchemy.orm.scoped_session(sqlalchemy.orm.sessionmaker(bind=self.engine))

    def write_trial(self, trial_id: int, content: Content, end: FrozenTrial | None = None) -> None:
        """Adds to an unfinished trial, in one transaction; end: also gives it the state, values and time of its end.

        Raises KeyError for an unknown trial, UpdateFinishedTrialError for one that has ended.
        """
        with self.engine.begin() as connection:
            state = connection.scalar(select(TRIAL.state).where(TRIAL.trial_id == trial_id).with_for_update())
            if state is None:
                raise KeyError(f"no trial has the id {trial_id}")
            self.check_trial_is_updatable(trial_id, state)
            _write(connection, trial_id, content, (end and end.values) or ())
            if end is not None:
                ended = {TRIAL.state: end.state, TRIAL._datetime_complete_utc: _utc(end.datetime_complete)}
                connection.execute(update(TRIAL).where(TRIAL.trial_id == trial_id).values(ended))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """Creates a trial, in one transaction and a statement a table. Raises KeyError for an unknown study."""
        trial = copy(template_trial) if template_trial else create_trial(state=TrialState.RUNNING)
        with self.engine.begin() as connection:
            study = models.StudyModel.study_id
            if connection.scalar(select(study).where(study == study_id).with_for_update()) is None:
                raise KeyError(f"no study has the id {study_id}")
            trial._trial_id = self._insert(connection, study_id, trial)
            trial.number = connection.execute(
                select(TRIAL.number).where(TRIAL.trial_id == trial._trial_id)
            ).scalar_one()
        return trial

    def _insert(self, connection: Connection, study_id: int, trial: FrozenTrial) -> int:
        """Inserts a trial, with the next number; returns its id."""
        number = select(func.count()).where(TRIAL.study_id == study_id).scalar_subquery()
        times = {
            TRIAL._datetime_start_utc: _utc(trial.datetime_start),
            TRIAL._datetime_complete_utc: _utc(trial.datetime_complete),
        }
        row = {TRIAL.study_id: study_id, TRIAL.number: number, TRIAL.state: trial.state, **times}
        key = connection.execute(insert(TRIAL).values(row)).inserted_primary_key
        assert key is not None
        _write(connection, key[0], Content.of(trial), trial.values or ())
        return int(key[0])

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
            values = _rows(connection, chosen, VALUE, "objective", "value", "value_type")
            user = _rows(connection, chosen, models.TrialUserAttributeModel, "key", "value_json")
            system = _rows(connection, chosen, models.TrialSystemAttributeModel, "key", "value_json")
            columns_of_reports = ("step", "intermediate_value", "intermediate_value_type")
            reports = _rows(connection, chosen, REPORT, *columns_of_reports)
        value_of = VALUE.stored_repr_to_value
        report_of = REPORT.stored_repr_to_intermediate_value
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


def backend(storage: BaseStorage) -> RowStorage:
    """The storage that `get_storage` has wrapped."""
    assert isinstance(storage, _CachedStorage)
    assert isinstance(storage._backend, RowStorage)
    return storage._backend


def _write(connection: Connection, trial_id: int, content: Content, values: Sequence[float]) -> None:
    """Writes rows as Optuna's own methods do, a statement a table, in place of those with the same keys."""
    params = [
        (name, distribution.to_internal_repr(content.params[name]), distribution_to_json(distribution))
        for name, distribution in content.distributions.items()
    ]
    reports = [(step, *REPORT.intermediate_value_to_stored_repr(value)) for step, value in content.reports.items()]
    numbers = [(objective, *VALUE.value_to_stored_repr(value)) for objective, value in enumerate(values)]
    for model, rows, *names in (
        (models.TrialParamModel, params, "param_name", "param_value", "distribution_json"),
        (models.TrialUserAttributeModel, _encode(content.user_attrs), "key", "value_json"),
        (models.TrialSystemAttributeModel, _encode(content.system_attrs), "key", "value_json"),
        (REPORT, reports, "step", "intermediate_value", "intermediate_value_type"),
        (VALUE, numbers, "objective", "value", "value_type"),
    ):
        if rows:
            statement, columns = _upsert(connection.dialect.name, model, *names), ("trial_id", *names)
            connection.execute(statement, [dict(zip(columns, (trial_id, *row), strict=True)) for row in rows])


@cache
def _upsert(dialect: str, model: Any, key: str, *names: str) -> Any:
    """Inserts rows of a table, or updates those of the same trial and key."""
    # In here, since that of PostgreSQL takes 0.03 s to import, which every command on SQLite would wait for.
    make = importlib.import_module(f"sqlalchemy.dialects.{dialect}").insert
    statement = make(model)
    values = {name: statement.excluded[name] for name in names}
    return statement.on_conflict_do_update(index_elements=["trial_id", key], set_=values)


def _encode(attrs: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, json.dumps(value)) for key, value in attrs.items()]


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


def _utc(local: datetime | None) -> datetime | None:
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


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
            {"connect_args": CONNECT_ARGS, "pool_events": POOL_EVENTS},
        )
        self._where = shown_url(url)
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
        """Creates a trial once."""
        trial = copy(template_trial) if template_trial else create_trial(state=TrialState.RUNNING)
        nonce = uuid.uuid4().hex
        trial.system_attrs = {**trial.system_attrs, NONCE: nonce}
        try:
            return self._retry(lambda _: super(ReconnectingStorage, self)._create_new_trial(study_id, trial))
        finally:
            self._asked.discard(nonce)

    def _insert(self, connection: Connection, study_id: int, trial: FrozenTrial) -> int:
        """The trial of an earlier attempt, else a new one; the caller has locked the study's row."""
        nonce = trial.system_attrs[NONCE]
        if nonce in self._asked:
            attribute = models.TrialSystemAttributeModel
            query = select(TRIAL.trial_id).join(attribute, attribute.trial_id == TRIAL.trial_id)
            query = query.where(TRIAL.study_id == study_id, attribute.key == NONCE)
            id_ = connection.scalar(query.where(attribute.value_json == json.dumps(nonce)))
            if id_ is not None:
                return int(id_)
        self._asked.add(nonce)
        return super()._insert(connection, study_id, trial)

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

    def write_trial(self, trial_id: int, content: Content, end: FrozenTrial | None = None) -> None:
        """Adds to an unfinished trial, and ends it once."""

        def call(repeated: bool) -> None:
            try:
                super(ReconnectingStorage, self).write_trial(trial_id, content, end)
            except UpdateFinishedTrialError:
                if not (repeated and end is not None and self._has(trial_id, end.state, end.values)):
                    raise

        self._retry(call)

    def _has(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = self.get_trial(trial_id)
        return (trial.state, trial.values or []) == (state, list(values or []))
