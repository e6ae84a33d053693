"""Settings of ``assay poc pins new`` and ``check``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from assay.cli.flags import MODEL, OUTPUT
from assay.poc.protocol.builds import FORMATS
from assay.poc.protocol.pins import FEWEST_NONCES
from assay.poc.protocol.round import Round
from assay.settings import Flag, Settings

if TYPE_CHECKING:
    ProvenFormat = str
else:
    ProvenFormat = Literal[FORMATS]  # all that a fingerprint may name, also those in which no model is loaded by name


class NewPinsSettings(Settings):
    """Settings of ``assay poc pins new``: what is known of a network before its first proof."""

    model: Annotated[str, MODEL] = Field(
        description="Model that the network runs: a directory, a hub id or reference:…; it is hashed and not run."
    )
    output: Annotated[Path, OUTPUT] = Field(description="Pins file to write.")
    from_proof: Annotated[tuple[Path, ...], Flag(("--from-proof",))] = Field(
        (), description="Honest proof whose preset, length, target and build are taken over; one for each build."
    )
    calibration: Annotated[tuple[Path, ...], Flag(("--calibration",))] = Field(
        (), description="Calibration file of this model to pin."
    )
    public_key: Annotated[tuple[str, ...], Flag(("--public-key",))] = Field(
        (), description="Key of a node that may prove; any key when left out."
    )
    preset: str | None = Field(None, description=f"Preset; that of the proof, or {Round.preset}.")
    seq_len: int | None = Field(
        None, description=f"Number of positions of a nonce; as in the proof, or {Round.seq_len}."
    )
    strength: Literal[32, 256] = Field(256, description="Bits of the input seeds; those of 256 cannot collide.")
    r_target: float | None = Field(None, description=f"Target distance; that of the proof, or {Round.r_target}.")
    node_count: int = Field(Round.node_count, ge=1, description="Number of machines of one key.")
    fewest_nonces: int = Field(FEWEST_NONCES, ge=1, description="Number of nonces of the smallest proof.")
    dtype: ProvenFormat | None = Field(
        None,
        description="Number format of the build where there is no proof, as a fingerprint names it; else the first one "
        "of the preset.",
    )
    overwrite: bool = Field(False, description="Replace an existing pins file.")


class CheckPinsSettings(Settings):
    """Settings of ``assay poc pins check``: what is known of the round of a proof."""

    block_hash: str | None = Field(None, description="Block of the round.")
    public_key: str | None = Field(None, description="Key of the node; with a list of nodes, the key of the proof.")
    node_id: int | None = Field(None, description="Share of the node; with a list of nodes, the share of the proof.")
