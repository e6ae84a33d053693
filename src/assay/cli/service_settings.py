"""Settings of ``assay poc serve``, ``receive`` and ``callbacks``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

import assay.poc.service
from assay.cli.flags import DTYPE, MODEL, OUTPUT
from assay.cli.poc_settings import NUMBER_FORMAT, NumberFormat
from assay.settings import Device, Flag, Settings

HOST = "Address to listen on. Addresses that other machines reach need a key."
PORT = "Port to listen on. 0 takes a free one."
Kernels = Annotated[
    Literal["auto", "compiled", "eager"],
    Field(description="Kernels: compiled, eager, or auto (compiled on CUDA)."),
]
LogFormat = Annotated[
    Literal["console", "json"],
    Flag(variable="ASSAY_LOG_FORMAT"),
    Field(description="Form of the log: console or json."),
]


class ServeSettings(Settings):
    """Settings of ``assay poc serve``."""

    service: assay.poc.service.Settings = Field(default_factory=assay.poc.service.Settings)
    model: Annotated[str, MODEL] = Field(description="Model: a directory, a hub id, or reference:…")
    host: Annotated[str, Flag(variable="ASSAY_HOST")] = Field("127.0.0.1", description=HOST)
    port: Annotated[int, Flag(variable="ASSAY_PORT")] = Field(8000, ge=0, le=65535, description=PORT)
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(
        None, description=f"{NUMBER_FORMAT}; by default the stored one."
    )
    device: Device = None
    kernels: Kernels = "auto"
    log_format: LogFormat = "console"


class ReceiveSettings(Settings):
    """Settings of ``assay poc receive``."""

    service: assay.poc.service.Settings = Field(default_factory=assay.poc.service.Settings)
    host: str = Field("127.0.0.1", description=HOST)
    port: int = Field(8081, ge=0, le=65535, description=PORT)
    output: Annotated[Path, OUTPUT] = Field(
        Path("received.sqlite3"), description="SQLite file that keeps the callbacks."
    )
    log_format: LogFormat = "console"


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
