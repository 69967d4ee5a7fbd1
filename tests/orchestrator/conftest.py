"""A real Ray cluster for the tests that need one, started once per module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import psutil
import pytest

from orchestrator.ray_cluster import CHILD_ENV, end_processes
from tests.orchestrator.servers import POSTGRESQL, MlflowServer, free_port, running_postgres


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system memory://, empty: files that are no local ones, in this process."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@dataclass(frozen=True)
class Head:
    """A Ray head node with a dashboard."""

    address: str
    """Of its GCS, host:port."""
    dashboard: str
    """http://host:port, for jobs."""


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Head]:
    """A head with 8 logical CPUs, as a user would start one by `ray start --head`."""
    ray = str(Path(sys.executable).with_name("ray"))
    port, dashboard = free_port(), free_port()
    # Unix sockets live below this folder and their paths are limited to 107 characters.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    # Jobs that are submitted to the head find the `python` of these tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | CHILD_ENV | {"PATH": path}
    # Of a job that is stopped, before it is killed; Ray's three seconds can be too few on a busy machine.
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = "60"
    command = [ray, "start", "--head", f"--port={port}", "--num-cpus=8", "--include-dashboard=true"]
    # Agents of a Ray that has just ended hold the default ports for a while; a head without its agent runs no job.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
    command += [f"--dashboard-agent-grpc-port={free_port()}"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={temporary}", "--object-store-memory=500000000"]
    command += ["--disable-usage-stats", "--block"]
    with open(f"{temporary}/head.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _wait_for_head(process, dashboard, Path(temporary))
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        # `ray start --block` itself takes half a minute to end what it started.
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        end_processes(family, patience_s=0)
        process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_for_head(process: subprocess.Popen[bytes], dashboard: int, temporary: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        try:
            # The dashboard answers before there is a node, long before on a busy machine.
            with urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/nodes?view=summary", timeout=5) as answer:
                if json.load(answer)["data"]["summary"]:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError((temporary / "head.log").read_text())


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of an empty PostgreSQL database."""
    if not (POSTGRESQL / "initdb").exists():
        pytest.skip(f"no PostgreSQL in {POSTGRESQL.parent}")
    with running_postgres() as address:
        yield address


@pytest.fixture(scope="module")
def mlflow_server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with PostgreSQL behind it that is not started yet."""
    server = MlflowServer(postgres, tmp_path_factory.mktemp("server"))
    yield server
    server.kill()
