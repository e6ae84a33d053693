"""Settings of ``assay poc validator``: its own, those of a service that it shares, and where it runs."""

from typing import Annotated, Literal

from pydantic import Field

import assay.poc.service
import assay.poc.validator
from assay.settings import Device, Dtype, Flag, Settings


class ValidatorCommandSettings(Settings):
    """Settings of ``assay poc validator``."""

    service: assay.poc.service.Settings = Field(default_factory=assay.poc.service.Settings)
    validator: assay.poc.validator.ValidatorSettings
    model: Annotated[str, Flag(variable="ASSAY_MODEL")] = Field(
        description="Model that recomputes, the one of the pins: a directory, a hub id, or reference:…"
    )
    host: Annotated[str, Flag(variable="ASSAY_HOST")] = Field(
        "127.0.0.1", description="Address to listen on. Addresses that other machines reach need a key."
    )
    port: Annotated[int, Flag(variable="ASSAY_PORT")] = Field(
        8090, ge=0, le=65535, description="Port to listen on. 0 takes a free one."
    )
    dtype: Dtype = None
    device: Device = None
    kernels: Literal["auto", "compiled", "eager"] = Field(
        "auto", description="Kernels: compiled, eager, or auto (compiled on CUDA)."
    )
    log_format: Annotated[Literal["console", "json"], Flag(variable="ASSAY_LOG_FORMAT")] = Field(
        "console", description="Form of the log: console or json."
    )
