"""``assay doctor``: what is installed, what works, and whether the streams are exact here."""

import importlib.util
import shutil
from hashlib import sha256
from itertools import product
from typing import Any

import click

from assay.cli.output import emit_json, table
from assay.errors import BackendUnavailable, how_to_install

# What a user may miss, what for, and how to get it.
OPTIONAL = {
    "triton": ("fused streams on CUDA", "comes with the CUDA builds of torch"),
    "fastapi": ("assay poc serve", how_to_install("serve")),
    "trl": ("assay vhack train", how_to_install("train")),
    "vllm": ("--engine vllm", how_to_install("vllm")),
}
PROGRAMS = {"bwrap": ("isolation of untrusted code", "apt-get install bubblewrap")}


def doctor(as_json: bool) -> int:
    """Report versions, devices, and exact streams.

    Every backend must give the same bits. Exit code 1 if one does not.
    """
    from assay.pages.provenance import provenance

    backends, found = _backends(), provenance()
    absent = [(name, *about) for name, about in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    absent += [(name, *about) for name, about in PROGRAMS.items() if shutil.which(name) is None]
    missing = [{"name": name, "needed_for": purpose, "get_it": how} for name, purpose, how in absent]
    exact = all(row["exact"] for row in backends if row["available"])
    if as_json:
        emit_json("assay.doctor/1", {"exact": exact, "backends": backends, "missing": missing, **found})
        return 0 if exact else 1
    versions: Any = found.pop("versions")
    here = versions | {name: "none" if value is None else value for name, value in found.items()}
    table(("", "here"), list(here.items()), title="Versions and devices")
    rows = []
    for row in backends:
        state = row.get("why") or ("exact" if row["exact"] else "DIFFERENT BITS")
        of_all = sha256(repr(sorted(row["sha256"].items())).encode()).hexdigest()[:16] if row["available"] else ""
        rows.append((row["backend"], row["device"], state, of_all))
    table(("streams", "device", "state", "SHA-256"), rows, title="Bit-exactness")
    if missing:
        table(("missing", "needed for", "how to get it"), absent)
    click.echo(f"{len(backends)} backends looked at; compare the SHA-256 column between two machines.")
    return 0 if exact else 1


def _backends() -> list[dict[str, Any]]:
    from assay import streams

    expected = streams.selftest(streams.get_backend("numpy"))
    rows = []
    for name, device in product(streams.BACKENDS, ("cpu", "cuda")):
        if (name, device) == ("numpy", "cuda"):
            continue
        row: dict[str, Any] = {"backend": name, "device": device}
        try:
            found = streams.selftest(streams.get_backend(name, device))
            rows.append(row | {"available": True, "exact": found == expected, "sha256": found})
        except BackendUnavailable as error:
            rows.append(row | {"available": False, "exact": False, "why": error.seen})
    return rows
