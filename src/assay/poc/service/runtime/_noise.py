"""The honest noise that a service judges by: as given, else as the network pinned it, else the stated default."""

from assay.errors import CalibrationError
from assay.poc.protocol import Build, Pipeline, Round
from assay.poc.service._settings import Settings
from assay.poc.service.runtime._deployment import Deployment
from assay.poc.verdict import Calibration, Noise, default_noise, noise_of_build


class HonestNoise:
    """Finds the noise between nodes and this service.

    Args:
        settings: Settings that may name a calibration, and pins that may name others.

    Raises:
        CalibrationError: A pinned file is not a calibration.
        DataError: A pinned file cannot be read, or is another one than was pinned.
    """

    def __init__(self, settings: Settings) -> None:
        self._given, pins = settings.calibration, settings.pins
        self._pinned: dict[str, tuple[tuple[Build, ...], list[Calibration]]] = {}
        if self._given is None and pins is not None:
            for model in pins.models:
                measured = [Calibration.load(path) for path in pins.calibrations(model)]
                self._pinned[model.digest] = model.builds, measured

    def of(self, pipeline: Pipeline, dtype: str, digest: str, round: Round) -> Noise | None:
        """Return the noise of a preset; None where it is not known, and a wider law must not take its place.

        Args:
            pipeline: Preset.
            dtype: Number format of the deployed model.
            digest: SHA-256 of its checkpoint.
            round: Round whose block scales distances.
        """
        if self._given is not None:
            mine = [one for one in self._given.builds if (one.digest, one.preset) == (digest, pipeline.name)]
            if not mine:
                return _default(pipeline, dtype)
            fitting = (one for one in mine if not one.known or dtype in {known.dtype for known in one.known})
            measured = [Calibration(builds=(one,)) for one in fitting]
            return noise_of_build(measured, None, digest=digest, preset=pipeline.name, round=round)
        builds, pinned = self._pinned.get(digest, ((), []))
        if not pinned:
            return _default(pipeline, dtype)
        alike = (build for build in builds if dtype in build.dtype)
        found = (noise_of_build(pinned, build, digest=digest, preset=pipeline.name, round=round) for build in alike)
        return next((noise for noise in found if noise is not None), None)  # of the first build that was measured


def check_calibration(calibration: Calibration | None, deployment: Deployment) -> None:
    """Refuse a calibration that was measured on another model than is deployed.

    Raises:
        CalibrationError: The noise of another model would be too wide or too narrow for this one.
    """
    if calibration is not None and deployment.digest not in calibration.digests:
        measured = ", ".join(digest[:12] for digest in calibration.digests if digest) or "that it does not name"
        raise CalibrationError(
            f"a calibration of a checkpoint {measured}",
            wanted=f"one of {deployment.reference} ({deployment.digest[:12]})",
            do="measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out",
        )


def _default(pipeline: Pipeline, dtype: str) -> Noise | None:
    try:
        return default_noise(pipeline.noise, dtype, dtype)
    except CalibrationError:
        return None
