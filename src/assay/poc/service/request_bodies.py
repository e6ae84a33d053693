"""Request bodies, field for field as published, and their checks before any work.

The defaults are those of the library: sign flips on, hooks between the layers off. The bodies of
responses are here for the OpenAPI document: handlers return plain values that fit them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from assay.errors import UsageError
from assay.files.names import normal_form
from assay.poc.net.callback_urls import check_url
from assay.poc.net.deployment import Deployment
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.protocol.distinct_seeds import check_distinct_seeds
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pins import Build, describe_build, nearest_build
from assay.poc.protocol.pipelines import find_pipeline, get_pipeline
from assay.poc.protocol.records import Record, pack_points, packed_size, unpack_or_nan
from assay.poc.protocol.round import Round
from assay.poc.service.rounds import RoundValues, StoredRound
from assay.poc.service.service_settings import ServiceSettings

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048, pattern=r"^[\x21-\x7e]+$")]
Nonce = Annotated[int, Field(strict=True, ge=0, le=MAX_NONCE)]
Index = Annotated[int, Field(ge=0, le=MAX_NONCE)]
Count = Annotated[int, Field(ge=1, le=MAX_NONCE)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Length = Annotated[int, Field(ge=1, le=2**20)]
Probability = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
StateName = Literal["IDLE", "GENERATING", "VALIDATING", "STOPPED"]
# Presets of jobs, which publish bytes.
PRESET_PATTERN = (
    "^(artifact|tokens-1|hardened|decode(-[1-9][0-9]{1,3})?|chain-decode(-[1-9][0-9]{0,3})?)$"
)
OF_EVERY_ROUND = (
    "block_hash",
    "public_key",
    "block_height",
    "node_id",
    "node_count",
    "group_id",
    "n_groups",
    "batch_size",
)
OF_DISTANCES = ("preset", "seq_len", "r_target", "fraud_threshold", "callback_url")
MISMATCH = "pins mismatch"
MOST_POINTS = 4097  # of a chain with the most steps


def _distance(value: Any) -> Any:
    """Read anything but a finite number as NaN: it counts as a mismatch, and no request escapes its
    verdict by it.
    """
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

    chain: ClassVar[bool] = False
    """Whether the client of the chain sent it, for which some limits are others."""

    block_hash: Name
    block_height: Index
    public_key: Name
    batch_size: BatchSize = 32
    poc_stronger_rng: bool = False


class InitRequest(_Block):
    """Begin a round of distances: ``/init``, ``/init/generate``, ``/init/validate``."""

    r_target: Annotated[float, Field(gt=0, le=2)]
    fraud_threshold: Probability = 0.01
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)] = -1
    node_count: Annotated[int, Field(ge=-1, le=MAX_NONCE)] = -1
    seq_len: Length = 256
    callback_url: Url | None = None
    use_layer_hooks: bool = False
    use_sign_flips: bool = True
    group_id: Index = 0
    n_groups: Count = 1

    @property
    def preset(self) -> str:
        """The preset of distances that the round is of; 422 unless exactly one is asked for."""
        if self.use_layer_hooks == self.use_sign_flips:
            raise UsageError(
                f"use_layer_hooks {self.use_layer_hooks} with use_sign_flips {self.use_sign_flips}",
                wanted="exactly one of the two",
                do="leave both out: sign flips are the recommendation",
            )
        return "layer-normalize" if self.use_layer_hooks else "poc-2.0"


class Params(BaseModel):
    """Parameters that the network agreed on; another model or length is refused. ``preset`` is an
    addition of assay; ``decode``, or the scheme of that name, asks for ``chain-decode`` with
    ``max_tokens`` steps.
    """

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    model: Name
    seq_len: Length
    k_dim: Length = 12
    preset: Annotated[str, StringConstraints(pattern=PRESET_PATTERN)] = "artifact"
    # The wire form of decode proofs. Those who send one forward pass send these values or none.
    decode: bool = False
    scheme: Literal["prefill", "decode"] = "prefill"
    max_tokens: Index = 0  # steps to decode; read where decode is set
    route_window: Index = 0  # of former releases; experts are seeded neighbours now

    @model_validator(mode="after")
    def _name_chain(self) -> "Params":
        """Name the preset that the fields of the chain's client ask for."""
        if self.decode or self.scheme == "decode":
            pipeline = find_pipeline(f"chain-decode-{self.max_tokens}")
            if pipeline is None:
                raise ValueError(f"max_tokens {self.max_tokens}; a decode proof has 1 to 4096")
            self.preset = pipeline.name
        return self


