"""Optuna as its own PyTorch example has it, with SQLite as people use it: one process, one trial at a time."""

import sys

import optuna
import torch
from torch_example import net, train
from work import Work, report

WORK = Work.read(sys.argv[1])
STEPS: dict[int, int] = {}  # of each trial


class Listed(optuna.samplers.RandomSampler):
    """Draws as the random sampler does, and then takes the value of the list, so that both sides train the same."""

    def sample_independent(self, study, trial, name, distribution):
        super().sample_independent(study, trial, name, distribution)
        point = WORK.points[trial.number]
        values = {"lr": point["lr"], "n_layers": len(point["widths"])}
        return values[name] if name in values else point["widths"][int(name.removeprefix("n_units_l"))]


def objective(trial: optuna.Trial) -> float:
    torch.manual_seed(1000 * WORK.seed + trial.number)
    layers = trial.suggest_int("n_layers", 1, 3)
    model = net([trial.suggest_int(f"n_units_l{i}", 64, 256) for i in range(layers)])
    lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)

    last = 0.0

    def after(epoch: int, accuracy: float, steps: int) -> None:
        nonlocal last
        last = accuracy
        STEPS[trial.number] = steps
        trial.report(accuracy, epoch)
        if trial.should_prune():  # never: the pruner is none
            raise optuna.TrialPruned

    train(WORK, model, lr, after)
    return last


def main() -> None:
    if "--one-thread" in sys.argv:
        torch.set_num_threads(1)
    study = optuna.create_study(
        storage=f"sqlite:///{WORK.folder / 'optuna.db'}",
        direction="maximize",
        sampler=Listed(seed=0),
        pruner=optuna.pruners.NopPruner(),
    )
    study.optimize(objective, n_trials=len(WORK.points))
    report([(STEPS[trial.number], trial.value) for trial in study.trials])


if __name__ == "__main__":
    main()
