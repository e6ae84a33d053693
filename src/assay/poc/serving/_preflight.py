"""What is refused before vLLM loads a model, which takes minutes.

:func:`before_start` is an entry point of ``vllm.general_plugins``: vLLM calls it in each of its processes, in the first
one while it builds the parser of its command line (``AsyncEngineArgs.add_cli_args``).
"""

import multiprocessing
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from assay.errors import AssayError, UsageError
from assay.poc.engines.vllm import check_config, check_engines, check_installed, multiply_exactly
from assay.poc.service.http import is_loopback
from assay.poc.serving._settings import PluginSettings

MODULES = ("api_server.py", "entry.py")
"""Files that ``python -m`` runs as a server: the second one since 0.32, where the first is deprecated."""


def before_start() -> None:
    """Refuse a server that could not prove, in the first seconds, and set what float32 needs.

    It reads the command line and a ``--config`` file with vLLM's own parser, and the settings of the model with vLLM's
    own configuration. Only the first process of a server with the plugin is checked; all others are left alone.

    Raises:
        SystemExit: Exit code 1 with the refusal, or whatever vLLM's parser raises for arguments that it refuses itself.
    """
    if "assay" not in os.environ.get("VLLM_PLUGINS", "").split(",") or multiprocessing.parent_process() is not None:
        return
    if not (sys.argv[1:2] == ["serve"] or Path(sys.argv[0]).name in MODULES):
        return
    try:
        check_installed()
        _check_frontend()
        arguments = _arguments()
        check_arguments(arguments, PluginSettings())
        multiply_exactly(arguments.dtype)
        config = _config(arguments)
        if config is not None:
            check_config(config)
    except AssayError as error:
        raise SystemExit(f"assay refuses to start: {error}") from None


def check_arguments(arguments: Any, settings: PluginSettings) -> None:
    """Refuse a server that would share its round with others, whose checkpoint has no digest, or that needs a key."""
    check_engines(getattr(arguments, "data_parallel_size", None) or 1)
    servers = getattr(arguments, "api_server_count", None) or 1
    if servers > 1:
        raise UsageError(
            f"{servers} API servers of one engine",
            wanted="one, which owns the round and its database",
            do="pass --api-server-count 1",
        )
    if getattr(arguments, "revision", None):
        raise UsageError(
            f"--revision {arguments.revision}",
            wanted="a checkpoint whose digest the proof can name",
            do="download it, and serve the directory",
        )
    host = getattr(arguments, "host", None)
    if not (settings.has_keys or getattr(arguments, "uds", None) or (host and is_loopback(host))):
        raise UsageError(
            f"--host {host or '0.0.0.0'} without a key of assay",
            wanted="a key where others reach the port: that of --api-key does not guard /api/v1/pow",
            do="set ASSAY_API_KEY or ASSAY_API_KEY_FILE, or pass --host 127.0.0.1",
        )


def _check_frontend() -> None:
    """Refuse the Rust front end, under which ``vllm serve`` never builds the application that plugins extend."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UsageError(
            "VLLM_USE_RUST_FRONTEND=1, a server without plugins",
            wanted="the Python server, to which assay adds /api/v1/pow",
            do="unset VLLM_USE_RUST_FRONTEND",
        )


def _arguments() -> Namespace:
    """Return the command line and the ``--config`` file of this server, as vLLM will parse them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    parser = FlexibleArgumentParser()
    if sys.argv[1:2] == ["serve"]:
        from vllm.entrypoints.cli.serve import ServeSubcommand  # type: ignore[import-not-found]

        ServeSubcommand().subparser_init(parser.add_subparsers())
    else:
        try:  # since 0.32
            from vllm.entrypoints.launchers.cli_args import make_arg_parser  # type: ignore[import-not-found]
        except ImportError:
            from vllm.entrypoints.openai.cli_args import make_arg_parser  # type: ignore[import-not-found]
        make_arg_parser(parser)
    arguments: Namespace = parser.parse_args()
    if getattr(arguments, "model_tag", None) is not None:
        arguments.model = arguments.model_tag
    return arguments


def _config(arguments: Namespace) -> Any:
    """Return the ``VllmConfig`` of this server; None where vLLM refuses the arguments, which it will do itself."""
    from vllm import AsyncEngineArgs  # type: ignore[import-not-found]

    try:
        return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except Exception:
        return None
