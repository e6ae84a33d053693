"""Settings of the plugin, which has no command line of its own: the environment, under the names of the flags."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast, get_args

from assay.errors import UsageError
from assay.poc.engines.vllm import FlowSettings, Inputs

if TYPE_CHECKING:
    from assay.poc.service import Settings

__all__ = ["PluginSettings"]

FLOW = "ASSAY_VLLM_"
DRAIN = 2.0  # seconds; on SIGTERM vLLM ends its engine before the service, and the batch that runs never ends


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """What an operator set.

    Args:
        service: of the service; numbers under ``ASSAY_`` and the name of the field in capitals.
        flow: what nonces may take; under ``ASSAY_VLLM_`` and the name of the field.
        inputs: ``ASSAY_VLLM_INPUTS``, local or sent.
        reference: ``ASSAY_REFERENCE``, how requests call the model; the served name when None.
    """

    service: "Settings"
    flow: FlowSettings
    inputs: Inputs
    reference: str | None

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "PluginSettings":
        """Read the environment.

        Raises:
            UsageError: a value is none of its kind, or out of range.
            CalibrationError: ``ASSAY_CALIBRATION`` names no calibration file.
        """
        from assay.poc.service import Settings

        names = {name: Settings.environment_name(name) or "" for name in Settings.model_fields}
        values = {name: environment[key] for name, key in names.items() if key in environment}
        inputs = environment.get("ASSAY_VLLM_INPUTS", "local")
        if inputs not in get_args(Inputs):
            raise UsageError(f"ASSAY_VLLM_INPUTS={inputs}", wanted=" or ".join(get_args(Inputs)), do="leave it out")
        return cls(
            service=Settings(**({"drain": DRAIN} | values)),
            flow=FlowSettings(**_numbers(FlowSettings, FLOW, environment)),
            inputs=cast("Inputs", inputs),
            reference=environment.get("ASSAY_REFERENCE"),
        )


def _numbers(kind: type[Any], prefix: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a dataclass that the environment sets: numbers, switches and words."""
    read = {int: int, float: float, bool: _switch, "int": int, "float": float, "bool": _switch, "Mode": str}
    found: dict[str, Any] = {}
    for field in fields(kind):
        parse: Any = read.get(field.type, str if field.name == "mode" else None)
        text = environment.get(f"{prefix}{field.name.upper()}")
        if parse is None or text is None:
            continue
        try:
            found[field.name] = parse(text)
        except ValueError:
            name = f"{prefix}{field.name.upper()}"
            raise UsageError(
                f"{name}={text!r:.60}", wanted=f"a value such as {field.default}", do="correct it"
            ) from None
    return found


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true", "no", "yes"):
        raise ValueError(text)
    return text.lower() in ("1", "true", "yes")
