"""The settings of the service: those of every server, and its own."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from assay.poc.net.server_settings import Count, Seconds, ServerSettings, Words, loaded_by
from assay.settings import Flag

if TYPE_CHECKING:
    from assay.poc.protocol.pins_file import NetworkPins
else:
    NetworkPins = Any


_read_pins = BeforeValidator(partial(loaded_by, "assay.poc.protocol.pins_file", "NetworkPins"))


class ServiceSettings(ServerSettings):
    """How the service runs. Times are in seconds, sizes in bytes.

    Raises:
        UsageError: A value is of another type or out of range, or a setting has an unknown name.
        CalibrationError: ``calibration`` names a file that is not a calibration.
        DataError: ``pins`` names a file that is no pins file.
    """

    seq_len: Count = Field(
        256,
        description="Positions per nonce of artifact rounds and jobs. Requests for another length "
        "are refused.",
    )
    served_model_names: Annotated[Words, Flag(("--served-model-name",))] = Field(
        (), description="Further names of the model, under which requests may ask for it."
    )
    compatibility: Literal["gonka"] | None = Field(
        None,
        description="Answer calls of /api/v1/pow as those of /api/v1/inference/pow are answered: "
        "as the client of that chain expects.",
    )
    resume: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Which rounds go on generating after a restart: auto leaves out those that "
        "the client of the chain began.",
    )
    max_nonces: Count = Field(10_000, description="Nonces of one request.")
    max_positions: Count = Field(2**18, description="Largest product of batch_size and seq_len.")
    max_waiting: Count = Field(
        64, description="Validations that wait for the engine, half of them for one client."
    )
    max_queued_nonces: Count = Field(
        100_000, description="Nonces of all artifact jobs that wait, half of them for one client."
    )
    callback_interval: Seconds = Field(
        5.0, description="Time for which valid nonces are collected into one callback."
    )
    callback_nonces: Count = Field(
        1000, description="Nonces at which a callback is sent before that time has passed."
    )
    callback_attempts: Count = Field(
        20, description="Attempts after which a callback becomes a dead letter."
    )
    callback_backoff: Seconds = Field(
        1.0, description="Pause after the first failed attempt. It doubles each time."
    )
    callback_backoff_max: Seconds = Field(1800.0, description="Longest pause between two attempts.")
    max_pending: Count = Field(
        1000, description="Undelivered callbacks of a round at which generation waits."
    )
    max_pending_jobs: Count = Field(
        1000,
        description="Undelivered callbacks of artifact jobs, half of them for one client; others "
        "are refused.",
    )
    job_ttl: Seconds = Field(
        300.0, description="Time for which the results of artifact jobs are kept."
    )
    wait: Seconds = Field(
        60.0, description='Time that a request with "wait": true waits for its job.'
    )
    keep_rounds: Seconds = Field(
        30 * 86400.0, description="Time for which unused rounds stay in the database."
    )
    receipt_days: float = Field(
        30.0,
        gt=0,
        le=36_500,
        description="Days for which receipts of responses are kept; then they are deleted.",
    )
    receipt_prompts: bool = Field(
        False,
        description="Whether receipts keep the token ids of prompts. Without it they keep a hash "
        "of them.",
    )
    receipt_callback_url: str | None = Field(
        None,
        description="URL to which stored receipts are announced, by callbacks of kind receipts.",
    )
    max_receipts: Count = Field(
        4096, description="Receipts that wait for the disk; further responses are refused."
    )
    pins: Annotated[NetworkPins | None, _read_pins, NoDecode, "FILE"] = Field(
        None,
        description="What the network agreed on; other settings must agree with it.",
    )
    ledger: Path | None = Field(
        None, description="Ledger of nodes' lives to add the audit to; the life then counts."
    )
