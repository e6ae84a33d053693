"""All registered detectors, along axes of their own or of a given basis."""

from collections.abc import Collection

from assay.vhack.detectors.axes import replace_axes
from assay.vhack.detectors.detector import Detector, make_detector
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.names import DETECTORS


def make_detectors(
    names: Collection[str] = tuple(DETECTORS), *, basis: Basis | None = None
) -> list[Detector]:
    """Return detectors by their names, cheapest first.

    Args:
        names: Names in ``DETECTORS``.
        basis: Axes that take the place of the fitted ones; all detectors are returned then.

    Raises:
        UsageError: There is no detector of a name.
    """
    if unknown := set(names) - set(DETECTORS):
        make_detector(min(unknown))
    if basis is None:
        return [make_detector(name) for name in DETECTORS if name in names]
    return replace_axes([make_detector(name) for name in DETECTORS], basis)
