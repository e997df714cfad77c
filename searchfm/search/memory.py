"""A study in memory, which sampler and pruner read and change, and what of it is written to the database.

Optuna's own storages commit each parameter, report and attribute alone: 25 transactions a trial of five epochs. Here a
trial is created with its parameters and attributes in one, and each `write` after that is one.
"""

from copy import copy
from datetime import datetime

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from searchfm.search.rdb import Content, backend, no_collection


class MemoryStudy:
    """A study of the database, rebuilt in memory. One process writes it.

    A trial that was asked for is in memory alone until `write` creates it in the database.
    """

    def __init__(self, storage: BaseStorage, number: int, name: str, pruner: BasePruner) -> None:
        self._rows, self._number = backend(storage), number
        self._memory = InMemoryStorage()
        self.optuna = optuna.create_study(storage=self._memory, study_name=name, direction="maximize", pruner=pruner)
        id_ = self.optuna._study_id
        for key, value in storage.get_study_system_attrs(number).items():
            self._memory.set_study_system_attr(id_, key, value)
        self._attrs = dict(self._memory.get_study_system_attrs(id_))
        self._ids: dict[int, int] = {}  # of unfinished trials in the database, by number
        self._written: dict[int, Content] = {}  # of them
        self._paused: dict[int, FrozenTrial] = {}  # trials that are shown as pruned, as they stand
        with no_collection():
            for trial in storage.get_all_trials(number, deepcopy=False):
                template = copy(trial)
                if trial.state.is_finished():
                    template.user_attrs = {}  # neither samplers nor pruners read them
                else:
                    self._ids[trial.number], self._written[trial.number] = trial._trial_id, Content.of(trial)
                self._memory.create_new_trial(id_, template)  # copies it

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials by number; of those that ended earlier, without user attributes."""
        return self.optuna.get_trials(deepcopy=False)

    def ask(self, sampler: BaseSampler) -> optuna.Trial:
        """A new trial, in memory alone."""
        self.optuna.sampler = sampler
        return self.optuna.ask()

    def adopt(self, number: int, sampler: BaseSampler) -> optuna.Trial:
        """An unfinished trial of an earlier process."""
        self.optuna.sampler = sampler
        return optuna.Trial(self.optuna, self._id(number))

    def trial(self, number: int) -> FrozenTrial:
        """A trial as it stands."""
        return self._paused.get(number) or self._memory.get_trial(self._id(number))

    def pause(self, number: int, like: int) -> None:
        """Shows a RUNNING trial to the sampler as PRUNED, with the reports of trial `like`, until `unpause`. Some
        samplers take a RUNNING trial for a bad one. In the database it stays RUNNING.
        """
        trial = self._memory.get_trial(self._id(number))
        assert trial.state is TrialState.RUNNING
        reports, shown = self.trial(like).intermediate_values, copy(trial)
        shown.state, shown.datetime_complete = TrialState.PRUNED, datetime.now()
        shown.intermediate_values, shown.values = dict(reports), [reports[max(reports)]]
        self._paused[number] = trial
        self._memory._set_trial(trial._trial_id, shown)

    def unpause(self, number: int) -> None:
        """Shows a paused trial as RUNNING again."""
        trial = self._paused.pop(number)
        self._memory._set_trial(trial._trial_id, trial)

    def write(self, number: int) -> None:
        """Writes what of a trial is not in the database yet, in one transaction; creates the trial if it is new. Raises
        what the storage raises.
        """
        trial = self.trial(number)
        content = Content.of(trial)
        if number not in self._ids:
            self._create(trial)
        elif content != self._written[number]:
            self._rows.write_trial(self._ids[number], content.since(self._written[number]))
        self._written[number] = content

    def tell(self, trial: optuna.Trial, value: float | None, state: TrialState) -> None:
        """Ends a trial, in memory and in the database, with all that is not written yet. Raises ValueError for a value
        that Optuna does not take.
        """
        self.optuna.tell(trial, value, state)
        id_, written = self._ids.pop(trial.number), self._written.pop(trial.number)
        end = self.trial(trial.number)
        self._rows.write_trial(id_, Content.of(end).since(written), end)

    def _create(self, trial: FrozenTrial) -> None:
        """Creates the trial in the database; it starts now."""
        trial = copy(trial)
        trial.datetime_start = datetime.now()
        self._memory._set_trial(trial._trial_id, trial)
        attrs = self._memory.get_study_system_attrs(self.optuna._study_id)
        for key, value in attrs.items():
            if self._attrs.get(key) != value:  # before the trial: else its proposal would repeat
                self._rows.set_study_system_attr(self._number, key, value)
        self._attrs = dict(attrs)
        created = self._rows._create_new_trial(self._number, trial)
        assert created.number == trial.number, "another process asks in this study"
        self._ids[trial.number] = created._trial_id

    def _id(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self.optuna._study_id, number)
