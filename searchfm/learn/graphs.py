"""Steps of training as CUDA graphs: the kernels of a step are recorded once, and launched again by one call.

A step of a small net has dozens of kernels of a few microseconds each; launching them one by one from Python takes
several times as long as they run.
"""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from searchfm.config import Adagrad, Config, Custom
from searchfm.errors import DataError, one_line
from searchfm.tables import show

log = logging.getLogger("searchfm")
T = TypeVar("T")

SWITCH = "SEARCHFM_CUDA_GRAPHS"
EAGER = 3  # steps before the recorded one, as torch advises: they allocate the optimizer's state and load kernels
MEMORY = 1 / 8  # of a GPU's; a step that allocates more has large kernels, to which launching adds little
WAITED = "called a synchronizing CUDA operation"  # torch's warning


def wanted() -> bool:
    """Whether steps may be recorded, from SEARCHFM_CUDA_GRAPHS. Raises DataError, which ends a search."""
    text = os.environ.get(SWITCH) or "0"  # until the tests marked `gpu` have passed with a torch that we support
    if text not in ("0", "1"):
        raise DataError(f"{SWITCH} = {show(text)}: must be 0, or 1 to train with CUDA graphs on an NVIDIA GPU")
    return text == "1"


def suits(config: Config, device: torch.device) -> bool:
    """Whether all steps of a training launch the same kernels, so that recording one is enough: on an NVIDIA GPU. Not
    with the user's own model, whose code may depend on values or count calls, nor with Adagrad, whose count of steps
    torch keeps in host memory. Raises DataError for the variable.
    """
    varies = isinstance(config.model.kind, Custom) or isinstance(config.optimizer.kind, Adagrad)
    return wanted() and device.type == "cuda" and not varies


def watch(step: Callable[[], T], device: torch.device) -> tuple[T, bool]:
    """Runs a step on a GPU: what it returns, and whether it may be recorded.

    Not if it waited for the GPU: torch 2.11's random numbers are unusable after the attempt. Nor if it allocated more
    than MEMORY in all: a graph keeps what a step computes.
    """
    before = _allocated(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = any(WAITED in str(warning.message) for warning in caught)
    total = torch.cuda.get_device_properties(device).total_memory
    return result, not waited and _allocated(device) - before <= MEMORY * total


def _allocated(device: torch.device) -> int:
    """Bytes that were ever allocated, freed ones included."""
    return int(torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"])


def record(step: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Records what `step` launches on a GPU, without running it. Each call of the result runs it, in the current
    stream. Random numbers go on from call to call as without a graph. Raises RuntimeError for what cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


class Recorded(Generic[T]):
    """Runs a step, of training or validation, on batches (inputs, targets) of a GPU.

    Batches of the first one's size run as a graph from the fourth on; others, such as an epoch's last one, run as they
    are. A large model, and one that cannot be recorded, as a few of timm's, runs without a graph. The step must read
    what changes between batches from tensors that stay where they are.

    stream: to record in, shared by steps that live and die together: torch keeps memory for each, and frees it with a
    graph that was recorded there.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._size = self._batches = 0  # images of a batch; batches of that size so far
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._replay: Callable[[], None] | None = None
        self._result: T

    def __call__(self, step: Callable[[Tensor, Tensor], T], inputs: Tensor, targets: Tensor) -> T:
        """Runs the step on a batch; it must do the same in every call. What it returns may be valid until the next
        call alone.
        """
        self._size = self._size or len(inputs)
        if len(inputs) != self._size:
            return step(inputs, targets)
        self._batches += 1
        if self._batches == EAGER:
            result, suits = watch(partial(step, inputs, targets), inputs.device)
            if suits:
                self._inputs, self._targets = torch.empty_like(inputs), torch.empty_like(targets)
                try:
                    self._replay = record(partial(self._run, step), self._stream)
                except RuntimeError as error:  # out of memory, too: without a graph the step may fit
                    log.info("no CUDA graph: %s", one_line(error.__context__ or error))
            return result
        if self._replay is None:
            return step(inputs, targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._replay()
        return self._result

    def _run(self, step: Callable[[Tensor, Tensor], T]) -> None:
        self._result = step(self._inputs, self._targets)
