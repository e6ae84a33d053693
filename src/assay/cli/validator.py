"""``assay poc validator``: the other end of the service."""

from pathlib import Path
from typing import TYPE_CHECKING

from assay.cli.engines import check_loadable, compiles, load
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.validator_settings import ValidatorCommandSettings
    from assay.poc.service.deployment import Deployment


FLAGS = (
    "model", "host", "port", "dtype", "device", "kernels", "log_format",
    "data_dir", "api_keys", "api_key_file", "read_keys", "callback_secrets", "allow_private_callbacks",
    "calibration", "alpha", "beta", "drain",
    "pins", "nodes", "nonces_per_hour", "sample", "batch_size", "minimum_share", "epoch", "positions", "open_blocks",
    "max_proof", "max_unwritten", "max_kept", "keep", "poll_interval",
)  # fmt: skip
"""The settings that have a flag; the others are for the environment alone."""


@settings("assay.cli.validator_settings:ValidatorCommandSettings", only=FLAGS)
def validator(chosen: "ValidatorCommandSettings") -> None:
    """Take the work of many nodes, recompute a secret sample of it, and keep the ledger, until SIGTERM.

    A restart continues where the validator was stopped. Messages that it has acknowledged are on disk.
    """
    from assay.models.load import model_info
    from assay.poc import service
    from assay.poc.service.deployment import Deployment
    from assay.poc.validator.app import validate
    from assay.poc.validator.controller import LEDGER
    from assay.poc.validator.registry import Registry
    from assay.poc.verdict.ledger import check_ledger

    # Before there is a database.
    info, files = model_info(chosen.model), (chosen.validator.pins, chosen.validator.nodes)
    Registry.load(*files, chosen.service, model=chosen.model).check_length(info)
    dtype = chosen.dtype or pinned_format(chosen.validator.pins, chosen.model)
    check_loadable(chosen.model, dtype, chosen.device)
    check_ledger(chosen.service.data_dir / LEDGER, alpha=chosen.service.alpha, beta=chosen.service.beta)
    service.configure_logs(chosen.log_format)

    def deploy() -> "Deployment":
        loaded = load(chosen.model, dtype, chosen.device)
        return Deployment.of(loaded, compiled=compiles(loaded, chosen.kernels))

    validate(deploy, chosen.validator, chosen.service, reference=chosen.model, host=chosen.host, port=chosen.port)


def pinned_format(pins: Path, model: str) -> str | None:
    """Return the number format of the weights that the pins name for a model; None where they name several."""
    from assay.poc.protocol.builds import of_weights
    from assay.poc.protocol.pins_file import NetworkPins

    network = NetworkPins.load(pins)
    builds = network.model(model if len(network.models) > 1 else None).builds
    formats = {of_weights(dtype) for build in builds for dtype in build.dtype}
    return formats.pop() if len(formats) == 1 else None
