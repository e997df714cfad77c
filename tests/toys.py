"""Job entries that take milliseconds where training takes minutes. Workers import them by name: keep imports light."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from searchfm import errors
from searchfm.jobs import PAUSED, Context, Result
from searchfm.records import Epoch

JOBS = itertools.count(1)  # of this process


def curve(config: Mapping[str, Any], index: int) -> float:
    """A validation accuracy that depends on the config alone."""
    lr, units = config["optimizer"]["lr"], sum(config["model"]["mlp"]["width"])
    return round((1 - 0.5**index) * (0.5 + 0.4 * units / (units + 8)) / (1 + 100 * abs(lr - 0.01)), 6)


def trial(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Yields epochs without training; replays those of an earlier attempt from a file, as a checkpoint would.

    payload: `kill` ({trial: attempts whose worker is killed in the second epoch}), `fail` (trials that raise), `raise`
    ({trial: name of the searchfm error that it raises}), `nan` and `inf` (trials whose value is that), `ticks` an
    epoch, `seconds` a tick, `until` (the epoch after which it is paused), `weights_from` (the least value whose weights
    are written).
    """
    config, number = payload["config"], int(payload["identity"].rpartition("/")[2])
    assert context.folder is not None
    epochs = config["train"]["epochs"]
    done = 0
    for folder in context.earlier:
        if (folder / "done").exists():
            done = int((folder / "done").read_text() or 0)  # empty: killed while it was written
            break
    with (context.folder / "log.txt").open("a") as log:
        log.write(f"trial {number} goes on after epoch {done}\n")
    for index in range(1, epochs + 1):
        if index > done:
            for _ in range(payload.get("ticks", 2)):
                context.tick()
                time.sleep(payload.get("seconds", 0.0))
            attempt = int(context.folder.name.removeprefix("attempt-"))
            if index == 2 and attempt <= payload.get("kill", {}).get(str(number), 0):
                os.kill(os.getpid(), signal.SIGKILL)
            if number in payload.get("fail", []):
                raise ValueError("made to fail")
            if str(number) in payload.get("raise", {}):
                raise getattr(errors, payload["raise"][str(number)])("made to fail")
            (context.folder / "done").write_text(str(index))
        value = curve(config, index)
        yield Epoch(index, 1 - value, value, 1 - value, value, config["optimizer"]["lr"], 0.1, 1000.0, time.time())
        if index == payload.get("until"):
            return {PAUSED: index}
    value = float(next((name for name in ("nan", "inf") if number in payload.get(name, [])), curve(config, epochs)))
    least = payload.get("weights_from", 0.0)
    if least is not None and not value < least:
        (context.folder / "weights.safetensors").write_bytes(b"weights")
        (context.folder / "model.json").write_text("{}")
        (context.folder / "wrote").touch()
    return {"value": value, "best_epoch": epochs, "parameters": 1, "seconds": 0.1 * epochs}


def prepare(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Returns a PrepareResult for digits."""
    yield from ()
    data = {"fingerprint": "toy", "shape": [1, 8, 8], "classes": [str(i) for i in range(10)]}
    return {"data": {**data, "train": 100, "validation": 20}, "devices": {"cuda": 0, "mps": 0}}


def work(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Does what `payload` lists, in this order; returns the worker's pid and device, its job count, and the folders of
    earlier attempts.
    """
    for index in range(1, payload.get("epochs", 0) + 1):
        yield Epoch(index, 0.0, 0.0, None, None, 0.1, 0.1, 1.0, time.time())
    if payload.get("code") and not context.allow_code:
        raise errors.CodeNotAllowedError("is code")
    if "says" in payload:
        print(payload["says"])
        os.system(f"echo {payload['says']} from a child")  # libraries print past sys.stdout too
        sys.stderr.write(payload["says"] + " as an error\n")
    if "raises" in payload:
        kind, *arguments = payload["raises"]
        raise (getattr(errors, kind, None) or {"ValueError": ValueError, "SystemExit": SystemExit}[kind])(*arguments)
    if "dies" in payload:
        os.kill(os.getpid(), payload["dies"])
    began = time.monotonic()
    while time.monotonic() < began + payload.get("ticks_for", 0.0):
        if context.folder:
            (context.folder / "tick").touch()
        context.tick()
        time.sleep(0.005)
    time.sleep(payload.get("sleeps", 0.0))
    return {
        "pid": os.getpid(),
        "device": context.device,
        "jobs": next(JOBS),
        "earlier": [p.name for p in context.earlier],
    }


def imports(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Counts the imports of `tests.heavy`, in all processes."""
    import tests.heavy  # noqa: F401

    yield from ()
    return {"imports": len(Path(os.environ["HEAVY"]).read_text().splitlines()), "pid": os.getpid()}
