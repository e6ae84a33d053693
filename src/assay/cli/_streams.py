"""``assay streams``: print portable random numbers."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
import typer

from assay.cli._commands import App
from assay.cli._output import JsonFlag, emit_json
from assay.errors import UsageError

app = App(help="Print portable random numbers, the same bits on every machine.")

PRINTABLE = 1_000_000


class BackendName(StrEnum):
    """Backends by name."""

    auto = "auto"
    numpy = "numpy"
    numba = "numba"
    torch = "torch"
    triton = "triton"


SeedText = Annotated[str, typer.Option("--seed-text", help="Text whose SHA-256 gives the seed.")]
Count = Annotated[
    int, typer.Option("-n", help="Number of values. Normal values of another number begin differently.", min=1)
]
BackendFlag = Annotated[BackendName, typer.Option("--backend", help="Implementation that computes the values.")]
Device = Annotated[str, typer.Option("--device", help="Device that computes the values: cpu or cuda.")]
Strength = Annotated[int, typer.Option("--strength", help="Bits of the seed: 32, as published, or 256.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of the values: float32, float16 or bfloat16.")]

KINDS = {
    "hash": ("hashes", "Print 32-bit hashes."),
    "uniform": ("uniforms", "Print uniform float32 values in [0, 1]."),
    "signs": ("signs", "Print signs, +1 or -1."),
    "permutation": ("permutations", "Print a permutation of 0..n-1."),
}
"""Kind of number → method of a backend, and help of its command."""


def _command(kind: str) -> Callable[..., None]:
    def command(
        seed_text: SeedText,
        n: Count,
        backend: BackendFlag = BackendName.auto,
        device: Device = "cpu",
        as_json: JsonFlag = False,
    ) -> None:
        _print(kind, seed_text, n, backend, device, as_json)

    return command


for _kind, (_, _text) in KINDS.items():
    app.command(_kind, help=_text, epilog=f"Example: assay streams {_kind} --seed-text block -n 4")(_command(_kind))


@app.command(epilog="Example: assay streams normal --seed-text block -n 4 --dtype bfloat16")
def normal(
    seed_text: SeedText,
    n: Count,
    backend: BackendFlag = BackendName.auto,
    device: Device = "cpu",
    strength: Strength = 32,
    dtype: Dtype = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Print standard normal values."""
    _print("normal", seed_text, n, backend, device, as_json, strength=strength, dtype=dtype)


def _print(
    kind: str,
    seed_text: str,
    n: int,
    backend: BackendName,
    device: str,
    as_json: bool,
    strength: int = 32,
    dtype: str = "float32",
) -> None:
    from assay import streams

    if n > PRINTABLE:
        raise UsageError(f"-n {n}", wanted=f"at most {PRINTABLE} values to print", do="use assay.streams from Python")
    source = streams.get_backend(backend.value, device)
    seeds = streams.seeds([seed_text], strength)
    values = source.normals(seeds, n, dtype) if kind == "normal" else getattr(source, KINDS[kind][0])(seeds, n)
    printed = _numbers(streams.as_tensor(values)[0].cpu())
    if as_json:
        described = {"kind": kind, "seed_text": seed_text, "n": n, "backend": source.name, "device": source.device}
        if kind == "normal":
            described |= {"strength": strength, "dtype": dtype}
        emit_json("assay.streams/1", {**described, "sha256": streams.digest(values), "values": printed})
    else:
        typer.echo("\n".join(str(value) for value in printed))


def _numbers(row: Any) -> list[int] | list[float]:
    """Return Python numbers; floats as the shortest decimal that reads back to the same float32."""
    if not row.is_floating_point():
        return [int(value) for value in row.tolist()]
    return [float(str(value)) for value in row.float().numpy().astype(np.float32)]
