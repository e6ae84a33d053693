"""Settings of the plugin: those of the service, and what nonces may take of the engine, all from the environment."""

from dataclasses import fields
from typing import Any

from pydantic import Field

from assay.poc.engines.vllm import Inputs, Mode, ThrottleSettings
from assay.poc.service import Settings

DEFAULT = ThrottleSettings()


class PluginSettings(Settings):
    """The settings of ``assay poc serve`` under their names in the environment, and those of the vLLM engine.

    Raises:
        UsageError: A value is of another type or out of range.
        CalibrationError: ``ASSAY_CALIBRATION`` names a file that is not a calibration.
    """

    drain: float = Field(2.0, ge=0, allow_inf_nan=False, description="Time that a stopping server waits for its batch.")
    reference: str | None = Field(None, description="Name of the model in requests; the served name by default.")
    vllm_inputs: Inputs = Field("local", description="Where inputs are made: in the workers, or sent by the server.")
    vllm_mode: Mode = Field(DEFAULT.mode, description="Whether chat goes first, or a round has the engine to itself.")
    vllm_share: float = Field(DEFAULT.share, description="Part of the time that nonces may run while there is chat.")
    vllm_chat_in_flight: int = Field(DEFAULT.chat_in_flight, description="Nonces at once while there is chat.")
    vllm_in_flight: int = Field(DEFAULT.in_flight, description="Nonces at once without chat; 0 measures and adapts.")
    vllm_wait: float = Field(
        DEFAULT.wait, description="Time that the first chat request on an idle engine may wait for the nonces inside."
    )
    vllm_quiet: float = Field(
        DEFAULT.quiet, description="Time after the last chat request until the engine counts as idle."
    )
    vllm_drain: float = Field(DEFAULT.drain, description="Time that an exclusive round waits for running chat.")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        _ = self.throttle  # refuses what is out of range

    @property
    def throttle(self) -> ThrottleSettings:
        """What nonces may take of the engine."""
        return ThrottleSettings(**{field.name: getattr(self, f"vllm_{field.name}") for field in fields(DEFAULT)})
