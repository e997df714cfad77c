"""A real MLflow server that tests start and kill."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """MLflow's own, over HTTP, which keeps its own artifacts."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def start(self) -> None:
        environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.folder / "artifacts"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            start_new_session=True,
        )
        end = time.monotonic() + 60
        while not self.answers():
            assert time.monotonic() < end
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
