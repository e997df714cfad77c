"""Ray Tune with the training function of its own PyTorch example, a trial a core.

--reuse-actors: a process for several trials, else one for each; --asha: with the ASHA scheduler.
"""

import os
import sys
import time
from pathlib import Path

import psutil
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from work import Work, report


def objective(config: dict) -> None:
    import torch
    from torch_example import net, train

    work, index = Work.read(config["folder"]), config["index"]
    torch.manual_seed(1000 * work.seed + index)
    point = work.points[index]

    def after(epoch: int, accuracy: float, steps: int) -> None:
        tune.report({"accuracy": accuracy, "steps": steps, "cpu": time.process_time()})

    train(work, net(point["widths"]), point["lr"], after)


def cpu_seconds(trials: list[dict]) -> float:
    """CPU seconds of this process, of Ray's own, and of those of the trials up to their last report.

    Nobody waits for Ray's processes, so that the operating system adds their time to no parent's.
    """
    workers: dict[int, float] = {}  # by process id
    for metrics in trials:
        workers[metrics["pid"]] = max(metrics["cpu"], workers.get(metrics["pid"], 0.0))
    total = time.process_time() + sum(workers.values())
    for process in psutil.Process().children(recursive=True):
        if process.pid not in workers:
            times = process.cpu_times()
            total += times.user + times.system
    return total


def main() -> None:
    work = Work.read(sys.argv[1])
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # of workers: Ray gives each trial one thread
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, _temp_dir=str(work.folder / "ray"))
    scheduler = ASHAScheduler(max_t=work.epochs, grace_period=1, reduction_factor=2) if "--asha" in sys.argv else None
    reuse = "--reuse-actors" in sys.argv
    tuner = tune.Tuner(
        tune.with_resources(objective, {"cpu": 1}),
        # Points of the list instead of draws: random draws take Ray no longer.
        param_space={"folder": str(work.folder), "index": tune.grid_search(list(range(len(work.points))))},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max", scheduler=scheduler, reuse_actors=reuse),
        run_config=tune.RunConfig(storage_path=str(work.folder / "results"), verbose=0),
    )
    results = {result.config["index"]: result.metrics for result in tuner.fit()}
    trials = [metrics for _, metrics in sorted(results.items())]
    cpu = cpu_seconds(trials)
    ray.shutdown()
    report([(metrics["steps"], metrics["accuracy"]) for metrics in trials], cpu=cpu)


if __name__ == "__main__":
    main()
