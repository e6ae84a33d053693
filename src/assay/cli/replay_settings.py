"""Settings of ``assay poc replay`` and ``calibrate-responses``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from assay.cli.flags import DTYPE, LEDGER, MODEL, OUTPUT, PINS
from assay.cli.poc_settings import EngineName, NumberFormat
from assay.settings import Device, Settings

_BATCH = "Number of responses that are run at once, at most; 1 where bits must not depend on the others."


class ReplaySettings(Settings):
    """Settings of ``assay poc replay``: what the validator knows, and how it runs the responses again."""

    model: Annotated[str, MODEL] = Field(
        description="Model that the network agreed on: a directory, a hub id, reference:… or shape:…"
    )
    pins: Annotated[Path | None, PINS] = Field(
        None, description="File with all that the network agreed on; flags must agree with it."
    )
    requests: Path | None = Field(
        None,
        description="Requests that were sent, as `assay poc respond --prompts` reads them; needed for exit code 0.",
    )
    block_hash: str | None = Field(None, description="Block of the responses; needed for exit code 0.")
    public_key: str | None = Field(None, description="Key of the node; needed for exit code 0.")
    prover_dtype: str | None = Field(None, description="Number format agreed on; else any dtype.")
    evidence: Literal["both", "tokens", "sketches"] = Field(
        "both", description="What receipts must have for exit code 0: seeded tokens, sketches, or both."
    )
    lora: Path | None = Field(
        None, description="Directory of the LoRA adapter with which receipts that name one are replayed."
    )
    sample: int | None = Field(None, description="Number of responses to replay; all when left out.")
    calibration: Path | None = Field(
        None, description="File with the noise measured for this model and pair of engines; else the stated default."
    )
    batch_size: int = Field(16, ge=1, le=1024, description=_BATCH)
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(
        None, description="Number format that replays; by default the node's."
    )
    device: Device = None
    engine: EngineName = Field("hf", description="Engine that replays: hf or vllm.")
    alpha: float = Field(1e-3, gt=0, lt=1, description="Bound on the chance of accusing an honest node.")
    seed: int | None = Field(None, ge=0, description="Number that draws the sample; unpredictable when left out.")
    ledger: Annotated[Path | None, LEDGER] = Field(
        None, description="Ledger of nodes' lives to which the replay is added; its verdict on the life then counts."
    )


class CalibrateResponsesSettings(Settings):
    """Settings of ``assay poc calibrate-responses``."""

    model: Annotated[str, MODEL] = Field(
        description="Model of the receipts: a directory, a hub id, reference:… or shape:…"
    )
    output: Annotated[Path, OUTPUT] = Field(description="Calibration file to write.")
    requests: Path | None = Field(
        None, description="Requests that were sent, for receipts that have hashes of prompts alone."
    )
    batch_size: int = Field(16, ge=1, le=1024, description=_BATCH)
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(
        None, description="Number format that replays; by default that of the first receipts."
    )
    device: Device = None
    engine: EngineName = Field("hf", description="Engine that replays: hf or vllm.")
