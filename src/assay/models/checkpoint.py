"""A checkpoint directory: its weight files, their tensors, their digest. Only safetensors is read.

The digest is SHA-256 over the sorted names of ``SHA-256(name, dtype, shape, bytes)`` of each tensor, so it depends
neither on how the tensors are spread over files nor on how they are loaded.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from assay.errors import BadWeights, ModelNotFound, UnsafeCheckpoint
from assay.streams.backends import DTYPES, torch_dtype

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Ends of the names of files that would execute code when they are read."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
EIGHT_BITS = ("F8_E4M3", "I8")
"""Dtypes of weights in eight bits, as the header of a safetensors file has them."""

STORED_DTYPES = dict(zip(("F32", "F16", "BF16"), DTYPES, strict=True))  # by their names in a safetensors header
_DTYPES = {name: torch_dtype(dtype) for name, dtype in STORED_DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
}
_OTHERS = {"BOOL", "I32", "I64", *EIGHT_BITS}
_DO = "download or save the checkpoint again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def without_numbers(self) -> torch.Tensor:
        """Return a tensor of this shape on the meta device, in int64 where weights have no such dtype."""
        return torch.empty(self.shape, dtype=_DTYPES.get(self.dtype, torch.int64), device="meta")


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, sorted.

    Raises:
        UnsafeCheckpoint: The directory holds only pickles.
        ModelNotFound: The directory holds no weights.
        BadWeights: The index is unreadable or names a file that is missing.
    """
    if (directory / _SINGLE).is_file():
        return (directory / _SINGLE,)
    if (directory / _INDEX).is_file():
        return _indexed_files(directory)
    pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        raise UnsafeCheckpoint(
            f"{directory} holds only a pickle ({pickles[0]}), which would execute code when it is read",
            wanted=f"{_SINGLE}, or {_INDEX} with its files",
            do="convert it on a machine you can afford to lose: model.save_pretrained writes safetensors",
        )
    raise ModelNotFound(
        f"{directory} holds no weights",
        wanted=f"{_SINGLE}, or {_INDEX} with its files",
        do="check that the download or the save was complete",
    )


def _indexed_files(directory: Path) -> tuple[Path, ...]:
    index = directory / _INDEX
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = tuple(directory / name for name in sorted(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadWeights(f"{index} is unreadable: {error}", wanted="JSON with a weight_map", do=_DO) from error
    for file in files:
        if file.parent != directory or not file.is_file():
            raise BadWeights(f"{index} names {file.name}, which is not there", wanted="every file beside it", do=_DO)
    return files


def find_file(directory: Path, tensors: Mapping[str, Stored], name: str) -> Path:
    """Return the file of a tensor; of one that is missing, the file in which the index has it, or else the index."""
    if name in tensors:
        return tensors[name].file
    if (directory / _SINGLE).is_file():
        return directory / _SINGLE
    placed = json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"].get(name)
    return directory / (_INDEX if placed is None else placed)


def list_tensors(directory: Path) -> list[Stored]:
    """Return every tensor of a checkpoint, sorted by name; only headers are read.

    Raises:
        BadWeights: A file is corrupt or cut short, a name occurs twice, or a dtype is not supported.
    """
    tensors = sorted((t for file in weight_files(directory) for t in _headers(file)), key=lambda t: t.name)
    twice = [name for name, count in Counter(t.name for t in tensors).items() if count > 1]
    if twice or not tensors:
        seen = f"{directory} holds {twice[0]!r} twice" if twice else f"{directory} holds no tensor"
        raise BadWeights(seen, wanted="every tensor of the model once", do=_DO)
    for tensor in tensors:
        if tensor.dtype not in STORED_DTYPES and tensor.dtype not in _OTHERS:
            raise BadWeights(
                f"{tensor.file} stores {tensor.name!r} as {tensor.dtype}",
                wanted="float32, float16 or bfloat16, or a quantised format of docs/models.md",
                do="use the checkpoint before quantisation",
            )
    return tensors


def _headers(file: Path) -> Iterator[Stored]:
    try:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - no mapping
                view = reader.get_slice(name)
                yield Stored(file, name, view.get_dtype(), tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise BadWeights(
            f"{file} is corrupt or cut short: {error}", wanted="a whole safetensors file", do=_DO
        ) from error


def stored_dtype(tensors: list[Stored]) -> torch.dtype:
    """Return the floating dtype in which most of the values are stored."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel() * (tensor.dtype in STORED_DTYPES)
    return torch_dtype(STORED_DTYPES.get(sizes.most_common(1)[0][0], "float32"))


def digest_tensors(tensors: list[Stored], quantisation: object = None) -> str:
    """Return the SHA-256 of all tensors, and of how quantised ones are used, in hex; every value must be finite.

    Raises:
        BadWeights: A tensor holds NaN or infinity.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(_digest_tensor, tensors)
        said = b"" if quantisation is None else json.dumps(quantisation, sort_keys=True).encode()
        return hashlib.sha256(b"".join(parts) + said).hexdigest()


def _digest_tensor(stored: Stored) -> bytes:
    with safe_open(stored.file, framework="pt") as reader:
        tensor = reader.get_tensor(stored.name)
    check_finite(stored.name, tensor, str(stored.file))
    digest = hashlib.sha256(f"{stored.name}\n{stored.dtype}\n{list(stored.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raise BadWeights if a tensor holds NaN or infinity.

    One pass without a temporary: minimum and maximum are finite only if every value is, for NaN propagates.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype == torch.float8_e4m3fn:  # without infinity, and without a minimum in torch
        tensor = torch.where(tensor.view(torch.uint8) % 128 == 127, torch.nan, 0.0)
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise BadWeights(f"{where}: {name!r} holds NaN or infinity", wanted="finite weights", do=_DO)


# --------------------------------------------------------------------------------------------------
# How PEFT names the files of a LoRA adapter, and the tensors in them.

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the two files of an adapter, as peft writes them."""

PREFIX = "base_model.model."
"""What stands before the name that a module has in the model."""

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""What follows that name for A [R, I] and B [O, R] of the product B A."""
