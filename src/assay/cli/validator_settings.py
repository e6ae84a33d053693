"""Settings of ``assay poc validator``: its own, those of a service that it shares, and where it runs."""

from typing import Annotated

from pydantic import Field

import assay.poc.service
import assay.poc.validator
from assay.cli.flags import DTYPE, MODEL
from assay.cli.poc_settings import NUMBER_FORMAT, NumberFormat
from assay.cli.service_settings import HOST, PORT, Kernels, LogFormat
from assay.settings import Device, Flag, Settings


class ValidatorCommandSettings(Settings):
    """Settings of ``assay poc validator``."""

    service: assay.poc.service.Settings = Field(default_factory=assay.poc.service.Settings)
    validator: assay.poc.validator.ValidatorSettings
    model: Annotated[str, MODEL] = Field(
        description="Model that recomputes, the one of the pins: a directory, a hub id, or reference:…"
    )
    host: Annotated[str, Flag(variable="ASSAY_HOST")] = Field("127.0.0.1", description=HOST)
    port: Annotated[int, Flag(variable="ASSAY_PORT")] = Field(8090, ge=0, le=65535, description=PORT)
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(
        None, description=f"{NUMBER_FORMAT}; by default the only one of the pins, else the stored one."
    )
    device: Device = None
    kernels: Kernels = "auto"
    log_format: LogFormat = "console"
