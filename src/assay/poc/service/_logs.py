"""Structured logs on stderr, for people or for machines. Nothing that is logged comes from a header or a URL."""

import logging
import sys
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries only speak up when something is wrong; httpx would log every callback URL at level info.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
