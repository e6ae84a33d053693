"""Which of the calibrations that a network pinned is that of a proof."""

from assay.errors import CalibrationError
from assay.poc.protocol import Header, NetworkPins
from assay.poc.verdict._calibration import Calibration


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
