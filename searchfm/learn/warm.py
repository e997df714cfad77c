"""Slow imports, done once by the forkserver, so that forked workers start warm. A spawned worker imports this too.

One thread, because threads do not survive a fork. No CUDA: where the forkserver has as much as counted the GPUs, its
forks cannot use them. So nothing here may train: a backward pass starts a thread for each GPU, and a step of an
optimizer looks for GPUs.
"""

import atexit
import gc
import importlib
import sys
from types import ModuleType
from typing import Any

gc.disable()  # until all is imported: collections among so many objects take 0.25 of 2.25 s of CPU

import torch  # noqa: E402
import torch.utils.flop_counter  # noqa: E402

import searchfm.learn.entries  # noqa: E402, F401  the entries, and all they need but timm

torch.set_num_threads(1)
# L2 drives weights that nothing needs towards zero, and a CPU takes many times as long over numbers below 1e-38: 11.6 s
# an epoch instead of 1.0 (an MLP, weight_decay = 0.02, from the fourth epoch on). Forked workers inherit the setting.
torch.set_flush_denormal(True)


class LazyDynamo(ModuleType):
    """A placeholder, which the first use of anything but the two functions below replaces by torch._dynamo.

    torch's optimizers import torch._dynamo to mark what is not to be compiled; torch has no switch for that. It takes
    1.8 of 5.6 s of CPU and 77 of 841 MB of this module's imports (Xeon at 2.5 GHz, torch 2.15, medians of 3). timm's
    models import it too, through torchvision's operators.
    """

    def disable(self, *arguments: Any, wrapping: bool = True, **options: Any) -> Any:
        """The function as it is, where torch's own `torch._disable_dynamo` asks, which passes `wrapping=False`."""
        return self.__getattr__("disable")(*arguments, **options) if wrapping else arguments[0]

    @staticmethod
    def graph_break(*_: object) -> None:
        """Nothing: no graph is being recorded."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module by `inspect`; the path by an import
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__], torch._dynamo
        return getattr(importlib.import_module(self.__name__), name)


if "torch._dynamo" not in sys.modules:
    torch._dynamo = sys.modules["torch._dynamo"] = LazyDynamo("torch._dynamo")
# A worker collects garbage after every trial, and then skips the frozen objects of these imports: 0.02 s of CPU a trial
# instead of 0.18 where they were 330,000 (MLP of one epoch on digits, means of 40 trials, AMD EPYC, Python 3.11).
# Objects still frozen when the interpreter ends count as leaked, and nanobind prints a page about them.
gc.collect()
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)
