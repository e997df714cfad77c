"""Optuna as in its own PyTorch example: one process, TPE, median pruning, one trial at a time on all cores."""

import time

import deadline_work as work
import optuna
import torch

TASK = work.Task.parse()


def choose(trial: optuna.Trial) -> dict:
    stages = trial.suggest_int("stages", *work.STAGES)
    return {
        "filters": [trial.suggest_categorical(f"filters_{i}", work.FILTERS) for i in range(stages)],
        "convs": trial.suggest_int("convs", *work.CONVS),
        "dropout": trial.suggest_float("dropout", *work.DROPOUT),
        "lr": trial.suggest_float("lr", *work.LR, log=True),
        "batch_size": trial.suggest_categorical("batch_size", work.BATCHES),
    }


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.manual_seed(TASK.seed)
    best = work.Best()
    validation = work.loader(TASK, "val", 128)

    def objective(trial: optuna.Trial) -> float:
        point = choose(trial)
        model, value = work.net(point), 0.0
        batches = work.loader(TASK, "train", point["batch_size"])
        for epoch in work.train(model, point, batches, TASK.epochs, TASK.search_ends):
            value = work.accuracy(model, validation)
            best.offer(value, point, model)
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=TASK.seed))
    study.optimize(objective, timeout=TASK.search_ends - time.monotonic())
    model = work.final(TASK, best)
    work.answer(work.accuracy(model, work.loader(TASK, "test", 128)), best.value, len(study.trials))


if __name__ == "__main__":
    main()
