"""Refusals that need only a server's command line, so that nobody waits for an engine that would then be ended.

``refuse_early`` is an entry point of ``vllm.general_plugins``: vLLM calls it in each of its processes, first before it
reads its command line. What does not stand there, but in a ``--config`` file, the plugin refuses when the engine is up.
"""

import os
import sys
from argparse import ArgumentParser
from typing import Any

from assay.errors import UsageError
from assay.poc.engines.vllm._gate import check_engines

__all__ = ["check_alone", "refuse_early"]


def refuse_early() -> None:
    """Refuse command lines of servers with the plugin under which no server could own a round.

    Raises:
        UsageError: see :func:`check_alone`.
    """
    if "assay" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-parallel-size", "--data_parallel_size", "-dp", type=_number)
    parser.add_argument("--api-server-count", "--api_server_count", "-asc", type=_number)
    parser.add_argument("--revision")
    check_alone(parser.parse_known_args(sys.argv[1:])[0])


def check_alone(args: Any) -> None:
    """Refuse several servers or engines, each of which would own a round, and checkpoints that a proof cannot name.

    Raises:
        UsageError: names the first reason.
    """
    check_engines(getattr(args, "data_parallel_size", None) or 1)
    servers = getattr(args, "api_server_count", None) or 1
    if servers > 1:
        raise UsageError(
            f"{servers} API servers of one engine",
            wanted="one, which owns the round and its database",
            do="pass --api-server-count 1",
        )
    if getattr(args, "revision", None):
        raise UsageError(
            f"--revision {args.revision}",
            wanted="a checkpoint whose digest the proof can name",
            do="download it, and serve the directory",
        )


def _number(text: str) -> int:
    """Read a number; what is none is left to vLLM's own parser."""
    return int(text) if text.isascii() and text.isdigit() else 1
