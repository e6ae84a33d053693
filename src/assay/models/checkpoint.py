"""The weight files of a checkpoint: their tensors, the check that they are all of it, their digest.

Only safetensors is read. The digest is SHA-256 over the sorted names of ``SHA-256(name, dtype,
shape, bytes)`` of each tensor, so it depends neither on how the tensors are spread over files nor
on how they are loaded.

Reading and hashing a large checkpoint takes minutes, so what cannot be loaded is refused before, by
headers alone.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from assay.errors import BadWeights
from assay.files.tensors import check_tensors
from assay.files.weights import (
    INDEX,
    SINGLE,
    bad_weights,
    files_by_tensor,
    refuse_corrupt,
    warn_of_unread,
    weight_files,
)
from assay.loading_progress import report_progress
from assay.models.configuration import build_empty
from assay.models.resolve import ModelSource
from assay.streams.arrays import DTYPES, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EIGHT_BITS = ("F8_E4M3", "I8")
"""Dtypes of weights in eight bits, as the header of a safetensors file has them."""

STORED_DTYPES = dict(zip(("F32", "F16", "BF16"), DTYPES, strict=True))
"""Names of floating dtypes by what the header of a safetensors file calls them."""

_TORCH_DTYPES = {name: torch_dtype(dtype) for name, dtype in STORED_DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
}
_READ_DTYPES = {*STORED_DTYPES, *EIGHT_BITS, "BOOL", "I32", "I64"}

_FAULTS = {
    "mismatched_keys": "of another shape",
    "missing_keys": "missing",
    "unexpected_keys": "surplus",
}
"""Faults by the key under which transformers reports them."""

_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Buffers in old files, which transformers skips."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def to_meta(self) -> torch.Tensor:
        """Return an empty tensor on the meta device; int64 stands for dtypes weights never have."""
        return torch.empty(
            self.shape, dtype=_TORCH_DTYPES.get(self.dtype, torch.int64), device="meta"
        )


def find_file(directory: Path, tensors: Mapping[str, StoredTensor], name: str) -> Path:
    """Return the file of a tensor; for a missing one, where the index places it, else the index."""
    if name in tensors:
        return tensors[name].file
    if (directory / SINGLE).is_file():
        return directory / SINGLE
    return directory / files_by_tensor(directory).get(name, INDEX)


def list_tensors(directory: Path) -> list[StoredTensor]:
    """Return every tensor of a checkpoint, sorted by name; only headers are read.

    Raises:
        BadWeights: A file is corrupt, a name is there twice, or a dtype is not read.
    """
    files = weight_files(directory)
    warn_of_unread(directory, {file.name for file in files})
    headers = [tensor for file in files for tensor in _read_headers(file)]
    tensors = sorted(headers, key=lambda tensor: tensor.name)
    counts = Counter(tensor.name for tensor in tensors)
    duplicates = [name for name, count in counts.items() if count > 1]
    if duplicates or not tensors:
        fault = f"{duplicates[0]!r} twice" if duplicates else "no tensor"
        raise bad_weights(f"{directory} holds {fault}", "every tensor of the model once")
    for tensor in tensors:
        if tensor.dtype not in _READ_DTYPES:
            raise BadWeights(
                f"{tensor.file} stores {tensor.name!r} as {tensor.dtype}",
                wanted="float32, float16 or bfloat16, or a quantised format of docs/models.md",
                do="use the checkpoint before quantisation",
            )
    return tensors


def _read_headers(file: Path) -> Iterator[StoredTensor]:
    with refuse_corrupt(file):
        check_tensors(file)
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - no mapping
                view = reader.get_slice(name)
                yield StoredTensor(file, name, view.get_dtype(), tuple(view.get_shape()))


def check_headers(source: ModelSource, tensors: list[StoredTensor]) -> None:
    """Refuse tensors that are not those of the configuration, or are in eight bits without reason.

    Where tensors are both missing and surplus, names may be of an older layout that transformers
    converts: that is left to the load.
    """
    for tensor in tensors:
        if tensor.dtype in EIGHT_BITS:
            raise bad_weights(
                f"{tensor.file} stores {tensor.name!r} as {tensor.dtype}, and config.json has no "
                f"quantization_config",
                "a configuration that says how they are used",
            )
    module = build_empty(source.config)
    inside: dict[str, torch.Tensor] = module.state_dict()
    shapes = _shapes_in_files(module, inside)
    stored = {tensor.name: tensor for tensor in tensors}
    names = {name for name, _ in module.named_parameters()}
    # A tied matrix has two names, and need not be stored under the second.
    seconds = {name for name, _ in module.named_parameters(remove_duplicate=False)} - names
    tied = _shapes_in_files(module, {name: inside[name] for name in seconds}).keys()
    ignored = [_SKIPPED, *map(re.compile, module._keys_to_ignore_on_load_unexpected or ())]
    shaped = sorted(
        name for name in stored.keys() & shapes.keys() if stored[name].shape != shapes[name]
    )
    missing = sorted(shapes.keys() - stored.keys() - tied)
    surplus = [
        name
        for name in sorted(stored.keys() - shapes.keys() - tied)
        if not any(pattern.search(name) for pattern in ignored)
    ]
    if shaped:
        name = shaped[0]
        difference = f": {list(stored[name].shape)}, not {list(shapes[name])}"
        raise _misfit(str(stored[name].file), "mismatched_keys", shaped, difference)
    if missing and not surplus:
        file = find_file(source.checkpoint, stored, missing[0])
        raise _misfit(str(file), "missing_keys", missing)
    if surplus and not missing:
        raise _misfit(str(stored[surplus[0]].file), "unexpected_keys", surplus)


def check_report(reference: str, report: Mapping[str, Any]) -> None:
    """Refuse the misfits that transformers reports of a load, which headers did not show."""
    for key in _FAULTS:
        entries = report.get(key) or ()
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries)
        if names:
            raise _misfit(repr(reference), key, names)


def _shapes_in_files(
    module: "PreTrainedModel", inside: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's tensors by their names in a file, as transformers writes it
    today.
    """
    inside = {name: tensor.to("meta") for name, tensor in inside.items()}
    # Another version of transformers, or experts that it cannot take apart.
    with suppress(Exception):
        from transformers.core_model_loading import revert_weight_conversion

        inside = revert_weight_conversion(module, inside)
    return {name: tuple(tensor.shape) for name, tensor in inside.items()}


