"""The benchmarks can be imported, and their ratios are of pairs. Nothing is timed here."""

import importlib

import pytest

from tests.bench.__main__ import NAMES
from tests.bench._common import alternate, ratio


def test_a_ratio_is_of_pairs_measured_one_after_the_other() -> None:
    found = ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    assert (found.low, found.median, found.high, found.pairs) == (2.0, 3.0, 4.0, 3)
    assert str(found) == "**3.00** [2.00-4.00] n=3"


def test_sides_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    results = alternate({name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}, 3)
    assert calls == list("ABBAAB")
    assert results == {"A": [1, 4, 5], "B": [2, 3, 6]}


@pytest.mark.slow  # they import torch, timm and torchvision
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_has_a_main(name: str) -> None:
    assert callable(importlib.import_module(f"tests.bench.{name}").main)