class _Vectors(_Block):
    """What a round and a job of vectors have in common."""

    node_id: Index
    node_count: Count
    params: Params
    url: Url | None = None


class ArtifactInit(_Vectors):
    """Begin a round of vectors: ``/init/generate`` with ``params``."""

    group_id: Index = 0
    n_groups: Count = 1


def _form(body: Any) -> str:
    """Tell the two published forms of ``/init/generate`` apart, so that errors refer to the form
    that was meant.
    """
    return "vectors" if isinstance(body, dict) and "params" in body else "distances"


AnyInit = Annotated[
    Annotated[ArtifactInit, Tag("vectors")] | Annotated[InitRequest, Tag("distances")],
    Discriminator(_form),
]


class ValidateRequest(BaseModel):
    """Published distances to be recomputed; ``dist`` may hold null in place of a number."""

    model_config = ConfigDict(allow_inf_nan=True, strict=True)

    public_key: Name
    block_hash: Name
    block_height: Index
    nonces: list[Nonce]
    dist: list[Distance]
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)]


class Artifact(BaseModel):
    """A published vector, or the points of a chain; malformed ones count as mismatches."""

    nonce: Nonce
    vector_b64: Annotated[str, StringConstraints(max_length=65_536)] = ""
    k_points_steps: Annotated[list[int], Field(max_length=MOST_POINTS)] | None = None

    @model_validator(mode="after")
    def _pack(self) -> "Artifact":
        """Make one text of either field; a number that is no byte becomes one that is no point."""
        if self.k_points_steps is not None:
            self.vector_b64 = pack_points(self.k_points_steps)
        elif "vector_b64" not in self.model_fields_set:
            raise ValueError("neither vector_b64 nor k_points_steps")
        return self


class Validation(BaseModel):
    """The vectors to compare with recomputed ones."""

    artifacts: list[Artifact]


class StatTest(BaseModel):
    """The published count test on vectors, with any values that a chain agreed on."""

    # Useless values are computed too: the chain's client takes a refusal as the prover's fault.
    model_config = ConfigDict(allow_inf_nan=False)

    dist_threshold: Annotated[float, Field(ge=0)] = 0.02
    p_mismatch: Share = 0.001
    fraud_threshold: Share = 0.01
    p_value_threshold: Share | None = None  # the chain's name of fraud_threshold

    @property
    def level(self) -> tuple[float, str]:
        """Level of the test, and the field that it is of."""
        if self.p_value_threshold is not None:
            return self.p_value_threshold, "p_value_threshold"
        return self.fraud_threshold, "fraud_threshold"


