"""Slow imports, done once by the forkserver, so that forked workers start warm. A spawned worker imports this too.

One thread, because threads do not survive a fork; no CUDA, because a forked CUDA context is broken.
"""

import atexit
import gc
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import searchfm.learn.entries  # noqa: F401  the entries, and all they need but timm

torch.set_num_threads(1)
# L2 drives weights that nothing needs towards zero, and a CPU takes many times as long over numbers below 1e-38: 11.6 s
# an epoch instead of 1.0 (an MLP, weight_decay = 0.02, from the fourth epoch on). Forked workers inherit the setting.
torch.set_flush_denormal(True)


class LazyDynamo(ModuleType):
    """Stands for torch._dynamo until something needs more of it than optimizers do: they import it to mark what is not
    to be compiled, and torch has no switch for that. torchvision's operators need it, and so do timm's models.

    With it the imports of this module take 5.6 s of CPU instead of 3.8, and 841 MB instead of 764 (Xeon at 2.5 GHz,
    torch 2.15, medians of 3).
    """

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        """The function as it is: nothing is compiled."""
        return function

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
weight = torch.nn.Parameter(torch.zeros(2))
torch.autograd.backward(weight.square().sum())
torch.optim.AdamW([weight], fused=True).step()
# A worker collects garbage after every trial, and then skips the frozen objects of these imports: 0.02 s of CPU a trial
# instead of 0.18 where they were 330,000 (MLP of one epoch on digits, means of 40 trials, AMD EPYC, Python 3.11).
# Objects still frozen when the interpreter ends count as leaked, and nanobind prints a page about them.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
