"""Which of several calibrations is that of a proof, or of a build where there is no proof."""

from collections.abc import Iterable

from assay.errors import CalibrationError
from assay.poc.protocol import Build, Header, NetworkPins, Round
from assay.poc.verdict._calibration import Calibration
from assay.poc.verdict._noise import Noise


def noise_of_build(
    calibrations: Iterable[Calibration], build: Build | None, *, digest: str, preset: str, round: Round | None
) -> Noise | None:
    """Return the noise of a build with any validator, for messages that name no engine; None where none was measured.

    Args:
        calibrations: Calibrations, the first one first tried.
        build: Build that the network allows; any when None.
        digest: SHA-256 of the checkpoint.
        preset: Preset of the rounds.
        round: Round whose block scales distances; None for the law at the usual scale.
    """
    for measured in (one for calibration in calibrations for one in calibration.builds):
        if (measured.digest, measured.preset) == (digest, preset):
            allowed = [known for known in measured.known if build is None or not build.differing(known)]
            if allowed or not measured.known:
                return measured.between(allowed[0] if len(allowed) == 1 else None, None, round=round)
    return None


def pinned_calibration(network: NetworkPins, header: Header) -> Calibration | None:
    """Return the first calibration of the proof's model that was measured with its preset and build.

    Args:
        network: Pins whose files are read, each after its hash was compared.
        header: Header of the proof, which the pins allow.

    Returns:
        The calibration; None where the network pins none for this model, so that the stated default holds.

    Raises:
        CalibrationError: There are calibrations, and none is of this proof: a wider law must not take its place.
        DataError: A file cannot be read, or is another one than was pinned.
        UsageError: The model is not one of the network's.
    """
    reason = None
    for path in network.calibrations(network.model(header.digest)):
        calibration = Calibration.load(path)
        try:
            calibration.check(header)
        except CalibrationError as error:
            reason = error.with_traceback(None)
        else:
            return calibration
    if reason is not None:
        raise CalibrationError(
            f"no pinned calibration of this proof; the last has: {reason.seen}",
            wanted=reason.wanted,
            do="measure this build with `assay poc calibrate`, and pin the file; or pass --calibration",
        )
    return None
