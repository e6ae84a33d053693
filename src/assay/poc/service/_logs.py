"""Structured logs on stderr, for people or for machines. Nothing that is logged comes from a header or a URL."""

import logging
import sys
from contextlib import suppress
from typing import Literal

import structlog

__all__ = ["Format", "configure_logs"]

Format = Literal["console", "json"]


def configure_logs(form: Format, level: str = "info") -> None:
    """Send the logs of the service and of its libraries to stderr."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *names: _Stderr(),
        cache_logger_on_first_use=False,
    )
    # Libraries only speak up when something is wrong; httpx would log every callback URL at level info.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)


class _Stderr:
    """Writes lines to whatever stderr is now. A reader that has gone must not stop the service."""

    def msg(self, line: str) -> None:
        """Write one line."""
        with suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = msg
