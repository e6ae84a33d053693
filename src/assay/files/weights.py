"""Which safetensors files of a folder are the weights of its checkpoint, found without torch."""

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from os import SEEK_END
from pathlib import Path

from safetensors import SafetensorError, safe_open

from assay.errors import BadWeights, DataError, ModelNotFound, UnsafeCheckpoint
from assay.files.jsonl import LONGEST_LINE, parse
from assay.files.reading import malformed, read_whole
from assay.files.tensors import check_tensors

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of files that would execute code when they are read."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MISTRAL = "consolidated"
"""Prefix of files in Mistral's own layout, which vLLM prefers and transformers does not read."""
_READ_BY_OTHERS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz")
_PICKLED = ("pytorch_model", "model", _MISTRAL)
"""Prefixes of pickles that are weights; those beside them are a trainer's state."""
_NOT_READ = (_MISTRAL, "adapter_model.")
_STATE = re.compile(r"optimizer|scheduler|scaler|rng_state|training_|trainer_|events\.")
"""Prefixes of what a trainer keeps beside weights."""
_BEGINS = re.compile(rb"GGUF|PK\x03\x04|\x80[\x02-\x05]|\x89HDF|\x93NUMPY")
"""How files of GGUF, archives of torch and numpy, pickles, and HDF5 begin."""
# How pictures, films, sounds, PDF, SentencePiece and the settings of a folder begin.
_KNOWN = re.compile(rb"(?s)\x89PNG|\xff\xd8\xff|GIF8|RIFF|....ftyp|ID3|%PDF|\n.\n|\0\0\0\x01Bud1")
_LOOKED_AT = 4096  # bytes of a file
_READABLE = 0.7  # share of bytes that any text has in UTF-8
# Names of texts that libraries read whole.
_TEXTS = re.compile(r"(?!trainer_).*\.(json|txt|jinja|model|tiktoken)$")
_LONGEST_HEADER = 2**27  # bytes of a header of safetensors
_LARGE = 2**26  # bytes of a file that is no text of a tokenizer
_MOST_FILES = 10_000  # of a folder that are looked at


def bad_weights(seen: str, wanted: str) -> BadWeights:
    """Return the error of a checkpoint that is not as it was published."""
    return BadWeights(seen, wanted=wanted, do="download or save the checkpoint again")


@contextmanager
def refuse_corrupt(file: Path) -> Iterator[None]:
    """Raise BadWeights in place of the errors of a safetensors file that is not whole."""
    try:
        yield
    except (SafetensorError, OSError, DataError) as error:
        reason = error.seen if isinstance(error, DataError) else error
        raise bad_weights(
            f"{file} is corrupt or cut short: {reason}", "a whole safetensors file"
        ) from error


