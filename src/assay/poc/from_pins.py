"""What a pins file says to each of those who read it: to a node that proves, and to a validator that judges.

Values that are given beside the file, by options or a configuration file, must agree with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.errors import ProofMismatch, UsageError
from assay.models.load import Model
from assay.poc.engines.base import Engine
from assay.poc.opening import Proving
from assay.poc.protocol.builds import nearest_build, of_weights
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.pins_file import ModelPins, NetworkPins
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import Header
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration import Calibration, find_pinned_calibration


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a node is asked to prove.

    Args:
        round: Round of the node.
        nonces: Nonces of the proof.
        how: Model and engine.
        pins: What the network agreed on; None without a pins file.
    """

    round: Round
    nonces: range
    how: Proving
    pins: Pins | None

    def check_engine(self, model: Model, engine: Engine) -> None:
        """Refuse a checkpoint or a build that the network did not agree on, before anything is computed.

        Raises:
            ProofMismatch: Names the first value that differs.
        """
        if self.pins is None:
            return
        if (model.digest, model.weights) != (self.pins.digest, self.pins.weights):
            raise ProofMismatch(
                f"{model.reference} ({model.weights}, {model.digest[:12]})",
                wanted=f"the checkpoint of the pins ({self.pins.weights}, {(self.pins.digest or '')[:12]})",
                do="pass the model that the network agreed on",
                field="model",
            )
        build, odd = nearest_build(self.pins.builds or (), engine.fingerprint)
        if odd:
            raise ProofMismatch(
                f"an engine with {odd[0]} {getattr(engine.fingerprint, odd[0])!s:.60}",
                wanted=f"{odd[0]} {' or '.join(map(str, getattr(build, odd[0])))}, as the pins say",
                do="prove on a build that the network agreed on",
                field=odd[0],
            )


def asked(file: Path | None, how: Proving, given: Mapping[str, Any], positions: tuple[int, int] | None) -> Asked:
    """Return what a node is asked to prove, by a pins file and by what is given beside it.

    Args:
        file: Pins file of the network, if there is one.
        how: Model and engine. Without a model it is that of the file; ``preset`` and ``seq_len`` are not looked at.
        given: Values that are given for the round, and of ``dtype``, ``engine`` and ``batch_size`` those that are.
        positions: Positions in the share of the node; those of the file, else the first 256, when None.

    Raises:
        UsageError: A value is missing, out of range, or contradicts the file.
        DataError: The file cannot be read.
    """
    values = {name: value for name, value in given.items() if name in Round.__dataclass_fields__}
    if file is None:
        for name in ("model", "block_hash", "public_key"):
            if not (how.model if name == "model" else values.get(name)):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"no {flag}", wanted=f"a {name.replace('_', ' ')}", do=f"pass {flag}, or --pins")
        round, pins = Round(**values), None
        positions = positions or (0, 256)
        formats = get_pipeline(round.preset).number_formats
        how = replace(how, dtype=how.dtype or next(iter(formats), None))
    else:
        network = NetworkPins.load(file)
        entry = _model_of(network, how.model)
        pins = network.for_round(model=entry.digest, also=Pins(**values))
        if pins.block_hash is None or pins.public_key is None:
            flag = "--block-hash" if pins.block_hash is None else "--public-key"
            raise UsageError(f"no {flag} beside {file}", wanted="the value of this round", do=f"pass {flag}")
        known = {name: value for name in Round.__dataclass_fields__ if (value := getattr(pins, name)) is not None}
        round, positions = Round(**known), positions or network.round.nonces or (0, 256)
        how = _pinned_engine(replace(how, model=how.model or entry.reference), pins, given, file)
    nonces = round.nonces(*positions)
    if pins is not None:
        _check_nonces(pins, nonces, file)
    how = replace(how, preset=get_pipeline(round.preset).name, seq_len=round.seq_len)
    return Asked(round=replace(round, preset=how.preset), nonces=nonces, how=how, pins=pins)


def _model_of(network: NetworkPins, reference: str) -> ModelPins:
    """Return the model of the file that a reference means; of a directory only its digest can say it later."""
    if not reference or any(reference in (one.reference, one.digest) for one in network.models):
        return network.model(reference or None)
    return network.model()


def _pinned_engine(how: Proving, pins: Pins, given: Mapping[str, Any], file: Path | None) -> Proving:
    """Return an engine that is one of the builds, as far as that can be said before it is started."""
    builds = pins.builds or ()
    formats = list(dict.fromkeys(of_weights(dtype) for build in builds for dtype in build.dtype))
    allowed: dict[str, Sequence[Any]] = {
        "engine": [name for build in builds for name in build.engine],
        "batch_size": [size for build in builds for size in build.batch_size],
        "dtype": formats,
    }
    for name, wanted in allowed.items():
        value = getattr(how, name)
        if not wanted or "*" in wanted or value in wanted or (name, value) == ("batch_size", "auto"):
            continue
        if name in given:
            raise _beside(name, value, " or ".join(map(str, wanted)), file)
        how = replace(how, **{name: wanted[0]})
    return how


def _check_nonces(pins: Pins, nonces: range, file: Path | None) -> None:
    if pins.nonces is not None and list(pins.nonces) != list(nonces):
        raise _beside("nonces", f"{nonces[0]} to {nonces[-1]}", f"{pins.nonces[0]} to {pins.nonces[-1]}", file)
    if pins.nonces is None and pins.fewest_nonces is not None and len(nonces) < pins.fewest_nonces:
        raise _beside("nonces", f"{len(nonces)} in all", f"{pins.fewest_nonces} or more", file)


def _beside(name: str, value: object, wanted: str, file: Path | None) -> UsageError:
    return UsageError(
        f"--{name.replace('_', '-')} {value} beside {file}",
        wanted=f"{wanted}, as the network agreed there",
        do="leave it out, or correct one of the two",
        field=name,
    )


def expected(
    header: Header,
    file: Path | None,
    given: Pins,
    positions: tuple[int, int] | None = None,
    calibration: Path | None = None,
) -> tuple[Pins, Calibration | None]:
    """Return what a proof is held against, and the calibration that was measured with its build.

    Args:
        header: Header of the proof. The model that it states must be one of the file; the judge compares it with the
            one that is loaded.
        file: Pins file of the network.
        given: Further values, which must agree with the file.
        positions: Positions in the share of the node that the proof must hold.
        calibration: Calibration file; one of the pins when None.

    Raises:
        UsageError: A value contradicts the file, or the file needs another one.
        ProofMismatch: The header contradicts the values or the file.
        CalibrationError: No pinned calibration is of this proof, or a calibration cannot be used.
        DataError: A file cannot be read.
    """
    network = None if file is None else NetworkPins.load(file)
    pins = given if network is None else network.for_round(model=header.digest, also=given)
    if positions is not None:
        named = {"node_id": pins.node_id, "node_count": pins.node_count}
        share: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        nonces: Sequence[int] = Round(block_hash="any", public_key="any", **share).nonces(*positions)
        pins = pins.joined(Pins(nonces=nonces), str(file))
    if calibration is not None:
        return pins, Calibration.load(calibration)
    pins.check(header)
    return pins, None if network is None else find_pinned_calibration(network, header)


def pinned_format(pins: Path, model: str) -> str | None:
    """Return the number format of the weights that the pins name for a model; None where they name several."""
    network = NetworkPins.load(pins)
    builds = network.model(model if len(network.models) > 1 else None).builds
    formats = {of_weights(dtype) for build in builds for dtype in build.dtype}
    return formats.pop() if len(formats) == 1 else None
