"""Checks of a request against the deployed model, the pins and the bounds, before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from assay.errors import UsageError
from assay.files.names import normal_form
from assay.poc.net.callback_urls import check_url
from assay.poc.net.deployment import Deployment
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.distinct_seeds import check_distinct_seeds
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pins import Build, describe_build, nearest_build
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.round import Round
from assay.poc.service.request_bodies import (
    ArtifactInit,
    GenerateRequest,
    InitRequest,
    Params,
    ValidateRequest,
)
from assay.poc.service.rounds import RoundValues, StoredRound
from assay.poc.service.service_settings import ServiceSettings

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
