"""``assay doctor``: what is installed, what works, and whether the streams are exact here."""

import importlib.util
import shutil
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
    from assay.pages.provenance import provenance as origin

    backends = _backends()
    missing = _missing()
    provenance = origin()
    exact = all(row["exact"] for row in backends if row["available"])
    if as_json:
        emit_json("assay.doctor/1", {"exact": exact, "backends": backends, "missing": missing, **provenance})
    else:
        _print(provenance, backends, missing)
    return 0 if exact else 1


def _backends() -> list[dict[str, Any]]:
    from assay import streams

    expected = streams.selftest(streams.get_backend("numpy"))
    rows = []
    for name in streams.BACKENDS:
        for device in ("cpu", "cuda"):
            if device == "cuda" and name == "numpy":
                continue
            row: dict[str, Any] = {"backend": name, "device": device, "available": True, "exact": True}
            try:
                found = streams.selftest(streams.get_backend(name, device))
                row |= {"exact": found == expected, "sha256": found}
            except BackendUnavailable as error:
                row |= {"available": False, "exact": False, "why": error.seen}
            rows.append(row)
    return rows


def _missing() -> list[dict[str, str]]:
    absent = [(name, *about) for name, about in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    absent += [(name, *about) for name, about in PROGRAMS.items() if shutil.which(name) is None]
    return [{"name": name, "needed_for": purpose, "get_it": how} for name, purpose, how in absent]


def _print(provenance: dict[str, Any], backends: list[dict[str, Any]], missing: list[dict[str, str]]) -> None:
    from assay import streams

    versions = dict(provenance.pop("versions"))
    here = {**versions, **{name: "none" if value is None else value for name, value in provenance.items()}}
    table(("", "here"), list(here.items()), title="Versions and devices")
    rows = []
    for row in backends:
        state = ("exact" if row["exact"] else "DIFFERENT BITS") if row["available"] else row["why"]
        rows.append((row["backend"], row["device"], state, _short(row.get("sha256"))))
    table(("streams", "device", "state", "SHA-256"), rows, title="Bit-exactness")
    if missing:
        needs = [(item["name"], item["needed_for"], item["get_it"]) for item in missing]
        table(("missing", "needed for", "how to get it"), needs)
    click.echo(f"{len(streams.BACKENDS)} backends known; compare the SHA-256 column between two machines.")


def _short(digests: dict[str, str] | None) -> str:
    """One digest that stands for all of a backend."""
    import hashlib

    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16] if digests else ""
