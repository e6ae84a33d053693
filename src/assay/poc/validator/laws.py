"""The noise laws of the builds that a network pins."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from assay.errors import CalibrationError
from assay.files.jsonl import JsonObject
from assay.poc.net.server_settings import ServerSettings
from assay.poc.protocol.pins import Build
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration_file import Calibration, describe_promise, find_build_noise
from assay.poc.verdict.honest_noise import Noise, bundled_noise, missing_law
from assay.poc.verdict.sample_plan import LARGEST_SAMPLE, plan_sample

if TYPE_CHECKING:
    from assay.poc.net.deployment import Deployment
from assay.poc.validator.registry import Registry

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
        deployment: "Deployment",
        batch_size: int,
    ) -> None:
        self._registry = registry
        self._deployment = deployment
        chosen = settings.calibration
        # of the engine that recomputes, so that none is made for its description alone
        self._batch_size = batch_size
        pinned = registry.network.calibrations(registry.model) if chosen is None else ()
        self._measured = [Calibration.load(path) for path in pinned] if chosen is None else [chosen]
        self._kept: OrderedDict[tuple[str, str], Noise | None] = OrderedDict()
        self.laws = [self._law(build, settings) for build in registry.model.builds]
        """For every build the nonces that its law needs, and their power; or which command measures
        a law.
        """
        self.promise = describe_promise(registry.network, registry.alpha, self._measured)
        """False convictions that the network accepts, and that are expected."""

    def of(self, build: Build, round: Round | None = None) -> Noise | None:
        """Return the noise law of a node in a round; None where none was measured."""
        key = (build.model_dump_json(), "" if round is None else round.block_hash)
        if key not in self._kept:
            self._kept[key] = self._find(build, round)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _law(self, build: Build, settings: ServerSettings) -> JsonObject:
        noise = self.of(build)
        registry = self._registry
        if noise is None:
            round = Round(
                block_hash="any",
                public_key="any",
                preset=registry.pipeline.name,
                seq_len=registry.network.round.seq_len,
            )
            return {
                "build": build.name,
                "missing": missing_law(
                    registry.model.reference,
                    registry.model.digest,
                    round,
                    frame=registry.network.frame(registry.model.digest),
                ),
            }
        nonces, power = plan_sample(noise, LARGEST_SAMPLE, None, registry.alpha, settings.beta)
        return {"build": build.name, "missing": None, "nonces": nonces, "power": power}

    def _find(self, build: Build, round: Round | None) -> Noise | None:
        registry = self._registry
        preset = self._registry.pipeline.name
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
        of: dict[str, Any] = {"digest": registry.model.digest, "preset": preset}
        of |= {"controls": [control.dtype for control in self._deployment.controls]}
        seq_len = (registry.network.round if round is None else round).seq_len
        of["validator"] = self._deployment.engine(seq_len, self._batch_size).fingerprint
        return find_build_noise(self._measured, build, **of, formats=formats, round=round)
