"""The command line, run in this process: exit code, stdout and stderr."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from assay.cli import run


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def assay(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``assay`` with arguments."""

    def call(*arguments: object) -> Outcome:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
