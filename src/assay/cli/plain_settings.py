"""Settings of ``assay streams``, ``models``, ``demo`` and ``vhack pairs``, which start without waiting for torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from assay.cli.flags import MODEL, OUTPUT
from assay.settings import Flag, Settings

PRINTABLE = 1_000_000


class NumberSettings(Settings):
    """Settings of ``assay streams hash``, ``uniform``, ``gumbel``, ``signs`` and ``permutation``."""

    seed_text: str = Field(description="Text whose SHA-256 gives the seed.")
    n: Annotated[int, Flag(("-n",))] = Field(
        ge=1,
        le=PRINTABLE,
        description="Number of values. Normal values of another number begin differently.",
    )
    backend: Literal["auto", "numpy", "numba", "torch", "triton"] = Field(
        "auto", description="Implementation that computes the values: auto, numpy, numba, torch or triton."
    )
    device: str = Field("cpu", description="Device that computes the values: cpu or cuda.")


class NormalSettings(NumberSettings):
    """Settings of ``assay streams normal``."""

    strength: Literal[32, 256] = Field(32, description="Bits of the seed: 32, as published, or 256.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="Dtype of the values: float32, float16 or bfloat16."
    )


class RandomModelSettings(Settings):
    """Settings of ``assay models random``."""

    output: Annotated[Path, OUTPUT] = Field(description="Directory of the checkpoint.")
    block_hash: str = Field("block", description="Block that seeds the weights.")
    weights: str = Field("random-all", description="What is random: random-all or random-embed.")
    dtype: str = Field("bfloat16", description="Dtype of the weights: float32, float16 or bfloat16.")


class DemoSettings(Settings):
    """Settings of ``assay demo``."""

    model: Annotated[str, MODEL] = Field("reference:qwen3", description="Model that proves.")
    output: Annotated[Path, OUTPUT] = Field(Path("demo"), description="Directory of the report.")


class GenerateSettings(Settings):
    """Settings of ``assay vhack pairs generate``."""

    output: Annotated[Path, OUTPUT] = Field(description="The pair file to write.")
    n: Annotated[int, Flag(("--count", "-n"))] = Field(96, lt=100_000, description="Number of pairs.")
    seed: int = Field(0, description="The same seed gives the same pairs.")
    mechanisms: Annotated[tuple[str, ...] | None, Flag(("--mechanism",))] = Field(
        None, description="Use this mechanism only; may be repeated."
    )
    families: Annotated[tuple[str, ...] | None, Flag(("--family",))] = Field(
        None, description="Use tasks of this family only; may be repeated."
    )
    overwrite: bool = Field(False, description="Replace an existing file.")


class MatchPairsSettings(Settings):
    """Settings of ``assay vhack pairs match``."""

    output: Annotated[Path, OUTPUT] = Field(description="The pair file to write.")
    works: Path | None = Field(
        None, description="Graded completions of which correct work is taken; by default the same as for the hacks."
    )
    per_prompt: int = Field(1, ge=1, description="Most pairs of one prompt.")
    overwrite: bool = Field(False, description="Replace an existing file.")


class VerifyPairsSettings(Settings):
    """Settings of ``assay vhack pairs verify``."""

    tests: Path | None = Field(None, description="A JSON Lines file with hidden cases of your own tasks.")
    allow_unsandboxed: bool = Field(False, description="Run the programs even where no sandbox works.")


class FuzzSettings(Settings):
    """Settings of ``assay vhack fuzz``."""

    count: Annotated[int, Flag(("--count", "-n"))] = Field(1000, ge=1, description="Number of cases.")
    seed: int = Field(0, ge=0, description="The same seed gives the same cases.")
    kinds: Annotated[tuple[str, ...] | None, Flag(("--kind",))] = Field(
        None, description="Use cases of this kind only; may be repeated."
    )
    seconds: float = Field(1.0, gt=0, description="Time limit of a run; what hangs is stopped then.")
    workers: int = Field(2, ge=1, description="Programs that run at the same time.")
    output: Annotated[Path | None, OUTPUT] = Field(None, description="File for the result as JSON.")
