"""The noise laws of the builds that a network pins."""

from functools import lru_cache

from assay.errors import CalibrationError
from assay.files.jsonl import JsonObject
from assay.poc.net.deployment import Deployment
from assay.poc.net.server_settings import ServerSettings
from assay.poc.protocol.pins import Build
from assay.poc.protocol.round import Round
from assay.poc.validator.registry import Registry
from assay.poc.verdict.calibration_file import Calibration, describe_promise, find_build_noise
from assay.poc.verdict.honest_noise import Noise, bundled_noise, missing_law
from assay.poc.verdict.sample_plan import LARGEST_SAMPLE, plan_sample

KEPT = 256  # noises of builds and blocks


class Noises:
    """Finds the noise of a build: as it was given or pinned, else that of a bundled model.

    Raises:
        CalibrationError: A build of the pins has several number formats.
        DataError: A pinned file cannot be read, or is another one.
    """

    def __init__(
        self,
        settings: ServerSettings,
        registry: Registry,
        deployment: Deployment,
        batch_size: int,
    ) -> None:
        self.registry = registry
        """Pins and nodes whose laws these are."""
        self._deployment = deployment
        chosen = settings.calibration
        # of the engine that recomputes, so that none is made for its description alone
        self._batch_size = batch_size
        pinned = registry.network.calibrations(registry.model)
        self._measured = [*map(Calibration.load, pinned)] if chosen is None else [chosen]
        self._found = lru_cache(KEPT)(self._find)
        self.laws = [self._law(build, settings) for build in registry.model.builds]
        """For every build the nonces that its law needs, and their power; or which command measures
        a law.
        """
        self.promise = describe_promise(registry.network, registry.alpha, self._measured)
        """False convictions that the network accepts, and that are expected."""

    def of(self, build: Build, round: Round | None = None) -> Noise | None:
        """Return the noise law of a node in a round; None where none was measured."""
        return self._found(build, None if round is None else round.block_hash)

    def _law(self, build: Build, settings: ServerSettings) -> JsonObject:
        noise = self.of(build)
        registry = self.registry
        if noise is None:
            return {
                "build": build.name,
                "missing": missing_law(
                    registry.model.reference,
                    registry.model.digest,
                    self._round("any"),
                    frame=registry.network.frame(registry.model.digest),
                ),
            }
        nonces, power = plan_sample(noise, LARGEST_SAMPLE, None, registry.alpha, settings.beta)
        return {"build": build.name, "missing": None, "nonces": nonces, "power": power}

    def _round(self, block_hash: str) -> Round:
        """Return a round of a block; whose it is does not matter to a law."""
        return Round(
            block_hash=block_hash,
            public_key="any",
            preset=self.registry.pipeline.name,
            seq_len=self.registry.network.round.seq_len,
        )

    def _find(self, build: Build, block_hash: str | None) -> Noise | None:
        registry = self.registry
        if len(build.dtype) > 1:
            raise CalibrationError(
                f"the build {build.name!r} of {' and '.join(build.dtype)}",
                wanted=(
                    "one number format for each build: callbacks do not say in which they were "
                    "computed"
                ),
                do="list the build once for each format, and name it for each node",
            )
        formats = build.dtype[0], self._deployment.dtype
        if not self._measured:
            return bundled_noise(registry.model.digest, registry.pipeline.noise, *formats)
        engine = self._deployment.engine(registry.network.round.seq_len, self._batch_size)
        return find_build_noise(
            self._measured,
            build,
            digest=registry.model.digest,
            preset=registry.pipeline.name,
            formats=formats,
            round=None if block_hash is None else self._round(block_hash),
            validator=engine.fingerprint,
            controls=[control.dtype for control in self._deployment.controls],
        )
