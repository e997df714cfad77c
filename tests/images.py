"""The services of docker/compose.yaml from images that buildah builds, without Docker and without an image registry.

Each service runs in a chroot of its image (buildah's isolation `chroot`), in network and UTS namespaces of its own on
one bridge, which itself is in a namespace. So its name, its address and its ports are those of compose. Not emulated:
published ports, `internal`, `cap_drop`, memory limits, restarts. Needs root.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
CERTIFICATES = Path("/etc/ssl/certs")
BRIDGE = "10.77.9"  # of addresses; in a namespace of its own
# The parts of PostgreSQL's official image that compose.yaml relies on: its variables, its folder of SQL, its checks.
POSTGRES = """
FROM {base}
RUN mkdir -p /etc/postgresql-common && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf \\
 && apt-get update -q && apt-get install -qy --no-install-recommends postgresql && apt-get clean
COPY entrypoint /entrypoint
RUN install -d -o postgres -g postgres -m 700 /var/lib/postgresql/data /var/run/postgresql
ENV PGDATA=/var/lib/postgresql/data
USER postgres
ENTRYPOINT ["/bin/sh", "/entrypoint"]
"""
POSTGRES_ENTRYPOINT = """
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb -U "$POSTGRES_USER" --locale=C.UTF-8 --pwfile="$POSTGRES_PASSWORD_FILE" \\
    --auth-local=trust --auth-host=scram-sha-256
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  pg_ctl -w start -o "-c listen_addresses="
  createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
  for file in /docker-entrypoint-initdb.d/*.sql; do psql -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$file"; done
  pg_ctl -w stop
fi
exec postgres -c "listen_addresses=*"
"""


def run(*command: str | Path, **options: Any) -> str:
    """The standard output of a command that succeeds; else an error with the end of what it printed."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Builder:
    """buildah with a storage of its own below `folder`; PostgreSQL's and searchfm's images on one base."""

    BASE = "localhost/searchfm-base"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        driver = "overlay" if "overlay" in Path("/proc/filesystems").read_text("utf-8") else "vfs"
        settings = folder / "storage.conf"
        settings.write_text(
            f'[storage]\ndriver = "{driver}"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n', "utf-8"
        )
        self.environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(settings), "BUILDAH_ISOLATION": "chroot"}

    def buildah(self, *arguments: str | Path) -> str:
        return run("buildah", *arguments, env=self.environment).strip()

    def make(self, image: str, build: Callable[[str], None]) -> float:
        """Builds an image unless it is there. Returns seconds."""
        began = time.monotonic()
        if image not in self.buildah("images", "--format", "{{.Name}}").split():
            build(image)
        return time.monotonic() - began

    def make_base(self, name: str) -> None:
        """A minimal Debian of this machine's release with Python, in place of the official Python image."""
        root = self.folder / "root"
        release = re.search(r"^VERSION_CODENAME=(.+)$", Path("/etc/os-release").read_text("utf-8"), re.M)
        assert release
        packages = "--include=ca-certificates,python3,python3-venv"
        run("debootstrap", "--variant=minbase", packages, release[1], root)
        container = self.buildah("from", "scratch")
        run("cp", "-a", f"{root}/.", self.buildah("mount", container))
        shutil.rmtree(root)
        self.buildah("config", "--cmd", "/bin/sh", container)
        self.buildah("commit", "-q", container, name)
        self.buildah("rm", container)

    def build_searchfm(self, name: str) -> None:
        """The image that ships, on our base. The Dockerfile knows nothing of this machine's certificates: they are
        mounted.
        """
        settings = self.folder / "uv.toml"
        settings.write_text("system-certs = true\n", "utf-8")
        mounts = [f"-v={CERTIFICATES}:{CERTIFICATES}:ro", f"-v={settings}:/etc/uv/uv.toml:ro"]
        base = f"--build-arg=BASE={self.BASE}"
        self.buildah("build", "-q", *mounts, base, "-f", DOCKER / "Dockerfile", "-t", name, ROOT)

    def build_postgres(self, name: str) -> None:
        context = self.folder / "postgres"
        context.mkdir(exist_ok=True)
        (context / "entrypoint").write_text(POSTGRES_ENTRYPOINT, "utf-8")
        (context / "Dockerfile").write_text(POSTGRES.format(base=self.BASE), "utf-8")
        self.buildah("build", "-q", "-t", name, context)

    def size(self, image: str) -> float:
        """GB of the image's files."""
        container = self.buildah("from", image)
        used = run("du", "-sb", self.buildah("mount", container))
        self.buildah("rm", container)
        return int(used.split()[0]) / 1e9

    def close(self, *, images: bool) -> None:
        """Removes all containers, and all images too."""
        for command in (("rm", "-a"), ("rmi", "-a", "-f"))[: 2 if images else 1]:
            subprocess.run(["buildah", *command], env=self.environment, capture_output=True)


def compose() -> dict[str, Any]:
    """compose.yaml with its variables' defaults."""
    text = (DOCKER / "compose.yaml").read_text("utf-8")
    read: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return read


def start_order(services: Mapping[str, Any]) -> Iterator[str]:
    """Names of services after those they depend on, without those of a profile."""
    done: set[str] = set()
    waiting = [name for name, service in services.items() if "profiles" not in service]
    while waiting:
        ready = [name for name in waiting if set(services[name].get("depends_on", {})) <= done]
        assert ready, f"circular: {waiting}"
        yield from ready
        done |= set(ready)
        waiting = [name for name in waiting if name not in done]


class Stack:
    """The services of compose.yaml, on hosts of their own. images: compose's name of an image -> buildah's."""

    def __init__(self, builder: Builder, images: Mapping[str, str], secrets: Path) -> None:
        self.builder, self.images, self.secrets = builder, images, secrets
        self.folder, self.compose = builder.folder, compose()
        self.prefix = f"sfm{os.getpid()}"
        self.addresses = itertools.count(1)
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n", "utf-8")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.namespaces: list[str] = []
        self._add("net")
        run("ip", "-n", self.namespaces[0], "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.namespaces[0], "link", "set", "br0", "up")

    def add_host(self, name: str) -> None:
        """A host of this name on the bridge, and its container."""
        number = next(self.addresses)
        self._add(name)
        host, bridge = self.namespaces[-1], self.namespaces[0]
        run("ip", "-n", bridge, *f"link add v{number} type veth peer name eth0 netns {host}".split())
        run("ip", "-n", bridge, *f"link set v{number} master br0 up".split())
        run("ip", "-n", host, *f"addr add {BRIDGE}.{number}/24 dev eth0".split())
        run("ip", "-n", host, "link", "set", "eth0", "up")
        # No host has this address, but Ray asks which of its own leads out.
        run("ip", "-n", host, *f"route add default via {BRIDGE}.254".split())
        with self.hosts.open("a", encoding="utf-8") as file:
            file.write(f"{BRIDGE}.{number} {name}\n")
        service = self.service(name)
        # All names stand in /etc/hosts. A name server that does not answer would hold up Ray's resolver.
        dns = "--dns=127.0.0.1"
        self.builder.buildah("from", dns, "--name", f"{self.prefix}-{name}", self.images[service["image"]])

    def _add(self, name: str) -> None:
        self.namespaces.append(f"{self.prefix}-{name}")
        run("ip", "netns", "add", self.namespaces[-1])
        run("ip", "-n", self.namespaces[-1], "link", "set", "lo", "up")

    def service(self, name: str) -> dict[str, Any]:
        """The service of a host; `worker-2` is the second of `worker`."""
        found: dict[str, Any] = self.compose["services"][re.sub(r"-\d+$", "", name)]
        return found

    def command(self, name: str, arguments: Sequence[str]) -> list[str]:
        """A command line that runs in the service's container, on its host."""
        service, container = self.service(name), f"{self.prefix}-{name}"
        variables = service.get("environment", {})
        inside = ["buildah", "run", "--no-hosts", *(f"--env={key}={value}" for key, value in variables.items())]
        inside += [f"-v={self.hosts}:/etc/hosts:ro"]
        inside += [f"-v={self.secrets / secret}:/run/secrets/{secret}:ro" for secret in service.get("secrets", ())]
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            inside.append(f"-v={self._source(container, source, target)}:{target}{':' * bool(mode)}{''.join(mode)}")
        inside += [container, "--", *arguments]
        script = f'hostname {name}; exec "$@"'
        return ["ip", "netns", "exec", container, "unshare", "--uts", "sh", "-c", script, "sh", *inside]

    def _source(self, container: str, source: str, target: str) -> Path:
        """A file beside compose.yaml, or the folder of a named volume, which has the owner of the image's folder."""
        if source.startswith("."):
            return DOCKER / source
        folder = self.folder / "volumes" / source
        if not folder.exists():
            folder.mkdir(parents=True)
            image = Path(self.builder.buildah("mount", container)) / target.lstrip("/")
            owner = image.stat()
            os.chown(folder, owner.st_uid, owner.st_gid)
        return folder

    def entrypoint(self, name: str) -> list[str]:
        """The service's own entrypoint, else its image's."""
        service = self.service(name)
        if "entrypoint" in service:
            return list(service["entrypoint"])
        config = json.loads(self.builder.buildah("inspect", f"{self.prefix}-{name}"))
        return list(config["OCIv1"]["config"]["Entrypoint"])

    def up(self, name: str) -> float:
        """Starts a service and waits until its health check passes, as often as compose would try. Returns seconds."""
        began = time.monotonic()
        self.add_host(name)
        arguments = [*self.entrypoint(name), *self.service(name).get("command", ())]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name, arguments), env=self.builder.environment, stdout=log, stderr=log
            )
        check = self.service(name)["healthcheck"]
        assert check["test"][0] == "CMD"
        for _ in range(check["retries"]):
            assert self.processes[name].poll() is None, self.log(name)
            done = subprocess.run(self.inside(name, check["test"][1:]), capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                return time.monotonic() - began
            time.sleep(int(check["interval"].removesuffix("s")))
        raise AssertionError(f"{name} is not healthy: {done.stderr}\n{self.log(name)}")

    def run(self, name: str, *arguments: str, timeout: float = 900) -> str:
        """`docker compose run --rm NAME ARGUMENTS`. Returns what it printed."""
        if f"{self.prefix}-{name}" not in self.namespaces:
            self.add_host(name)
        command = self.command(name, [*self.entrypoint(name), *arguments])
        return run(*command, env=self.builder.environment, timeout=timeout)

    def inside(self, name: str, arguments: Sequence[str]) -> list[str]:
        """A command line that runs beside the service's process: `docker compose exec`. A second `buildah run` would
        take away the mounts of the first.
        """
        for pid in run("ip", "netns", "pids", f"{self.prefix}-{name}").split():
            process = Path("/proc", pid)
            try:
                owner, root = process.stat(), (process / "root").readlink()
                variables = (process / "environ").read_text("utf-8").split("\0")[:-1]
                ours = not (process / "cmdline").read_bytes().startswith(b"buildah")
            except OSError:
                continue  # it has ended
            if ours and root != Path("/"):
                kept = [item for item in variables if not item.startswith(("PGPASSWORD=", "MLFLOW_TRACKING_TOKEN="))]
                user = ["--setuid", str(owner.st_uid), "--setgid", str(owner.st_gid)]
                enter = ["nsenter", "--target", pid, "--mount", "--net", "--uts", "--root", "--wd=/", *user]
                return [*enter, "env", "-i", "--chdir=/", *kept, *arguments]
        return ["false"]  # not there yet

    def exec(self, name: str, *arguments: str) -> str:
        """`docker compose exec NAME ARGUMENTS`."""
        return run(*self.inside(name, arguments))

    def ask(self, name: str, *arguments: str) -> str:
        """A program of this machine on the network of a service's host."""
        return run("ip", "netns", "exec", f"{self.prefix}-{name}", *arguments)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text("utf-8", errors="replace")[-4000:]

    def down(self) -> None:
        """Ends all processes on the hosts, and the hosts."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for name in self.namespaces:
                for pid in run("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):  # it has ended
                        os.kill(int(pid), number)
            end = time.monotonic() + 15
            while any(run("ip", "netns", "pids", name).split() for name in self.namespaces):
                if time.monotonic() > end:
                    break
                time.sleep(0.2)
        for process in self.processes.values():
            process.wait(30)
        for name in self.namespaces:
            run("ip", "netns", "del", name)
