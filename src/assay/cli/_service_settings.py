"""Settings of ``assay poc serve``, ``receive`` and ``callbacks``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

import assay.poc.service
from assay.settings import Device, Dtype, Flag, Settings

_HOST = "Address to listen on. Addresses that other machines reach need a key."
_PORT = "Port to listen on. 0 takes a free one."
_LogFormat = Annotated[
    Literal["console", "json"],
    Flag(variable="ASSAY_LOG_FORMAT"),
    Field(description="Form of the log: console or json."),
]


class ServeSettings(Settings):
    """Settings of ``assay poc serve``."""

    service: assay.poc.service.Settings = Field(default_factory=assay.poc.service.Settings)
    model: Annotated[str, Flag(variable="ASSAY_MODEL")] = Field(
        description="Model: a directory, a hub id, or reference:…"
    )
    host: Annotated[str, Flag(variable="ASSAY_HOST")] = Field("127.0.0.1", description=_HOST)
    port: Annotated[int, Flag(variable="ASSAY_PORT")] = Field(8000, ge=0, le=65535, description=_PORT)
    dtype: Dtype = None
    device: Device = None
    kernels: Literal["auto", "compiled", "eager"] = Field(
        "auto", description="Kernels: compiled, eager, or auto (compiled on CUDA)."
    )
    log_format: _LogFormat = "console"


class ReceiveSettings(Settings):
    """Settings of ``assay poc receive``."""

    service: assay.poc.service.Settings = Field(default_factory=assay.poc.service.Settings)
    host: str = Field("127.0.0.1", description=_HOST)
    port: int = Field(8081, ge=0, le=65535, description=_PORT)
    output: Annotated[Path, Flag(("-o", "--output"))] = Field(
        Path("received.sqlite3"), description="SQLite file that keeps the callbacks."
    )
    log_format: _LogFormat = "console"


class ReplaySettings(Settings):
    """Settings of ``assay poc callbacks replay``."""

    data_dir: Annotated[Path, Flag(variable="ASSAY_DATA_DIR")] = Field(
        Path("assay-data"), description="Directory of the service's database."
    )


class ListSettings(ReplaySettings):
    """Settings of ``assay poc callbacks list``."""

    every: Annotated[bool, Flag(("--all",), variable="ASSAY_POC_CALLBACKS_LIST_EVERY")] = Field(
        False, description="List delivered callbacks too."
    )
    limit: int = Field(100, ge=1, description="Largest number of callbacks to list, the newest first.")
