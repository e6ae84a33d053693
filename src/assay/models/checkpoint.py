"""The weight files of a checkpoint: which ones belong to it, their tensors, and their digest.

Only safetensors is read. The digest is SHA-256 over the sorted names of ``SHA-256(name, dtype,
shape, bytes)`` of each tensor, so it depends neither on how the tensors are spread over files nor
on how they are loaded.
"""

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from assay.errors import BadWeights, DataError, ModelNotFound, UnsafeCheckpoint
from assay.files.jsonl import LONGEST_LINE, parse
from assay.files.reading import read_whole
from assay.files.tensors import check_tensors
from assay.loading_progress import report_progress
from assay.streams.arrays import DTYPES, torch_dtype

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of files that would execute code when they are read."""

EIGHT_BITS = ("F8_E4M3", "I8")
"""Dtypes of weights in eight bits, as the header of a safetensors file has them."""

STORED_DTYPES = dict(zip(("F32", "F16", "BF16"), DTYPES, strict=True))
"""Names of floating dtypes by what the header of a safetensors file calls them."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MISTRAL = "consolidated"
"""Prefix of files in Mistral's own layout, which vLLM prefers and transformers does not read."""
_READ_BY_OTHERS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz")
_PICKLED = ("pytorch_model", "model", _MISTRAL)
"""Prefixes of pickles that are weights; those beside them are a trainer's state."""
_NOT_READ = (_MISTRAL, "adapter_model.")
_TORCH_DTYPES = {name: torch_dtype(dtype) for name, dtype in STORED_DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
}
_READ_DTYPES = {*STORED_DTYPES, *EIGHT_BITS, "BOOL", "I32", "I64"}


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


def bad_weights(seen: str, wanted: str) -> BadWeights:
    """Return the error of a checkpoint that is not as it was published."""
    return BadWeights(seen, wanted=wanted, do="download or save the checkpoint again")


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, sorted; refuse two sets of weights.

    Raises:
        BadWeights: There is a second set of weights, or a file of the index is missing.
        ModelNotFound: There are no weights, or files without an index that says which belong.
        UnsafeCheckpoint: There are only pickles.
    """
    written = _written(directory)
    if (directory / _SINGLE).is_file():
        others = [name for name in written if name != _SINGLE and not name.startswith(_NOT_READ)]
        others += sorted(path.name for path in directory.glob("*.safetensors.index*.json"))
        if others:
            raise _second_set(directory, _SINGLE, others[0])
        return (directory / _SINGLE,)
    index = directory / _INDEX
    if not index.is_file():
        raise _no_weights(directory, written)
    try:
        names = set(_files_by_tensor(directory).values())
        files = tuple(directory / name for name in sorted(names))
    except (DataError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad_weights(f"{index} is unreadable: {error}", "JSON with a weight_map") from error
    for file in files:
        if file.parent != directory or not file.is_file():
            raise bad_weights(
                f"{index} names {file.name!a}, which is not there",
                "every file beside it, spelt to the letter as the index does",
            )
    # Loaders that follow no index take every file whose name begins so.
    others = [name for name in written if name not in names and name.lower().startswith("model")]
    if others:
        raise _second_set(directory, _INDEX, others[0])
    return files


def warn_of_unread(directory: Path, read: Collection[str]) -> None:
    """Warn of files in a folder, or one level below it, that look like weights and are not read."""
    paths = [path for pattern in ("*", "*/*") for path in directory.glob(pattern)]
    like_weights = (path for path in paths if _is_weights(path.name.lower()) and path.is_file())
    names = sorted({str(path.relative_to(directory)) for path in like_weights} - {*read})
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(
            f"{directory} also holds {shown}, which looks like weights and is not read; what is "
            f"measured is {min(read)}",
            stacklevel=2,
        )


def _is_weights(name: str) -> bool:
    is_pickle = name.endswith(PICKLES) and name.startswith(_PICKLED)
    return (is_pickle or name.endswith(_READ_BY_OTHERS)) and not name.startswith(".")


def check_served(directory: Path) -> None:
    """Refuse a folder in which a server such as vLLM would load other weights than are identified.

    vLLM loads the files of Mistral's layout where there are some, and without an index every
    safetensors file.
    """
    files = {file.name for file in weight_files(directory)}
    is_indexed = (directory / _INDEX).is_file()
    for name in _written(directory):
        if name not in files and (name.startswith(_MISTRAL) or not is_indexed):
            raise _second_set(directory, min(files), name)


def _written(directory: Path) -> list[str]:
    """Return the names of all safetensors files in a folder that are not hidden, sorted."""
    names = (path.name for path in directory.iterdir())
    return sorted(
        name for name in names if name.lower().endswith(".safetensors") and name[0] != "."
    )


def _second_set(directory: Path, name: str, second: str) -> BadWeights:
    return BadWeights(
        f"{directory} holds {name} and {second}",
        wanted="one set of weights: loaders choose differently",
        do="move the other file elsewhere",
    )


def _no_weights(directory: Path, written: list[str]) -> ModelNotFound | UnsafeCheckpoint:
    wanted = f"{_SINGLE}, or {_INDEX} with its files"
    pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        return UnsafeCheckpoint(
            f"{directory} holds only a pickle ({pickles[0]}), which would execute code when it is "
            f"read",
            wanted=wanted,
            do="convert it on a machine you can afford to lose: model.save_pretrained writes "
            "safetensors",
        )
    seen = f"{written[0]} and no file that says what belongs to it" if written else "no weights"
    return ModelNotFound(
        f"{directory} holds {seen}",
        wanted=wanted,
        do="check that the download or the save was complete",
    )


def _files_by_tensor(directory: Path) -> dict[str, str]:
    """Return the file of every tensor by the index of a directory."""
    return dict(parse(read_whole(directory / _INDEX, LONGEST_LINE).decode())["weight_map"])


def find_file(directory: Path, tensors: Mapping[str, StoredTensor], name: str) -> Path:
    """Return the file of a tensor; for a missing one, where the index places it, else the index."""
    if name in tensors:
        return tensors[name].file
    if (directory / _SINGLE).is_file():
        return directory / _SINGLE
    return directory / _files_by_tensor(directory).get(name, _INDEX)


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
    try:
        check_tensors(file)
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - no mapping
                view = reader.get_slice(name)
                yield StoredTensor(file, name, view.get_dtype(), tuple(view.get_shape()))
    except (SafetensorError, OSError, DataError) as error:
        reason = error.seen if isinstance(error, DataError) else error
        raise bad_weights(
            f"{file} is corrupt or cut short: {reason}", "a whole safetensors file"
        ) from error


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
