"""Steps of training as CUDA graphs: the kernels of a step are recorded once, and launched again by one call.

A step of a small net has dozens of kernels of a few microseconds each; launching them one by one from Python takes
several times as long as they run.
"""

import logging
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from searchfm.config import Adagrad, Config, Custom
from searchfm.errors import UserError, one_line
from searchfm.tables import show

log = logging.getLogger("searchfm")
T = TypeVar("T")

SWITCH = "SEARCHFM_CUDA_GRAPHS"
EAGER = 3  # steps before the recorded one, as torch advises: they allocate the optimizer's state and load kernels
MEMORY = 1 / 8  # of a GPU's; a step that takes more has large kernels, to which launching adds little
WAITED = "called a synchronizing CUDA operation"  # torch's warning


def wanted() -> bool:
    """Whether steps may be recorded, from SEARCHFM_CUDA_GRAPHS. Raises UserError."""
    text = os.environ.get(SWITCH) or "1"
    if text not in ("0", "1"):
        raise UserError(f"{SWITCH} = {show(text)}: must be 1, or 0 to train without CUDA graphs")
    return text == "1"


def suits(config: Config, device: torch.device) -> bool:
    """Whether all steps of a training launch the same kernels, so that recording one is enough: on an NVIDIA GPU. Not
    with the user's own model, whose code may depend on values or count calls, nor with Adagrad, whose count of steps
    torch keeps in host memory. Raises UserError for the variable.
    """
    varies = isinstance(config.model.kind, Custom) or isinstance(config.optimizer.kind, Adagrad)
    return wanted() and device.type == "cuda" and not varies


def watch(step: Callable[[], T], device: torch.device) -> tuple[T, bool]:
    """Runs a step on a GPU: what it returns, and whether it may be recorded.

    Not if it waited for the GPU: torch's random numbers and memory would be unusable after the attempt. Nor if steps
    take more than MEMORY: what they compute is then kept twice.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = any(WAITED in str(warning.message) for warning in caught)
    taken = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return result, not waited and taken <= MEMORY * torch.cuda.get_device_properties(device).total_memory


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records what `step` launches on a GPU, without running it. Each call of the result runs it, in the current
    stream. Random numbers go on from call to call as without a graph. Raises RuntimeError for what cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream(device)):
        step()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record in: one for all trainings, since cuBLAS keeps 70 MB for each stream that it was used in."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Recorded(Generic[T]):
    """Runs a step, of training or validation, on batches (inputs, targets) of a device.

    Batches of the first one's size run as a graph from the fourth on; others, such as an epoch's last one, as they are.
    So do all of a large model, and of one that cannot be recorded, as a few of timm's. The step must read what changes
    between batches from tensors that stay where they are.

    watch, record: as the functions of this module.
    """

    def __init__(
        self,
        device: torch.device,
        watch: Callable[[Callable[[], T], torch.device], tuple[T, bool]] = watch,
        record: Callable[[Callable[[], None], torch.device], Callable[[], None]] = record,
    ) -> None:
        self._device, self._watch, self._record = device, watch, record
        self._size = self._batches = 0  # images of a batch; batches of that size so far
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._replay: Callable[[], None] | None = None
        self._suits = False
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
            result, self._suits = self._watch(partial(step, inputs, targets), self._device)
            return result
        if self._batches == EAGER + 1 and self._suits:
            self._inputs, self._targets = torch.empty_like(inputs), torch.empty_like(targets)
            try:
                self._replay = self._record(partial(self._run, step), self._device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.info("no CUDA graph: %s", one_line(error))
        if self._replay is None:
            return step(inputs, targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._replay()
        return self._result

    def _run(self, step: Callable[[Tensor, Tensor], T]) -> None:
        self._result = step(self._inputs, self._targets)
