"""What must be done before vLLM loads a model.

``before_start`` is an entry point of ``vllm.general_plugins``: vLLM calls it in each of its processes, first before it
reads its command line. It refuses there what would be refused later, so that nobody waits for an engine that would then
be ended. What does not stand there, but in a ``--config`` file, the plugin refuses when the engine is up.
"""

import os
import sys
from argparse import ArgumentParser
from typing import Any

from assay.errors import UsageError
from assay.poc.engines.vllm._compatibility import check_engines

__all__ = ["before_start", "check_alone", "multiply_exactly"]


def before_start() -> None:
    """Refuse command lines under which no server could own a round, and set what float32 needs.

    Of servers with the plugin only: others are left as they are.

    Raises:
        UsageError: see :func:`check_alone`.
    """
    if "assay" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-parallel-size", "--data_parallel_size", "-dp", type=_number)
    parser.add_argument("--api-server-count", "--api_server_count", "-asc", type=_number)
    parser.add_argument("--revision")
    parser.add_argument("--dtype")
    args = parser.parse_known_args(sys.argv[1:])[0]
    check_alone(args)
    multiply_exactly(args.dtype)


def multiply_exactly(dtype: str | None) -> None:
    """Have triton multiply float32 as float32, for this process and those that it starts, unless told otherwise.

    By default triton rounds the factors of a float32 product to the ten bits of TF32. On a GPU vLLM's attention in
    float32 is such a kernel: distances were up to 3e-5 from those of other engines, where honest noise is 3e-7, and an
    honest node was found to be a fraud. Models in other formats are left alone: they do not need it, and some of their
    kernels would be slower.

    Args:
        dtype: what vLLM is told; None where it is not.
    """
    if dtype in ("float32", "float"):
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


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
