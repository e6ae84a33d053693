"""The honest noise between the build of a node and this validator's engine, for callbacks that name no fingerprint."""

from collections import OrderedDict
from collections.abc import Sequence

from assay.errors import CalibrationError
from assay.poc.protocol.builds import Build
from assay.poc.protocol.round import Round
from assay.poc.service.deployment import Deployment
from assay.poc.validator.registry import Registry
from assay.poc.verdict.calibration import Calibration, noise_of_build
from assay.poc.verdict.noise import Noise, default_noise

KEPT = 256  # noises of builds and blocks


class Noises:
    """Finds the noise of a build: measured, where a calibration was given or pinned, else the stated default.

    Args:
        given: Calibration of the command line, which takes the place of those of the pins.
        registry: Pins with their calibrations.
        deployment: Model that recomputes.

    Raises:
        CalibrationError: A build of the pins has no noise: a wider law must not take its place.
        DataError: A pinned file cannot be read, or is another one.
    """

    def __init__(self, given: Calibration | None, registry: Registry, deployment: Deployment) -> None:
        self._registry, self._deployment = registry, deployment
        self._measured: Sequence[Calibration] = (
            (given,)
            if given is not None
            else [Calibration.load(path) for path in registry.network.calibrations(registry.model)]
        )
        self._kept: OrderedDict[tuple[str, str], Noise] = OrderedDict()
        for build in registry.model.builds:
            self._find(build, None)

    def of(self, build: Build, round: Round) -> Noise:
        """Return the noise of a node's residuals in a round."""
        key = (build.model_dump_json(), round.block_hash)
        if key not in self._kept:
            self._kept[key] = self._find(build, round)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _find(self, build: Build, round: Round | None) -> Noise:
        registry = self._registry
        if len(build.dtype) > 1:
            raise CalibrationError(
                f"the build {build.name!r} of {' and '.join(build.dtype)}",
                wanted="one number format for each build: callbacks do not say in which they were computed",
                do="list the build once for each format, and name it for each node",
            )
        if not self._measured:
            return default_noise(registry.pipeline.noise, build.dtype[0], self._deployment.dtype)
        wanted = {"digest": registry.model.digest, "preset": registry.pipeline.name}
        noise = noise_of_build(self._measured, build, **wanted, round=round)
        if noise is not None:
            return noise
        raise CalibrationError(
            f"no calibration of the build {build.name!r} with preset {registry.pipeline.name}",
            wanted="one of this model, preset and build",
            do="measure it with `assay poc calibrate`, and pin the file or pass --calibration",
        )
