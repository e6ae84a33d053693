"""GGUF files, as llama.cpp writes them: a header that is read with bounds, and the checkpoint folder made of a file.

transformers reads a file and restores its numbers in float32. They are written once, as safetensors with configuration
and tokenizer, to a folder in the user's cache, and everything else reads that folder: so digests, tokenizers, stop
tokens and servers of vLLM are as for any checkpoint. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import importlib.util
import math
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from assay.errors import (
    BackendUnavailable,
    BadWeights,
    ModelError,
    ModelNotFound,
    StorageError,
    how_to_install,
    is_out_of_memory,
)
from assay.models.checkpoint import auto_class, build, read_tokenizer, silence_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUFFIX = ".gguf"

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9  # types of values without a code
_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS = 2**12, 2**16, 2**21  # the largest vocabularies have 2**18 tokens
_LONGEST_TEXT = 2**22  # bytes of a name, or of a chat template
_EMPTY = (0, False, "", "none", None)
# What else a header may say of an architecture: the setting of transformers that must have the same value.
_SAME_AS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "logit_scale": "logit_scale",
    "attention.causal": "use_cache",  # true for every decoder
}


@dataclass(frozen=True)
class Header:
    """What the header of a GGUF file says.

    Attributes:
        values: Numbers and texts by key; of an array, the number of its items as a text.
        tensors: Shape of every tensor by name, in the order of the file, which is the reverse of torch's.
    """

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or that a folder without safetensors holds; refuse to choose among several.

    Raises:
        ModelError: The folder holds several.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        seen, do = f"{path} holds {len(files)} GGUF files", f"pass one of them, such as {files[0]}"
        raise ModelError(seen, wanted="one file with the whole model", do=do)
    return files[0]


def find_in_wheel(reference: str, package: str, install: str) -> Path:
    """Return the one GGUF file inside an installed package, which is not imported: its own needs may be missing.

    Raises:
        ModelNotFound: The package is not installed; names the command.
    """
    spec = importlib.util.find_spec(package)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if len(files) != 1:
        seen = f"the weights of {reference} are not installed"
        raise ModelNotFound(seen, wanted=f"the package {package} with its GGUF file", do=f"run {install}")
    return files[0]


def read_header(file: Path) -> Header:
    """Return the header of a GGUF file, whose counts and lengths are claims until they have been checked.

    Raises:
        BackendUnavailable: The package gguf is missing.
        BadWeights: The file is cut short, no GGUF, or states what cannot be.
        ModelError: A tensor is in a format that the package gguf does not restore.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError as error:
        seen, do = f"{file} is a GGUF file, and the package gguf is missing", how_to_install("smollm2")
        raise BackendUnavailable(seen, wanted="gguf 0.17 or newer", do=do) from error
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor, total = _Cursor(data), len(data)
            values, infos = _read_values(cursor)
            alignment = int(values.get("general.alignment", 32))
            if alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"an alignment of {alignment}")
            start = -(-cursor.place // alignment) * alignment
            for name, (shape, kind, offset) in infos.items():
                form = GGMLQuantizationType(kind)
                numbers, size = GGML_QUANT_SIZES[form]
                if shape[0] % numbers or start + offset + math.prod(shape) // numbers * size > total:
                    raise ValueError(f"{name!r:.80} of shape {list(shape)} does not fit")
    except (ValueError, OSError, struct.error) as error:
        seen = f"{file} is no whole GGUF file: {error!s:.200}"
        raise BadWeights(seen, wanted="the file as it was published", do="download it again") from error
    for form in sorted({GGMLQuantizationType(kind) for _, kind, _ in infos.values()}):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[form][1]), np.uint8), form)
        except NotImplementedError as error:
            raise ModelError(
                f"{file} has tensors in {form.name}",
                wanted="a format that the package gguf restores",
                do="update gguf, or take the file in another format, such as Q8_0",
            ) from error
    return Header(values, {name: shape for name, (shape, _, _) in infos.items()})


class _Cursor:
    """A place in the bytes of a header, which never passes their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def skip(self, size: int) -> int:
        start = self.place
        if size > len(self.data) - start:
            raise ValueError("it ends inside its header")
        self.place += size
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int, what: str) -> int:
        count = int(self.number("Q"))
        if count > most:
            raise ValueError(f"{count} {what}, more than {most}")
        return count

    def text(self) -> str:
        size = self.count(_LONGEST_TEXT, "bytes of text")
        start = self.skip(size)
        return self.data[start : start + size].decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        kind, count = self.number("I"), self.count(_MOST_ITEMS, "items")
        if kind == _TEXT:
            for _ in range(count):
                self.skip(self.count(_LONGEST_TEXT, "bytes of text"))
        else:
            self.skip(count * struct.calcsize(f"<{_code(kind)}"))
        return f"an array of {count}"


def _code(kind: int) -> str:
    if kind not in _CODES:
        raise ValueError(f"a value of type {kind}")
    return _CODES[kind]


def _read_values(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """Return the values of a header, and shape, format and offset of every tensor."""
    if cursor.data[:4] != b"GGUF" or (cursor.skip(4) or cursor.number("I")) not in (2, 3):
        raise ValueError("it does not begin as a GGUF file of version 2 or 3 does")
    tensors, keys = cursor.count(_MOST_TENSORS, "tensors"), cursor.count(_MOST_KEYS, "keys")
    values: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text()
        if name in values:
            raise ValueError(f"the key {name!r:.80} twice")
        values[name] = cursor.value()
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name, axes = cursor.text(), cursor.number("I")
        if name in infos or not 1 <= axes <= 4:
            raise ValueError(f"the tensor {name!r:.80} twice, or with {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))
        infos[name] = (shape, cursor.number("I"), cursor.number("Q"))
    if not infos:
        raise ValueError("it holds no tensor")
    return values, infos


def read_published(file: Path, header: Header) -> dict[str, Any]:
    """Return the configuration that transformers makes of a header, as the object of a ``config.json``.

    Raises:
        ModelError: The file is a part, no model, or of an architecture that transformers does not read from GGUF.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    kind, parts = header.values.get("general.type", "model"), header.values.get("split.count", 0)
    if kind != "model" or parts not in (0, 1):
        seen = f"{file} is a GGUF file of type {kind!r:.40}" if kind != "model" else f"{file} is one of {parts} parts"
        raise ModelError(seen, wanted="one file with the whole model", do="join its parts, or take another file")
    try:
        published: dict[str, Any] = load_gguf_checkpoint(str(file))["config"]  # type: ignore[no-untyped-call]
    except Exception as error:  # the library fails on unusual values with exceptions of many kinds
        raise ModelError(
            f"{file} of architecture {header.values.get('general.architecture')!r:.60} is not read: {error!s:.200}",
            wanted="an architecture that this version of transformers reads from GGUF",
            do="update transformers, or use the checkpoint as safetensors",
        ) from error
    return published


