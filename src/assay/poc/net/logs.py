"""Structured logs on stderr, for people or machines, without headers and callback URLs."""

import logging
import sys
import time
from contextlib import suppress
from typing import Literal

import structlog

from assay.errors import visible

LONGEST_TEXT = 2**16  # characters of one value: a traceback is the longest


def configure_logs(form: Literal["console", "json"]) -> None:
    """Send the logs of the service and of its libraries to stderr."""
    rendered: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()]  # writes control characters out by itself
        if form == "json"
        else [_written_out, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *rendered,
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=lambda *names: _Stderr(),
        cache_logger_on_first_use=False,
    )
    # Libraries only speak up when something is wrong; httpx would log every callback URL at level
    # info.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    # It would warn of every malformed request, and so let any client fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def _written_out(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Write control characters out: an id that a sender chose must not steer the terminal that
    shows the log.
    """
    return {
        name: visible(value, LONGEST_TEXT) if isinstance(value, str) else value
        for name, value in event.items()
    }


class LogBudget:
    """Lets clients cause only so many lines of the log per minute."""

    def __init__(self, lines: int = 60) -> None:
        self._lines = lines
        self._left = float(lines)
        self._last = time.monotonic()
        self._skipped = 0

    def info(self, log: structlog.typing.FilteringBoundLogger, event: str, **about: object) -> None:
        """Write a line, with the number of lines that were left out before it, or leave it out."""
        now = time.monotonic()
        self._left = min(self._lines, self._left + (now - self._last) * self._lines / 60)
        self._last = now
        if self._left < 1:
            self._skipped += 1
            return
        self._left -= 1
        skipped = self._skipped
        self._skipped = 0
        log.info(event, **about, skipped=skipped)


class _Stderr:
    """Writes lines to the present stderr. A reader that has gone must not stop the service."""

    def msg(self, line: str) -> None:
        """Write one line."""
        with suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    debug = info = warning = error = exception = msg
