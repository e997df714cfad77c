"""Steps of training as CUDA graphs: the kernels of a step are recorded once, and launched again by one call.

A step of a small net has dozens of kernels of a few microseconds each; launching them one by one from Python takes
several times as long as they run.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from searchfm.config import Adagrad, Config, Custom
from searchfm.errors import UserError
from searchfm.tables import show

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
    stream. Random numbers go on from call to call as without a graph.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


class Recorded:
    """Runs a step of training on batches (inputs, targets) of a device. From the fourth batch on, those of the first
    one's size run as a graph; others, such as an epoch's last one, as they are.

    The step must read what changes between batches from tensors that stay where they are.
    """

    def __init__(
        self, device: torch.device, record: Callable[[Callable[[], None], torch.device], Callable[[], None]] = record
    ) -> None:
        self._device, self._record = device, record
        self._batches, self._size = 0, 0
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._replay: Callable[[], None] | None = None

    def __call__(self, step: Callable[[Tensor, Tensor], None], inputs: Tensor, targets: Tensor) -> None:
        """Runs the step on a batch; it must be the same step in every call."""
        self._size = self._size or len(inputs)
        if self._batches < EAGER or len(inputs) != self._size:
            self._batches += 1
            step(inputs, targets)
            return
        if self._replay is None:
            self._inputs, self._targets = torch.empty_like(inputs), torch.empty_like(targets)
            self._replay = self._record(lambda: step(self._inputs, self._targets), self._device)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._replay()
