"""The bodies of requests, field for field as published, with bounds; and those of responses, for the OpenAPI document.

The defaults are those of the library: sign flips on, hooks between the layers off. Handlers return plain values that
fit the bodies of responses.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag

from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.proof import Record, unpack_or_nan
from assay.poc.protocol.round import MAX_NONCE, Round

Name = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048, pattern=r"^[\x21-\x7e]+$")]
Nonce = Annotated[int, Field(strict=True, ge=0, le=MAX_NONCE)]
Index = Annotated[int, Field(ge=0, le=MAX_NONCE)]
Count = Annotated[int, Field(ge=1, le=MAX_NONCE)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Length = Annotated[int, Field(ge=1, le=2**20)]
Probability = Annotated[float, Field(gt=0, lt=1)]
StateName = Literal["IDLE", "GENERATING", "VALIDATING", "STOPPED"]


def _distance(value: Any) -> Any:
    """Read anything but a finite number as NaN: it counts as a mismatch, and no request escapes its verdict by it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    return math.nan if value is None else value


Distance = Annotated[float, BeforeValidator(_distance)]


class _Block(BaseModel):
    """The block and the key that every request names."""

    model_config = ConfigDict(allow_inf_nan=False)

    block_hash: Name
    block_height: Index
    public_key: Name


class InitRequest(_Block):
    """Begin a round of distances: ``/init``, ``/init/generate``, ``/init/validate``."""

    r_target: Annotated[float, Field(gt=0, le=2)]
    fraud_threshold: Probability = 0.01
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)] = -1
    node_count: Annotated[int, Field(ge=-1, le=MAX_NONCE)] = -1
    batch_size: BatchSize = 32
    seq_len: Length = 256
    callback_url: Url | None = None
    use_layer_hooks: bool = False
    use_sign_flips: bool = True
    group_id: Index = 0
    n_groups: Count = 1
    poc_stronger_rng: bool = False


class Params(BaseModel):
    """Parameters that the network agreed on; another model or length is refused. ``preset`` is an addition of assay."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    model: Name
    seq_len: Length
    k_dim: Length = 12
    preset: Annotated[str, StringConstraints(pattern="^(artifact|hardened|decode(-[1-9][0-9]{1,3})?)$")] = "artifact"


class ArtifactInit(_Block):
    """Begin a round of vectors: ``/init/generate`` with ``params``."""

    node_id: Index
    node_count: Count
    group_id: Index = 0
    n_groups: Count = 1
    batch_size: BatchSize = 32
    params: Params
    url: Url | None = None
    poc_stronger_rng: bool = False


def _form(body: Any) -> str:
    """Tell the two published forms of ``/init/generate`` apart, so that errors refer to the form that was meant."""
    return "vectors" if isinstance(body, dict) and "params" in body else "distances"


AnyInit = Annotated[
    Annotated[ArtifactInit, Tag("vectors")] | Annotated[InitRequest, Tag("distances")], Discriminator(_form)
]


class ValidateRequest(BaseModel):
    """Distances that a prover published, to be recomputed. ``dist`` may hold null in place of a number."""

    model_config = ConfigDict(allow_inf_nan=True, strict=True)

    public_key: Name
    block_hash: Name
    block_height: Index
    nonces: list[Nonce]
    dist: list[Distance]
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)]


class Artifact(BaseModel):
    """A published vector. Text that does not decode to one counts as a mismatch."""

    nonce: Nonce
    vector_b64: Annotated[str, StringConstraints(max_length=65_536)]


class Validation(BaseModel):
    """The vectors to compare with recomputed ones."""

    artifacts: list[Artifact]


class StatTest(BaseModel):
    """The published count test on vectors."""

    model_config = ConfigDict(allow_inf_nan=False)

    dist_threshold: Annotated[float, Field(ge=0, le=2)] = 0.02
    p_mismatch: Probability = 0.001
    fraud_threshold: Probability = 0.01


class GenerateRequest(_Block):
    """An artifact job: compute vectors, or check them where ``validation`` is given."""

    node_id: Index
    node_count: Count
    nonces: Annotated[list[Nonce], Field(min_length=1)]
    params: Params
    batch_size: BatchSize = 32
    wait: bool = False
    url: Url | None = None
    validation: Validation | None = None
    stat_test: StatTest | None = None
    poc_stronger_rng: bool = False

    def round(self, model: str) -> Round:
        """Return the round of the job, of a model by its name."""
        same = ("block_hash", "public_key", "block_height", "node_id", "node_count")
        return Round(
            **{name: getattr(self, name) for name in same},
            model=model,
            preset=self.params.preset,
            seq_len=self.params.seq_len,
            r_target=2.0,
            strength=256 if self.poc_stronger_rng else 32,
        )

    def received(self) -> list[Record]:
        """Return the vectors to check, in the order of the nonces."""
        assert self.validation is not None
        sent = {artifact.nonce: artifact.vector_b64 for artifact in self.validation.artifacts}
        return [unpack_or_nan(nonce, sent[nonce], get_pipeline(self.params.preset)) for nonce in self.nonces]


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


class ReceiptEntry(_Reply):
    """What there is to know of a stored receipt without reading it. ``sha256`` is that of its line."""

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
    """Stored receipts, oldest first. ``next`` is the ``after`` of the following page, null after the last."""

    receipts: list[ReceiptEntry]
    next: int | None


class StoredReceipt(_Reply):
    """A receipt, and the header under which it stands in a file."""

    seq: int
    stored_at: float
    sha256: str
    header: dict[str, Any]
    receipt: dict[str, Any]


class RequestReceipts(_Reply):
    """The receipts of a request, by index."""

    receipts: list[StoredReceipt]


class DeletedReceipts(_Reply):
    """How many receipts were deleted."""

    deleted: int
