"""Checks before any work is done: of limits and parameters, and of what the network agreed on (``--pins``)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from assay.errors import UsageError
from assay.poc.net.deployment import Deployment
from assay.poc.net.guard import check_url
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.builds import Build, describe_build, nearest_build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import Fingerprint, check_distinct_seeds
from assay.poc.protocol.round import Round
from assay.poc.service.bodies import ArtifactInit, GenerateRequest, InitRequest, Params, ValidateRequest
from assay.poc.service.jobs import job_round
from assay.poc.service.rounds import RoundValues, State, StoredRound
from assay.poc.service.settings import Settings

MISMATCH = "pins mismatch"


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
    """Refuse a round that the network did not agree on.

    Args:
        round: Round that is asked for, or that is continued.
        settings: Settings that name the pins.
        share: Whether the round is generated, so that its key and share must be of a node where the pins list nodes. A
            validator's round has a key of its own.

    Raises:
        Refusal: 409; names all values that contradict.
    """
    pins = settings.pins
    if pins is None:
        return
    names = pins.differing(round)
    if share or not pins.nodes:
        names += pins.foreign(round.public_key, round.node_id, round.node_count)
    if names:
        agreed = {name: value for name in names if (value := getattr(pins.round, name, None)) is not None}
        raise _refusal(names, {name: getattr(round, name) for name in names}, agreed)


def check_prover(request: ValidateRequest, stored: StoredRound, settings: Settings) -> None:
    """Refuse distances of a key or a share that is of no node of the network.

    Raises:
        Refusal: 409; names the key or the share.
    """
    pins = settings.pins
    if pins is None or not pins.nodes:
        return
    names = pins.foreign(request.public_key, request.node_id, stored.node_count)
    if request.node_id < 0 or stored.n_groups > 1:  # the request does not say the share
        names = tuple(name for name in names if name == "public_key")
    if names:
        stated = {"public_key": request.public_key, "node_id": request.node_id, "node_count": stored.node_count}
        raise _refusal(names, {name: stated[name] for name in names}, {})


def check_batch(batch_size: int, deployment: Deployment, settings: Settings) -> None:
    """Refuse a batch size that no build of the deployed model allows.

    Raises:
        Refusal: 409.
    """
    builds = _builds(deployment, settings.pins)
    if builds and not any(build.allows("batch_size", batch_size) for build in builds):
        agreed = sorted({size for build in builds for size in build.batch_size}, key=str)
        raise _refusal(("batch_size",), {"batch_size": batch_size}, {"batch_size": agreed})


def check_build(fingerprint: Fingerprint, deployment: Deployment, settings: Settings) -> None:
    """Refuse an engine that is of no build that the network allows.

    Raises:
        Refusal: 409; names the fields of the fingerprint that differ from the nearest build.
    """
    build, names = nearest_build(_builds(deployment, settings.pins), fingerprint)
    if names:
        stated = {name: describe_build(fingerprint)[name] for name in names}
        raise _refusal(names, stated, {name: getattr(build, name) for name in names})


def _builds(deployment: Deployment, pins: NetworkPins | None) -> tuple[Build, ...]:
    return () if pins is None else pins.model(deployment.digest).builds


def _refusal(names: tuple[str, ...], requested: dict[str, Any], agreed: dict[str, Any]) -> Refusal:
    listed = {"public_key", "node_id", "node_count"}.intersection(names) - agreed.keys()
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in agreed.items()}
    wanted = [f"{name} {' or '.join(map(str, values)) or 'none'}" for name, values in lists.items()]
    wanted += ["a node of the network"] if listed else []
    return Refusal(
        409,
        f"{MISMATCH}: {', '.join(names)}",
        wanted=", ".join(wanted),
        do="ask for what the network agreed on, or start the service with the pins that hold now",
        fields={"error": MISMATCH, "requested": requested, "pinned": agreed, "fields": list(names)},
    )


PRESETS = {(False, True): "poc-2.0", (True, False): "layer-normalize"}
"""Preset by (use_layer_hooks, use_sign_flips)."""


def round_values(
    request: InitRequest | ArtifactInit, deployment: Deployment, settings: Settings, *, needs_share: bool
) -> RoundValues:
    """Return the round that a request asks for.

    Raises:
        UsageError: A field is out of range.
        Refusal: 400 without a share where one is needed, 409 for other parameters than deployed or agreed on.
    """
    node_id, node_count = request.node_id, request.node_count
    if isinstance(request, ArtifactInit):
        _check_params(request.params, deployment, settings)
        url, seq_len, preset = request.url, request.params.seq_len, str(request.params.preset)
        r_target, fraud_threshold = 2.0, 0.01
    else:
        url, seq_len, preset = request.callback_url, request.seq_len, _preset(request)
        r_target, fraud_threshold = request.r_target, request.fraud_threshold
        if -1 in (node_id, node_count):
            if needs_share:
                seen, wanted = "Node ID and node count must be set", "node_id and node_count"
                raise Refusal(400, seen, wanted=wanted, do="send 0 and 1 for one node")
            node_id, node_count = 0, 1
    _check_work(url, request.batch_size, seq_len + get_pipeline(preset).steps, deployment, settings)
    asked = RoundValues(
        block_hash=request.block_hash,
        public_key=request.public_key,
        block_height=request.block_height,
        node_id=node_id,
        node_count=node_count,
        group_id=request.group_id,
        n_groups=request.n_groups,
        preset=preset,
        seq_len=seq_len,
        batch_size=request.batch_size,
        r_target=r_target,
        strength=256 if request.poc_stronger_rng else 32,
        reference=deployment.reference,
        digest=deployment.digest,
        weights=deployment.weights,
        fraud_threshold=fraud_threshold,
        callback_url=url,
    )
    check_round(asked.round, settings, share=needs_share)  # an error says which field is out of range
    check_batch(request.batch_size, deployment, settings)
    return asked


def check_same_model(stored: StoredRound, deployment: Deployment, state: State) -> None:
    """Refuse to work on a round of another model than the deployed one.

    Raises:
        Refusal: 409; names both models, and the state of the service.
    """
    if (deployment.digest, deployment.weights) != (stored.digest, stored.weights):
        raise Refusal(
            409,
            f"a round of {stored.reference} ({stored.digest[:12]})",
            wanted=f"a round of {deployment.reference} ({deployment.digest[:12]}), which runs now",
            do="start the service with that model, or begin another round",
            fields={"state": str(state)},
        )


def check_validation(request: ValidateRequest, stored: StoredRound, settings: Settings) -> None:
    """Refuse distances that cannot be of this round.

    Raises:
        Refusal: 409 for another block, a round of vectors or a key that is of no node, 422 for lists that do not fit
            or nonces of another node.
        ProofMismatch: One forward pass would serve several of the nonces.
    """
    other = [name for name in ("block_hash", "block_height") if getattr(request, name) != getattr(stored, name)]
    if other:
        raise Refusal(
            409,
            f"a proof with another {' and '.join(other)} than the round's",
            wanted=f"block_hash {stored.block_hash!r} at height {stored.block_height}",
            do="send /init/validate for that block first",
            fields={"state": "VALIDATING", "fields": other},
        )
    if get_pipeline(stored.preset).output != "distance":
        raise Refusal(
            409,
            "distances for a round of vectors",
            wanted="a round that was begun with r_target",
            do="check vectors with /generate and its field validation",
            fields={"state": "VALIDATING"},
        )
    check_prover(request, stored, settings)
    different = len(set(_limited(request.nonces, settings)))
    if not len(request.nonces) == len(request.dist) == different:
        raise Refusal(
            422,
            f"{len(request.nonces)} nonces, {different} different, {len(request.dist)} distances",
            wanted="one distance per nonce, every nonce once",
            do="send both lists in the same order",
        )
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
    """Refuse an artifact job that cannot be done.

    Raises:
        UsageError: A field is out of range, or a nonce is repeated or belongs to another node.
        Refusal: 400 for artifacts of other nonces, 409 for other parameters than deployed or agreed on.
        ProofMismatch: One forward pass would serve several of the nonces whose artifacts are to be checked.
    """
    _check_params(request.params, deployment, settings)
    steps = get_pipeline(request.params.preset).steps
    _check_work(request.url, request.batch_size, request.params.seq_len + steps, deployment, settings)
    round = job_round(request, deployment.reference)
    check_round(round, settings, share=True)
    check_batch(request.batch_size, deployment, settings)
    round.check_nonces(sorted(_limited(request.nonces, settings)))
    if request.validation is not None:
        check_distinct_seeds(round, request.nonces)
        sent = [artifact.nonce for artifact in request.validation.artifacts]
        if sorted(sent) != sorted(request.nonces):
            seen = "artifacts of other nonces than asked"
            raise Refusal(400, seen, wanted="one artifact per nonce", do="send both lists alike")


def _check_params(params: Params, deployment: Deployment, settings: Settings) -> None:
    requested = params.model_dump(exclude={"preset"})
    pipeline = get_pipeline(params.preset)
    if pipeline.steps and not deployment.decodes:
        raise Refusal(
            409,
            f"preset {pipeline.name} on an engine that does not decode proofs",
            wanted="a preset of one forward pass, such as artifact or hardened",
            do="prove it with `assay poc prove` or `assay poc serve`, which run the model on transformers",
            fields={"fields": ["preset"]},
        )
    k_dim = pipeline.vector_size
    deployed = {"model": deployment.reference, "seq_len": settings.seq_len, "k_dim": k_dim}
    other = sorted(name for name, value in deployed.items() if requested[name] != value)
    if other:
        raise Refusal(
            409,
            "params mismatch: " + ", ".join(other),
            wanted=", ".join(f"{name} {deployed[name]}" for name in other),
            do="ask for what is deployed",
            fields={"error": "params mismatch", "requested": requested, "deployed": deployed, "fields": other},
        )


def _check_work(
    url: str | None,
    batch_size: int,
    positions: int,
    deployment: Deployment,
    settings: Settings,
) -> None:
    """Refuse a callback URL, or a shape, that is outside the bounds of the service."""
    if url is not None:
        check_url(url, allow_private=settings.allow_private_callbacks)
    if batch_size * positions > settings.max_positions or positions > deployment.max_positions:
        raise Refusal(
            422,
            f"batch_size {batch_size} × seq_len {positions}",
            wanted=f"at most {settings.max_positions} positions a batch, {deployment.max_positions} a sequence",
            do="lower batch_size or seq_len",
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
