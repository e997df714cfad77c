"""A model of the user's own code, from the search to an exported file. No command runs it without --allow-code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from searchfm.home import Home
from tests.commands import Done, searchfm_here

NETS = """from torch import nn

def net(shape, classes, *, width):
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, classes))
"""
STUDY = """# Question: how wide?
[search]
trials = 2
[data]
name = "digits"
[model]
name = "custom"
[model.custom]
factory = "own_code_nets:net"
[model.custom.params]
width = { low = 8, high = 16 }
[train]
epochs = 1
"""
REFUSED = 'model.custom.factory = "own_code_nets:net": is code: a host runs it only with --allow-code'


def test_a_study_of_own_code_is_refused_without_permission_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(STUDY)
    done = searchfm_here("tune", "own.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"searchfm: own.toml: {REFUSED}; give that if you trust it\n" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow(seconds=20)
@pytest.mark.usefixtures("unfollowed")
def test_own_code_goes_all_the_way_where_it_is_allowed(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    new_home(tmp_path / "runs")
    (tmp_path / "own_code_nets.py").write_text(NETS)
    (tmp_path / "own.toml").write_text(STUDY)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")

    def run(*arguments: str, allow: bool = True) -> Done:
        return searchfm_here(*arguments, *["--allow-code"] * allow, cwd=tmp_path)

    def succeed(*arguments: str, allow: bool = True) -> str:
        done = run(*arguments, allow=allow)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(succeed("tune", "own.toml", "--workers", "1", "--json"))["trials"]["complete"] == 2
    counts = [
        json.loads(succeed("studies", "own.toml", "--json", allow=allow))["parameters"] for allow in (False, True)
    ]
    assert counts == [None, [610, 1210]]
    for command in (("tune", "own", "--trials", "3"), ("retrain", "own")):
        assert REFUSED in run(*command, allow=False).stderr
    succeed("retrain", "own", "--trial", "0", "--workers", "1")
    for command in (
        ("predict", "own", "black.png"),
        ("predict", "models:/searchfm-own/1", "black.png"),
        ("export", "own"),
    ):
        refused = run(*command, allow=False)
        assert refused.returncode == 2
        assert REFUSED in refused.stderr
    (predicted,) = json.loads(succeed("predict", "own", "black.png", "--json"))
    succeed("export", "own")
    assert (
        json.loads(succeed("predict", "own.onnx", "black.png", "--json", allow=False))[0]["class"] == predicted["class"]
    )
    succeed("export", "own", "--format", "safetensors")
    assert REFUSED in run("predict", "own.safetensors", "black.png", allow=False).stderr
    (tmp_path / "own_code_nets.py").write_text(NETS + "# changed\n")
    for command in (
        ("tune", "own.toml", "--trials", "3"),
        ("retrain", "own", "--again"),
        ("predict", "own", "black.png"),
    ):
        changed = run(*command)
        assert changed.returncode == 2
        assert "its code has changed (sha256 " in changed.stderr
    (tmp_path / "own_code_nets.py").write_text(NETS)
    assert json.loads(succeed("tune", "own.toml", "--trials", "3", "--json"))["trials"]["complete"] == 3
