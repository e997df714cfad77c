"""What needs an NVIDIA GPU: `uv run pytest -m gpu -n 0` on a machine that has one."""

from pathlib import Path

import pytest
import torch

from searchfm.engines import EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.home import Home
from searchfm.search.study import Study
from searchfm.tuning import Tuning
from tests.driving import let_go
from tests.test_tuning import TABLE

pytestmark = pytest.mark.gpu


def test_a_trial_records_its_gpu_and_memory_and_auto_packs_by_it(tmp_path: Path) -> None:
    options = EngineOptions.from_table({"device": "cuda:0", "workers_per_gpu": "auto"})
    study, home = Study("toy", {**TABLE, "search": {"trials": 6, "pruner": "none"}}), Home(tmp_path / "home")
    engines: list[LocalEngine] = []

    def start() -> LocalEngine:
        engines.append(LocalEngine(options=options))
        return engines[0]

    with Tuning(study, home, study.resolved, None, engine=start, follow=False) as tuning:
        packed = [item.text for item in tuning.run() if item.kind == "packed"]
        record = tuning.result()
        let_go(tuning.storage)
    assert len(record.of("complete")) == 6
    for trial in record.trials:
        assert trial.result is not None
        assert trial.result.device == f"{torch.cuda.get_device_name(0)} (cuda:0)"
        assert trial.result.memory is not None
        assert 0 < trial.result.memory < 0.2  # a tiny MLP, and CUDA's context
    assert len(packed) == 1
    assert "workers a GPU" in packed[0]
