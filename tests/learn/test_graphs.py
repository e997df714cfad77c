"""Recorded steps without a GPU: which trainings have them, and which batches. tests/test_gpu.py records real ones."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
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


@pytest.mark.parametrize(
    ("waits", "peak", "suits"), [(False, 2_000, True), (True, 2_000, False), (False, 2_001, False)]
)
def test_a_step_that_waits_or_takes_much_memory_is_not_to_be_recorded(
    waits: bool, peak: int, suits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's warning tells the first, not the other one, which torch gives once a process."""
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )

    def step() -> int:
        if waits:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at a.cpp:147.)", stacklevel=2)
        return len(modes)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8_000))
    assert graphs.watch(step, CUDA) == (1, suits)
    assert modes == ["warn", "default"]


def plain(run: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
    """In place of `watch`."""
    return run(), True


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


@pytest.mark.parametrize("suits", [True, False])
def test_a_step_that_cannot_be_recorded_is_run_as_it_is(suits: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One that was seen not to suit is not even tried."""
    ran, tries = [], []

    def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded = graphs.Recorded[None](torch.device("cpu"), lambda run, _: (run(), suits), record)
    with caplog.at_level("INFO", "searchfm"):
        for value in range(6):
            recorded(lambda inputs, targets: ran.append(inputs.item()), torch.tensor([value]), torch.zeros(1))
    assert ran == list(range(6))
    assert len(tries) == int(suits)
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
