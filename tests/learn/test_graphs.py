"""Recorded steps without a GPU: which trainings have them, and which batches. tests/test_gpu.py records real ones."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from searchfm.config import Config
from searchfm.errors import DataError
from searchfm.learn import graphs, optim
from searchfm.learn.data import Splits
from searchfm.learn.train import Training
from tests.learn.test_train import CONFIGS
from tests.learn.toys import config, losses

CUDA = torch.device("cuda:0")
STREAM: Any = None


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Steps that were recorded. They are run again where a GPU would launch their kernels."""
    steps: list[Callable[[], None]] = []

    def record(step: Callable[[], None], stream: object) -> Callable[[], None]:
        steps.append(step)
        return step

    monkeypatch.setattr(graphs, "watch", lambda step, device: (step(), True))
    monkeypatch.setattr(graphs, "record", record)
    return steps


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
def test_which_trainings_are_recorded(
    chosen: Config, device: torch.device, suits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(graphs.SWITCH, "1")
    assert graphs.suits(chosen, device) == suits


def test_graphs_are_off_unless_the_variable_is_1_and_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    assert not graphs.suits(CONFIGS["mlp-sgd"], CUDA)
    for value, suits in (("0", False), ("1", True)):
        monkeypatch.setenv(graphs.SWITCH, value)
        assert graphs.suits(CONFIGS["mlp-sgd"], CUDA) == suits
    monkeypatch.setenv(graphs.SWITCH, "off")
    with pytest.raises(DataError, match=r'^SEARCHFM_CUDA_GRAPHS = "off": must be 0, or 1 to train with CUDA'):
        graphs.suits(CONFIGS["mlp-sgd"], CUDA)


@pytest.mark.parametrize(
    ("waits", "allocates", "suits"), [(False, 1_000, True), (True, 1_000, False), (False, 1_001, False)]
)
def test_a_step_that_waits_or_allocates_much_is_not_to_be_recorded(
    waits: bool, allocates: int, suits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's warning tells the first, not the other one, which torch gives once a process."""
    modes: list[str] = []
    allocated = 50_000  # by what came before

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )

    def step() -> int:
        nonlocal allocated
        allocated += allocates
        if waits:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at a.cpp:147.)", stacklevel=2)
        return len(modes)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocated_bytes.all.allocated": allocated})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8_000))
    assert graphs.watch(step, CUDA) == (1, suits)
    assert modes == ["warn", "default"]


def test_batches_of_the_first_size_are_replayed_from_the_fourth_on(recordings: list[Callable[[], None]]) -> None:
    ran: list[tuple[int, int, bool]] = []  # value and size of a batch; whether it was in the recorded step's own memory

    def step(inputs: Tensor, targets: Tensor) -> int:
        assert torch.equal(inputs[:, 0], targets)
        ran.append((int(targets[0]), len(inputs), inputs.data_ptr() == recorded._inputs.data_ptr()))
        return int(targets.sum())

    recorded = graphs.Recorded[int](STREAM)
    for value, size in enumerate([4, 4, 3, 4, 3, 4, 4, 3, 4]):
        assert recorded(step, torch.full((size, 2), value), torch.full((size,), value)) == value * size
    eager = [(0, 4, False), (1, 4, False), (2, 3, False), (3, 4, False), (4, 3, False)]
    assert ran == [*eager, (5, 4, True), (6, 4, True), (7, 3, False), (8, 4, True)]
    assert len(recordings) == 1


@pytest.mark.parametrize(
    ("suits", "error"),
    [
        (True, RuntimeError("operation not permitted when stream is capturing")),
        (True, torch.OutOfMemoryError("CUDA out of memory")),
        (False, None),
    ],
)
def test_a_step_that_cannot_be_recorded_is_run_as_it_is(
    suits: bool, error: Exception | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was seen not to suit is not even tried."""
    ran, tries = [], []

    def record(step: Callable[[], None], stream: object) -> Callable[[], None]:
        tries.append(step)
        assert error is not None
        raise error

    monkeypatch.setattr(graphs, "watch", lambda step, device: (step(), suits))
    monkeypatch.setattr(graphs, "record", record)
    recorded = graphs.Recorded[None](STREAM)
    with caplog.at_level("INFO", "searchfm"):
        for value in range(6):
            recorded(lambda inputs, targets: ran.append(inputs.item()), torch.tensor([value]), torch.zeros(1))
    assert ran == list(range(6))
    assert len(tries) == int(suits)
    assert caplog.messages == [f"no CUDA graph: {error}"] * len(tries)


@pytest.mark.parametrize("name", ["mlp-adamw-average", "cnn-rmsprop"])
def test_a_training_whose_batches_go_through_a_recorded_step_is_the_same(
    name: str, digits: Splits, recordings: list[Callable[[], None]]
) -> None:
    eager, recorded = Training(CONFIGS[name], digits), Training(CONFIGS[name], digits)
    recorded._recorded, recorded._recorded_val = graphs.Recorded(STREAM), graphs.Recorded(STREAM)
    assert losses(list(recorded)) == losses(list(eager))
    assert len(recordings) == 2  # of training and of validation


@pytest.mark.parametrize("name", ["mlp-sgd", "mlp-adamw-average"])
def test_a_training_with_recorded_steps_is_the_same(
    name: str, digits: Splits, recordings: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for learning rates, which are then of 32 bits. Resumed, too."""
    whole = list(Training(CONFIGS[name], digits))
    monkeypatch.setattr(graphs, "suits", lambda config, device: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    begun = Training(CONFIGS[name], digits)
    next(begun), next(begun)
    assert len(recordings) == 2  # of training and of validation
    resumed = Training(CONFIGS[name], digits, resume=begun.checkpoint())
    for epoch, expected in zip(losses([*resumed.epochs, *resumed]), losses(whole), strict=True):
        assert epoch == pytest.approx(expected, rel=1e-3, abs=0.005)
    assert len(recordings) == 4


def test_learning_rates_of_recorded_steps_stay_where_they_are(digits: Splits) -> None:
    model = Training(CONFIGS["mlp-sgd"], digits).model
    built = optim.optimizer(model, CONFIGS["mlp-sgd"].optimizer, recorded=True)
    rates = [group["lr"] for group in built.param_groups]
    addresses = [rate.data_ptr() for rate in rates]
    optim.set_lr(built, 0.5)
    assert [group["lr"].data_ptr() for group in built.param_groups] == addresses
    assert [rate.item() for rate in rates] == pytest.approx([0.025] * len(rates))
