"""GGUF files, as llama.cpp writes them: where they are, a header that is read with bounds, and what
it leaves out.

transformers reads a file and restores its numbers in float32. They are written once, as safetensors
with configuration and tokenizer, to a folder in the user's cache, and everything else reads that
folder: so digests, tokenizers, stop tokens and servers of vLLM are as for any checkpoint. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import importlib.util
import math
import mmap
import os
import struct
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.errors import BackendUnavailable, BadWeights, ModelError, ModelNotFound, how_to_install

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Values = dict[str, Any]
"""Numbers and texts of a header by key; of an array, ``an array of`` so many."""
Shapes = dict[str, tuple[int, ...]]
"""Shape of every tensor by its name in the file, in the file's order of axes, which is the reverse
of torch's.
"""

_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # as of struct
_TEXT = 8
_ARRAY = 9  # types of values without a code
_MOST_KEYS = 2**12
_MOST_TENSORS = 2**16
_MOST_ITEMS = 2**21  # the largest vocabularies have 2**18 tokens
_LONGEST_TEXT = 2**22
_LONGEST_HEADER = 2**27  # bytes of a name or a chat template, and of everything
_MADE = 2  # a higher number where the folder of the same file is made in another way
# What transformers passes over in a header: the setting that must have the same value all the same.
_SAME_AS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "logit_scale": "logit_scale",
}


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or that a folder without safetensors holds; refuse to
    choose among several.

    Raises:
        ModelError: The folder holds several.
    """
    files = [path] if path.is_file() else sorted(path.iterdir())
    found = [file for file in files if file.suffix.lower() == ".gguf"]
    if len(found) > 1 and not any(path.glob("*.safetensors")):
        seen = f"{path} holds {len(found)} GGUF files"
        do = f"pass one of them, such as {found[0]}"
        raise ModelError(seen, wanted="one file with the whole model", do=do)
    return found[0] if found and not any(path.glob("*.safetensors")) else None


def find_in_wheel(reference: str, package: str, install: str) -> Path:
    """Return the one GGUF file inside an installed package, which is not imported: its own needs
    may be missing.

    Raises:
        ModelNotFound: The package is not installed; names the command.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        seen = f"the weights of {reference} are not installed"
        raise ModelNotFound(
            seen, wanted=f"the package {package} with its GGUF file", do=f"run {install}"
        )
    return files[0]


def read_header(file: Path) -> tuple[Values, Shapes]:
    """Return the header of a GGUF file, whose counts and lengths are claims until they have been
    checked.

    Raises:
        BackendUnavailable: The package gguf is missing.
        BadWeights: The file is cut short, no GGUF, or states what cannot be.
        ModelError: A tensor is in a format that the package gguf does not restore.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError as error:
        seen = f"{file} is a GGUF file, and the package gguf is missing"
        do = how_to_install("smollm2")
        raise BackendUnavailable(seen, wanted="gguf 0.17 or newer", do=do) from error
    shapes: Shapes = {}
    forms = set()
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            cursor = _Cursor(data)
            if cursor.take(4) != b"GGUF" or cursor.number("I") not in (2, 3):
                raise ValueError("it does not begin as a GGUF file of version 2 or 3 does")
            tensors = cursor.count(_MOST_TENSORS)
            keys = cursor.count(_MOST_KEYS)
            values = {cursor.text(): cursor.value() for _ in range(keys)}
            for _ in range(tensors):
                name = cursor.text()
                axes = cursor.number("I")
                shape = shapes[name] = tuple(cursor.number("Q") for _ in range(min(axes, 5)))
                form = GGMLQuantizationType(cursor.number("I"))
                offset = cursor.number("Q")
                numbers, size = GGML_QUANT_SIZES[form]
                fits = offset + math.prod(shape) // numbers * size <= len(data) - cursor.place
                if not (1 <= axes <= 4 and shape[0] % numbers == 0 and fits):
                    raise ValueError(f"{name!r:.80} of shape {list(shape)} does not fit")
                forms.add(form)
            if not tensors or (len(values), len(shapes)) != (keys, tensors):
                raise ValueError("it holds no tensor, or a name twice")
    except (ValueError, OSError) as error:
        seen = f"{file} is no whole GGUF file: {error!s:.200}"
        raise BadWeights(
            seen, wanted="the file as it was published", do="download it again"
        ) from error
    for form in sorted(forms):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[form][1]), np.uint8), form)
        except NotImplementedError as error:
            wanted = "a format that the package gguf restores"
            do = "update gguf, or take another format, such as Q8_0"
            raise ModelError(f"{file} has tensors in {form.name}", wanted=wanted, do=do) from error
    return values, shapes