def _misfit(where: str, key: str, names: list[str], difference: str = "") -> BadWeights:
    tensors = f"{len(names)} tensors are" if len(names) > 1 else "a tensor is"
    return BadWeights(
        f"{where}: {tensors} {_FAULTS[key]}, the first is {names[0]!r}{difference}",
        wanted="exactly the tensors of the configuration",
        do="download or save the checkpoint again; a fused or quantised layout is not read",
    )


def stored_dtype(tensors: list[StoredTensor]) -> torch.dtype:
    """Return the floating dtype in which most of the values are stored."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += math.prod(tensor.shape) * (tensor.dtype in STORED_DTYPES)
    return torch_dtype(STORED_DTYPES.get(sizes.most_common(1)[0][0], "float32"))


def digest_tensors(tensors: list[StoredTensor], quantisation: object = None) -> str:
    """Return the SHA-256 in hex of all tensors and of how quantised ones are used.

    Every value must be finite, or it raises BadWeights.
    """
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    digest = hashlib.sha256()
    hashed = 0
    # Tensors are hashed side by side, and their hashes joined in the order of names.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, tensor in zip(pool.map(_digest_tensor, tensors), tensors, strict=True):
            digest.update(part)
            hashed += math.prod(tensor.shape)
            report_progress("reading weights", hashed, total)
    if quantisation is not None:
        digest.update(json.dumps(quantisation, sort_keys=True).encode())
    return digest.hexdigest()


def _digest_tensor(stored: StoredTensor) -> bytes:
    with safe_open(stored.file, framework="pt") as reader:
        tensor = reader.get_tensor(stored.name)
    check_finite(stored.name, tensor, str(stored.file))
    digest = hashlib.sha256(f"{stored.name}\n{stored.dtype}\n{list(stored.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raise BadWeights if a tensor holds NaN or infinity.

    One pass without a temporary: minimum and maximum are finite only if every value is, for NaN
    propagates.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # Without infinity, and without a minimum in torch.
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = torch.where(tensor.view(torch.uint8) % 128 == 127, torch.nan, 0.0)
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise bad_weights(f"{where}: {name!r} holds NaN or infinity", "finite weights")
