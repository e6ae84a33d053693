"""What the network agreed on (``--pins``): the deployed model, rounds, nodes and builds are held against the file."""

from typing import Any

from assay.errors import UsageError
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.builds import Build, described, nearest_build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import Fingerprint
from assay.poc.protocol.round import Round
from assay.poc.service.bodies import ValidateRequest
from assay.poc.service.deployment import Deployment
from assay.poc.service.rounds import StoredRound
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
        stated = {name: described(fingerprint)[name] for name in names}
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
