"""What a short training costs in a process that is new, and in one that has trained before, as workers have.

CPU seconds on one thread: an MLP of one layer, an epoch on a tenth of Fashion-MNIST. `python -m tests.bench warm`.
"""

import statistics
import subprocess
import sys

REPEATS = 5
CODE = """
import time
import torch
from searchfm.config import Config
from searchfm.learn.data import load
from searchfm.learn.train import Training

torch.set_num_threads(1)
model = {"name": "mlp", "mlp": {"layers": 1, "width": 50}}
config = Config.from_table({"data": {"subset": 0.1}, "model": model, "train": {"epochs": 1}})
data = load(config.data)
for again in (False, True):
    before = time.process_time() if again else 0.0  # of a new process all counts, its imports too
    (epoch,) = Training(config, data)
    print(time.process_time() - before)
"""


def main(arguments: list[str]) -> None:
    command = [sys.executable, "-c", CODE]
    runs = [subprocess.check_output(command, text=True).split() for _ in range(REPEATS)]
    new, again = (statistics.median(float(run[index]) for run in runs) for index in (0, 1))
    print(f"CPU seconds, medians of {REPEATS}: in a new process {new:.2f}, in one that has trained before {again:.2f}")
