"""Settings of every server: directory, keys, limits, callbacks and verdicts.

A value comes from the argument of that name, else from the environment, else from the default. The
setting ``max_body`` is ``ASSAY_MAX_BODY`` in the environment.
"""

import base64
import importlib
import ipaddress
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

import assay.settings
from assay.errors import DataError, UsageError
from assay.files.reading import read_whole
from assay.settings import Flag

if TYPE_CHECKING:
    from assay.poc.verdict.calibration_file import Calibration
else:  # its module imports torch, for which a usage error need not wait
    Calibration = Any

PREFIX = "ASSAY_"
LONGEST_KEY_FILE = 2**20  # bytes; room for ten thousand keys


def _words(value: Any) -> Any:
    """Split a list that the environment holds: its items are separated by white space."""
    return tuple(value.split()) if isinstance(value, str) else value


def loaded_by(module: str, name: str, value: Any) -> Any:
    """Return a value of a class, or what the class loads from the file of this name."""
    if value is None:
        return None
    kind = getattr(importlib.import_module(module), name)
    if isinstance(value, (str, Path)):
        return kind.load(value)
    if not isinstance(value, kind):
        raise ValueError(f"a {name}, or the path of its file")
    return value


Count = Annotated[int, "NUMBER", Field(ge=1)]
Bytes = Annotated[int, "BYTES", Field(ge=1)]
Seconds = Annotated[float, "SECONDS", Field(ge=0, allow_inf_nan=False)]
Chance = Annotated[float, "SHARE", Field(gt=0, lt=1)]
_read_calibration = BeforeValidator(
    partial(loaded_by, "assay.poc.verdict.calibration_file", "Calibration")
)
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]


class ListenerSettings(assay.settings.Settings):
    """Whom a server answers, and how much it takes from each.

    Raises:
        UsageError: A value is of another type or out of range, or a setting has an unknown name.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True)

    api_key_file: Path | None = Field(
        None, description="File with keys that may do everything, one per line."
    )
    api_keys: Annotated[Words, Flag(("--api-key",), secret=True)] = Field(
        (),
        validate_default=True,
        description="Keys that may do everything. Those of the file are added to them.",
    )
    validate_keys: Annotated[Words, Flag(("--validate-key",), secret=True)] = Field(
        (), description="Keys that may validate, submit artifact jobs and read."
    )
    read_keys: Annotated[Words, Flag(("--read-key",), secret=True)] = Field(
        (), description="Keys that may only read."
    )
    max_body: Bytes = Field(2**20, description="Largest body of a request.")
    max_bodies: Count = Field(
        2**26,
        description="Memory for all bodies that are being received at the same time, an eighth of "
        "it for each address. Bodies below 64 KiB have a quarter as much beside it.",
    )
    max_connections: Count = Field(
        4096, description="Connections that are open at the same time; more are answered with 503."
    )
    max_client_connections: Count = Field(
        512,
        description="Connections, and requests, that one address, or one /64 of IPv6, has open at "
        "the same time. "
        "Addresses of this machine are not bounded: a proxy on it names its clients.",
    )
    max_header: Bytes = Field(
        2**16, description="Largest head of a request, all its headers included."
    )
    header_timeout: Seconds = Field(
        10.0,
        description="Time in which the next request of a connection must begin, and its whole "
        "head arrive.",
    )
    callback_secrets: Annotated[Words, Flag(("--callback-secret",), secret=True)] = Field(
        (),
        description="Standard Webhooks secrets (whsec_…), the newest first. Each of them signs "
        "every callback.",
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        check_secrets(self.callback_secrets)
        if any(
            not key.isascii() or len(key) < 16
            for key in self.api_keys + self.validate_keys + self.read_keys
        ):
            raise UsageError(
                "an API key of fewer than 16 ASCII characters",
                wanted="a key that cannot be guessed",
                do="choose another; make one: python -c 'import secrets; "
                "print(secrets.token_urlsafe(32))'",
            )

    @field_validator("api_keys", mode="after")
    @classmethod
    def _with_file(cls, keys: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        path = info.data.get("api_key_file")
        if path is None:
            return keys
        try:
            keys_of_file = tuple(read_whole(path, LONGEST_KEY_FILE).decode().split())
        except (DataError, UnicodeDecodeError) as error:
            fault = error.seen if isinstance(error, DataError) else f"{path}: {error}"
            raise UsageError(
                f"the key file {fault}",
                wanted="a text file",
                do="correct --api-key-file or ASSAY_API_KEY_FILE",
            ) from None
        # Its owner believes that the service has one.
        if not keys_of_file:
            raise UsageError(
                f"the key file {path} without a key",
                wanted="a key on each line",
                do="write one into it, or leave --api-key-file out",
            )
        return keys + keys_of_file

    @property
    def has_keys(self) -> bool:
        """Whether requests must carry a key."""
        return bool(self.api_keys or self.validate_keys or self.read_keys)


class ServerSettings(ListenerSettings):
    """How a server runs that keeps a database. Times are in seconds, sizes in bytes.

    Raises:
        UsageError: A value is of another type or out of range, or a setting has an unknown name.
        CalibrationError: ``calibration`` names a file that is not a calibration.
    """

    data_dir: Path = Field(
        Path("assay-data"), description="Directory of the database. One service runs per directory."
    )
    max_streams: Count = Field(32, description="Event streams that are open at the same time.")
    max_client_streams: Count = Field(
        16, description="Event streams that one client has open at the same time."
    )
    callback_timeout: Seconds = Field(10.0, description="Time that one delivery may take.")
    callback_concurrency: Count = Field(8, description="Deliveries that run at the same time.")
    allow_private_callbacks: bool = Field(
        False,
        description="Whether callback URLs may point into private networks and to this machine.",
    )
    drain: Seconds = Field(
        30.0, description="Time that a stopping service waits for the running batch."
    )
    alpha: Chance | None = Field(
        None, description="Chance of ever accusing an honest node; else the pins', or 0.001."
    )
    beta: Chance = Field(
        1e-2, description="Chance of passing a node that computes too many nonces cheaply."
    )
    calibration: Annotated[Calibration | None, _read_calibration, NoDecode, "FILE"] = Field(
        None,
        description="Measured honest noise; else the pins' or bundled models'.",
    )


def is_loopback(host: str) -> bool:
    """Return whether an address or name is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_host(host: str, settings: ListenerSettings) -> None:
    """Refuse an address that others reach while requests need no key."""
    if not is_loopback(host) and not settings.has_keys:
        raise UsageError(
            f"--host {host} without a key",
            wanted="an API key where others reach the port",
            do="pass --api-key-file, set ASSAY_API_KEY, or leave --host out",
        )


def check_secrets(secrets: Sequence[str]) -> list[bytes]:
    """Return webhook secrets of 24 to 64 bytes; the error does not show them.

    Standard Webhooks drops characters of another alphabet, such as those of base64url, so that two
    sides that decode differently would have two secrets. Here they are refused.
    """
    keys = []
    for secret in secrets:
        text = secret.removeprefix("whsec_").rstrip("=")
        try:
            key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError:
            key = b""
        if not 24 <= len(key) <= 64:
            code = (
                "import base64, secrets; "
                'print("whsec_" + base64.b64encode(secrets.token_bytes(32)).decode())'
            )
            raise UsageError(
                "a callback secret that cannot be used",
                wanted="whsec_ and the base64 of 24 to 64 random bytes",
                do=f"choose another, in the alphabet with + and / and not with - and _; make one: "
                f"python -c '{code}'",
            )
        keys.append(key)
    return keys