class GenerateRequest(_Vectors):
    """An artifact job: compute vectors, or check them where ``validation`` is given."""

    nonces: Annotated[list[Nonce], Field(min_length=1)]
    wait: bool = False
    validation: Validation | None = None
    stat_test: StatTest | None = None

    def round(self, model: str) -> Round:
        """Return the round of the job, of a model by its name.

        What is checked has the number of the machine that checks, and nonces of the one that
        proved: any share.
        """
        shared = ["block_hash", "public_key", "block_height"]
        if self.validation is None:
            shared += ["node_id", "node_count"]
        return Round(
            **{name: getattr(self, name) for name in shared},
            model=model,
            preset=self.params.preset,
            seq_len=self.params.seq_len,
            r_target=2.0,
            strength=256 if self.poc_stronger_rng else 32,
        )

    def bounded(self) -> "GenerateRequest":
        """Return the same job with one artifact per nonce, the last, and no text that is longer
        than a record of the preset: either is a mismatch, and would fill the disk.
        """
        if self.validation is None:
            return self
        longest = -(-packed_size(get_pipeline(self.params.preset)) // 3) * 4
        last = {artifact.nonce: artifact for artifact in self.validation.artifacts}
        artifacts = [
            artifact
            if len(artifact.vector_b64) <= longest
            else artifact.model_copy(update={"vector_b64": ""})
            for artifact in last.values()
        ]
        return self.model_copy(update={"validation": Validation(artifacts=artifacts)})

    def received(self) -> list[Record]:
        """Return the vectors to check, in the order of the nonces."""
        assert self.validation is not None
        sent = {artifact.nonce: artifact.vector_b64 for artifact in self.validation.artifacts}
        return [
            unpack_or_nan(nonce, sent[nonce], get_pipeline(self.params.preset))
            for nonce in self.nonces
        ]


class ChainInit(ArtifactInit):
    """Begin a round, as the client of the chain does."""

    chain: ClassVar[bool] = True


class ChainJob(GenerateRequest):
    """Queue a job, as the client of the chain does."""

    chain: ClassVar[bool] = True


def check_deployed(deployment: Deployment, settings: ServiceSettings) -> None:
    """Refuse a deployed model that the network did not agree on.

    Raises:
        UsageError: The checkpoint, its weights or its number format is not pinned, or rounds of
            vectors would have another length; names it.
    """
    pins = settings.pins
    if pins is None:
        return
    pinned = pins.model(deployment.digest)
    formats = sorted({dtype for build in pinned.builds for dtype in build.dtype})
    length = (
        settings.seq_len
        if get_pipeline(pins.round.preset).output != "distance"
        else pins.round.seq_len
    )
    for name, flag, deployed, agreed in (
        ("weights", "--model", deployment.weights, [pinned.weights]),
        ("dtype", "--dtype", deployment.dtype, formats),
        ("seq_len", "--seq-len", length, [pins.round.seq_len]),
    ):
        if deployed not in agreed:
            raise UsageError(
                f"a service with {name} {deployed}, which its pins do not allow",
                wanted=f"{name} {' or '.join(map(str, agreed))}",
                do=f"start it with {flag}, or with the pins of this network",
            )


def check_round(round: Round, settings: ServiceSettings, *, share: bool | None) -> None:
    """Refuse with 409 a round that the network did not agree on; names all values that contradict.

    ``share`` says that the round is generated, so that its key and share must be of a node where
    the pins list nodes. A validator's round has a key of its own. None says that the nonces may be
    of any share of a node.
    """
    if (pins := settings.pins) is not None:
        names = pins.differing(round)
        foreign = pins.foreign(round.public_key, round.node_id, round.node_count)
        if share is None:
            foreign = tuple(name for name in foreign if name == "public_key")
        if share is not False or not pins.nodes:
            names += foreign
        _check_agreed(names, vars(round), vars(pins.round))


def check_build(
    fingerprint: Fingerprint, deployment: Deployment, settings: ServiceSettings
) -> None:
    """Refuse with 409 an engine of no allowed build, and name its differences to the nearest."""
    build, names = nearest_build(_builds(deployment, settings), fingerprint)
    _check_agreed(names, describe_build(fingerprint), vars(build) if build is not None else {})


def _builds(deployment: Deployment, settings: ServiceSettings) -> tuple[Build, ...]:
    return () if settings.pins is None else settings.pins.model(deployment.digest).builds


def _check_agreed(
    names: tuple[str, ...], stated: Mapping[str, Any], agreed: Mapping[str, Any]
) -> None:
    """Refuse stated values that contradict the pins, by their names; ``agreed`` has what the pins
    say of them.
    """
    if not names:
        return
    pinned = {name: agreed[name] for name in names if agreed.get(name) is not None}
    listed = {"public_key", "node_id", "node_count"}.intersection(names) - pinned.keys()
    lists = {
        name: value if isinstance(value, (list, tuple)) else [value]
        for name, value in pinned.items()
    }
    alternatives = [
        f"{name} {' or '.join(map(str, values)) or 'none'}" for name, values in lists.items()
    ]
    raise Refusal(
        409,
        f"{MISMATCH}: {', '.join(names)}",
        wanted=", ".join(alternatives + ["a node of the network"] * bool(listed)),
        do="ask for what the network agreed on, or start the service with the pins that hold now",
        fields={
            "error": MISMATCH,
            "requested": {name: stated[name] for name in names},
            "pinned": pinned,
            "fields": list(names),
        },
    )


def round_values(
    request: InitRequest | ArtifactInit,
    deployment: Deployment,
    settings: ServiceSettings,
    *,
    needs_share: bool,
) -> RoundValues:
    """Return the round of a request; 400 without its share, 409 for other parameters."""
    values: dict[str, Any] = {name: getattr(request, name) for name in OF_EVERY_ROUND}
    if isinstance(request, ArtifactInit):
        _check_params(request.params, deployment, settings, chain=request.chain)
        values |= {
            "preset": request.params.preset,
            "seq_len": request.params.seq_len,
            "r_target": 2.0,
            "fraud_threshold": 0.01,
            "callback_url": request.url,
        }
    else:
        values |= {name: getattr(request, name) for name in OF_DISTANCES}
        if -1 in (request.node_id, request.node_count):
            if needs_share:
                raise Refusal(
                    400,
                    "Node ID and node count must be set",
                    wanted="node_id and node_count",
                    do="send 0 and 1 for one node",
                )
            values |= {"node_id": 0, "node_count": 1}
    check_url(values["callback_url"], allow_private=settings.allow_private_callbacks)
    asked = RoundValues(
        **values,
        strength=256 if request.poc_stronger_rng else 32,
        reference=deployment.reference,
        digest=deployment.digest,
        weights=deployment.weights,
        under_pins=settings.pins is not None,
    )
    _check_work(asked.round, request.batch_size, deployment, settings, share=needs_share)
    return asked


def check_validation(
    request: ValidateRequest, stored: StoredRound, settings: ServiceSettings
) -> None:
    """Refuse distances of another block or key (409), wrong lists or colliding seeds (422)."""
    fields: dict[str, Any] = {"state": "VALIDATING"}
    different_fields = [
        name
        for name in ("block_hash", "block_height")
        if getattr(request, name) != getattr(stored, name)
    ]
    if different_fields:
        raise Refusal(
            409,
            f"a proof with another {' and '.join(different_fields)} than the round's",
            wanted=f"block_hash {stored.block_hash!r} at height {stored.block_height}",
            do="send /init/validate for that block first",
            fields=fields | {"fields": different_fields},
        )
    if get_pipeline(stored.preset).output != "distance":
        raise Refusal(
            409,
            "distances for a round of vectors",
            wanted="a round that was begun with r_target",
            do="check vectors with /generate and its field validation",
            fields=fields,
        )
    pins = settings.pins
    if pins is not None and pins.nodes:
        names = pins.foreign(request.public_key, request.node_id, stored.node_count)
        # The request does not say the share.
        if request.node_id < 0 or stored.n_groups > 1:
            names = tuple(name for name in names if name == "public_key")
        _check_agreed(names, {**vars(request), "node_count": stored.node_count}, {})
    different = len(set(_limited(request.nonces, settings)))
    if not len(request.nonces) == len(request.dist) == different:
        raise Refusal(
            422,
            f"{len(request.nonces)} nonces, {different} different, {len(request.dist)} distances",
            wanted="one distance per nonce, every nonce once",
            do="send both lists in the same order",
        )
    foreign = [
        n
        for n in request.nonces
        if request.node_id >= 0 and (n - request.node_id) % stored.node_count
    ]
    if foreign and stored.node_count > 1:
        raise Refusal(
            422,
            f"nonce {foreign[0]} of node {request.node_id}",
            wanted=f"nonces of its share, which are equal to {request.node_id} modulo "
            f"{stored.node_count}",
            do="send the node_id that proved, to a round with the network's node_count",
        )
    check_distinct_seeds(replace(stored.round, public_key=request.public_key), request.nonces)


def check_job(request: GenerateRequest, deployment: Deployment, settings: ServiceSettings) -> None:
    """Refuse a job of other nonces (400), other parameters (409) or colliding seeds (422)."""
    _check_params(request.params, deployment, settings, chain=request.chain)
    check_url(request.url, allow_private=settings.allow_private_callbacks)
    round = request.round(deployment.reference)
    share = True if request.validation is None else None
    _check_work(round, request.batch_size, deployment, settings, share=share)
    nonces = sorted(_limited(request.nonces, settings))
    # The client of that chain may name a nonce twice, and nonces of any share.
    if request.chain:
        nonces = sorted(set(nonces))
        round = replace(round, node_id=0, node_count=1)
    round.check_nonces(nonces)
    if request.validation is not None:
        check_distinct_seeds(round, nonces)
        sent = [artifact.nonce for artifact in request.validation.artifacts]
        if sorted(set(sent) if request.chain else sent) != nonces:
            raise Refusal(
                400,
                "artifacts of other nonces than asked",
                wanted="one artifact per nonce",
                do="send both lists alike",
            )
        if get_pipeline(round.preset).output == "points" and any(
            not artifact.vector_b64 for artifact in request.validation.artifacts
        ):
            raise Refusal(
                400,
                "artifacts of a decode proof without k_points_steps",
                wanted="the points of every nonce, which the check follows",
                do="send what the node published",
            )


def _check_params(
    params: Params, deployment: Deployment, settings: ServiceSettings, *, chain: bool
) -> None:
    """Refuse with 409 a model, a length or a size that is not deployed. The chain of a client says
    how long its nonces are.
    """
    requested = params.model_dump(include={"model", "seq_len", "k_dim"})
    pipeline = get_pipeline(params.preset)
    if pipeline.steps and not deployment.decodes:
        raise Refusal(
            409,
            f"preset {pipeline.name} on an engine that does not decode proofs",
            wanted="a preset of one forward pass, such as artifact or hardened",
            do="prove it with `assay poc prove` or `assay poc serve`, which run the model on "
            "transformers",
            fields={"fields": ["preset"]},
        )
    aliases = (deployment.reference, *deployment.aliases, *settings.served_model_names)
    is_served = normal_form(params.model) in map(normal_form, aliases)
    deployed = {
        "model": params.model if is_served else deployment.reference,
        "seq_len": params.seq_len if chain else settings.seq_len,
        # No vector is published of a chain, and its client leaves the size at the default.
        "k_dim": pipeline.vector_size or params.k_dim,
    }
    different_fields = sorted(name for name, value in deployed.items() if requested[name] != value)
    if different_fields:
        raise Refusal(
            409,
            f"params mismatch: {', '.join(different_fields)}",
            wanted=", ".join(f"{name} {deployed[name]}" for name in different_fields),
            do="ask for what is deployed",
            fields={
                "error": "params mismatch",
                "requested": requested,
                "deployed": deployed,
                "fields": different_fields,
            },
        )


def _check_work(
    round: Round,
    batch_size: int,
    deployment: Deployment,
    settings: ServiceSettings,
    *,
    share: bool | None,
) -> None:
    """Refuse batches outside the bounds of the service (422), and rounds and batches outside the
    pins (409).
    """
    pipeline = get_pipeline(round.preset)
    if pipeline.framed and not deployment.framed:
        raise Refusal(
            409,
            f"preset {pipeline.name} on a service without a frame",
            wanted="the frame of its checkpoint",
            do="pin the file of `assay poc frame` in pins.toml, and start the service with --pins",
            fields={"fields": ["preset"]},
        )
    positions = round.seq_len + pipeline.steps
    if batch_size * positions > settings.max_positions or positions > deployment.max_positions:
        raise Refusal(
            422,
            f"batch_size {batch_size} × seq_len {positions}",
            wanted=f"at most {settings.max_positions} positions a batch, "
            f"{deployment.max_positions} a "
            f"sequence",
            do="lower batch_size or seq_len",
        )
    check_round(round, settings, share=share)
    builds = _builds(deployment, settings)
    if builds and not any(build.allows("batch_size", batch_size) for build in builds):
        agreed = sorted({size for build in builds for size in build.batch_size}, key=str)
        _check_agreed(("batch_size",), {"batch_size": batch_size}, {"batch_size": agreed})


def _limited(nonces: Sequence[int], settings: ServiceSettings) -> Sequence[int]:
    if len(nonces) > settings.max_nonces:
        raise Refusal(
            422,
            f"{len(nonces)} nonces",
            wanted=f"at most {settings.max_nonces} a request",
            do="split it",
        )
    return nonces


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
