"""Live commands of assay: the service and a receiver in processes of their own, spoken to over HTTP."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from assay.errors import ResourceError

__all__ = ["Live", "wait_until"]

_START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_POLL = 0.02


class Live:
    """A command of assay, such as ``poc serve``, on a free port of this machine until the ``with`` block ends.

    What it writes is appended to the log.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self._start = self.log_size()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "assay", *arguments, "--port", "0", "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self._client: Any = None
        self.url = ""

    def connect(self, ready: str = "/health") -> None:
        """Wait until the process serves and the page ``ready`` answers 200; the error has the end of its log."""
        if self._client is not None:
            return
        import httpx

        wait_until(lambda: self._port() is not None, _START_SECONDS, self.failure)
        self.url = f"http://127.0.0.1:{self._port()}"
        self._client = httpx.Client(base_url=self.url, timeout=60.0)
        wait_until(lambda: self._answers(ready), _START_SECONDS, self.failure)

    def get(self, path: str, **query: Any) -> Any:
        """Return what a page answers."""
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Post an object and return the answer."""
        return self._call("POST", path, json=body or {})

    def log_size(self) -> int:
        """Return the bytes of the log so far."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_since(self, offset: int) -> bytes:
        """Return what was logged after so many bytes."""
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read()

    def failure(self, seen: str) -> ResourceError:
        """Return the error for something that was seen, with the end of the log."""
        tail = self.log_since(self._start).decode(errors="replace").strip()[-1500:]
        return ResourceError(
            f"{self.log.name}: {seen}", wanted="a live service", do=f"see the log, which ends with:\n{tail}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """Return what the service answers; anything but 200 is a ResourceError."""
        import httpx

        try:
            answer = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self.failure(f"{method} {path}: {type(error).__name__}") from error
        if answer.status_code != httpx.codes.OK:
            raise self.failure(f"{method} {path} answered {answer.status_code}: {answer.text[:500]}")
        return answer.json()

    def _answers(self, path: str) -> bool:
        import httpx

        self._check_alive()
        try:
            return bool(self._client.get(path).status_code == httpx.codes.OK)
        except httpx.TransportError:
            return False

    def _port(self) -> int | None:
        """Return the port that the log names."""
        self._check_alive()
        for line in self.log_since(self._start).splitlines():
            if b'"serving"' in line:
                return int(json.loads(line)["port"])
        return None

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise self.failure(f"the process ended with code {self._process.returncode}")


def wait_until(true: Callable[[], Any], seconds: float, failed: Callable[[str], Exception]) -> None:
    """Ask again and again until something is true; raise what ``failed`` makes of a sentence after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise failed(f"not done after {seconds:.0f} seconds")
        time.sleep(_POLL)
