"""The honest noise that a service judges by: as given, else as the network pinned it, else the stated default."""

from assay.errors import CalibrationError
from assay.poc.protocol import NetworkPins, Pipeline, Round
from assay.poc.service._settings import Settings
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
        self._given, self._pins = settings.calibration, settings.pins
        self._pinned: dict[str, list[Calibration]] = {}
        if self._given is None and self._pins is not None:
            for model in self._pins.models:
                self._pinned[model.digest] = [Calibration.load(path) for path in self._pins.calibrations(model)]

    def of(self, pipeline: Pipeline, dtype: str, digest: str, round: Round) -> Noise | None:
        """Return the noise of a preset; None where it is not known, and a wider law must not take its place.

        Args:
            pipeline: Preset.
            dtype: Number format of the deployed model.
            digest: SHA-256 of its checkpoint.
            round: Round whose block scales distances.
        """
        if self._given is not None:
            measured = noise_of_build([self._given], None, digest=digest, preset=pipeline.name, round=round)
            return measured or _default(pipeline, dtype)
        pinned = self._pinned.get(digest)
        if not pinned or self._pins is None:
            return _default(pipeline, dtype)
        return self._of_pinned(self._pins, pinned, pipeline, dtype, digest, round)

    def _of_pinned(
        self,
        pins: NetworkPins,
        pinned: list[Calibration],
        pipeline: Pipeline,
        dtype: str,
        digest: str,
        round: Round,
    ) -> Noise | None:
        """Return the noise of the first build in the number format that was measured."""
        builds = [build for build in pins.model(digest).builds if dtype in build.dtype]
        found = (noise_of_build(pinned, one, digest=digest, preset=pipeline.name, round=round) for one in builds)
        return next((noise for noise in found if noise is not None), None)


def _default(pipeline: Pipeline, dtype: str) -> Noise | None:
    try:
        return default_noise(pipeline.noise, dtype, dtype)
    except CalibrationError:
        return None
