"""Settings that several commands have: their options, units, variables, bounds and help."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from assay.devices import Device
from assay.poc.engines.names import ENGINES, known_engine
from assay.settings import Flag, Settings, Spelling

ARGUMENT = Flag(argument=True)
OUTPUT = Flag(("-o", "--output"), file=True)
FILE = Flag(file=True)
FOLDER = Flag(("-o", "--output"))  # or a database, which may be there
MODEL = Flag(variable="ASSAY_MODEL", unit="MODEL")
DTYPE = Flag(variable="ASSAY_DTYPE", unit="DTYPE")
PINS = Flag(variable="ASSAY_PINS", reads="assay.poc.protocol.pins_file:NetworkPins.load")
PROOF = Flag(reads="assay.poc.protocol.proof:Proof.load")
RECEIPTS = Flag(reads="assay.poc.responses.receipts:Receipts.load")

KernelName = Annotated[
    Literal["auto", "compiled", "eager"],
    Field(description="Kernels of hf: compiled, eager, or auto, which compiles on CUDA."),
]
ModelName = Annotated[
    str, MODEL, Field(description="Model: a directory, GGUF file, hub id, or name of models list")
]
PinsFile = Annotated[
    Path | None,
    PINS,
    Field(description="What the network agreed on; other settings must agree with it."),
]
CALIBRATION = Flag(reads="assay.poc.verdict.calibration_file:Calibration.load")
CalibrationFile = Annotated[
    Path | None,
    CALIBRATION,
    Field(description="Measured honest noise; else the pins' or bundled models'."),
]
FrameFile = Annotated[
    Path | None,
    Flag(reads="assay.models.frame:Frame.load"),
    Field(description="Frame of the checkpoint, for tokens-1; else that of the pins file."),
]
Positions = Annotated[int, "POSITIONS", Field(ge=1, description="Positions of a nonce.")]
Unsandboxed = Annotated[
    bool, Field(description="Run programs even where nothing can isolate them.")
]
NodeCount = Annotated[
    int | None,
    "NUMBER",
    Field(ge=1, description="Number of nodes that share the nonces of the key; else 1."),
]
NodeId = Annotated[
    int | None, "NUMBER", Field(description="Number of the node, from 0 or 1; else 0.")
]
Strength = Annotated[
    Literal[32, 256] | None,
    Field(description="Bits of the seed of each input; else 32. 256 cannot collide."),
]
Limit = Annotated[
    int, "ROWS", Field(ge=1, lt=2**63, description="Most rows of each table, the newest ones.")
]
Blocks = Annotated[int, "NUMBER", Field(ge=1, description="Blocks that are computed.")]
BlockNonces = Annotated[int, "NUMBER", Field(ge=1, description="Nonces of each block.")]
DtypeName = Annotated[
    Literal["float32", "float16", "bfloat16"], Field(description="float32, float16 or bfloat16.")
]
Seed = Annotated[int, "NUMBER", Field(ge=0, lt=2**63, description="The same seed draws the same.")]


class LoadSettings(Settings):
    """How a model is loaded, and where."""

    dtype: Annotated[Literal["float32", "float16", "bfloat16", "float8"] | None, DTYPE] = Field(
        None,
        description="Number format of the weights; by default the stored one, or that of the "
        "pins, or of the proof that is checked.",
    )
    device: Device = None


class ModelSettings(LoadSettings):
    """Which model is loaded, how, and where."""

    model: ModelName


class EngineSettings(LoadSettings):
    """How a model is loaded, where, and which engine runs it."""

    engine: Annotated[str, Spelling(known_engine, str, "|".join(ENGINES))] = Field(
        "hf", description="Engine that runs the model."
    )


class LaunchSettings(EngineSettings, ModelSettings):
    """Which model runs, where, and by which engine."""


class RoundNames(Settings):
    """Which round a proof or receipts are of."""

    block_hash: Annotated[str | None, "HASH"] = Field(None, description="Block of the round.")
    public_key: Annotated[str | None, "KEY"] = Field(None, description="Key of the node.")


class ReplacingSettings(Settings):
    """Whether a result may replace what exists."""

    overwrite: bool = Field(False, description="Replace what exists.")


class NewFileSettings(Settings):
    """The file that a command writes."""

    output: Annotated[Path, OUTPUT] = Field(description="File to write.")


class FileSettings(ReplacingSettings, NewFileSettings):
    """The file that a command writes, also over another."""


class FolderSettings(Settings):
    """The directory that a command writes."""

    output: Annotated[Path, FOLDER] = Field(description="Directory to write.")


class ResultSettings(Settings):
    """The file that a command writes if asked."""

    output: Annotated[Path | None, OUTPUT] = Field(None, description="File for the result as JSON.")


class AgreedSettings(Settings):
    """What a network agrees on; what is left out is the published value, or that of a file."""

    preset: Annotated[str | None, "NAME"] = Field(
        None, description="Preset agreed on; else poc-2.0."
    )
    seq_len: Annotated[int | None, "POSITIONS"] = Field(
        None, description="Input positions of a nonce; else 256. With decode, its prompt."
    )
    strength: Strength = None
    r_target: Annotated[float | None, "DISTANCE"] = Field(
        None, description="Distance below which a nonce is valid; else 1.416."
    )
    node_count: NodeCount = None
    frame: FrameFile = None


class RoundSettings(AgreedSettings):
    """What a network agrees on, and the share of one node."""

    node_id: NodeId = None


class AuditSettings(RoundNames, LaunchSettings):
    """What a validator knows, how it recomputes, and where it notes what it found."""

    pins: PinsFile = None
    calibration: CalibrationFile = None
    ledger: Annotated[
        Path | None, Flag(variable="ASSAY_LEDGER", reads="assay.poc.verdict.ledger:check_ledger")
    ] = Field(None, description="Ledger of nodes' lives to add the audit to; the life then counts.")
    prover_dtype: Annotated[str | None, "DTYPE"] = Field(
        None, description="Number format agreed on; else one of the preset, or any dtype."
    )
    alpha: Annotated[float | None, "SHARE"] = Field(
        None,
        gt=0,
        lt=1,
        description="Chance of ever accusing an honest node; else the pins', or 0.001.",
    )
    seed: Annotated[int | None, "NUMBER"] = Field(
        None, ge=0, description="Draws the sample; else unpredictable."
    )
