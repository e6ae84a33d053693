"""The bodies of responses, for the OpenAPI document. Handlers return plain values that fit them."""

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


class JobReply(_Reply):
    """The state of an artifact job; a completed one holds its result."""

    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    request_id: str


class Health(_Reply):
    """The process answers."""

    status: Literal["ok"]


class Ready(_Reply):
    """The model is loaded."""

    ready: bool


class Problem(_Reply):
    """The reason of a refusal, what was wanted, and what to do."""

    detail: str
    wanted: str
    do: str
