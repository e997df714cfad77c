"""What the forkserver prepares for every worker."""

import gc
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pytest
import torch

from searchfm.engines.local import LocalEngine
from searchfm.jobs import Context, EpochDone, Finished, Job, Result
from searchfm.learn.data import load
from searchfm.learn.train import Training
from searchfm.records import Epoch
from tests.learn.toys import config

TINY = 1e-40  # below float32's smallest normal number, 1.2e-38


def settings(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """A number that only exists where denormal numbers do, how many objects no collection looks at, how many threads
    there are, what is imported at the start, and which parts of torch._dynamo once every optimizer has trained.
    """
    imported = [name for name in ("searchfm.learn.entries", "timm", "optuna", "mlflow") if name in sys.modules]
    threads, cuda = torch.get_num_threads(), torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()
    product = (torch.full((8,), TINY * 1e10) * torch.full((8,), 1e-10)).sum().item()
    for kind in ("sgd", "adam", "adamw", "rmsprop", "adagrad"):
        trained = config(optimizer={"name": kind}, train={"epochs": 1, "ema": 0.9})
        yield from Training(trained, load(trained.data))
    dynamo = [name for name in sys.modules if name.startswith("torch._dynamo.")]
    return {
        "product": product,
        "frozen": gc.get_freeze_count(),
        "start": (threads, cuda, imported),
        "dynamo": dynamo,
    }


@pytest.fixture(scope="module", params=["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def result(request: pytest.FixtureRequest) -> Result:
    """What a job finds in a worker that was started so."""
    engine = LocalEngine(["cpu"])
    engine._context = multiprocessing.get_context(request.param)
    try:
        engine.submit(Job("settings", None, "tests.learn.test_warm:settings", {}, attempt=1))
        event = None
        while event is None or isinstance(event, EpochDone):
            event = engine.next_event(timeout=10)
    finally:
        engine.close()
    assert isinstance(event, Finished)
    return event.result


def test_workers_take_numbers_too_small_to_matter_for_zero(result: Result) -> None:
    """Where they do not, L2 slows an MLP's training tenfold after a few epochs."""
    assert result["product"] == 0.0


def test_no_collection_looks_at_what_was_imported(result: Result) -> None:
    """Where it does, collecting garbage takes most of a small trial's time."""
    assert result["frozen"] > 100_000


def test_a_worker_starts_with_the_entries_one_thread_and_no_gpu(result: Result) -> None:
    """Threads and CUDA do not survive a fork: a mere `torch.cuda.is_available()` before it forbids CUDA in the worker.
    PyTorch's CUDA build keeps count of that without a GPU, too.
    """
    assert result["start"] == (1, False, ["searchfm.learn.entries"])


def test_training_imports_no_compiler(result: Result) -> None:
    """With it the imports take half as long again. Where this fails, torch has moved: see LazyDynamo."""
    assert result["dynamo"] == []


@pytest.mark.nightly
def test_a_compiled_function_finds_the_compiler(record_property: Callable[[str, object], None]) -> None:
    record_property("figures", "torch.compile after the placeholder of torch._dynamo")
    program = """
import torch, searchfm.learn.warm
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [2, 2]
import torch._dynamo.config
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.slow
def test_nothing_is_printed_when_the_interpreter_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import searchfm.learn.warm"], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "")
