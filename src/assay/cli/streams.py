"""``assay streams``: print portable random numbers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from assay.cli.commands import App
from assay.cli.output import JsonFlag, emit_json
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.plain_settings import NormalSettings, NumberSettings


app = App(help="Print portable random numbers, the same bits on every machine.")

KINDS = {
    "hash": ("hashes", "Print 32-bit hashes."),
    "uniform": ("uniforms", "Print uniform float32 values in [0, 1]."),
    "gumbel": ("gumbels", "Print standard Gumbel values."),
    "signs": ("signs", "Print signs, +1 or -1."),
    "permutation": ("permutations", "Print a permutation of 0..n-1."),
}
"""Kind of number → method of a backend, and help of its command."""


def _command(kind: str) -> Callable[..., None]:
    @settings("assay.cli.plain_settings:NumberSettings")
    def command(chosen: "NumberSettings", as_json: JsonFlag = False) -> None:
        _print(kind, KINDS[kind][0], chosen, as_json)

    return command


for _kind, (_, _text) in KINDS.items():
    app.command(_kind, help=_text, epilog=f"Example: assay streams {_kind} --seed-text block -n 4")(_command(_kind))


@app.command(epilog="Example: assay streams normal --seed-text block -n 4 --dtype bfloat16")
@settings("assay.cli.plain_settings:NormalSettings")
def normal(chosen: "NormalSettings", as_json: JsonFlag = False) -> None:
    """Print standard normal values."""
    _print("normal", "normals", chosen, as_json, strength=chosen.strength, dtype=chosen.dtype)


def _print(
    kind: str, method: str, chosen: "NumberSettings", as_json: bool, *, strength: int = 32, **options: str
) -> None:
    from assay import streams
    from assay.streams.backends import as_tensor, digest

    source = streams.get_backend(chosen.backend, chosen.device)
    seeds = streams.seeds([chosen.seed_text], strength)
    values = getattr(source, method)(seeds, chosen.n, **options)
    printed = _numbers(as_tensor(values)[0].cpu())
    if not as_json:
        typer.echo("\n".join(str(value) for value in printed))
        return
    described = {"kind": kind} | chosen.model_dump() | {"backend": source.name, "device": source.device}
    emit_json("assay.streams/1", {**described, "sha256": digest(values), "values": printed})


def _numbers(row: Any) -> list[int] | list[float]:
    """Return Python numbers; floats as the shortest decimal that reads back to the same float32."""
    if not row.is_floating_point():
        return [int(value) for value in row.tolist()]
    return [float(str(value)) for value in row.float().numpy().astype(np.float32)]
