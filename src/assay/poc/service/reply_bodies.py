"""Bodies of responses, for the OpenAPI document: handlers return plain values that fit them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

StateName = Literal["IDLE", "GENERATING", "VALIDATING", "STOPPED"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="allow")


class Status(_Reply):
    """State and counts of the current round; ``valid_nonces`` holds the latest ones."""

    state: StateName
    valid_nonces: list[int]
    valid_distances: list[float]
    total_checked: int
    total_valid: int
    elapsed_seconds: float
    rate_per_second: float
    r_target: float | None
    status: StateName
    config: dict[str, Any] | None
    stats: dict[str, float] | None
    ready: bool
    paused: Literal["storage", "callbacks"] | None
    error: str | None


class InitReply(_Reply):
    """The answer to every call that changes the state."""

    status: Literal["OK"]
    pow_status: Status


class ValidateReply(_Reply):
    """The published rule (``fraud_detected``) and the residual test."""

    status: Literal["OK"]
    fraud_detected: bool
    computed_distances: list[float]
    valid: list[bool]
    n_invalid: int
    probability_honest: float
    residual_test: dict[str, Any]


class ChainReply(_Reply):
    """The answer to the client of the chain, in the fields of what it calls."""

    status: str


class JobReply(_Reply):
    """The state of an artifact job; a completed one holds its result."""

    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    request_id: str


class ReceiptEntry(_Reply):
    """Facts of a stored receipt; ``sha256`` is the hash of its line."""

    seq: int
    request_id: str
    index: int
    block_hash: str
    tokens: int
    finish: str
    size: int
    stored_at: float
    sha256: str


class ReceiptList(_Reply):
    """Stored receipts, oldest first; ``next`` is the ``after`` of the next page, or null."""

    receipts: list[ReceiptEntry]
    next: int | None


class StoredReceipt(_Reply):
    """A receipt, and the header under which it stands in a file."""

    seq: int
    stored_at: float
    sha256: str
    header: dict[str, Any]
    receipt: dict[str, Any]
