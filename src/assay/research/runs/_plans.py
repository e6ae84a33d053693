"""Settings and checks that the plans of all experiments share."""

from typing import Annotated

from pydantic import Field

from assay.errors import UsageError
from assay.settings import Device, Names, Settings

__all__ = ["BLOCKS", "Blocks", "ExperimentPlan", "check_lists"]

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
"""Blocks of the published tests."""

Blocks = Annotated[Names, Field(description="Block hashes, separated by commas.")]


class ExperimentPlan(Settings):
    """Settings of every experiment that runs models."""

    models: Names = Field(("reference:qwen3", "reference:llama"), description="Models, separated by commas.")
    seq_len: int = Field(256, ge=1, description="Input positions per nonce.")
    batch_size: int = Field(32, ge=1, description="Nonces per forward pass.")
    device: Device = None


def check_lists(plan: Settings, **least: int) -> None:
    """Refuse a plan whose lists are too short or name something twice.

    Args:
        plan: Plan that has a tuple under every name.
        least: Name of the tuple → the least number of entries.

    Raises:
        UsageError: A list is too short or repeats an entry; the message names the flag.
    """
    for name, count in least.items():
        values = getattr(plan, name)
        if len(values) < count or len(set(values)) < len(values):
            raise UsageError(
                f"{name} {values!r:.80}",
                wanted=f"{count} or more, each once",
                do=f"correct --{name.replace('_', '-')}",
            )
