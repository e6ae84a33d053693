"""Settings of ``assay poc prove``, ``verify`` and ``calibrate``; the defaults of a round are those of ``Round``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from assay.cli.flags import BLOCK_HASH, DTYPE, LEDGER, MODEL, OUTPUT, PINS, PUBLIC_KEY
from assay.poc.protocol.round import Round
from assay.settings import Device, Names, Settings, Spelling


def _positions(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isascii() and first.isdigit() and end.isascii() and end.isdigit() and len(text) <= 40):
        raise ValueError("two numbers A:B with A < B, for instance 0:256")
    return int(first), int(end)


_POSITIONS = Spelling(_positions, "{0[0]}:{0[1]}".format)
EngineName = Literal["hf", "vllm"]
NumberFormat = Literal["float32", "float16", "bfloat16", "int8", "float8"]
NUMBER_FORMAT = "Number format of the weights: float32, float16, bfloat16, int8 or float8"


class ProveSettings(Settings):
    """Settings of ``assay poc prove``."""

    model: Annotated[str, MODEL] = Field(description="Model: a directory, a hub id, reference:… or shape:…")
    block_hash: Annotated[str, BLOCK_HASH] = Field(description="Block that seeds the round.")
    public_key: Annotated[str, PUBLIC_KEY] = Field(description="Key of the node.")
    output: Annotated[Path, OUTPUT] = Field(description="Proof file to write.")
    nonces: Annotated[tuple[int, int], _POSITIONS] = Field(
        (0, 256), description="Positions A:B in this node's sequence of nonces."
    )
    preset: str = Field(
        Round.preset,
        description="How a proof follows from the model: poc-2.0, artifact, hardened, decode, or another pipeline.",
    )
    seq_len: int = Field(Round.seq_len, description="Number of input positions of a nonce; with decode, of its prompt.")
    batch_size: str = Field(
        "32", description="Nonces per forward pass, part of the fingerprint; auto takes what fits into memory."
    )
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(None, description=f"{NUMBER_FORMAT}.")
    device: Device = None
    engine: EngineName = Field("hf", description="Engine that runs the model: hf or vllm.")
    kernels: Literal["auto", "compiled", "eager"] = Field(
        "auto", description="Kernels of the hf engine: compiled, eager, or auto, which compiles on CUDA."
    )
    deterministic: bool = Field(False, description="Refuse every operation that may give other bits the next time.")
    tensor_parallel: int = Field(1, ge=1, description="Processes of torchrun that hold one model together.")
    r_target: float = Field(Round.r_target, description="Distance below which a nonce is valid.")
    node_id: int = Field(Round.node_id, description="Share of this node, from 0.")
    node_count: int = Field(Round.node_count, description="Number of nodes that share the nonces of the key.")
    block_height: int = Field(Round.block_height, description="Height of the block, recorded in the proof.")
    strength: Literal[32, 256] = Field(
        Round.strength, description="Bits of the seed of each input: 32, as published, or 256, which cannot collide."
    )
    overwrite: bool = Field(False, description="Replace an existing proof file.")


class VerifySettings(Settings):
    """Settings of ``assay poc verify``: what the validator knows, and how it recomputes."""

    model: Annotated[str, MODEL] = Field(
        description="Model that the round asked for: a directory, a hub id, reference:… or shape:…"
    )
    pins: Annotated[Path | None, PINS] = Field(
        None, description="File with all that the network agreed on; flags must agree with it."
    )
    block_hash: str | None = Field(None, description="Block of the round; needed for exit code 0.")
    public_key: str | None = Field(None, description="Key of the node; needed for exit code 0.")
    preset: str | None = Field(None, description=f"Preset that the network agreed on; else {Round.preset}.")
    seq_len: int | None = Field(None, description=f"Number of positions agreed on; else {Round.seq_len}.")
    strength: Literal[32, 256] | None = Field(
        None, description=f"Bits of the input seeds agreed on; else {Round.strength}."
    )
    r_target: float | None = Field(None, description=f"Target distance agreed on; else {Round.r_target}.")
    node_id: int | None = Field(None, description=f"Share of the node; else {Round.node_id}.")
    node_count: int | None = Field(None, description=f"Number of nodes that share the nonces; else {Round.node_count}.")
    nonces: Annotated[tuple[int, int] | None, _POSITIONS] = Field(
        None, description="Positions A:B that the proof must hold; else any 32 or more in a row."
    )
    prover_dtype: str | None = Field(None, description="Number format agreed on; else one of the preset, or any dtype.")
    sample: int | None = Field(None, description="Number of nonces to recompute; 128, or all of a smaller proof.")
    calibration: Path | None = Field(
        None,
        description="File with the noise measured for this model, preset and pair of engines; else one of the pins.",
    )
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(
        None, description="Number format that recomputes; by default the prover's."
    )
    device: Device = None
    engine: EngineName = Field("hf", description="Engine that recomputes: hf or vllm.")
    alpha: float = Field(1e-3, gt=0, lt=1, description="Bound on the chance of accusing an honest node.")
    seed: int | None = Field(None, ge=0, description="Number that draws the sample; unpredictable when left out.")
    ledger: Annotated[Path | None, LEDGER] = Field(
        None, description="Ledger of nodes' lives to which the audit is added; its verdict on the life then counts."
    )


class CalibrateSettings(Settings):
    """Settings of ``assay poc calibrate``."""

    valid_rate: float | None = Field(None, description="Share of valid nonces that is wanted, in (0, 1).")
    dimension: int | None = Field(
        None, description="Dimension of the output; that of the random head, or what a proof says."
    )
    model: str | None = Field(
        None,
        description="Model of the proofs. With --valid-rate its states say how wide the distances of their blocks are; "
        "else its hidden size makes a law of distances relative to the scale of each block.",
    )
    device: Device = None
    effective_dimension: float | None = Field(
        None, description="Effective dimension of the model's states; without it and without --model, 16 is assumed."
    )
    output: Annotated[Path | None, OUTPUT] = Field(None, description="Calibration file to write.")
    vectors: Path | None = Field(
        None, description="File of sets of vectors as networks publish them, in place of proofs; JSON Lines, or gzip."
    )
    sets: Names = Field(
        (), description="Words, separated by commas, that the name of a set must have; with a dash before: must not."
    )
    digest: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the checkpoint of --vectors, which they do not say; without it they judge no proof.",
    )
    against: tuple[Path, ...] = Field(
        (), description="Proof or set of vectors of a known cheat, which an honest verdict must exclude; repeatable."
    )
    name: tuple[str, ...] = Field((), description="Name of each --against, in the same order, such as int4.")
    merge: tuple[Path, ...] = Field(
        (), description="Calibration file whose builds are added; the newly measured ones come first. Repeatable."
    )
