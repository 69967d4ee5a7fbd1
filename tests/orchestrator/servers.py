"""Servers that tests start: PostgreSQL, MLflow, and a proxy that is slow."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_DEBIAN = Path("/usr/lib/postgresql")
POSTGRESQL = max(_DEBIAN.glob("*/bin"), key=lambda found: int(found.parent.name), default=_DEBIAN / "none")
"""PostgreSQL's programs, where Debian has them; they are not on the PATH."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float, complaint: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{complaint}\n{log.read_text() if log else ''}"
        time.sleep(0.2)


@contextmanager
def running_postgres() -> Iterator[str]:
    """The address of an empty PostgreSQL database that is asked over a socket in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the socket's path is limited to 107 characters
    owner: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:  # as which it refuses to run
        shutil.chown(folder, "postgres", "postgres")
        owner |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    make = [
        POSTGRESQL / "initdb",
        "-D",
        folder / "data",
        "-U",
        "mlflow",
        "--auth=trust",
        "--no-sync",
        "--locale=C",
        "-E",
        "UTF8",
    ]
    subprocess.run(make, check=True, capture_output=True, **owner)
    command = [
        POSTGRESQL / "postgres",
        "-D",
        folder / "data",
        "-k",
        folder,
        "-c",
        "listen_addresses=",
        "-c",
        "fsync=off",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **owner)
    try:
        wait_until(lambda: "ready to accept connections" in (folder / "log").read_text(), 60, "PostgreSQL is not ready")
        yield f"postgresql+psycopg://mlflow@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)  # its fast shutdown, which does not wait for clients
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


class MlflowServer:
    """A real `mlflow server` in a process group of its own, which can be killed and started again."""

    def __init__(self, store: str, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store, self._folder = store, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self._store, "--artifacts-destination", str(self._folder / "artifacts")]
        # Its job queue is a dozen of processes more, for what is not used here.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = self._folder / "server.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            wait_until(self.is_up, 400, "the MLflow server does not answer", log)
        except AssertionError:
            self.kill()
            raise

    def is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, to all of its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class SlowProxy:
    """Passes requests on to a server, each after `delay_s`; the answers, too, after `answer_delay_s`."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.answer_delay_s = 0.0
        self.num_requests = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                proxy.num_requests += 1
                time.sleep(proxy.delay_s)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(self.command, self.path, body, {**self.headers, "Host": f"127.0.0.1:{port}"})
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                time.sleep(proxy.answer_delay_s)
                with contextlib.suppress(OSError):  # the client has given up
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815 - names of http.server

            def log_message(self, format: str, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
