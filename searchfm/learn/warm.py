"""Slow imports, done once by the forkserver, so that forked workers start warm. A spawned worker imports this too.

torch's first optimizer step imports half of torch._dynamo. One thread, because threads do not survive a fork; no CUDA,
because a forked CUDA context is broken.
"""

import atexit
import gc

import torch

import searchfm.learn.entries  # noqa: F401  the entries, and all they need but timm

torch.set_num_threads(1)
# L2 drives weights that nothing needs towards zero, and a CPU takes many times as long over numbers below 1e-38: 11.6 s
# an epoch instead of 1.0 (an MLP, weight_decay = 0.02, from the fourth epoch on). Forked workers inherit the setting.
torch.set_flush_denormal(True)


weight = torch.nn.Parameter(torch.zeros(2))
torch.autograd.backward(weight.square().sum())
torch.optim.AdamW([weight], fused=True).step()
# A worker collects garbage after every trial, and then skips the 330,000 frozen objects of these imports:
# 0.02 s of CPU a trial instead of 0.18 (MLP of one epoch on digits, means of 40 trials, AMD EPYC, Python 3.11).
# Objects still frozen when the interpreter ends count as leaked, and nanobind prints a page about them.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
