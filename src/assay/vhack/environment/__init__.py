"""Where model-written programs run: a sandbox, and the loopholes ("channels") that a grader may leave open."""

from assay.vhack.environment._channels import CHANNELS, Channel, stubbed
from assay.vhack.environment._types import Call, Limits, Outcome, Result
from assay.vhack.environment.sandbox import available_backend, run

__all__ = ["CHANNELS", "Call", "Channel", "Limits", "Outcome", "Result", "available_backend", "run", "stubbed"]
