"""Everything an operator can set, with the bounds that keep the service small."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.poc.verdict import Calibration

__all__ = ["Settings", "check_secrets"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the service runs. Times are in seconds.

    Args:
        data_dir: holds the database; one service at a time.
        seq_len: positions per nonce of artifact rounds and jobs; requests for another are refused.
        api_keys: keys that may do everything.
        validate_keys: keys that may validate, submit artifact jobs and read.
        read_keys: keys that may only read.
        max_body: bytes of a request body.
        max_nonces: nonces of one request.
        max_positions: bound on ``batch_size · seq_len``.
        max_waiting: validations that wait for the engine.
        max_queued_nonces: nonces of artifact jobs that wait.
        max_streams: open event streams.
        callback_secrets: Standard Webhooks secrets, the newest first; every one signs.
        callback_interval: valid nonces are collected for this long before they are sent.
        callback_nonces: a callback is sent earlier when it holds this many nonces.
        callback_timeout: of one delivery.
        callback_attempts: after so many a callback is a dead letter.
        callback_backoff: pause after the first failure; it doubles.
        callback_backoff_max: the longest pause.
        callback_concurrency: deliveries at once.
        max_pending: generation waits while so many callbacks are undelivered.
        allow_private_callbacks: let callback URLs point into private networks and to this machine.
        job_ttl: how long results of artifact jobs are kept.
        wait: how long ``"wait": true`` waits.
        keep_rounds: how long finished rounds stay in the database.
        drain: how long a stopping service waits for the running batch.
        alpha: bound on the chance to ever accuse an honest node.
        beta: chance to pass a node with four times the honest noise.
        calibration: measured honest noise; the stated default when None.
    """

    data_dir: Path
    seq_len: int = 256
    api_keys: tuple[str, ...] = ()
    validate_keys: tuple[str, ...] = ()
    read_keys: tuple[str, ...] = ()
    max_body: int = 2**20
    max_nonces: int = 10_000
    max_positions: int = 2**18
    max_waiting: int = 64
    max_queued_nonces: int = 100_000
    max_streams: int = 32
    callback_secrets: tuple[str, ...] = ()
    callback_interval: float = 5.0
    callback_nonces: int = 1000
    callback_timeout: float = 10.0
    callback_attempts: int = 20
    callback_backoff: float = 1.0
    callback_backoff_max: float = 1800.0
    callback_concurrency: int = 8
    max_pending: int = 1000
    allow_private_callbacks: bool = False
    job_ttl: float = 300.0
    wait: float = 60.0
    keep_rounds: float = 30 * 86400.0
    drain: float = 30.0
    alpha: float = 1e-3
    beta: float = 1e-2
    calibration: "Calibration | None" = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", int) and value < 1:
                raise UsageError(f"{field.name} is {value}", wanted="at least 1", do=f"raise {field.name}")
            if field.type in ("float", float) and not 0 <= value < math.inf:
                raise UsageError(f"{field.name} is {value}", wanted="a number from 0", do=f"correct {field.name}")
        check_secrets(self.callback_secrets)
        if any(not key.isascii() or len(key) < 16 for key in self.api_keys + self.validate_keys + self.read_keys):
            raise UsageError(
                "an API key of fewer than 16 ASCII characters",
                wanted="a key that cannot be guessed",
                do="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )

    @property
    def has_keys(self) -> bool:
        """Whether requests must carry a key."""
        return bool(self.api_keys or self.validate_keys or self.read_keys)


def check_secrets(secrets: Sequence[str]) -> None:
    """Refuse webhook secrets that cannot sign.

    Raises:
        UsageError: not base64, or fewer than 24 bytes, the least that Standard Webhooks allows. Never shows it.
    """
    for secret in secrets:
        try:
            size = len(base64.b64decode(secret.removeprefix("whsec_") + "==", validate=False))
        except ValueError:
            size = 0
        if not 24 <= size <= 64:
            raise UsageError(
                "a callback secret that cannot be used",
                wanted="whsec_ and the base64 of 24 to 64 random bytes",
                do="make one: python -c 'import base64, secrets; "
                'print("whsec_" + base64.b64encode(secrets.token_bytes(32)).decode())\'',
            )
