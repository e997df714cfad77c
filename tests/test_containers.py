"""docker/compose.yaml, built and run for real, without a Docker engine: see images.py."""

import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import Builder, Stack, compose, start_order
from tests.programs import missing

pytestmark = pytest.mark.nightly
TRIALS = 6
MLFLOW = """
import mlflow
client = mlflow.MlflowClient()
(experiment,) = client.search_experiments(filter_string="name = 'mlp'")
runs = client.search_runs([experiment.experiment_id], filter_string="tags.role = 'trial'")
print(len(runs), {run.info.status for run in runs}, {run.info.artifact_uri.partition(":")[0] for run in runs})
print(len(client.list_artifacts(runs[0].info.run_id)))
"""


@pytest.fixture
def builder() -> Iterator[Builder]:
    """SEARCHFM_IMAGES: a folder whose images are used, if it has them, and kept; for work on compose.yaml."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "debootstrap", "ip", "curl"))):
        missing("this test builds images as root: apt-get install buildah debootstrap iproute2 curl")
    kept = os.environ.get("SEARCHFM_IMAGES")
    builder = Builder(Path(kept or tempfile.mkdtemp(prefix="searchfm-images-", dir="/var/tmp")))  # 20 GB: not in memory
    try:
        yield builder
    finally:
        builder.close(images=not kept)
        if not kept:
            shutil.rmtree(builder.folder)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """The folder of secrets, made as README.md says."""
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o700)
    for name in ("postgres_password", "ui_token", "ray_token"):
        (folder / name).write_text(f"{secrets.token_hex(32)}\n")
    return folder


def test_a_study_completes_across_the_services_of_compose(
    builder: Builder, secret: Path, record_property: Callable[[str, object], None]
) -> None:
    took = {
        "image of base": builder.make(builder.BASE, builder.make_base),
        "image of searchfm": builder.make("localhost/searchfm", builder.build_searchfm),
        "image of postgres": builder.make("localhost/postgres", builder.build_postgres),
    }
    size = builder.size("localhost/searchfm")

    names = {service["image"] for service in compose()["services"].values()}
    stack = Stack(builder, {name: f"localhost/{name.partition(':')[0]}" for name in names}, secret)
    token = (secret / "ui_token").read_text().strip()
    try:
        for name in [*start_order(stack.compose["services"]), "worker-2"]:
            took[name] = stack.up(name)
        began = time.monotonic()
        options = ["--dataset", "digits", "--trials", str(TRIALS), "--epochs", "2", "--workers", "2"]
        printed = stack.run("tune", "mlp", *options)
        took["study"] = time.monotonic() - began
        assert f"of {TRIALS}" in printed

        client = ["env", "MLFLOW_TRACKING_URI=http://127.0.0.1:5000", f"MLFLOW_TRACKING_TOKEN={token}"]
        runs, artifacts = stack.ask("mlflow", *client, sys.executable, "-c", MLFLOW).splitlines()
        assert runs == f"{TRIALS} {{'FINISHED'}} {{'mlflow-artifacts'}}"
        assert int(artifacts) > 3
        pages = "http://127.0.0.1:8080/api/studies"
        code = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]
        assert stack.ask("optuna-dashboard", *code, pages) == "401"
        assert stack.ask("mlflow", *code, "http://127.0.0.1:5000/") == "401"
        listed = stack.ask("optuna-dashboard", "curl", "-s", "-H", f"Authorization: Bearer {token}", pages)
        (study,) = json.loads(listed)["study_summaries"]
        assert study["study_name"] == "mlp"
        assert "CREATE DATABASE mlflow" in stack.exec("postgres", "pg_dumpall", "-U", "searchfm")
    finally:
        stack.down()
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in took.items())
    record_property("figures", f"{TRIALS} of {TRIALS} trials; image {size:.1f} GB; seconds: {seconds}")
