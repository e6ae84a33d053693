"""The settings of a validator, beside those that it shares with a service."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from assay.poc.net.server_settings import Bytes, Count
from assay.settings import Flag, Names, Settings

Seconds = Annotated[float, "SECONDS", Field(gt=0, allow_inf_nan=False)]


class ValidatorSettings(Settings):
    """What a validator accepts, how much it recomputes, and how long it keeps what it received.

    Raises:
        UsageError: A value is of another type or out of range, or a setting has an unknown name.
    """

    pins: Annotated[
        Path, Flag(variable="ASSAY_PINS", reads="assay.poc.protocol.pins_file:NetworkPins.load")
    ] = Field(description="What the network agreed on; other settings must agree with it.")
    nodes: Path | None = Field(
        None,
        description="File with the secrets, builds and addresses of nodes; docs/validator.md "
        "describes it.",
    )
    nonces_per_hour: Count = Field(
        3600, description="Nonces that are recomputed in an hour, of all nodes together."
    )
    sample: Count = Field(8, description="Nonces that are drawn from one message at a time.")
    controls: Names = Field(
        (),
        description="Number formats in which every nonce is computed again, where the calibration "
        "measured them.",
    )
    batch_size: Count = Field(32, description="Nonces per forward pass.")
    minimum_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the nonces that is spread over all nodes, decided or not.",
    )
    epoch: Seconds = Field(
        86_400.0,
        description="Time for which one secret draws the samples. It is published when that time "
        "has passed.",
    )
    positions: Count = Field(
        2**22,
        description="Positions of a share that messages may name; farther nonces are refused "
        "with 32-bit seeds.",
    )
    open_blocks: Count = Field(
        16, description="Latest announced blocks of which messages are accepted."
    )
    max_proof: Bytes = Field(2**24, description="Largest proof in bytes.")
    max_unwritten: Count = Field(
        4096, description="Messages that wait for the disk at the same time."
    )
    max_kept: Bytes = Field(
        2**32, description="Bytes of the messages of one node that are kept; more are refused."
    )
    keep: Seconds = Field(
        2 * 86_400.0, description="Time for which messages are kept; evidence is kept for ever."
    )
    poll_interval: Seconds = Field(
        5.0, description="Pause between two questions to a node that is polled."
    )
