"""Data from the network or from copies: files in the data sets' own formats, a real HTTP server, a real apt."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.learn import datasets
from searchfm.learn.data import load, load_full, load_test
from tests.programs import worker_port

CIFAR = DataConfig(name="cifar100")
DIGITS = DataConfig(name="mnist")


@dataclass
class Server:
    """Serves `files` by path, and counts what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    pause: float = 0.0  # seconds before each answer
    cut: int = 0  # bytes promised but not sent


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            time.sleep(served.pause)
            body = served.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write((body or b"")[: len(body or b"") - served.cut])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{http.server_port}"
        yield served
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SEARCHFM_DATA", "SEARCHFM_MIRROR", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    """The files a cache holds, but for its locks."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks")


def closed() -> str:
    """The address of a server that is not there."""
    return f"http://127.0.0.1:{worker_port(6700)}"


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------


class Python2(pickle._Pickler):
    """Pickles as Python 2 did, for which bytes and short texts were one: so the published files were written."""

    dispatch: ClassVar[dict[type, object]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2(value: object) -> bytes:
    stream = io.BytesIO()
    Python2(stream, 2).dump(value)
    old = stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"_codecs" not in old
    return old


def pixels(seed: int, count: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, 3072)).astype(np.uint8)


CLASSES = [f"class {i:02}" for i in range(100)]
TRAIN, TEST = pixels(0, 400), pixels(1, 100)


def members() -> dict[str, bytes]:
    def part(data: np.ndarray) -> bytes:
        labels = [i % 100 for i in range(len(data))]
        return python2({"data": data, "fine_labels": labels, "coarse_labels": [i // 5 for i in labels]})

    meta = {"fine_label_names": CLASSES, "coarse_label_names": [f"group {i}" for i in range(20)]}
    return {"meta": python2(meta), "train": part(TRAIN), "test": part(TEST)}


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], url: str) -> bytes:
    """Makes these files the CIFAR-100 that torchvision knows."""
    packed = archive(files)
    monkeypatch.setattr(CIFAR100, "url", f"{url}/cifar-100-python.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(packed))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(files["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(files["test"])]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(files["meta"])})
    return packed


def test_cifar100_is_downloaded_once_and_refused_when_corrupt(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = publish(monkeypatch, members(), server.url)
    corrupt = bytearray(packed)
    corrupt[len(corrupt) // 2] ^= 1
    server.files["/cifar-100-python.tar.gz"] = bytes(corrupt)
    with pytest.raises(DataError) as caught:
        load(CIFAR)
    message = str(caught.value)
    assert f"{server.url}/cifar-100-python.tar.gz is damaged: its content has md5 {md5(bytes(corrupt))}" in message
    assert f"must have {md5(packed)}" in message
    assert "\n" not in message
    assert kept(cache) == []

    server.files["/cifar-100-python.tar.gz"] = packed
    splits = load(CIFAR)
    assert len(server.asked) == 2
    assert kept(cache) == ["cifar-100-python.tar.gz", "train-0.safetensors"]
    assert splits.classes == tuple(CLASSES)
    assert splits.val is not None
    assert (len(splits.train), len(splits.val)) == (300, 100)  # each class has 4, of which one validates
    for part in (splits.train, splits.val):
        assert part.images.reshape(-1, 3072).numpy().tolist() == TRAIN[part.indices].tolist()
        assert part.labels.tolist() == (part.indices % 100).tolist()
    assert splits.mean.shape == (3,)
    test = load_test(CIFAR)
    assert test.images.reshape(-1, 3072).numpy().tolist() == TEST.tolist()
    load(CIFAR)
    assert datasets.fetch("cifar100").name == "cifar-100-python.tar.gz"
    assert datasets.describe("cifar100").location == datasets.fetch("cifar100")
    assert len(server.asked) == 2


def test_a_download_that_breaks_off_leaves_nothing(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/cifar-100-python.tar.gz"] = publish(monkeypatch, members(), server.url)
    server.cut = 1000
    with pytest.raises(DataError, match="IncompleteRead"):
        load(CIFAR)
    assert kept(cache) == []


def test_many_that_need_it_at_once_download_it_once(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/cifar-100-python.tar.gz"] = publish(monkeypatch, members(), server.url)
    server.pause = 0.3
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(datasets.fetch, "cifar100") for _ in range(4)]
        jobs += [pool.submit(lambda size: load_full(DataConfig(name="cifar100", size=size)), size) for size in (0, 8)]
        for job in jobs:
            job.result()
    assert server.asked == ["/cifar-100-python.tar.gz"]


def test_a_silent_server_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, members(), server.url)
    server.pause = 1.0
    monkeypatch.setattr(datasets, "TIMEOUT", 0.2)
    started = time.monotonic()
    with pytest.raises(DataError, match="timed out"):
        load(CIFAR)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "unpacked"])
