"""Steps of training as CUDA graphs: the kernels of a step are recorded once, and launched again by one call.

A step of a small net has dozens of kernels of a few microseconds each; launching them one by one from Python takes
several times as long as they run.
"""

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from searchfm.config import Adagrad, Config, Custom
from searchfm.errors import UserError, one_line
from searchfm.tables import show

T = TypeVar("T")

log = logging.getLogger("searchfm")

SWITCH = "SEARCHFM_CUDA_GRAPHS"
EAGER = 3  # steps before the recorded one: they allocate the optimizer's state and load kernels; torch advises three


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
    own = isinstance(config.model.kind, Custom) or isinstance(config.optimizer.kind, Adagrad)
    return wanted() and device.type == "cuda" and not own


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records what `step` launches on a GPU, without running it. Each call of the result runs it, in the current
    stream. Random numbers go on from call to call as without a graph. Raises RuntimeError for what cannot be recorded:
    a step that waits for the device, or copies from host memory.
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

    From the fourth batch on, those of the first one's size run as a graph; others, such as an epoch's last one, as they
    are. So do all of a model that cannot be recorded, as a few of timm's. The step must read what changes between
    batches from tensors that stay where they are.
    """

    def __init__(
        self, device: torch.device, record: Callable[[Callable[[], None], torch.device], Callable[[], None]] = record
    ) -> None:
        self._device, self._record = device, record
        self._batches, self._size, self._tried = 0, 0, False
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._replay: Callable[[], None] | None = None
        self._result: T

    def __call__(self, step: Callable[[Tensor, Tensor], T], inputs: Tensor, targets: Tensor) -> T:
        """Runs the step on a batch; it must do the same in every call. What it returns may be valid until the next
        call alone.
        """
        self._size = self._size or len(inputs)
        same = len(inputs) == self._size
        if same and not self._tried and self._batches >= EAGER:
            self._tried = True
            self._inputs, self._targets = torch.empty_like(inputs), torch.empty_like(targets)
            try:
                self._replay = self._record(partial(self._run, step), self._device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.info("no CUDA graph: %s", one_line(error))
        self._batches += 1
        if self._replay is None or not same:
            return step(inputs, targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._replay()
        return self._result

    def _run(self, step: Callable[[Tensor, Tensor], T]) -> None:
        self._result = step(self._inputs, self._targets)
