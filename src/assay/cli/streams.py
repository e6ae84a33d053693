"""``assay streams``: print portable random numbers."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import click
from pydantic import Field

from assay.cli.framework import Group
from assay.cli.output import emit_json
from assay.settings import Flag, Settings

PRINTABLE = 1_000_000

streams = Group("streams", "Portable random numbers.", panel="Research")

KINDS = {
    "hash": ("hashes", "Print 32-bit hashes."),
    "uniform": ("uniforms", "Print uniform float32 values in [0, 1]."),
    "gumbel": ("gumbels", "Print standard Gumbel values."),
    "signs": ("signs", "Print signs, +1 or -1."),
    "permutation": ("permutations", "Print a permutation of 0..n-1."),
}
"""Kind of number → method of a backend, and help of its command."""


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


def _command(kind: str) -> Callable[[NumberSettings, bool], None]:
    def command(chosen: NumberSettings, as_json: bool) -> None:
        _print(kind, KINDS[kind][0], chosen, as_json)

    command.__doc__ = KINDS[kind][1]
    return command


for _kind in KINDS:
    streams.add(_kind, NumberSettings, example=f"assay streams {_kind} --seed-text block -n 4")(_command(_kind))


@streams.add("normal", NormalSettings, example="assay streams normal --seed-text block -n 4 --dtype bfloat16")
def normal(chosen: NormalSettings, as_json: bool) -> None:
    """Print standard normal values."""
    _print("normal", "normals", chosen, as_json, strength=chosen.strength, dtype=chosen.dtype)


def _print(
    kind: str, method: str, chosen: NumberSettings, as_json: bool, *, strength: int = 32, **options: str
) -> None:
    from assay import streams
    from assay.streams.backends import as_tensor, digest

    source = streams.get_backend(chosen.backend, chosen.device)
    seeds = streams.seeds([chosen.seed_text], strength)
    values = getattr(source, method)(seeds, chosen.n, **options)
    printed = _numbers(as_tensor(values)[0].cpu())
    if not as_json:
        click.echo("\n".join(str(value) for value in printed))
        return
    described = {"kind": kind} | chosen.model_dump() | {"backend": source.name, "device": source.device}
    emit_json("assay.streams/1", {**described, "sha256": digest(values), "values": printed})


def _numbers(row: Any) -> list[int] | list[float]:
    """Return Python numbers; floats as the shortest decimal that reads back to the same float32."""
    import numpy as np

    if not row.is_floating_point():
        return [int(value) for value in row.tolist()]
    return [float(str(value)) for value in row.float().numpy().astype(np.float32)]
