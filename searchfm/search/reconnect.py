"""Optuna's storage on PostgreSQL, through dropped connections: a call is repeated, and each write counts once.

A connection can be lost between a commit and its answer, so the outcome of a write may be unknown. What repeats it
finds out first, inside the transaction that would write, after a lock on the row of the study or the trial: until an
earlier attempt has been committed or rolled back, it waits there. A new trial is recognised by a nonce, the end of a
trial by its state and values. All other writes set a value under a key, and may be repeated.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from copy import copy
from typing import Concatenate, ParamSpec, TypeVar

import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

from searchfm.search.database import CONNECT_ARGS, POOL_EVENTS, retry
from searchfm.search.reader import RowStorage

P = ParamSpec("P")
T = TypeVar("T")

NONCE = "searchfm:nonce"  # system attribute of a trial


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
    set_study_user_attr = _repeated(RDBStorage.set_study_user_attr)
    set_study_system_attr = _repeated(RDBStorage.set_study_system_attr)
    get_study_id_from_name = _repeated(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _repeated(RDBStorage.get_study_name_from_id)
    get_study_directions = _repeated(RDBStorage.get_study_directions)
    get_study_user_attrs = _repeated(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _repeated(RDBStorage.get_study_system_attrs)
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