def test_copies_at_hand_need_no_network(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = members()
    data = publish(monkeypatch, files, closed())
    mine = tmp_path / "mine"
    folder = mine / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if packed:
        shutil.rmtree(folder)
        (mine / "cifar-100-python.tar.gz").write_bytes(data)
    assert len(load_full(CIFAR, data_dir=mine).train) == 400
    assert len(load_test(CIFAR, data_dir=mine)) == 100


def test_a_damaged_copy_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, members(), closed())
    folder = tmp_path / "mine" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in members().items():
        (folder / name).write_bytes(content + b"!" if name == "train" else content)
    with pytest.raises(DataError, match=r"train is damaged: its content has md5 .*Connection refused"):
        load(CIFAR, data_dir=tmp_path / "mine")
    assert kept(cache) == []


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "unpacked"])
def test_a_hostile_file_runs_no_code(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These data sets are pickles: what has not the published MD5 is not unpickled, be it the archive or a file."""
    publish(monkeypatch, members(), closed())
    mark, mine = tmp_path / "harm", tmp_path / "mine"
    poison = pickle.dumps({"data": Hostile(mark), "fine_labels": []})
    folder = mine / "cifar-100-python"
    for name in members():
        files = members() | {name: poison}
        shutil.rmtree(mine, ignore_errors=True)
        folder.mkdir(parents=True)
        if packed:
            (mine / "cifar-100-python.tar.gz").write_bytes(archive(files))
        else:
            for file, content in files.items():
                (folder / file).write_bytes(content)
        with pytest.raises(DataError, match="is damaged: its content has md5"):
            (load_test if name == "test" else load)(CIFAR, data_dir=mine)
    assert not mark.exists()
    pickle.loads(poison)
    assert mark.exists(), "the attack is a real one"


def test_cifar10_comes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    lists = {"train_list": 5, "test_list": 1}
    batches: dict[str, list[np.ndarray]] = {"train_list": [], "test_list": []}
    for listed, count in lists.items():
        entries = []
        for i in range(count):
            batches[listed].append(pixels(i + 10 * count, 20))
            data = python2({"data": batches[listed][-1], "labels": [j % 10 for j in range(20)]})
            name = getattr(CIFAR10, listed)[i][0]
            (folder / name).write_bytes(data)
            entries.append([name, md5(data)])
        monkeypatch.setattr(CIFAR10, listed, entries)
    meta = python2({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(meta)})
    full = load_full(DataConfig(name="cifar10"), data_dir=tmp_path)
    assert full.classes == tuple("abcdefghij")
    assert full.train.images.reshape(-1, 3072).numpy().tolist() == np.concatenate(batches["train_list"]).tolist()
    assert len(load_test(DataConfig(name="cifar10"), data_dir=tmp_path)) == 20


# --- MNIST ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST by file name, packed, which torchvision and we take for the real one."""
    files = {}
    for stem, count in (("train", 60), ("t10k", 20)):
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        files[f"{stem}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes()
        files[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, count) + labels.tobytes()
    packed = {f"{name}.gz": gzip.compress(data, 1) for name, data in files.items()}
    monkeypatch.setitem(datasets.IDX, "mnist", {name: md5(data) for name, data in files.items()})
    monkeypatch.setattr(MNIST, "resources", [(name, md5(data)) for name, data in packed.items()])
    return packed


def test_the_next_mirror_is_asked_when_one_fails(
    server: Server, mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {f"/second/{name}": data for name, data in mnist.items()}
    monkeypatch.setattr(MNIST, "mirrors", [f"{closed()}/", f"{server.url}/first/", f"{server.url}/second/"])
    splits = load(DIGITS)
    assert splits.train.images.shape == (50, 1, 28, 28)
    assert splits.classes == tuple("0123456789")
    assert [path.split("/")[1] for path in server.asked] == ["first"] + ["second"] * 4
    assert len(load_test(DIGITS)) == 20
    assert len(server.asked) == 5


def test_a_mirror_of_ones_own_stands_in_for_theirs(
    server: Server, mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {f"/here/mnist/{name}": data for name, data in mnist.items()}
    monkeypatch.setenv("SEARCHFM_MIRROR", f"{server.url}/here/")
    assert len(load_full(DIGITS).train) == 60
    monkeypatch.setenv("SEARCHFM_MIRROR", "nonsense")
    with pytest.raises(DataError, match="unknown url type"):
        load_full(CIFAR)


def test_a_folder_is_a_mirror_too(mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mirror" / "mnist").mkdir(parents=True)
    for name, data in mnist.items():
        (tmp_path / "mirror" / "mnist" / name).write_bytes(data)
    monkeypatch.setenv("SEARCHFM_MIRROR", (tmp_path / "mirror").as_uri())
    assert len(load_full(DIGITS).train) == 60
    with pytest.raises(DataError, match="No such file"):
        load_full(CIFAR)


def test_data_that_are_nowhere_name_every_source(
    mnist: dict[str, bytes], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = closed()
    monkeypatch.setattr(MNIST, "mirrors", [f"{gone}/a/", f"{gone}/b/"])
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError) as caught:
        load(DIGITS, data_dir=tmp_path / "mine")
    message = str(caught.value)
    locations = (f"{tmp_path / 'mine'}, ", str(cache), f"{gone}/a/train-images-idx3-ubyte.gz: ", f"{gone}/b/")
    assert [location for location in locations if location not in message] == []
    assert "\n" not in message
    assert kept(cache) == []


@pytest.mark.parametrize("where", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_mnist_at_hand_needs_no_network(
    where: str, packed: bool, mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MNIST, "mirrors", [])
    folder = tmp_path / "mine" / where
    folder.mkdir(parents=True)
    for name, data in mnist.items():
        (folder / (name if packed else name.removesuffix(".gz"))).write_bytes(data if packed else gzip.decompress(data))
    monkeypatch.setenv("SEARCHFM_DATA", str(tmp_path / "mine"))
    assert datasets.describe("mnist").location == folder
    assert torch.equal(load_full(DIGITS).train.labels, torch.arange(60) % 10)


# --- Fashion-MNIST from its mirror ------------------------------------------------------------------------------------


def published(folder: Path, stem: str) -> bytes:
    """The file as its makers packed it: Debian's, with the name and the time that Debian took out of gzip's header."""
    packed = (folder / f"{stem}.gz").read_bytes()
    if packed[3] & 8:  # has a name: it comes from a mirror
        return packed
    at = 1504176627 if stem.startswith("t10k") else 1504176606
    return b"\x1f\x8b\x08\x08" + struct.pack("<I", at) + packed[8:10] + stem.encode() + b"\0" + packed[10:]


@pytest.mark.slow
def test_many_processes_download_the_published_files_once(server: Server, fashion_mnist: Path, cache: Path) -> None:
    server.files = {
        f"/fashion-mnist/{stem}.gz": published(fashion_mnist, stem) for stem in datasets.IDX["fashion-mnist"]
    }
    code = (
        "from pathlib import Path; from searchfm.config import DataConfig; from searchfm.learn import data, datasets; "
        "datasets.DEBIAN_FOLDER = Path('/nowhere'); print(data.load(DataConfig()).fingerprint)"
    )
    environment = {**os.environ, "SEARCHFM_MIRROR": server.url, "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {job.communicate()[0] for job in jobs}
    assert {job.returncode for job in jobs} == {0}
    assert printed == {load(DataConfig()).fingerprint + "\n"}
    assert sorted(server.asked) == sorted(server.files)
    assert len(kept(cache)) == 4 + 1


# --- Fashion-MNIST as a Debian package --------------------------------------------------------------------------------


def repository(root: Path, files: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Debian archive in a folder, holding the real Fashion-MNIST, and an apt that knows nothing else."""
    tree = root / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = (
        f"Package: {datasets.DEBIAN_PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: tests\nDescription: tests\n"
    )
    (tree / "DEBIAN" / "control").write_text(control)
    (tree / folder).parent.mkdir(parents=True)
    shutil.copytree(files, tree / folder)
    package = root / "package.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, package], check=True, capture_output=True)
    shutil.rmtree(tree)
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    entry = f"{control}Filename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {sha256}\n"
    (root / "Packages").write_text(entry)
    (root / "datasets.list").write_text(f"deb [trusted=yes] file:{root} ./\n")
    settings = {
        "Dir::Etc::SourceList": root / "datasets.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": root / "no-lists",
        "APT::Sandbox::User": "root",  # apt's own user may not read the folders of tests
    }
    (root / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(root / "apt.conf"))


def test_the_debian_package_is_the_last_resort(
    tmp_path: Path,
    fashion_mnist: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    repository(tmp_path, fashion_mnist, "usr/share/elsewhere", monkeypatch)
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", Path("/usr/share/elsewhere"))
    monkeypatch.setenv("SEARCHFM_MIRROR", closed())
    splits = load(DataConfig(name="fashion-mnist"))
    assert len(splits.train) == 51000
    assert "apt-get download dataset-fashion-mnist" in caplog.text  # said aloud
    assert len(kept(cache)) == 4 + 1
    assert not (tmp_path / "no-lists").exists()  # the machine's own lists were left alone
    # What is not Fashion-MNIST is not used, whoever packed it.
    (tmp_path / "package.deb").write_bytes(b"!<arch>\n")
    shutil.rmtree(cache)
    with pytest.raises(DataError, match=r"apt-get download dataset-fashion-mnist: E: .* Hash Sum mismatch"):
        load(DataConfig(name="fashion-mnist"))
    assert kept(cache) == []


def test_without_apt_the_error_names_it_among_the_rest(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", Path("/usr/share/elsewhere"))
    monkeypatch.setenv("SEARCHFM_MIRROR", closed())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(DataConfig(name="fashion-mnist"))
    message = str(caught.value)
    assert message.startswith('data.name = "fashion-mnist" is not available: not in ')
    for location in (
        str(cache),
        "/usr/share/elsewhere",
        "Connection refused",
        "apt-get download dataset-fashion-mnist: ",
    ):
        assert location in message
    assert kept(cache) == []
