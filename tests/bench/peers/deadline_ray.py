"""Ray Tune, random search and the ASHA scheduler, as in its PyTorch example: a trial a core, a checkpoint an epoch."""

import os
import tempfile
import time
from pathlib import Path

import deadline_work as work
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler


def objective(config: dict) -> None:
    import torch

    task, point = config["task"], config["point"]
    point = {**point, "filters": point["filters"][: point["stages"]]}
    torch.manual_seed(task.seed + int(1e6 * point["lr"]))
    model = work.net(point)
    batches = work.loader(task, "train", point["batch_size"])
    validation = work.loader(task, "val", 128)
    for _ in work.train(model, point, batches, task.epochs, float("inf")):
        value = work.accuracy(model, validation)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), Path(folder) / "model.pt")
            tune.report({"accuracy": value}, checkpoint=tune.Checkpoint.from_directory(folder))


def main() -> None:
    import torch

    task = work.Task.parse()
    torch.manual_seed(task.seed)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # of workers: Ray gives each trial one thread
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(task.folder / "ray"),
    )
    point = {
        "stages": tune.randint(work.STAGES[0], work.STAGES[1] + 1),
        "filters": [tune.choice(work.FILTERS) for _ in range(work.STAGES[1])],
        "convs": tune.randint(work.CONVS[0], work.CONVS[1] + 1),
        "dropout": tune.uniform(*work.DROPOUT),
        "lr": tune.loguniform(*work.LR),
        "batch_size": tune.choice(work.BATCHES),
    }
    tuner = tune.Tuner(
        tune.with_resources(objective, {"cpu": 1}),
        param_space={"task": task, "point": point},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=-1,
            time_budget_s=task.search_ends - time.monotonic(),
            scheduler=ASHAScheduler(max_t=task.epochs, grace_period=1),
        ),
        run_config=tune.RunConfig(storage_path=str(task.folder / "results"), verbose=0),
    )
    results = tuner.fit()
    best = work.Best()
    for result in results:
        for checkpoint, metrics in result.best_checkpoints or ():
            if metrics["accuracy"] > best.value:
                chosen = result.config["point"]
                chosen = {**chosen, "filters": chosen["filters"][: chosen["stages"]]}
                model = work.net(chosen)
                with checkpoint.as_directory() as folder:
                    model.load_state_dict(torch.load(Path(folder) / "model.pt"))
                best.offer(metrics["accuracy"], chosen, model)
    ray.shutdown()
    model = work.final(task, best)
    began = sum("accuracy" in (result.metrics or {}) for result in results)  # Ray draws configurations ahead
    work.answer(work.accuracy(model, work.loader(task, "test", 128)), best.value, began)


if __name__ == "__main__":
    main()
