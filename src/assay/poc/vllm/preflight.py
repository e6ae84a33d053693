"""The settings of the plugin, and checks before vLLM loads a model, which takes minutes."""

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field

from assay.errors import UsageError
from assay.models.load import identify
from assay.poc.net.server_settings import Seconds, is_loopback
from assay.poc.protocol.checks import check_name
from assay.poc.protocol.pins import with_cache
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.service.service_settings import ServiceSettings
from assay.poc.vllm.client import most_positions
from assay.poc.vllm.compatibility import (
    EXTENSION,
    OLD_EXTENSION,
    RESPONSE_EXTENSION,
    ResponseMode,
    check_config,
    check_installed,
    check_responses,
    processor_for,
    refuse_first,
    rounded_cache,
)
from assay.poc.vllm.throttle import OperatorsThrottle
from assay.poc.vllm.vllm_start import multiply_exactly
from assay.streams.arrays import dtype_name

log = logging.getLogger("assay.vllm")


class PluginSettings(ServiceSettings):
    """The settings of ``assay poc serve`` from the environment, and those of the engine.

    Raises:
        AssayError: As of :class:`assay.poc.service.ServiceSettings`.
    """

    has_flags = False

    drain: Seconds = Field(
        2.0, description="Time that a stopping service waits for the running batch."
    )
    reference: str | None = Field(
        None, description="Name of the model in requests; the served name by default."
    )
    throttle: OperatorsThrottle = Field(
        default_factory=OperatorsThrottle, description="What nonces may take of the engine."
    )
    responses: ResponseMode = Field(
        "off",
        description="Receipts of answers: none, with sketches of what the engine sampled, or of "
        "seeded sampling.",
    )
    responses_public_key: str = Field(
        "", description="Key of the node in the seeds and the receipts of answers."
    )
    responses_block: Literal["newest", "next"] = Field(
        "newest",
        description="Block that seeds an answer: the last one posted, or the first after the "
        "request came.",
    )
    responses_wait: Seconds = Field(
        10.0, description="Time that a request waits for the next block."
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.responses != "off":
            check_name(
                "ASSAY_RESPONSES_PUBLIC_KEY",
                self.responses_public_key,
                do="set it to the key that the network knows",
            )

    def for_port(self, port: int | None) -> Self:
        """Return the settings of the server on a port, which ``data_dir`` may name ``{port}``.

        MLNode starts several servers in one environment, and each needs a directory of its own.
        """
        folder = str(self.data_dir).replace("{port}", str(port))
        return self.model_copy(update={"data_dir": Path(folder)})


def check_server() -> None:
    """Refuse a server that could not prove, and set what float32 and responses need.

    Raises:
        AssayError: It could not.
        SystemExit: vLLM's parser refuses the arguments itself.
    """
    version = check_installed()
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serves = sys.argv[1:2] == ["serve"]
    if serves:
        ServeSubcommand().subparser_init(parser.add_subparsers())
    else:
        make_arg_parser(parser)
    arguments = parser.parse_args()
    settings = PluginSettings()
    if getattr(arguments, "model_tag", None) is not None:
        arguments.model = arguments.model_tag
    if serves and arguments.api_server_count is None and arguments.data_parallel_size > 1:
        # `vllm serve` by itself starts one for every engine.
        sys.argv += ["--api-server-count", "1"]
    check_arguments(arguments, settings)
    multiply_exactly(arguments.dtype)
    try:
        config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except Exception:  # vLLM refuses the arguments, and will do so itself
        return
    check_config(config)
    check_responses(config, settings.responses)
    if settings.pins is not None:
        check_pins(settings.pins, arguments.model, config, version)
    if settings.responses != "off":
        sys.argv += response_arguments(arguments, config, settings.responses)


def check_arguments(arguments: Any, settings: PluginSettings) -> None:
    """Refuse a server whose plugins, keys, round or model digest are missing."""
    value_of = partial(getattr, arguments)
    responses = settings.responses
    engines = value_of("data_parallel_size", None) or 1
    servers = value_of("api_server_count", None) or 1
    revision = value_of("revision", None)
    host = value_of("host", None)
    guarded = (
        value_of("headless", False)
        or value_of("uds", None)
        or (host and is_loopback(host))
        or settings.has_keys
    )
    # Under the first two front ends `vllm serve` never builds the application that plugins extend.
    python = "the Python server for HTTP, to which assay adds /api/v1/pow"
    rows = (
        (
            os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
            "VLLM_USE_RUST_FRONTEND=1, a server without plugins",
            python,
            "unset VLLM_USE_RUST_FRONTEND",
        ),
        (value_of("grpc", False), "--grpc, a server without plugins", python, "leave --grpc out"),
        (
            responses != "off" and engines > 1,
            f"ASSAY_RESPONSES={responses} with {engines} data-parallel engines",
            "one that has all answers",
            "start one server per engine, or leave ASSAY_RESPONSES out",
        ),
        (
            servers > 1,
            f"{servers} API servers",
            "one, which has the round and all chat",
            "pass --api-server-count 1",
        ),
        (
            value_of("data_parallel_multi_port_external_lb", False),
            "--data-parallel-multi-port-external-lb",
            "one server, which deals out the nonces",
            "leave it out, or start one server per engine, each with its own node_id and data "
            "directory",
        ),
        (
            revision,
            f"--revision {revision}",
            "a checkpoint with a digest",
            "download it, and serve the directory",
        ),
        (
            not guarded,
            f"--host {host or '0.0.0.0'} without a key of assay",
            "a key of its own for /api/v1/pow",
            "set ASSAY_API_KEY or ASSAY_API_KEY_FILE, or pass --host 127.0.0.1",
        ),
    )
    refuse_first(rows)
    if value_of("worker_extension_cls", None) == OLD_EXTENSION:
        log.warning(
            "--worker-extension-cls %s ends with assay 0.4: name %s", OLD_EXTENSION, EXTENSION
        )


def response_arguments(arguments: Any, config: Any, mode: ResponseMode) -> list[str]:
    """Return the engine arguments of responses, which override the operator's.

    The processor is named there, which is public, and never in the entry points of the package:
    those hold for every server of the environment, whether or not assay runs.

    Raises:
        UsageError: The operator has a worker extension of another kind.
    """
    if arguments.worker_extension_cls not in (EXTENSION, OLD_EXTENSION, RESPONSE_EXTENSION):
        raise UsageError(
            (
                f"--worker-extension-cls {arguments.worker_extension_cls} with "
                f"ASSAY_RESPONSES={mode}"
            ),
            wanted=EXTENSION,
            do="leave the other extension out, or ASSAY_RESPONSES=off",
        )
    words = ["--worker-extension-cls", RESPONSE_EXTENSION]
    if mode != "seeded":
        return words
    return [
        *words,
        "--logits-processors",
        *(arguments.logits_processors or ()),
        processor_for(config),
    ]


def check_pins(pins: NetworkPins, model: str, config: Any, version: str) -> None:
    """Refuse a checkpoint, build or length that the network did not agree on.

    The checkpoint is hashed. What only a worker knows, such as the device, is compared when a round
    begins.

    Raises:
        UsageError: The checkpoint, the build or the length is not pinned; names what differs.
        ModelError: The checkpoint cannot be read.
    """
    longest = most_positions(config)
    if longest < pins.round.seq_len:
        raise UsageError(
            f"a server that takes {longest} positions",
            wanted=f"at least {pins.round.seq_len}, which the pins agree on, and one to generate",
            do=f"pass --max-model-len {pins.round.seq_len + 1} or more, or no "
            f"--max-num-batched-tokens below that",
        )
    dtype = dtype_name(config.model_config.dtype)
    served = identify(model, dtype=dtype)
    build_fields = {
        "engine": "vllm",
        "dtype": with_cache(served.quantised or dtype, rounded_cache(config)),
        "torch": torch.__version__,
        "library": f"vllm {version}",
    }
    builds = pins.model(served.digest).builds
    differing = (
        [name for name, value in build_fields.items() if not build.allows(name, value)]
        for build in builds
    )
    names, nearest = min(zip(differing, builds, strict=True), key=lambda pair: len(pair[0]))
    if names:
        raise UsageError(
            "a build that the pins do not allow: "
            + ", ".join(f"{name} {build_fields[name]}" for name in names),
            wanted=", ".join(
                f"{name} {' or '.join(map(str, getattr(nearest, name)))}" for name in names
            ),
            do="serve with a build of the network, or with the pins that hold now (ASSAY_PINS)",
        )
