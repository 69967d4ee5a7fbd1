"""Sources behind a URL: a real S3 server in this process, and fsspec's file systems.

gs:// and hdfs:// take the same way through pyarrow; no server for them can be had here.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from dino_core.config import ConfigError
from orchestrator.config import DataConfig
from orchestrator.data import storage
from orchestrator.data.images import BadImage, load_image
from orchestrator.data.readers import table
from orchestrator.data.sources import Source, open_source
from orchestrator.data.storage import RemoteFolder, connect, find, locate

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in this process; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(start: int, number: int, **columns: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [png(start + row) for row in range(number)], **columns}), buffer, 4)
    return buffer.getvalue()


def reds(source: Source) -> list[int]:
    return [int(load_image(source.train, index, 100)[0, 0, 0]) for index in range(len(source.train))]


class Store:
    """The bucket `bucket` of a server."""

    def __init__(self, address: str) -> None:
        self.options = f"?endpoint_override={address}&region=us-east-1"
        self.client: Any = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        self.client.create_bucket(Bucket="bucket")

    def put(self, **files: bytes) -> None:
        for name, data in files.items():
            self.client.put_object(Bucket="bucket", Key=name, Body=data)

    def open(self, path: str, **settings: str) -> Source:
        return open_source(DataConfig(source=f"s3://bucket/{path}{self.options}", **settings))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = Store(server)
    yield store
    listed = store.client.list_objects_v2(Bucket="bucket").get("Contents", [])
    for item in listed:
        store.client.delete_object(Bucket="bucket", Key=item["Key"])
    store.client.delete_bucket(Bucket="bucket")
    connect.cache_clear()


def test_a_folder_of_classes_is_read_in_another_process(store: Store) -> None:
    names = ("set/train/cat/1.png", "set/train/dog/a b#2.png", "set/train/dog/.x/4.png", "set/test/cat/3.png")
    store.put(**{name: png(number) for number, name in enumerate(names)})
    source = store.open("set")
    assert source.kind == "folder"
    assert source.location == "s3://bucket/set"
    assert source.classes == ("cat", "dog")
    assert source.test is not None
    assert reds(source) == [0, 1]
    assert source.train.name(1) == "dog/a b#2.png"
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(s.train.read(1))"
    read = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), check=True, capture_output=True, cwd=ROOT
    )
    assert read.stdout == png(1)


def test_the_digest_of_a_folder_is_that_of_its_copy_and_asks_for_no_file(store: Store, tmp_path: Path) -> None:
    files = {f"{name}.png": png(number) for number, name in enumerate("abc")}
    store.put(**{f"set/{name}": data for name, data in files.items()})
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = store.open("set")
    store.client.delete_object(Bucket="bucket", Key="set/a.png")  # so that asking for it would tell
    assert source.digest() == open_source(DataConfig(source=str(tmp_path))).digest()


def test_parquet_with_splits(store: Store) -> None:
    for part in range(3):
        split = ["train", "test", "train", "train", "test", "train"]
        store.put(**{f"tables/{part}.parquet": parquet(10 * part, 6, split=split, label=list("abcabc"))})
    source = store.open("tables")
    assert source.test is not None
    assert (len(source.train), len(source.test), source.classes) == (12, 6, ("a", "b", "c"))
    assert reds(source) == [0, 2, 3, 5, 10, 12, 13, 15, 20, 22, 23, 25]
    assert source.train.units() is not None
    assert reds(store.open("tables/1.parquet")) == [10, 12, 13, 15]
    assert reds(store.open("tables/{0..1}.parquet")) == [0, 2, 3, 5, 10, 12, 13, 15]
    assert store.open("tables/*.parquet").location == "s3://bucket/tables/*.parquet"
    with pytest.raises(
        ConfigError, match=r"no file is called 3\.parquet; there are 3 files; the nearest is 2\.parquet"
    ):
        store.open("tables/{2..3}.parquet")


def test_an_arrow_file_and_a_stream(store: Store) -> None:
    batch = pa.record_batch({"image": pa.array([png(5), png(6)], pa.binary())})
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        buffer = io.BytesIO()
        with new(buffer, batch.schema) as writer:
            writer.write_batch(batch)
            writer.write_batch(batch)
        store.put(**{f"{name}.arrow": buffer.getvalue()})
    assert reds(store.open("file.arrow")) == [5, 6, 5, 6]
    with pytest.raises(ConfigError, match=r"stream.arrow is not readable as Arrow: it is an Arrow stream.*local disc"):
        store.open("stream.arrow")


def test_the_endpoint_from_the_environment(store: Store, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(**{"set/1.png": png(1)})
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    connect.cache_clear()
    assert reds(open_source(DataConfig(source="s3://bucket/set?region=us-east-1"))) == [1]


def test_what_is_not_there(store: Store) -> None:
    for path in ("s3://bucket/none", "s3://nobody/images", "s3://nobody/*.png"):
        with pytest.raises(ConfigError, match=r"data.source = s3://(bucket|nobody).*no such file or folder"):
            open_source(DataConfig(source=path + store.options))
    with pytest.raises(ConfigError, match=r"data.source = s3://bucket/x: cannot be opened: .*nonsense"):
        open_source(DataConfig(source="s3://bucket/x?nonsense=1"))
    with pytest.raises(ConfigError, match=r"no such scheme as s33://.*did you mean s3://\?"):
        open_source(DataConfig(source="s33://bucket/x"))


def test_what_cannot_be_read_later_is_an_os_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(**{"set/1.png": png(1), "set/2.png": png(2), "table.parquet": parquet(0, 8)})
    images, rows = store.open("set"), store.open("table.parquet")
    assert reds(rows)[:4] == [0, 1, 2, 3]
    store.client.delete_object(Bucket="bucket", Key="set/2.png")
    store.client.put_object(Bucket="bucket", Key="table.parquet", Body=b"short")
    with pytest.raises(OSError, match=r"2\.png"):
        images.train.read(1)
    with pytest.raises(BadImage, match="cannot be read"):
        load_image(images.train, 1, 100)
    fresh = pickle.loads(pickle.dumps(rows))  # noqa: S301 - as another process would get it
    table.kept_open.cache_clear()
    monkeypatch.setattr(table, "_cache", table.GroupCache())
    with pytest.raises(OSError, match=r"s3://bucket/table.parquet, row group 1: "):
        fresh.train.read(4)


class _Forbidden(BaseHTTPRequestHandler):
    """A service that does not know these credentials."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.usefixtures("store")
