"""A checkpoint that starts fast, and servers that are always ended."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.server import Server


@pytest.fixture
def launch(tmp_path: Path, small_checkpoint: Path) -> Iterator[Callable[..., Server]]:
    """Start a server in a directory of its own; every one is ended with the test."""
    started: list[Server] = []

    def run(
        *arguments: str, name: str = "server", model: str | Path | None = None, fork: bool = True
    ) -> Server:
        directory = tmp_path / name
        directory.mkdir()
        server = Server(directory, *arguments, model=model or small_checkpoint, fork=fork)
        started.append(server)
        server.start()
        server.wait_for()
        return server

    yield run
    for server in started:
        server.close()
