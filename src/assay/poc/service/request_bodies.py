"""Request bodies, field for field as published.

The defaults are those of the library: sign flips on, hooks between the layers off.
"""

import math
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
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.protocol.pipelines import find_pipeline, get_pipeline
from assay.poc.protocol.records import Record, pack_points, packed_size, unpack_or_nan
from assay.poc.protocol.round import Round

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
# Presets of jobs, which publish bytes.
PRESET_PATTERN = (
    "^(artifact|tokens-1|hardened|decode(-[1-9][0-9]{1,3})?|chain-decode(-[1-9][0-9]{0,3})?)$"
)
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
    nonces: Annotated[list[Nonce], Field(fail_fast=True)]
    dist: Annotated[list[Distance], Field(fail_fast=True)]
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)]


class Artifact(BaseModel):
    """A published vector, or the points of a chain; malformed ones count as mismatches."""

    nonce: Nonce
    vector_b64: Annotated[str, StringConstraints(max_length=65_536)] = ""
    k_points_steps: Annotated[list[int], Field(fail_fast=True, max_length=MOST_POINTS)] | None = (
        None
    )

    @model_validator(mode="after")
    def _pack(self) -> "Artifact":
        """Make one text of either field; a number that is no byte becomes one that is no point.

        The numbers themselves are not kept: each may have thousands of digits.
        """
        if self.k_points_steps is not None:
            self.vector_b64 = pack_points(self.k_points_steps)
            self.k_points_steps = None
        elif "vector_b64" not in self.model_fields_set:
            raise ValueError("neither vector_b64 nor k_points_steps")
        return self


class Validation(BaseModel):
    """The vectors to compare with recomputed ones."""

    artifacts: Annotated[list[Artifact], Field(fail_fast=True)]


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

    nonces: Annotated[list[Nonce], Field(fail_fast=True, min_length=1)]
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
