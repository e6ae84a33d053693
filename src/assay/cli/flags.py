"""Settings that several commands have: their options, units, variables, bounds and help."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from assay.devices import Device
from assay.settings import Flag, Settings

ARGUMENT = Flag(argument=True)
OUTPUT = Flag(("-o", "--output"), file=True)
FILE = Flag(file=True)
FOLDER = Flag(("-o", "--output"))  # or a database, which may be there
MODEL = Flag(variable="ASSAY_MODEL", unit="MODEL")
DTYPE = Flag(variable="ASSAY_DTYPE", unit="DTYPE")
PINS = Flag(variable="ASSAY_PINS", reads="assay.poc.protocol.pins_file:NetworkPins.load")
PROOF = Flag(reads="assay.poc.protocol.proof:Proof.load")
RECEIPTS = Flag(reads="assay.poc.responses.receipts:Receipts.load")

EngineName = Literal["hf", "vllm"]
KernelName = Annotated[
    Literal["auto", "compiled", "eager"],
    Field(description="Kernels of hf: compiled, eager, or auto, which compiles on CUDA."),
]
ModelName = Annotated[
    str, MODEL, Field(description="Model: a directory, GGUF file, hub id, or name of models list")
]
NumberFormat = Annotated[
    Literal["float32", "float16", "bfloat16", "float8"] | None,
    DTYPE,
    Field(
        description="Number format of the weights; by default that of the other side, or the "
        "stored one."
    ),
]
PinsFile = Annotated[
    Path | None,
    PINS,
    Field(description="What the network agreed on; other settings must agree with it."),
]
_CALIBRATION = Flag(reads="assay.poc.verdict.calibration_file:Calibration.load")
CalibrationFile = Annotated[Path | None, _CALIBRATION]
CalibrationFiles = Annotated[tuple[Path, ...], _CALIBRATION]
CommitmentFiles = Annotated[
    tuple[Path, ...], Flag(reads="assay.poc.protocol.commitments:Commitment.load")
]
FrameToRead = Annotated[Path | None, Flag(reads="assay.models.frame:Frame.load")]
LedgerFile = Annotated[
    Path | None, Flag(variable="ASSAY_LEDGER", reads="assay.poc.verdict.ledger:check_ledger")
]
BlockHash = Annotated[str | None, "HASH", Field(description="Block of the round.")]
PublicKey = Annotated[str | None, "KEY", Field(description="Key of the node.")]
Overwrite = Annotated[bool, Field(description="Replace what exists.")]
Unsandboxed = Annotated[
    bool, Field(description="Run programs even where nothing can isolate them.")
]
Seed = Annotated[int, "NUMBER", Field(ge=0, lt=2**63, description="The same seed draws the same.")]


class AuditSettings(Settings):
    """What a validator knows, how it recomputes, and where it notes what it found."""

    model: ModelName
    pins: PinsFile = None
    block_hash: BlockHash = None
    public_key: PublicKey = None
    calibration: CalibrationFile = Field(
        None, description="Measured honest noise; else the pins' or bundled models'."
    )
    ledger: LedgerFile = Field(
        None, description="Ledger of nodes' lives to add the audit to; the life then counts."
    )
    engine: EngineName = Field("hf", description="Engine that recomputes.")
    device: Device = None
    dtype: NumberFormat = None
    prover_dtype: Annotated[str | None, "DTYPE"] = Field(
        None, description="Number format agreed on; else one of the preset, or any dtype."
    )
    alpha: Annotated[float | None, "SHARE"] = Field(
        None,
        gt=0,
        lt=1,
        description="Chance of ever accusing an honest node; else that of the pins, or 0.001.",
    )
    seed: Annotated[int | None, "NUMBER"] = Field(
        None, ge=0, description="Draws the sample; else unpredictable."
    )
