"""The settings of the plugin, and what is refused before vLLM loads a model, which takes minutes.

:func:`before_start` is an entry point of ``vllm.general_plugins``: vLLM calls it in each of its processes, in the first
one while it builds the parser of its command line (``AsyncEngineArgs.add_cli_args``).
"""

import multiprocessing
import os
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from assay.errors import AssayError, UsageError
from assay.models import identify
from assay.poc.engines.vllm import (
    Inputs,
    Mode,
    ThrottleSettings,
    check_config,
    check_engines,
    check_installed,
    most_positions,
    multiply_exactly,
)
from assay.poc.protocol import NetworkPins
from assay.poc.service import Settings
from assay.poc.service.http import is_loopback

DEFAULT = ThrottleSettings()
MODULES = ("api_server.py", "entry.py")
"""Files that ``python -m`` runs as a server: the second one since 0.32, where the first is deprecated."""


class PluginSettings(Settings):
    """The settings of ``assay poc serve`` under their names in the environment, and those of the vLLM engine.

    Raises:
        UsageError: A value is of another type or out of range.
        CalibrationError: ``ASSAY_CALIBRATION`` names a file that is not a calibration.
        DataError: ``ASSAY_PINS`` names a file that is no pins file.
    """

    drain: float = Field(2.0, ge=0, allow_inf_nan=False, description="Time that a stopping server waits for its batch.")
    reference: str | None = Field(None, description="Name of the model in requests; the served name by default.")
    vllm_inputs: Inputs = Field("local", description="Where inputs are made: in the workers, or sent by the server.")
    vllm_mode: Mode = Field(DEFAULT.mode, description="Whether chat goes first, or a round has the engine to itself.")
    vllm_share: float = Field(DEFAULT.share, description="Part of the time that nonces may run while there is chat.")
    vllm_chat_in_flight: int = Field(DEFAULT.chat_in_flight, description="Nonces at once while there is chat.")
    vllm_in_flight: int = Field(DEFAULT.in_flight, description="Nonces at once without chat; 0 measures and adapts.")
    vllm_wait: float = Field(
        DEFAULT.wait, description="Time that the first chat request on an idle engine may wait for the nonces inside."
    )
    vllm_quiet: float = Field(
        DEFAULT.quiet, description="Time after the last chat request until the engine counts as idle."
    )
    vllm_drain: float = Field(DEFAULT.drain, description="Time that an exclusive round waits for running chat.")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        _ = self.throttle  # refuses what is out of range

    @property
    def throttle(self) -> ThrottleSettings:
        """What nonces may take of the engine."""
        return ThrottleSettings(**{field.name: getattr(self, f"vllm_{field.name}") for field in fields(DEFAULT)})


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
        version = check_installed()
        _check_frontend()
        arguments, settings = _arguments(), PluginSettings()
        check_arguments(arguments, settings)
        multiply_exactly(arguments.dtype)
        config = _config(arguments)
        if config is not None:
            check_config(config)
        if config is not None and settings.pins is not None:
            check_pins(settings.pins, arguments.model, config, version)
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


def check_pins(pins: NetworkPins, model: str, config: Any, version: str) -> None:
    """Refuse a checkpoint, a build or a length that the network did not agree on, as far as no engine is needed.

    What only a worker knows, such as the device and the attention, is compared when a round begins.

    Args:
        pins: Pins of the network.
        model: Directory or hub id of the checkpoint, which is hashed.
        config: Configuration of vLLM.
        version: Version of vLLM.

    Raises:
        UsageError: The checkpoint, the build or the length is not pinned; names what differs.
        ModelError: The checkpoint cannot be read.
    """
    longest = most_positions(config)
    if longest < pins.round.seq_len:
        raise UsageError(
            f"a server that takes {longest} positions",
            wanted=f"at least {pins.round.seq_len}, which the pins agree on, and one to generate",
            do=f"pass --max-model-len {pins.round.seq_len + 1} or more, or no --max-num-batched-tokens below that",
        )
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    known = {"engine": "vllm", "dtype": dtype, "torch": torch.__version__, "library": f"vllm {version}"}
    builds = pins.model(identify(model, dtype=dtype).digest).builds
    differing = [[name for name, value in known.items() if not build.allows(name, value)] for build in builds]
    names = min(differing, key=len)
    if names:
        nearest = builds[differing.index(names)]
        raise UsageError(
            "a build that the pins do not allow: " + ", ".join(f"{name} {known[name]}" for name in names),
            wanted=", ".join(f"{name} {' or '.join(map(str, getattr(nearest, name)))}" for name in names),
            do="serve with a build of the network, or with the pins that hold now (ASSAY_PINS)",
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
