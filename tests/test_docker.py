"""The files of docker/: linted, valid for their schemas, and of commands that exist."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from searchfm.cli import app
from tests.images import DOCKER, ROOT, compose

VERSION = re.findall(r"^## (\S+)", (ROOT / ".github" / "CHANGELOG.md").read_text("utf-8"), re.M)[0]
USAGE_ERROR = typer.BadParameter.__mro__[1]  # click's, of which typer has its own copy
SCHEMA = Path(__file__).parent / "fixtures" / "compose-spec" / "compose-spec.json"
MANIFESTS = [
    (path.name, item)
    for path in sorted(DOCKER.glob("k8s/*.yaml"))
    for item in yaml.safe_load_all(path.read_text("utf-8"))
]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """All pod templates inside a manifest."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def code_lines(path: Path) -> Iterator[list[str]]:
    """The command lines in a page's code blocks, or in a script."""
    text = path.read_text("utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) if path.suffix == ".md" else [text]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield shlex.split(line, comments=True)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every use of searchfm: where it stands, and its arguments."""
    services = compose()["services"]
    for name, service in services.items():
        if service["image"].startswith("searchfm"):
            line = [*service.get("entrypoint", ["entrypoint", "searchfm"]), *service.get("command", [])]
            if "searchfm" in line:
                yield name, line[line.index("searchfm") + 1 :]
    for name, item in MANIFESTS:
        for pod in pods(item):
            for container in pod["spec"]["containers"]:
                line = [*container.get("command", []), *container.get("args", [])]
                if "searchfm" in line:
                    yield name, line[line.index("searchfm") + 1 :]
    for path in (DOCKER / "README.md", *DOCKER.glob("slurm/*")):
        for line in code_lines(path):
            if line[:2] == ["docker", "compose"] and "run" in line:
                # docker compose run --rm [--entrypoint WORDS] SERVICE ARGUMENTS
                words = [word for word in line[line.index("run") + 1 :] if word != "--rm"]
                own = words.pop(1).split() if words[0] == "--entrypoint" else None
                name, *arguments = words[1:] if own else words
                entrypoint = own or services[name]["entrypoint"]
                yield str(path), [*entrypoint[entrypoint.index("searchfm") + 1 :], *arguments]
            elif "searchfm" in line[:2] and line[0] in ("searchfm", "exec"):
                yield str(path), line[line.index("searchfm") + 1 :]


COMMANDS = list(commands())


def parse(arguments: list[str]) -> None:
    """Raises KeyError for a command, UsageError for an option or a value that searchfm does not have."""
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    if "--help" not in arguments:
        command.make_context(arguments[0], arguments[1:])


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shell_scripts_parse() -> None:
    for script in (*map(DOCKER.joinpath, ("entrypoint", "join", "node")), *DOCKER.glob("slurm/*.sbatch")):
        subprocess.run(["bash", "-n", script], check=True)


def test_the_compose_file_fits_its_schema() -> None:
    schema, file = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text("utf-8"))), compose()
    schema.validate(file)
    file["services"]["mlflow"]["depend_on"] = file["services"]["mlflow"].pop("depends_on")
    with pytest.raises(jsonschema.ValidationError, match="depend_on"):
        schema.validate(file)


def test_services_are_pinned_checked_and_closed() -> None:
    file = compose()
    for name, service in file["services"].items():
        assert re.search(r":\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "healthcheck" in service or service.get("profiles") == ["tune"], name
        assert set(service.get("secrets", ())) <= file["secrets"].keys()
        variables = service.get("environment", {})
        assert not [
            key for key in variables if re.search("PASSWORD|TOKEN", key) and not re.search("_(FILE|PATH)$", key)
        ]
        assert not [value for value in variables.values() if re.search("://[^/]*:[^/]*@", str(value))]
        if "ports" in service:
            assert "--token-file" in service["command"]
    for name in ("ray-head", "worker", "gpu-worker"):  # no password, and no way to a database
        service = file["services"][name]
        assert (service["secrets"], service["networks"]) == (["ray_token"], ["cluster"])
    ours = {service["image"] for service in file["services"].values() if "build" in service}
    assert ours == {f"searchfm:{VERSION}"}
    assert {Path(secret["file"]).parent for secret in file["secrets"].values()} == {Path("secrets")}
    ignored = subprocess.run(["git", "check-ignore", "-q", DOCKER / "secrets" / "ui_token"], cwd=ROOT)
    assert ignored.returncode == 0


@pytest.mark.parametrize(
    ("name", "item"), MANIFESTS, ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_kubernetes_takes_the_manifests(name: str, item: dict[str, Any]) -> None:
    if item["apiVersion"].startswith("ray.io/"):  # KubeRay's schema has 934 kB; its pods are Kubernetes'
        parts = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **pod} for pod in pods(item["spec"])]
        assert len(parts) == 1 + len(item["spec"]["workerGroupSpecs"])
    else:
        parts = [item]
    for part in parts:
        kubernetes_validate.validate(part, "1.37", strict=True)


def test_pods_run_as_the_images_user() -> None:
    for name, item in MANIFESTS:
        for pod in pods(item):
            assert pod["spec"]["securityContext"]["runAsNonRoot"], name
            assert {container["image"] for container in pod["spec"]["containers"]} == {f"searchfm:{VERSION}"}


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=[shlex.join(words) for _, words in COMMANDS])
def test_each_command_and_option_exists(where: str, arguments: list[str]) -> None:
    parse(arguments)


def test_a_missing_option_is_detected() -> None:
    for arguments in (["dashboard", "--hosts", "0.0.0.0"], ["tune", "--trials", "5"], ["dashboard", "--only", "mlfow"]):
        with pytest.raises(USAGE_ERROR):
            parse(arguments)
    with pytest.raises(KeyError):
        parse(["tuna", "mlp"])


def test_the_dockerfile_names_no_registry_and_no_certificate() -> None:
    text = (DOCKER / "Dockerfile").read_text("utf-8")
    assert not re.search(r"https?://|ssl|CERT|PROXY|INDEX_URL", text, re.I)
    assert f"install -d -o 10001 -g 10001 {' '.join(['/runs', '/cache'])}" in text
