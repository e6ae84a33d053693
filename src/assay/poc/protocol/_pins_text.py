"""Write ``pins.toml``: tables as text, in which what is not known yet is marked as required."""

import json
from collections.abc import Iterable, Mapping

from assay.poc.protocol._pins_tables import SCHEMA, UNFILLED

HEAD = f"""\
# What the network agreed on. docs/pins.md describes every key.
# `assay poc pins check FILE` says what this leaves open: the block and the key come with each proof.
schema = {SCHEMA}"""

BUILD_FIELDS = {
    "engine": "hf or vllm",
    "device": "name of the GPU or processor, as in the fingerprint of a proof",
    "dtype": "number format; it has no wildcard",
    "attention": "name of the attention implementation",
    "batch_size": "nonces of a batch",
    "threads": "CPU threads; 0 on a GPU",
    "torch": "version of torch",
    "library": "library that runs the model, with its version",
    "kernels": 'further choices, joined by commas; "" for none',
}
"""Fields of a build, with what to write where no proof says it."""


def pins_text(tables: Iterable[tuple[str, Mapping[str, object]]]) -> str:
    """Return a pins file as text.

    Args:
        tables: Names of the tables as TOML has them, such as ``[[models]]``, with their values in order. A value
            ``"?"`` is marked as required, and the file is refused until it is replaced.
    """
    lines = [HEAD]
    for name, values in tables:
        lines += ["", name]
        lines += [f"{key} = {_toml(value)}{_required(key, value)}" for key, value in values.items()]
    return "\n".join([*lines, ""])


def _required(key: str, value: object) -> str:
    return f"  # required: {BUILD_FIELDS[key]}" if value == UNFILLED else ""


def _toml(value: object) -> str:
    """Write a value as TOML, whose texts are those of JSON but for one control character that JSON does not escape."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
