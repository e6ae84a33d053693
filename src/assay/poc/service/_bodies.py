"""The bodies of requests, field for field as published, with bounds.

The defaults are those of the library: sign flips on, hooks between the layers off.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag

from assay.poc.protocol import MAX_NONCE

Name = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048, pattern=r"^[\x21-\x7e]+$")]
Nonce = Annotated[int, Field(strict=True, ge=0, le=MAX_NONCE)]
Count = Annotated[int, Field(ge=1, le=MAX_NONCE)]
Probability = Annotated[float, Field(gt=0, lt=1)]


def _distance(value: Any) -> Any:
    """Read anything but a finite number as NaN: it counts as a mismatch, and no request escapes its verdict by it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    return math.nan if value is None else value


Distance = Annotated[float, BeforeValidator(_distance)]


class _Body(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class InitRequest(_Body):
    """Begin a round of distances: ``/init``, ``/init/generate``, ``/init/validate``."""

    block_hash: Name
    block_height: Annotated[int, Field(ge=0, le=MAX_NONCE)]
    public_key: Name
    r_target: Annotated[float, Field(gt=0, le=2)]
    fraud_threshold: Probability = 0.01
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)] = -1
    node_count: Annotated[int, Field(ge=-1, le=MAX_NONCE)] = -1
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    seq_len: Annotated[int, Field(ge=1, le=2**20)] = 256
    callback_url: Url | None = None
    use_layer_hooks: bool = False
    use_sign_flips: bool = True
    group_id: Annotated[int, Field(ge=0, le=MAX_NONCE)] = 0
    n_groups: Count = 1
    poc_stronger_rng: bool = False


class Params(_Body):
    """Parameters that the network agreed on; another model or length is refused. ``preset`` is an addition of assay."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    model: Name
    seq_len: Annotated[int, Field(ge=1, le=2**20)]
    k_dim: Annotated[int, Field(ge=1, le=2**20)] = 12
    preset: Literal["artifact", "hardened"] = "artifact"


class ArtifactInit(_Body):
    """Begin a round of vectors: ``/init/generate`` with ``params``."""

    block_hash: Name
    block_height: Annotated[int, Field(ge=0, le=MAX_NONCE)]
    public_key: Name
    node_id: Annotated[int, Field(ge=0, le=MAX_NONCE)]
    node_count: Count
    group_id: Annotated[int, Field(ge=0, le=MAX_NONCE)] = 0
    n_groups: Count = 1
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    params: Params
    url: Url | None = None
    poc_stronger_rng: bool = False


def _form(body: Any) -> str:
    """Tell the two published forms of ``/init/generate`` apart, so that errors refer to the form that was meant."""
    return "vectors" if isinstance(body, dict) and "params" in body else "distances"


AnyInit = Annotated[
    Annotated[ArtifactInit, Tag("vectors")] | Annotated[InitRequest, Tag("distances")], Discriminator(_form)
]


class ValidateRequest(_Body):
    """Distances that a prover published, to be recomputed. ``dist`` may hold null in place of a number."""

    model_config = ConfigDict(allow_inf_nan=True, strict=True)

    public_key: Name
    block_hash: Name
    block_height: Annotated[int, Field(ge=0, le=MAX_NONCE)]
    nonces: list[Nonce]
    dist: list[Distance]
    node_id: Annotated[int, Field(ge=-1, le=MAX_NONCE)]


class Artifact(_Body):
    """A published vector. Text that does not decode to one counts as a mismatch."""

    nonce: Nonce
    vector_b64: Annotated[str, StringConstraints(max_length=65_536)]


class Validation(_Body):
    """The vectors to compare with recomputed ones."""

    artifacts: list[Artifact]


class StatTest(_Body):
    """The published count test on vectors."""

    dist_threshold: Annotated[float, Field(ge=0, le=2)] = 0.02
    p_mismatch: Probability = 0.001
    fraud_threshold: Probability = 0.01


class GenerateRequest(_Body):
    """An artifact job: compute vectors, or check them where ``validation`` is given."""

    block_hash: Name
    block_height: Annotated[int, Field(ge=0, le=MAX_NONCE)]
    public_key: Name
    node_id: Annotated[int, Field(ge=0, le=MAX_NONCE)]
    node_count: Count
    nonces: Annotated[list[Nonce], Field(min_length=1)]
    params: Params
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    wait: bool = False
    url: Url | None = None
    validation: Validation | None = None
    stat_test: StatTest | None = None
    poc_stronger_rng: bool = False
