"""The tables of ``pins.toml``, and what is said where one of them is wrong. docs/pins.md describes every key."""

import hashlib
import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from assay.errors import DataError
from assay.poc.protocol._build import ANY, Build
from assay.poc.protocol._pins import DIGEST
from assay.poc.protocol._round import MAX_COUNT, MAX_NAME, MAX_NONCE
from assay.reports import JsonObject, read_whole

SCHEMA = 1
LONGEST_CALIBRATION = 2**26  # bytes
UNFILLED = "?"
"""Value of a key that the one who wrote the file could not know."""


def _printable(text: str) -> str:
    if not 0 < len(text) <= MAX_NAME or not text.isprintable():
        raise ValueError(f"1 to {MAX_NAME} printable characters")
    if text == ANY:
        raise ValueError("the one value: only the fields of a build have wildcards")
    return text


def _relative(text: str) -> str:
    if not text or "\0" in text or PurePath(text).is_absolute():
        raise ValueError("a path that is relative to this file")
    return text


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, AfterValidator(_printable)]
Sha256 = Annotated[str, StringConstraints(pattern=f"^{DIGEST.pattern}$")]
Index = Annotated[int, Field(strict=True, ge=0, le=MAX_NONCE)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_NONCE)]


class Table(BaseModel):
    """A table of the file, whose keys are its fields and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RoundPins(Table):
    """What holds for every round of the network, and what is known of this one.

    Args:
        preset: Name of a row of :data:`assay.poc.PIPELINES`.
        seq_len: Number of positions of a nonce.
        strength: Bits of seed of the inputs.
        r_target: Distance below which a nonce is valid; left out with a preset that publishes vectors.
        node_count: Number of machines of one key among which its nonces are dealt out.
        fewest_nonces: Number of nonces of the smallest proof.
        block_hash: Block of the round, where the file is written for one.
        block_height: Height of that block.
        nonces: Positions ``[first, end]`` in the share that a proof must hold; any consecutive ones when None.
    """

    preset: Text
    seq_len: Count
    strength: Literal[32, 256]
    r_target: Annotated[float, Field(strict=True)] | None = None
    node_count: Count
    fewest_nonces: Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
    block_hash: Text | None = None
    block_height: Index | None = None
    nonces: Annotated[tuple[Index, Index], BeforeValidator(_pair)] | None = None


class NodePins(Table):
    """A node that may prove.

    Args:
        public_key: Key of the node.
        node_id: Share of the node, from 0.
        node_count: Number of machines of this key; that of the round when None.
        build: Name of the build that it runs; any build of the model when None.
    """

    public_key: Text
    node_id: Index
    node_count: Count | None = None
    build: Text | None = None


class PinnedFile(Table):
    """A file beside the pins that must not change.

    Args:
        file: Path, relative to the folder of the pins.
        sha256: SHA-256 of its bytes.
    """

    file: Annotated[str, AfterValidator(_relative)]
    sha256: Sha256

    @classmethod
    def of(cls, path: Path, folder: Path) -> Self:
        """Return what pins a file for pins in a folder.

        Raises:
            DataError: The file cannot be read, or is longer than a calibration.
        """
        return cls(file=os.path.relpath(path, folder), sha256=sha256_of(path))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a calibration file in hex.

    Raises:
        DataError: The file cannot be read, or is longer than a calibration.
    """
    return hashlib.sha256(read_whole(path, LONGEST_CALIBRATION)).hexdigest()


class ModelPins(Table):
    """A model that the network runs.

    Args:
        reference: Name under which requests ask for the model; the digest decides what it is.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode.
        builds: Builds that may prove it.
        calibrations: Files with the honest noise of these builds.
    """

    reference: Text
    digest: Sha256
    weights: Literal["trained", "random-all", "random-embed"] = "trained"
    builds: Annotated[tuple[Build, ...], Field(min_length=1)]
    calibrations: tuple[PinnedFile, ...] = ()


def check_tables(tables: JsonObject, path: str | Path) -> JsonObject:
    """Return the tables of a file without its schema.

    Raises:
        DataError: The schema is another one, or a value is still to be filled in; names the key.
    """
    if type(tables.get("schema")) is not int or tables["schema"] != SCHEMA:
        raise DataError(
            f"{path}: schema {tables.get('schema')!r:.40}",
            wanted=f"schema = {SCHEMA}",
            do="write the file with `assay poc pins new`, or read it with the version that wrote it",
        )
    for place in _unfilled(tables):
        raise DataError(
            f'{path}: {place} is still "{UNFILLED}"',
            wanted="the value that the network agreed on",
            do='write it there; docs/pins.md says where "*" allows any',
        )
    return {name: value for name, value in tables.items() if name != "schema"}


def _unfilled(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unfilled(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unfilled(inner, f"{place}[{index}]")
    elif value == UNFILLED:
        yield place


def fault_of(kind: type[BaseModel], error: ValidationError, path: str | Path) -> DataError:
    """Return the first fault of a file in three parts, naming the key by its place."""
    faults = error.errors(include_url=False)
    fault = next(
        (fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0]
    )  # a mistyped key misses as well
    place = ""
    table: type[BaseModel] | None = kind
    for step in fault["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
            continue
        if table is None:
            break  # the words of a union, which are no keys
        place += f".{step}" if place else step
        kind, table = table, _table_of(table.model_fields[step].annotation) if step in table.model_fields else None
    name, known = str(place.rpartition(".")[2]), list(kind.model_fields)
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(name, known, n=1)
        return DataError(
            f"{path}: unknown key {place}",
            wanted="one of " + ", ".join(known),
            do=f"did you mean {near[0]}?" if near else "remove it",
        )
    if fault["type"] == "missing":
        do = f'write it; {name} = "*" allows any' if kind is Build and name != "dtype" else "write it: see docs/pins.md"
        return DataError(f"{path}: no {place}", wanted="a value for it", do=do)
    wanted = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return DataError(f"{path}: {place} is {fault['input']!r:.60}", wanted=wanted, do="correct it: see docs/pins.md")


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the kind of table that a field holds, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_of(part))), None)
