"""``assay streams``: print portable random numbers."""

from typing import Annotated, Any, Literal

import click
from pydantic import Field

from assay.cli.framework import Group
from assay.cli.output import emit_json
from assay.settings import Flag, Settings

PRINTABLE = 1_000_000

streams = Group("streams", "Portable random numbers.", panel="Research")


class NumberSettings(Settings):
    """Settings of ``assay streams hash``, ``uniform``, ``gumbel``, ``signs`` and ``permutation``."""

    seed_text: Annotated[str, "TEXT"] = Field(description="Text whose SHA-256 gives the seed.")
    n: Annotated[int, Flag(("-n",), unit="VALUES")] = Field(
        ge=1, le=PRINTABLE, description="Number of values. Normal values of another number begin differently."
    )
    backend: Literal["auto", "numpy", "torch", "triton"] = Field(
        "auto", description="Implementation that computes the values."
    )
    device: Annotated[str, "DEVICE"] = Field("cpu", description="Device that computes: cpu or cuda.")


class NormalSettings(NumberSettings):
    """Settings of ``assay streams normal``."""

    strength: Literal[32, 256] = Field(32, description="Bits of the seed: 32, as published, or 256.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Dtype of the values.")


KINDS: dict[str, tuple[str, type[NumberSettings], str]] = {
    "hash": ("hashes", NumberSettings, "Print 32-bit hashes."),
    "uniform": ("uniforms", NumberSettings, "Print uniform float32 values in [0, 1]."),
    "gumbel": ("gumbels", NumberSettings, "Print standard Gumbel values."),
    "signs": ("signs", NumberSettings, "Print signs, +1 or -1."),
    "permutation": ("permutations", NumberSettings, "Print a permutation of 0..n-1."),
    "normal": ("normals", NormalSettings, "Print standard normal values."),
}
"""Kind of number → method of a backend, and settings and help of its command."""


def _add_command(kind: str, method: str, settings: type[NumberSettings], text: str) -> None:
    def command(chosen: NumberSettings, as_json: bool) -> None:
        _print(kind, method, chosen, as_json)

    command.__doc__ = text
    streams.add(kind, settings, example=f"assay streams {kind} --seed-text block -n 4")(command)


for _kind, _about in KINDS.items():
    _add_command(_kind, *_about)


def _print(kind: str, method: str, chosen: NumberSettings, as_json: bool) -> None:
    from assay import streams
    from assay.streams.backends import as_tensor, digest

    source = streams.get_backend(chosen.backend, chosen.device)
    seeds = streams.seeds([chosen.seed_text], getattr(chosen, "strength", 32))
    values = getattr(source, method)(seeds, chosen.n, **chosen.model_dump(include={"dtype"}))
    row: Any = as_tensor(values)[0].cpu()
    # Floats as the shortest decimal that reads back to the same float32.
    printed = [float(str(one)) for one in row.float().numpy()] if row.is_floating_point() else row.tolist()
    if not as_json:
        click.echo("\n".join(str(value) for value in printed))
        return
    described = {"kind": kind} | chosen.model_dump() | {"backend": source.name, "device": source.device}
    emit_json("assay.streams/1", {**described, "sha256": digest(values), "values": printed})
