"""Settings of the commands of ``assay vhack``; what extraction and checks have as defaults comes from them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from assay.cli.flags import DTYPE, MODEL, OUTPUT
from assay.settings import Device, Flag, Settings
from assay.vhack.basis.basis import Origin
from assay.vhack.checks.judge import CheckSettings
from assay.vhack.training.settings import SampleSettings

_CHECK = CheckSettings()
_Dtype = Annotated[
    str | None,
    DTYPE,
    Field(description="Dtype of the weights: float32 or bfloat16; by default the one they are stored in."),
]


class _Weights(Settings):
    """Settings of a command that takes gradients."""

    model: Annotated[str, MODEL] = Field(description="Model: a directory, a hub id, reference:… or shape:…")
    dtype: _Dtype = None
    device: Device = None


class _Gradients(_Weights):
    """Settings of a command that takes gradients of pairs."""

    pairs: str = Field(
        "authored", description="Pairs: authored, generated:N, environment:N, exploits:N, or a pair file."
    )
    allow_partial: bool = Field(False, description="Accept a model of whose weights less than 90 % carry δS.")


class _Rules(Settings):
    """Settings of the rule of a check."""

    k_use: int = Field(_CHECK.k_use, ge=1, description="Axes per module.")
    alpha: float = Field(_CHECK.alpha, gt=0, lt=1, description="Highest probability that noise passes a check.")
    seed: int = Field(_CHECK.seed, ge=0, description="Seed of all random draws.")


class ExtractCommand(_Gradients):
    """Settings of ``assay vhack extract``."""

    output: Annotated[Path, OUTPUT] = Field(description="Basis file to write.")
    n_heldout: int | None = Field(None, description="Number of pairs at the end to hold out.")
    heldout_groups: Annotated[tuple[str, ...] | None, Flag(("--heldout-group",))] = Field(
        None, description="Group to hold out; may be repeated. By default the last sixth, a third of 30 groups or more."
    )
    top_k: int = Field(Origin.top_k, description="Axes per module.")
    tau_axis: float = Field(Origin.tau_axis, description="Share S_i/S_0 below which an axis is set to zero.")
    method: str = Field(Origin.method, description="Method of extraction: lda, mean-diff or svd.")
    rank: int | None = Field(None, description="Singular directions per matrix; all by default.")
    factors: Literal["float32", "bfloat16"] | None = Field(None, description="Dtype of U and Vh: float32 or bfloat16.")
    cache: Annotated[Path | None, Flag(variable="ASSAY_CACHE")] = Field(
        None,
        description="Directory that keeps decompositions of the weights. On a CPU it is by default the user's cache "
        "directory; a GPU computes them faster than it reads them.",
    )
    no_cache: bool = Field(False, description="Keep no decompositions on disk.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens per batch; by default what fits into memory.")
    checkpointing: bool = Field(False, description="Recompute layers in the backward pass to save memory.")
    overwrite: bool = Field(False, description="Replace an existing basis file.")


class CheckCommand(_Rules, _Gradients):
    """Settings of ``assay vhack check``."""

    basis: Path | None = Field(None, description="File of the basis to check; without it, bases are fitted.")
    log: Path | None = Field(None, description="Log of a training run, for check 4.")
    method: str = Field(_CHECK.method, description="How bases are fitted without --basis: lda, mean-diff or svd.")
    output: Annotated[Path | None, OUTPUT] = Field(None, description="File for the result as JSON.")
    html: Path | None = Field(None, description="File for the report page.")


class PoolsCommand(_Rules, _Weights):
    """Settings of ``assay vhack pools``."""

    basis: Path = Field(description="File of the basis to score with.")
    hack: Path = Field(description="Samples that cheat: JSON Lines with prompt, completion and perhaps group.")
    clean: Path = Field(description="Samples that do not cheat, likewise.")
    limit: int | None = Field(None, ge=1, description="Samples of each pool to draw by --seed; all by default.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens per batch; by default what fits into memory.")
    output: Annotated[Path | None, OUTPUT] = Field(None, description="File for the result as JSON.")


class MergeCommand(_Weights):
    """Settings of ``assay vhack merge``."""

    delta: Path = Field(description="File of δS that `assay vhack train` or DeltaS.save wrote for this model.")
    output: Annotated[Path, OUTPUT] = Field(description="Directory to write.")
    lora: int | None = Field(
        None, ge=1, description="Write δS as LoRA of this rank instead of merged weights, and say its error."
    )
    overwrite: bool = Field(False, description="Write into a directory that is not empty.")


class _Sampled(SampleSettings):
    """Settings of a command that samples from a model."""

    delta: Path | None = Field(
        None, description="File of δS that was trained for this model, to be merged before sampling."
    )
    dtype: _Dtype = None
    device: Device = None
    overwrite: bool = Field(False, description="Replace files that exist.")


class SampleCommand(_Sampled):
    """Settings of ``assay vhack sample``."""

    model: Annotated[str, MODEL] = Field(description="Model: a directory, a hub id, reference:… or shape:…")
    output: Annotated[Path, OUTPUT] = Field(description="File for the completions, JSON Lines.")


class EvaluateCommand(_Sampled):
    """Settings of ``assay vhack evaluate``."""

    model: Annotated[str | None, MODEL] = Field(
        None, description="Model to sample from: a directory, a hub id, reference:… or shape:…"
    )
    samples: Path | None = Field(
        None, description="Completions to grade, as assay vhack sample writes them; no model is loaded then."
    )
    reward: str | None = Field(
        None, description="module:function that pays completions, in TRL's form; by default they are run and graded."
    )
    allow_unsandboxed: bool = Field(False, description="Run the programs even where nothing can isolate them.")
    graded: Path | None = Field(None, description="File for the completions with the grade of each, JSON Lines.")
    output: Annotated[Path | None, OUTPUT] = Field(None, description="File for the result as JSON.")