def check_weights(directory: Path) -> None:
    """Refuse a checkpoint whose files are missing or cut short; only names and headers are read.

    Raises:
        ModelError: As of :func:`weight_files`, or a file is not whole.
    """
    for file in weight_files(directory):
        with refuse_corrupt(file):
            check_tensors(file)
            with safe_open(file, framework="np"):
                pass


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, sorted; refuse two sets of weights.

    Raises:
        BadWeights: There is a second set of weights, or a file of the index is missing.
        ModelNotFound: There are no weights, or files without an index that says which belong.
        UnsafeCheckpoint: There are only pickles.
    """
    written = _written(directory)
    if (directory / SINGLE).is_file():
        others = [name for name in written if name != SINGLE and not name.startswith(_NOT_READ)]
        others += sorted(path.name for path in directory.glob("*.safetensors.index*.json"))
        if others:
            raise _second_set(directory, SINGLE, others[0])
        return (directory / SINGLE,)
    index = directory / INDEX
    if not index.is_file():
        raise _no_weights(directory, written)
    try:
        names = set(files_by_tensor(directory).values())
        files = tuple(directory / name for name in sorted(names))
        absent = [file for file in files if file.parent != directory or not file.is_file()]
    # Of names that are longer than a file system takes, too.
    except (
        DataError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise bad_weights(f"{index} is unreadable: {error}", "JSON with a weight_map") from error
    if absent:
        raise bad_weights(
            f"{index} names {absent[0].name!a}, which is not there",
            "every file beside it, spelt to the letter as the index does",
        )
    # Loaders that follow no index take every file whose name begins so.
    others = [name for name in written if name not in names and name.lower().startswith("model")]
    if others:
        raise _second_set(directory, INDEX, others[0])
    return files


def warn_of_unread(directory: Path, read: Collection[str]) -> None:
    """Warn of files in a folder, at any depth, that are weights by name or content and not read."""
    names = []
    for path in islice(directory.rglob("*"), _MOST_FILES):
        name = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in name.parts[:-1])
        if not (is_hidden or str(name) in read) and path.is_file() and _is_weights(path):
            names.append(str(name))
    if names:
        shown = ", ".join(map(ascii, sorted(names)[:3])) + (", …" if len(names) > 3 else "")
        warnings.warn(
            f"{directory} also holds {shown}, which looks like weights and is not read; what is "
            f"measured is {min(read)!a}",
            stacklevel=2,
        )


def _is_weights(path: Path) -> bool:
    name = path.name.lower()
    is_pickle = name.endswith(PICKLES) and name.startswith(_PICKLED)
    if is_pickle or (name.endswith(_READ_BY_OTHERS) and name[0] != "."):
        return True
    with suppress(OSError), path.open("rb") as file:
        head = file.read(_LOOKED_AT)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER:
            return True
        # Raw numbers have zeros, or bytes that are no text.
        readable = len(head.decode(errors="ignore").encode()) >= _READABLE * len(head)
        is_known = _KNOWN.match(head) or (readable and b"\0" not in head)
        is_weights = not is_known or _BEGINS.match(head) or file.seek(0, SEEK_END) > _LARGE
        return bool(is_weights and not _STATE.match(name))
    return False


def check_texts(directory: Path) -> None:
    """Refuse settings and tokenizers of more than 64 MiB, which may be sparse, as a DataError."""
    for path in directory.iterdir():
        if _TEXTS.match(path.name) and path.is_file() and path.stat().st_size > LONGEST_LINE:
            raise malformed(path, f"longer than {LONGEST_LINE} bytes", "a smaller file")


def check_served(directory: Path) -> None:
    """Refuse a folder in which a server such as vLLM would load other weights than are identified.

    vLLM loads the files of Mistral's layout where there are some, and without an index every
    safetensors file.
    """
    files = {file.name for file in weight_files(directory)}
    is_indexed = (directory / INDEX).is_file()
    for name in _written(directory):
        if name not in files and (name.startswith(_MISTRAL) or not is_indexed):
            raise _second_set(directory, min(files), name)


def _written(directory: Path) -> list[str]:
    """Return the names of all safetensors files in a folder that are not hidden, sorted."""
    names = (path.name for path in directory.iterdir())
    return sorted(name for name in names if re.match(r"(?is)[^.].*\.safetensors\Z", name))


def _second_set(directory: Path, name: str, second: str) -> BadWeights:
    return BadWeights(
        f"{directory} holds {name} and {second}",
        wanted="one set of weights: loaders choose differently",
        do="move the other file elsewhere",
    )


def _no_weights(directory: Path, written: list[str]) -> ModelNotFound | UnsafeCheckpoint:
    wanted = f"{SINGLE}, or {INDEX} with its files"
    pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        return UnsafeCheckpoint(
            f"{directory} holds only a pickle ({pickles[0]}), which would execute code when it is "
            f"read",
            wanted=wanted,
            do="convert it on a machine you can afford to lose: model.save_pretrained writes "
            "safetensors",
        )
    return ModelNotFound(
        f"{directory} holds " + (f"{written[0]} without an index" if written else "no weights"),
        wanted=wanted,
        do="check that the download or the save was complete",
    )


def files_by_tensor(directory: Path) -> dict[str, str]:
    """Return the file of every tensor by the index of a directory."""
    return dict(parse(read_whole(directory / INDEX, LONGEST_LINE).decode())["weight_map"])
