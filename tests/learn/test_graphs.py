"""Recorded steps without a GPU: which trainings have them, and which batches. tests/test_gpu.py records real ones."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from searchfm.config import Config
from searchfm.errors import UserError
from searchfm.learn import graphs
from searchfm.learn.data import Splits
from searchfm.learn.train import Training
from tests.learn.test_train import CONFIGS
from tests.learn.toys import config, losses

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("chosen", "device", "suits"),
    [
        (CONFIGS["mlp-sgd"], CUDA, True),
        (CONFIGS["cnn-rmsprop"], CUDA, True),
        (CONFIGS["mlp-sgd"], torch.device("cpu"), False),
        (CONFIGS["residual-adagrad"], CUDA, False),
        (config("custom", {"factory": "net.py:make"}), CUDA, False),
    ],
)
def test_which_trainings_are_recorded(chosen: Config, device: torch.device, suits: bool) -> None:
    assert graphs.suits(chosen, device) == suits


def test_the_variable_turns_graphs_off_and_nothing_else_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graphs.SWITCH, "0")
    assert not graphs.suits(CONFIGS["mlp-sgd"], CUDA)
    monkeypatch.setenv(graphs.SWITCH, "off")
    with pytest.raises(
        UserError, match=r'^SEARCHFM_CUDA_GRAPHS = "off": must be 1, or 0 to train without CUDA graphs$'
    ):
        graphs.suits(CONFIGS["mlp-sgd"], CUDA)


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_that_waits_is_told_by_torch_s_warning(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the other warning, which torch gives once a process."""
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )

    def step() -> int:
        if waits:
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:147.)", stacklevel=2
            )
        return len(modes)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert graphs.watch(step) == (1, waits)
    assert modes == ["warn", "default"]


def plain(run: Callable[[], Any]) -> tuple[Any, bool]:
    """In place of `watch`."""
    return run(), False


def test_batches_of_the_first_size_are_replayed_from_the_fourth_on() -> None:
    ran: list[tuple[int, bool]] = []  # rows of a batch, and whether it was in the recorded step's own memory
    own: set[int] = set()

    def step(inputs: Tensor, targets: Tensor) -> None:
        assert torch.equal(inputs[:, 0], targets)
        ran.append((len(inputs), inputs.data_ptr() in own))

    def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        own.update(tensor.data_ptr() for tensor in (recorded._inputs, recorded._targets))
        return run

    recorded = graphs.Recorded[None](torch.device("cpu"), plain, record)
    for value, size in enumerate([4, 4, 3, 4, 3, 4, 4, 3, 4]):
        recorded(step, torch.full((size, 2), value), torch.full((size,), value))
    eager = [(4, False), (4, False), (3, False), (4, False), (3, False)]
    assert ran == [*eager, (4, True), (4, True), (3, False), (4, True)]


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_that_cannot_be_recorded_is_run_as_it_is(waits: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One that was seen to wait for the device is not even tried."""
    ran, tries = [], []

    def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded = graphs.Recorded[None](torch.device("cpu"), lambda run: (run(), waits), record)
    with caplog.at_level("INFO", "searchfm"):
        for value in range(6):
            recorded(lambda inputs, targets: ran.append(inputs.item()), torch.tensor([value]), torch.zeros(1))
    assert ran == list(range(6))
    assert len(tries) == (0 if waits else 1)
    assert caplog.messages == ["no CUDA graph: operation not permitted when stream is capturing"] * len(tries)


def test_memory_that_runs_out_while_a_step_is_recorded_is_not_hidden() -> None:
    def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorded = graphs.Recorded[None](torch.device("cpu"), plain, record)
    batch = torch.zeros(1)
    for _ in range(graphs.EAGER):
        recorded(lambda inputs, targets: None, batch, batch)
    with pytest.raises(torch.OutOfMemoryError):
        recorded(lambda inputs, targets: None, batch, batch)


@pytest.mark.parametrize("name", ["mlp-adamw-average", "cnn-rmsprop"])
def test_a_training_whose_batches_go_through_a_recorded_step_is_the_same(name: str, digits: Splits) -> None:
    eager, recorded = Training(CONFIGS[name], digits), Training(CONFIGS[name], digits)
    steps, judged = (graphs.Recorded[Any](torch.device("cpu"), plain, lambda step, _: step) for _ in range(2))
    recorded._recorded, recorded._recorded_val = steps, judged
    assert losses(list(recorded)) == losses(list(eager))
    assert steps._replay
    assert judged._replay
