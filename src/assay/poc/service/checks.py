"""Checks before any work is done: of limits and parameters, and of what the network agreed on (``--pins``)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from assay.errors import UsageError
from assay.poc.net.deployment import Deployment
from assay.poc.net.guard import check_url
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.pins import Build, describe_build, nearest_build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.proof import Fingerprint, check_distinct_seeds
from assay.poc.protocol.round import Round
from assay.poc.service.bodies import ArtifactInit, GenerateRequest, InitRequest, Params, ValidateRequest
from assay.poc.service.rounds import RoundValues, StoredRound
from assay.poc.service.settings import Settings

MISMATCH = "pins mismatch"
PRESETS = {(False, True): "poc-2.0", (True, False): "layer-normalize"}
"""Preset by (use_layer_hooks, use_sign_flips)."""


def check_deployed(deployment: Deployment, settings: Settings) -> None:
    """Refuse a deployed model that the network did not agree on.

    Raises:
        UsageError: The checkpoint, its weights or its number format is not pinned, or rounds of vectors would have
            another length; names it.
    """
    pins = settings.pins
    if pins is None:
        return
    pinned = pins.model(deployment.digest)
    formats = sorted({dtype for build in pinned.builds for dtype in build.dtype})
    length = settings.seq_len if get_pipeline(pins.round.preset).output != "distance" else pins.round.seq_len
    for name, flag, deployed, agreed in (
        ("weights", "--model", deployment.weights, [pinned.weights]),
        ("dtype", "--dtype", deployment.dtype, formats),
        ("seq_len", "--seq-len", length, [pins.round.seq_len]),
    ):
        if deployed not in agreed:
            wanted = " or ".join(map(str, agreed))
            raise UsageError(
                f"a service with {name} {deployed}, which its pins do not allow",
                wanted=f"{name} {wanted}",
                do=f"start it with {flag}, or with the pins of this network",
            )


def check_round(round: Round, settings: Settings, *, share: bool) -> None:
    """Refuse with 409 a round that the network did not agree on; names all values that contradict.

    ``share`` says that the round is generated, so that its key and share must be of a node where the pins list nodes. A
    validator's round has a key of its own.
    """
    pins = settings.pins
    if pins is not None:
        names = pins.differing(round)
        if share or not pins.nodes:
            names += pins.foreign(round.public_key, round.node_id, round.node_count)
        _check_agreed(names, vars(round), vars(pins.round))


def check_build(fingerprint: Fingerprint, deployment: Deployment, settings: Settings) -> None:
    """Refuse with 409 an engine that is of no build that the network allows; names what the nearest one has else."""
    build, names = nearest_build(_builds(deployment, settings.pins), fingerprint)
    _check_agreed(names, describe_build(fingerprint), vars(build) if build is not None else {})


def _check_batch(batch_size: int, deployment: Deployment, settings: Settings) -> None:
    builds = _builds(deployment, settings.pins)
    if builds and not any(build.allows("batch_size", batch_size) for build in builds):
        agreed = sorted({size for build in builds for size in build.batch_size}, key=str)
        _check_agreed(("batch_size",), {"batch_size": batch_size}, {"batch_size": agreed})


def _builds(deployment: Deployment, pins: NetworkPins | None) -> tuple[Build, ...]:
    return () if pins is None else pins.model(deployment.digest).builds


def _check_agreed(names: tuple[str, ...], stated: Mapping[str, Any], agreed: Mapping[str, Any]) -> None:
    """Refuse stated values that contradict the pins, by their names; ``agreed`` has what the pins say of them."""
    if not names:
        return
    pinned = {name: agreed[name] for name in names if agreed.get(name) is not None}
    listed = {"public_key", "node_id", "node_count"}.intersection(names) - pinned.keys()
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in pinned.items()}
    wanted = [f"{name} {' or '.join(map(str, values)) or 'none'}" for name, values in lists.items()]
    requested = {name: stated[name] for name in names}
    raise Refusal(
        409,
        f"{MISMATCH}: {', '.join(names)}",
        wanted=", ".join(wanted + ["a node of the network"] * bool(listed)),
        do="ask for what the network agreed on, or start the service with the pins that hold now",
        fields={"error": MISMATCH, "requested": requested, "pinned": pinned, "fields": list(names)},
    )


def round_values(
    request: InitRequest | ArtifactInit, deployment: Deployment, settings: Settings, *, needs_share: bool
) -> RoundValues:
    """Return the round that a request asks for; refuse one without a needed share (400), and other parameters than
    deployed or agreed on (409).
    """
    share: dict[str, Any] = {"node_id": request.node_id, "node_count": request.node_count}
    if isinstance(request, ArtifactInit):
        _check_params(request.params, deployment, settings)
        own: dict[str, Any] = {"r_target": 2.0, "fraud_threshold": 0.01, "callback_url": request.url}
        own |= {"seq_len": request.params.seq_len, "preset": str(request.params.preset)}
    else:
        own = {name: getattr(request, name) for name in ("r_target", "fraud_threshold", "callback_url", "seq_len")}
        own["preset"] = _preset(request)
        if -1 in share.values():
            if needs_share:
                seen, wanted = "Node ID and node count must be set", "node_id and node_count"
                raise Refusal(400, seen, wanted=wanted, do="send 0 and 1 for one node")
            share = {"node_id": 0, "node_count": 1}
    positions = own["seq_len"] + get_pipeline(own["preset"]).steps
    _check_work(own["callback_url"], request.batch_size, positions, deployment, settings)
    same = ("block_hash", "public_key", "block_height", "group_id", "n_groups", "batch_size")
    asked = RoundValues(
        **{name: getattr(request, name) for name in same},
        **share,
        **own,
        strength=256 if request.poc_stronger_rng else 32,
        reference=deployment.reference,
        digest=deployment.digest,
        weights=deployment.weights,
    )
    check_round(asked.round, settings, share=needs_share)  # an error says which field is out of range
    _check_batch(request.batch_size, deployment, settings)
    return asked


def check_validation(request: ValidateRequest, stored: StoredRound, settings: Settings) -> None:
    """Refuse distances that cannot be of this round: of another block, of vectors or of a key of no node (409), lists
    that do not fit or nonces of another node (422), and nonces of which one forward pass would serve several.
    """
    fields: dict[str, Any] = {"state": "VALIDATING"}
    other = [name for name in ("block_hash", "block_height") if getattr(request, name) != getattr(stored, name)]
    if other:
        seen = f"a proof with another {' and '.join(other)} than the round's"
        wanted = f"block_hash {stored.block_hash!r} at height {stored.block_height}"
        do = "send /init/validate for that block first"
        raise Refusal(409, seen, wanted=wanted, do=do, fields=fields | {"fields": other})
    if get_pipeline(stored.preset).output != "distance":
        wanted, do = "a round that was begun with r_target", "check vectors with /generate and its field validation"
        raise Refusal(409, "distances for a round of vectors", wanted=wanted, do=do, fields=fields)
    pins = settings.pins
    if pins is not None and pins.nodes:
        names = pins.foreign(request.public_key, request.node_id, stored.node_count)
        if request.node_id < 0 or stored.n_groups > 1:  # the request does not say the share
            names = tuple(name for name in names if name == "public_key")
        _check_agreed(names, {**vars(request), "node_count": stored.node_count}, {})
    different = len(set(_limited(request.nonces, settings)))
    if not len(request.nonces) == len(request.dist) == different:
        seen = f"{len(request.nonces)} nonces, {different} different, {len(request.dist)} distances"
        wanted, do = "one distance per nonce, every nonce once", "send both lists in the same order"
        raise Refusal(422, seen, wanted=wanted, do=do)
    foreign = [n for n in request.nonces if request.node_id >= 0 and n % stored.node_count != request.node_id]
    if foreign and stored.node_count > 1:
        raise Refusal(
            422,
            f"nonce {foreign[0]} of node {request.node_id}",
            wanted=f"nonces of its share: every one leaves {request.node_id} when divided by {stored.node_count}",
            do="send the node_id that proved, to a round with the network's node_count",
        )
    check_distinct_seeds(replace(stored.round, public_key=request.public_key), request.nonces)


def check_job(request: GenerateRequest, deployment: Deployment, settings: Settings) -> None:
    """Refuse an artifact job that cannot be done: artifacts of other nonces (400), other parameters than deployed or
    agreed on (409), and nonces that one forward pass would serve where artifacts are to be checked.
    """
    _check_params(request.params, deployment, settings)
    positions = request.params.seq_len + get_pipeline(request.params.preset).steps
    _check_work(request.url, request.batch_size, positions, deployment, settings)
    round = request.round(deployment.reference)
    check_round(round, settings, share=True)
    _check_batch(request.batch_size, deployment, settings)
    round.check_nonces(sorted(_limited(request.nonces, settings)))
    if request.validation is not None:
        check_distinct_seeds(round, request.nonces)
        sent = [artifact.nonce for artifact in request.validation.artifacts]
        if sorted(sent) != sorted(request.nonces):
            seen = "artifacts of other nonces than asked"
            raise Refusal(400, seen, wanted="one artifact per nonce", do="send both lists alike")


def _check_params(params: Params, deployment: Deployment, settings: Settings) -> None:
    requested, pipeline = params.model_dump(exclude={"preset"}), get_pipeline(params.preset)
    if pipeline.steps and not deployment.decodes:
        raise Refusal(
            409,
            f"preset {pipeline.name} on an engine that does not decode proofs",
            wanted="a preset of one forward pass, such as artifact or hardened",
            do="prove it with `assay poc prove` or `assay poc serve`, which run the model on transformers",
            fields={"fields": ["preset"]},
        )
    deployed = {"model": deployment.reference, "seq_len": settings.seq_len, "k_dim": pipeline.vector_size}
    other = sorted(name for name, value in deployed.items() if requested[name] != value)
    if other:
        seen, wanted = "params mismatch: " + ", ".join(other), ", ".join(f"{name} {deployed[name]}" for name in other)
        fields = {"error": "params mismatch", "requested": requested, "deployed": deployed, "fields": other}
        raise Refusal(409, seen, wanted=wanted, do="ask for what is deployed", fields=fields)


def _check_work(url: str | None, batch_size: int, positions: int, deployment: Deployment, settings: Settings) -> None:
    """Refuse a callback URL, or a shape, that is outside the bounds of the service."""
    if url is not None:
        check_url(url, allow_private=settings.allow_private_callbacks)
    if batch_size * positions > settings.max_positions or positions > deployment.max_positions:
        wanted = f"at most {settings.max_positions} positions a batch, {deployment.max_positions} a sequence"
        raise Refusal(
            422, f"batch_size {batch_size} × seq_len {positions}", wanted=wanted, do="lower batch_size or seq_len"
        )


def _limited(nonces: Sequence[int], settings: Settings) -> Sequence[int]:
    if len(nonces) > settings.max_nonces:
        raise Refusal(422, f"{len(nonces)} nonces", wanted=f"at most {settings.max_nonces} a request", do="split it")
    return nonces


def _preset(request: InitRequest) -> str:
    preset = PRESETS.get((request.use_layer_hooks, request.use_sign_flips))
    if preset is None:
        raise UsageError(
            f"use_layer_hooks {request.use_layer_hooks} with use_sign_flips {request.use_sign_flips}",
            wanted="exactly one of the two",
            do="leave both out: sign flips are the recommendation",
        )
    return preset