class _Cursor:
    """A place in the bytes of a header, which never passes their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def take(self, size: int) -> bytes:
        if size > min(len(self.data), _LONGEST_HEADER) - self.place:
            raise ValueError("it ends inside its header, or has one without end")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int) -> int:
        count = int(self.number("Q"))
        if count > most:
            raise ValueError(f"a count of {count}, where {most} is the most")
        return count

    def text(self) -> str:
        return self.take(self.count(_LONGEST_TEXT)).decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self.scalar(kind)
        kind = self.number("I")
        count = self.count(_MOST_ITEMS)
        if kind in _CODES:
            self.take(count * struct.calcsize(f"<{_CODES[kind]}"))
        else:
            for _ in range(count):
                self.scalar(kind)
        return f"an array of {count}"

    def scalar(self, kind: int) -> Any:
        if kind != _TEXT and kind not in _CODES:
            raise ValueError(f"a value of type {kind}")
        return self.text() if kind == _TEXT else self.number(_CODES[kind])


def read_published(file: Path, values: Values) -> dict[str, Any]:
    """Return the configuration that transformers makes of a header, as the object of a
    ``config.json``.

    Raises:
        ModelError: The file is a part, no model, or of an architecture that transformers does not
            read from GGUF.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    kind = values.get("general.type", "model")
    parts = values.get("split.count", 0)
    if kind != "model" or parts not in (0, 1):
        seen = f"{file} is a GGUF file of type {kind!r:.40}, in {parts or 1} parts"
        raise ModelError(
            seen, wanted="one file with the whole model", do="join its parts, or take another file"
        )
    try:
        published: dict[str, Any] = load_gguf_checkpoint(str(file))["config"]  # type: ignore[no-untyped-call]
    except Exception as error:  # the library fails on unusual values with exceptions of many kinds
        seen = (
            f"{file} of architecture {values.get('general.architecture')!r:.60} is not read: "
            f"{error!s:.200}"
        )
        wanted = "an architecture that transformers reads from GGUF"
        do = "update transformers, or use safetensors"
        raise ModelError(seen, wanted=wanted, do=do) from error
    return published


def check_covered(
    file: Path, header: tuple[Values, Shapes], config: "PreTrainedConfig", parameters: int
) -> None:
    """Refuse a file of which transformers would pass over a part: a setting, or tensors.

    Rope scaling is such a part, stated as keys or, for Llama 3.1, as a tensor of factors.

    Args:
        file: File of the header.
        header: What :func:`read_header` returned.
        config: Configuration that transformers made of it.
        parameters: Numbers in the model of that configuration, a tied matrix once.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    (values, shapes), do = header, "use the checkpoint as safetensors"
    architecture = str(values["general.architecture"])
    kind = str(config.model_type).removesuffix("_text")
    known: dict[str, Any] = GGUF_CONFIG_MAPPING
    read = known.get(architecture, {}) | known.get(kind, {})
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, value in values.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or read.get(name) or value in (0, "", "none") or name == "attention.causal":
            continue
        setting = _SAME_AS.get(name, "")
        if not setting or value != (
            width if setting == "head_dim" else getattr(config, setting, None)
        ):
            seen = f"{file} says {key} = {value!r:.60}, which transformers does not read"
            raise ModelError(seen, wanted="a model that is computed as its file says", do=do)
    stored = sum(map(math.prod, shapes.values()))
    if stored != parameters:
        odd = [name for name in shapes if not name.startswith(("blk.", "output", "token_embd"))]
        also = f", among them {odd[0]!r:.60}" if odd else ""
        seen = f"{file} stores {stored} numbers{also}, and its configuration has {parameters}"
        raise BadWeights(seen, wanted="exactly the tensors of the configuration", do=do)


def folder_of(file: Path) -> Path:
    """Return where the checkpoint folder of a GGUF file is, or will be: it is named after what is
    read, and by what.
    """
    with file.open("rb") as opened:
        name = f"{hashlib.file_digest(opened, 'sha256').hexdigest()}-{version('transformers')}-{version('gguf')}"
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "assay"
        / "gguf"
        / f"{name}-{_MADE}"
    )
