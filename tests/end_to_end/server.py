"""A real ``assay poc serve`` in a process of its own, which can be killed and started again."""

import json
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.settings_files import with_file

# What a start spends its time on; a fork server imports it once for all starts.
PRELOAD = [
    "assay.poc.service",
    "assay.cli.app",
    "assay.models",
    "transformers.models.qwen3.modeling_qwen3",
]


def write_to(log: str) -> None:
    """Send what this process says to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def run_forked(arguments: list[str], log: str) -> None:
    write_to(log)
    import torch

    from assay.cli import run

    torch.set_num_threads(
        1
    )  # two threads that wait for each other on a busy machine are slower than one
    sys.exit(run(arguments))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerDied(Exception):
    """The process ended before it was ready."""


class Server:
    """Starts the command with some arguments; ``fork`` starts it from a process that has imported
    everything.
    """

    def __init__(
        self, directory: Path, *arguments: str, model: str | Path, fork: bool = True
    ) -> None:
        self.port = free_port()
        self.data_dir = directory / "data"
        self.log = directory / "server.log"
        self.base = f"http://127.0.0.1:{self.port}"
        self.fork = fork
        self.arguments = [
            *(
                "poc",
                "serve",
                "--model",
                str(model),
                "--port",
                str(self.port),
                "--data-dir",
                str(self.data_dir),
            ),
            *("--allow-private-callbacks", "--log-format", "json", *arguments),
        ]
        self.process: Any = None

    def start(self) -> None:
        words = with_file(*self.arguments, folder=self.log.parent)
        if self.fork:
            context = mp.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            self.process = context.Process(target=run_forked, args=(words, str(self.log)))
            self.process.start()
        else:
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", "assay", *words]
                self.process = subprocess.Popen(command, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def wait(self, timeout: float) -> int | None:
        """Wait for the end; return the exit code, None while it runs."""
        if self.fork:
            self.process.join(timeout)
            return self.process.exitcode
        try:
            return int(self.process.wait(timeout))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait(30) == -signal.SIGKILL

    def terminate(self, timeout: float = 30) -> int | None:
        os.kill(self.pid, signal.SIGTERM)
        return self.wait(timeout)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def post(self, path: str, body: Any = None) -> Any:
        """Post to a published route; the answer must be 200."""
        status, answer = self.call("POST", f"/api/v1/pow{path}", body if body is not None else {})
        assert status == 200, (path, status, answer)
        return answer

    def get(self, path: str) -> Any:
        status, answer = self.call("GET", path)
        assert status == 200, (path, status, answer)
        return answer

    def status(self) -> Any:
        return self.get("/api/v1/pow/status")

    def wait_for(self, path: str = "/ready", timeout: float = 60.0) -> None:
        """Wait until a page answers 200."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.wait(0) is not None:
                raise ServerDied(self.log.read_text()[-2000:])
            try:
                if self.call("GET", path)[0] == 200:
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.02)
        raise TimeoutError(self.log.read_text()[-2000:])

    def close(self) -> None:
        if self.process is not None and self.wait(0) is None:
            self.terminate()
            if self.wait(0) is None:
                self.kill()