def test_credentials_that_do_not_suffice() -> None:
    with serving(_Forbidden) as address:
        source = f"s3://bucket/x?endpoint_override={address}&region=us-east-1"
        with pytest.raises(
            ConfigError, match=r"data.source = s3://bucket/x: cannot be opened: .*ACCESS_DENIED"
        ) as caught:
            open_source(DataConfig(source=source))
    assert "very-secret" not in str(caught.value)


class _Failing(_Forbidden):
    """A service in trouble; at /none it knows that there is nothing."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/none" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815


def test_why_a_web_server_has_nothing() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/x.tar"
        with pytest.raises(ConfigError, match=r"data.source = http://.*x\.tar: cannot be opened: connection refused"):
            open_source(DataConfig(source=closed))
    with pytest.raises(ConfigError, match=r"cannot be opened: unknown host"):
        open_source(DataConfig(source="http://nobody.invalid/x.tar"))
    with serving(_Failing) as address:
        with pytest.raises(ConfigError, match=r"cannot be opened: the server failed: 503"):
            open_source(DataConfig(source=f"{address}/x.tar"))
        with pytest.raises(ConfigError, match=r"no such file or folder"):
            open_source(DataConfig(source=f"{address}/none"))
    with serving(_Forbidden) as address, pytest.raises(ConfigError, match=r"may not be seen with these credentials"):
        open_source(DataConfig(source=f"{address}/x.tar"))


def test_googles_client_gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_OPENING_RETRIES_S", 1)
    address = "gs://anonymous@bucket/x?endpoint_override=nobody.invalid&scheme=http"
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        open_source(DataConfig(source=address))
    assert time.monotonic() - start < 20
    told = "data.source = gs://anonymous@bucket/x: cannot be opened: PerformWork() - CURL error [6]="
    assert str(caught.value).startswith(told)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "source",
    ["s3://me:hunter2@bucket/x", "s3://me:hunter2@bucket/x/*.png?region=a", "abfs://c@a/x?client_secret=hunter2"],
)
def test_passwords_in_an_address_are_refused_and_not_repeated(source: str) -> None:
    with pytest.raises(ConfigError, match=r"runs record their settings.*AWS_ACCESS_KEY_ID") as caught:
        open_source(DataConfig(source=source))
    assert "hunter2" not in str(caught.value)


# fsspec


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def test_a_file_system_of_fsspec(memory: Any) -> None:
    memory.pipe({"/set/cat/a b%20#?.png": png(1), "/set/dog/2.png": png(2), "/tables/x.parquet": parquet(3, 6)})
    source = open_source(DataConfig(source="memory://set"))
    assert source.describe() == "folder memory://set: 2 training images in 2 classes"
    assert reds(source) == [1, 2]
    assert len(source.digest()) == 32
    assert reds(open_source(DataConfig(source="memory://set/cat/*.png"))) == [1]
    assert reds(open_source(DataConfig(source="memory://tables/x.parquet"))) == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ConfigError, match=r"data.source = memory://nothing: no such file or folder"):
        open_source(DataConfig(source="memory://nothing"))


def test_errors_of_a_client_are_os_errors(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/set/1.png": png(1)})
    source = open_source(DataConfig(source="memory://set"))
    monkeypatch.setattr(type(memory), "_open", lambda *args, **kwargs: {}["token"])
    with pytest.raises(OSError, match="KeyError: 'token'"):
        source.train.read(0)


def test_file_urls(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "1.png").write_bytes(png(1))
    assert reds(open_source(DataConfig(source=f"file://{tmp_path}/a%20b"))) == [1]
    assert reds(open_source(DataConfig(source=f"file://{tmp_path}/a%20b/*.png"))) == [1]
    with pytest.raises(ConfigError, match="comes an absolute path"):
        open_source(DataConfig(source="file://here/x"))
    with pytest.raises(ConfigError, match=r"data.source = file://.*c: no such file or folder; did you mean .*a b"):
        open_source(DataConfig(source=f"file://{tmp_path}/a%20c"))


def test_a_remote_folder_names_lists_and_measures(store: Store) -> None:
    store.put(**{"top/a.txt": b"12", "top/sub/b.txt": b"345", "top/sub/.hidden": b"", "topping/c.txt": b""})
    folder, name = locate("data.source", f"s3://bucket/top{store.options}")
    assert isinstance(folder, RemoteFolder)
    assert name is None
    assert folder.files() == ["a.txt", "sub/b.txt"]
    listing = folder.listing(recursive=False)
    assert list(listing) == ["a.txt"]
    assert listing["a.txt"] == folder.stat("a.txt")
    assert folder.stat("a.txt").size == 2
    assert folder.stat("a.txt").modified_ns > 0
    below = pickle.loads(pickle.dumps(folder)).below("sub")  # noqa: S301
    assert below.address == "s3://bucket/top/sub"
    assert below.read("b.txt") == b"345"
    with below.open("b.txt") as file:
        file.seek(1)
        assert file.read() == b"45"
    with pytest.raises(FileNotFoundError):
        below.stat("sub")
    with pytest.raises(OSError, match="none"):
        below.read("none")
    parent, name = locate("data.source", f"s3://bucket/top/sub/b.txt{store.options}")
    assert (parent.address, name) == (below.address, "b.txt")
    assert find("data.source", f"s3://bucket/top/?.txt{store.options}").files.keys() == {"a.txt"}


# hf://


class _Hub(BaseHTTPRequestHandler):
    """The few calls by which huggingface_hub lists and reads the data set `someone/digits`."""

    files: ClassVar[dict[str, bytes]] = {}

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": "0" * 40}

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            below = path.partition("/tree/main")[2].strip("/")
            found = [self._entry(name) for name in self.files if name.startswith(below)]
            folders = sorted({name.partition("/")[0] for name in self.files})
            return self._json(
                found + ([] if below else [{"type": "directory", "path": n, "oid": "0" * 40} for n in folders])
            )
        if "/resolve/main/" in path:
            data, asked = self.files[path.partition("/resolve/main/")[2]], self.headers.get("Range")
            if asked is None:
                return self._send(200, data, {})
            start, _, end = asked.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(end) + 1 if end else None]
            return self._send(206, part, {"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"})
        return self._json({"id": "someone/digits", "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(asked)["paths"] if asked.startswith("{") else []
        known = [self._entry(path) for path in paths if path in self.files]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in self.files)]
        self._json(known + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def log_message(self, *args: object) -> None:
        pass


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    _Hub.files = {f"data/train-0000{part}-of-00002.parquet": parquet(10 * part, 6) for part in range(2)}
    code = """
from orchestrator.config import DataConfig
from orchestrator.data.readers import table
from orchestrator.data import storage
from orchestrator.data.images import load_image
from orchestrator.data.sources import open_source
for path in ("data", "data/train-00001-of-00002.parquet", "data/*.parquet"):
    source = open_source(DataConfig(source=f"hf://datasets/someone/digits/{path}"))
    print([int(load_image(source.train, index, 100)[0, 0, 0]) for index in range(len(source.train))])
print(source.describe())
"""
    with serving(_Hub) as address:  # in another process, for huggingface_hub reads HF_ENDPOINT when it is imported
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    second = list(range(10, 16))
    assert done.stdout.splitlines() == [
        str([*range(6), *second]),
        str(second),
        str([*range(6), *second]),
        "parquet hf://datasets/someone/digits/data/*.parquet: 12 training images without labels",
    ]
