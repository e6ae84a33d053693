"""Checks of a request before any work is done: limits, parameters, and the round that it asks for."""

from collections.abc import Sequence
from dataclasses import replace

from assay.errors import UsageError
from assay.poc.net.guard import check_url
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import check_distinct_seeds
from assay.poc.service.agreed import check_batch, check_prover, check_round
from assay.poc.service.bodies import ArtifactInit, GenerateRequest, InitRequest, Params, ValidateRequest
from assay.poc.service.deployment import Deployment
from assay.poc.service.jobs import job_round
from assay.poc.service.rounds import RoundValues, StoredRound
from assay.poc.service.settings import Settings
from assay.poc.service.states import State

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