def check_covered(file: Path, header: Header, config: "PreTrainedConfig", parameters: int) -> None:
    """Refuse a file of which transformers would pass over a part: a setting, or tensors.

    Rope scaling is such a part, stated as keys or, for Llama 3.1, as a tensor of factors.

    Args:
        file: File of the header.
        header: Header of the file.
        config: Configuration that transformers made of it.
        parameters: Numbers in the model of that configuration, a tied matrix once.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture, kind = str(header.values["general.architecture"]), str(config.model_type).removesuffix("_text")
    known: dict[str, Any] = GGUF_CONFIG_MAPPING
    read = known.get(architecture, {}) | known.get(kind, {})
    same = {name: getattr(config, setting, None) for name, setting in _SAME_AS.items()}
    if same["rope.dimension_count"] is None:  # an architecture without a setting for it
        width = config.hidden_size // config.num_attention_heads
        same |= {name: width for name, setting in _SAME_AS.items() if setting == "head_dim"}
    do = "use the checkpoint as safetensors"
    for key, value in header.values.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or read.get(name) or value in _EMPTY:
            continue
        if name not in same or value != same[name]:
            seen = f"{file} says {key} = {value!r:.60}, which transformers does not read"
            raise ModelError(seen, wanted="a model that is computed as its file says", do=do)
    stored = sum(math.prod(shape) for shape in header.tensors.values())
    if stored != parameters:
        odd = [name for name in header.tensors if not name.startswith(("blk.", "output", "token_embd"))]
        also = f", among them {odd[0]!r:.60}" if odd else ""
        seen = f"{file} stores {stored} numbers{also}, and its configuration has {parameters}"
        raise BadWeights(seen, wanted="exactly the tensors of the configuration", do=do)


def folder_of(file: Path) -> Path:
    """Return where the checkpoint folder of a GGUF file is, or will be: it is named after what is read, and by what."""
    with file.open("rb") as opened:
        name = f"{hashlib.file_digest(opened, 'sha256').hexdigest()}-{version('transformers')}-{version('gguf')}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay" / "gguf" / name


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint folder is there; it is made under another name."""
    return (folder / "config.json").is_file()


def convert(file: Path, config: "PreTrainedConfig", folder: Path) -> None:
    """Make the checkpoint folder of a GGUF file: configuration, tokenizer, and its numbers in float32.

    Everything that :func:`read_header`, :func:`read_published` and :func:`check_covered` refuse was refused before.

    Raises:
        ModelError: The tokenizer or the weights are not read.
        OutOfMemory, StorageError: There is no room.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as work:
            alone, made = Path(work) / "alone", Path(work) / "made"  # other files beside it are not read
            alone.mkdir()
            (alone / "model.gguf").symlink_to(file.resolve())
            with silence_transformers(), np.errstate(all="ignore"):
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
                tokenizer.clean_up_tokenization_spaces = False  # which would drop spaces of a decoded text
                read, report = auto_class(config).from_pretrained(
                    alone, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
                )
                odd = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()]
                if odd:
                    raise ValueError(f"{odd[0]} is missing, or of another shape")
                module = build(config, torch.float32)  # the one that was read counts as quantised, and is not saved
                cast("nn.Module", module).load_state_dict(read.state_dict(), assign=True)
                module.tie_weights()
                module.save_pretrained(made)
                tokenizer.save_pretrained(made)
            read_tokenizer(made)
            made.chmod(0o755)
            made.rename(folder)
    except (OSError, SafetensorError) as error:
        if is_whole(folder):  # another process made it meanwhile
            return
        do = "make room there, or name another cache in XDG_CACHE_HOME"
        raise StorageError(f"{folder} cannot be written: {error}", wanted="room and permission", do=do) from error
    except ModelError:
        raise
    except Exception as error:  # the library fails on unusual values with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        seen, do = f"{file} does not load: {error!s:.300}", "download it again, or use the checkpoint as safetensors"
        raise BadWeights(seen, wanted="weights and a tokenizer that transformers reads", do=do) from error
