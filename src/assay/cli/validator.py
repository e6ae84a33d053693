"""``assay poc validator``: the other end of the service."""

from typing import TYPE_CHECKING

from assay.cli.poc import poc
from assay.cli.serve import SERVICE, Port, RunSettings

if TYPE_CHECKING:
    from assay.poc.service.settings import Settings as ServiceSettings
    from assay.poc.validator.settings import ValidatorSettings


class ValidatorRunSettings(RunSettings):
    """Settings of ``assay poc validator``: what it runs, and where."""

    port: Port = 8090


@poc.add(
    "validator",
    ValidatorRunSettings,
    SERVICE,
    "assay.poc.validator.settings:ValidatorSettings",
    panel="Validator",
    shown="model data_dir pins nodes nonces_per_hour calibration api_key_file host port log_format",
    example="assay poc validator --model reference:qwen3 --pins pins.toml",
)
def validator(chosen: ValidatorRunSettings, service: "ServiceSettings", own: "ValidatorSettings") -> None:
    """Recompute samples of many nodes until SIGTERM.

    It takes the work of the nodes, recomputes a secret sample of it, and keeps the ledger of their lives. A restart
    continues where the validator was stopped. Messages that it has acknowledged are on disk.
    """
    from assay.models.load import model_info
    from assay.poc.from_pins import pinned_format
    from assay.poc.net.logs import configure_logs
    from assay.poc.opening import check_loadable
    from assay.poc.validator.app import validate
    from assay.poc.validator.controller import LEDGER
    from assay.poc.validator.registry import Registry
    from assay.poc.verdict.ledger import check_ledger

    # Before there is a database.
    info = model_info(chosen.model)
    Registry.load(own.pins, own.nodes, service, model=chosen.model).check_length(info)
    dtype = chosen.dtype or pinned_format(own.pins, chosen.model)
    check_loadable(chosen.model, dtype, chosen.device)
    check_ledger(service.data_dir / LEDGER, alpha=service.alpha, beta=service.beta)
    configure_logs(chosen.log_format)
    validate(lambda: chosen.deploy(dtype), own, service, reference=chosen.model, host=chosen.host, port=chosen.port)
