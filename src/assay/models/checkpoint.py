"""A checkpoint: where a reference leads, its configuration, tokenizer and weight files, their
tensors and their digest.

A hub id is looked up in the local cache first, then fetched over the network with short timeouts.
Only safetensors is read. The digest is SHA-256 over the sorted names of ``SHA-256(name, dtype,
shape, bytes)`` of each tensor, so it depends neither on how the tensors are spread over files nor
on how they are loaded.
"""

import base64
import hashlib
import json
import logging
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from assay.errors import (
    BadWeights,
    DataError,
    ModelError,
    ModelNotFound,
    StorageError,
    UnsafeCheckpoint,
    UsageError,
    is_out_of_memory,
)
from assay.files.jsonl import LONGEST_LINE, parse, parts, read_json
from assay.files.reading import read_whole
from assay.files.references import (
    ADAPTER_CONFIG,
    CATALOGUE,
    check_bundled,
    check_config,
    check_hub_id,
    find_path,
    is_bundled,
)
from assay.files.tensors import check_tensors
from assay.files.toml import LONGEST_TOML
from assay.models import gguf
from assay.streams.backends import DTYPES, torch_dtype
from assay.waiting import tell

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


PREFIX = "base_model.model."
"""What stands before the name that a module has in the model."""

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""What follows that name for A [R, I] and B [O, R] of the product B A."""


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hide the log lines, warnings and progress bars of transformers inside the block."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


_HERE = Path(__file__).parent
_CHECKOUT = (
    Path(__file__).parents[3] / "tests" / "data" / "models"
)  # models that are not in the wheel

_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_MOST_LAYERS = 2**12
_ODD: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "use_bidirectional_attention": (True, "all"),
    "add_cross_attention": (True,),
    "return_dict": (False,),
}
"""Settings under which a model is no causal decoder, or does not answer as others do."""

_HIGHEST_ID = 2**21
"""The highest token id that is read: the library makes a table as long as the highest."""

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_SECONDS = 5.0


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        reference: Reference as it was given.
        config: Configuration of transformers.
        published: Configuration as the raw JSON object, which does not change with the version of
            transformers.
        directory: Directory of the checkpoint, or None for a shape.
    """

    reference: str
    config: "PreTrainedConfig"
    published: dict[str, Any]
    directory: Path | None

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint; a shape has none, and is refused."""
        if self.directory is None:
            do = "make one with `assay models random`, and pass its directory"
            raise UsageError(
                f"{self.reference} has no checkpoint", wanted="a checkpoint on disk", do=do
            )
        return self.directory


def resolve(reference: str | Path, *, with_weights: bool = True) -> Source:
    """Find a model. See :func:`assay.models.load_model` for what a reference may be and what is
    raised.

    Args:
        reference: Reference of the model.
        with_weights: Whether a GGUF file is made a checkpoint directory, which takes a while at the
            first time; without, its header alone is read, and the source has no directory.
    """
    name = os.fspath(reference)
    if isinstance(reference, str) and is_bundled(name):
        path = find_bundled(name)
        directory = None if name.startswith("shape:") else path
    else:
        directory = path = _locate(reference)
        if (path / ADAPTER_CONFIG).is_file():
            seen = f"{path} holds an adapter"
            do = "merge the adapter into its model and save the result"
            raise ModelError(
                seen, wanted="a whole model: an adapter is not part of what is measured here", do=do
            )
    if directory is not None and (file := gguf.find_gguf(directory)):
        directory = path = gguf.folder_of(file)
        if not (path / "config.json").is_file():
            header = gguf.read_header(file)
            published = gguf.read_published(file, header[0])
            config = _build_config(name, published)
            gguf.check_covered(file, header, config, count_parameters(config))
            if not with_weights:
                return Source(name, config, published, None)
            _convert(file, header[0], config, path)
    published = _read_config(path if directory is None else path / "config.json")
    return Source(name, _build_config(name, published), published, directory)


def _locate(reference: str | Path) -> Path:
    name = os.fspath(reference)
    if (path := find_path(name)) is not None:
        return path
    check_hub_id(name if isinstance(reference, str) else f"./{name}")
    return _cached(name) or _downloaded(name)


def _read_config(path: Path) -> dict[str, Any]:
    check_config(path)
    try:
        published = json.loads(read_whole(path, LONGEST_TOML), object_hook=_plain_number)
    except (DataError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", wanted="a JSON object", do="save it again"
        ) from error
    if not isinstance(published, dict) or not isinstance(published.get("model_type"), str):
        raise ModelError(
            f"{path} names no model_type", wanted="a transformers configuration", do="save it again"
        )
    return published


def _plain_number(value: dict[str, Any]) -> Any:
    """Return infinity in place of the object as which transformers writes it; JSON has no such
    number.
    """
    written = value.get("__float__") if len(value) == 1 else None
    if written == "NaN":
        raise ValueError("a setting that is not a number")
    return float(written) if written in ("Infinity", "-Infinity") else value


def _build_config(name: str, published: dict[str, Any]) -> "PreTrainedConfig":
    settings = {
        key: value
        for key, value in published.items()
        if key not in ("model_type", "quantization_config")
    }
    for key, value in settings.items():  # the library makes a list as long
        if "layer" in key and isinstance(value, int) and value > _MOST_LAYERS:
            seen = f"the configuration of {name!r} says {key} = {value}"
            raise ModelError(
                seen,
                wanted=f"at most {_MOST_LAYERS} layers",
                do="compare it with the published one",
            )
    try:
        with silence_transformers():
            config = AutoConfig.for_model(published["model_type"], **settings)
    except Exception as error:  # the library validates with exceptions of many kinds
        raise ModelError(
            f"the configuration of {name!r} is refused: {error!s:.300}",
            wanted="an architecture that this version of transformers has built in",
            do="code that comes with a checkpoint is never run; update transformers or use "
            "another model",
        ) from error
    known = (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    if not known or config.is_encoder_decoder or not _is_complete(config):
        wanted = "a causal language model with " + ", ".join(_NEEDED)
        raise ModelError(
            f"{name!r} is a {published['model_type']} model",
            wanted=wanted,
            do="use a decoder-only model",
        )
    text = config.get_text_config(decoder=True)
    is_either = "is_decoder" in getattr(
        type(text), "__dataclass_fields__", ()
    )  # as BERT, which is an encoder without
    for key, values in (_ODD | ({"is_decoder": (False,)} if is_either else {})).items():
        if (found := getattr(text, key, None)) in values:
            seen = f"the configuration of {name!r} says {key} = {found}"
            do = "use a decoder-only model"
            raise ModelError(
                seen,
                wanted="causal attention without cross-attention, and return_dict = true",
                do=do,
            )
    return config


def _is_complete(config: "PreTrainedConfig") -> bool:
    """Return whether a configuration, or that of the decoder which it wraps, has the sizes that are
    read.
    """
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # it wraps several decoders
        return False
    sizes = [getattr(text, key, None) for key in _NEEDED]
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _convert(file: Path, values: gguf.Values, config: "PreTrainedConfig", folder: Path) -> None:
    """Make the checkpoint folder of a GGUF file: configuration, tokenizer, and its numbers in
    float32.

    What the header shows to be wrong was refused before.

    Raises:
        ModelError: The tokenizer or the weights are not read.
        OutOfMemory, StorageError: There is no room.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as work:
            alone = Path(work) / "alone"
            made = Path(work) / "made"  # other files beside it are not read
            alone.mkdir()
            (alone / "model.gguf").symlink_to(file.resolve())
            with silence_transformers(), np.errstate(all="ignore"):
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
                tokenizer.clean_up_tokenization_spaces = (
                    False  # which would drop spaces of a decoded text
                )
                for name in (
                    "bos_token",
                    "eos_token",
                ):  # of which transformers takes one for the other
                    if (token := values.get(f"tokenizer.ggml.{name}_id")) is not None:
                        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
                read, report = auto_class(config).from_pretrained(
                    alone, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
                )
                odd = [
                    str(key)
                    for kind in ("missing_keys", "mismatched_keys")
                    for key in report.get(kind) or ()
                ]
                if odd:
                    raise ValueError(f"{odd[0]} is missing, or of another shape")
                module = build(
                    config, torch.float32
                )  # the one that was read counts as quantised, and is not saved
                cast("torch.nn.Module", module).load_state_dict(read.state_dict(), assign=True)
                module.tie_weights()
                module.save_pretrained(made)
                tokenizer.save_pretrained(made)
            read_tokenizer(made)
            made.chmod(0o755)
            made.rename(folder)
    except Exception as error:  # the library fails on unusual values with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        if (folder / "config.json").is_file():  # another process made it meanwhile
            return
        if isinstance(error, SafetensorError) or getattr(error, "errno", None):
            do = "make room there, or name another cache in XDG_CACHE_HOME"
            raise StorageError(
                f"{folder} cannot be written: {error}", wanted="room and permission", do=do
            ) from error
        seen = f"{file} does not load: {error!s:.300}"
        do = "download it again, or use the checkpoint as safetensors"
        raise BadWeights(
            seen, wanted="weights and a tokenizer that transformers reads", do=do
        ) from error


def auto_class(config: "PreTrainedConfig") -> Any:
    """Return what makes the model of a configuration: a decoder, or one inside a model that reads
    images too.
    """
    return (
        AutoModelForCausalLM
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForImageTextToText
    )


def build(config: "PreTrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """Return a model with its buffers computed and its parameters allocated but never written, or
    raise ModelError.

    Untouched memory costs nothing, so the largest shapes are built on the CPU in milliseconds.
    """
    module: PreTrainedModel
    try:
        with silence_transformers(), no_init_weights():
            module = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=choose_attention(config)
            )
    except Exception as error:  # a configuration of impossible numbers fails in many ways
        if is_out_of_memory(error):
            raise
        wanted = "sizes that fit together"
        do = "compare its config.json with the published one (--model, or REFERENCE)"
        raise ModelError(
            f"no model can be built from this configuration: {error}", wanted=wanted, do=do
        ) from error
    module.tie_weights()
    return module


def count_parameters(config: "PreTrainedConfig") -> int:
    """Return the numbers in the model of a configuration, a tied matrix once; nothing is
    allocated.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config, torch.float32).parameters())


def choose_attention(config: "PreTrainedConfig") -> str:
    """Return ``sdpa``, or ``eager`` for an architecture without it: GPT-OSS, whose softmax has a
    sink.
    """
    architecture: Any = auto_class(config)._model_mapping.get(type(config), None)
    return "sdpa" if getattr(architecture, "_supports_sdpa", True) else "eager"


def _cached(hub_id: str) -> Path | None:
    """Return the directory of a hub model that is complete in the local cache, or None."""
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True))
        weight_files(directory)
    except (LocalEntryNotFoundError, ValueError, ModelNotFound, BadWeights):
        return None
    return directory if (directory / "config.json").is_file() else None


def _downloaded(hub_id: str) -> Path:
    """Return the directory of a hub model after its download; pickles are never fetched."""
    try:
        names = [
            file.rfilename for file in HfApi().model_info(hub_id, timeout=_SECONDS).siblings or []
        ]
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            seen = (
                f"{hub_id!r} is published only as a pickle ({pickles[0]}), which would execute "
                f"code when it is read"
            )
            do = (
                "ask its authors for safetensors, or convert it on a machine you can afford to lose"
            )
            raise UnsafeCheckpoint(seen, wanted="safetensors", do=do)
        with silence_transformers():
            return Path(snapshot_download(hub_id, allow_patterns=_FILES, etag_timeout=_SECONDS))
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelNotFound(
            f"{hub_id!r} is no directory here, is not in the local cache, and the hub did not "
            f"return it: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            wanted="a directory, reference:NAME, shape:NAME, or a hub id that can be downloaded",
            do="check the name and the network, or take a model of `assay models list`",
        ) from error


def find_bundled(reference: str) -> Path:
    """Return the directory of a ``reference:`` name, the configuration of a ``shape:``, a
    ``pretrained:`` file.
    """
    check_bundled(reference)
    kind, _, name = reference.partition(":")
    if kind == "shape":
        return _HERE / "shapes" / f"{name}.json"
    if kind == "pretrained":
        return gguf.find_in_wheel(reference, **CATALOGUE[reference]["wheel"])
    for path in (_HERE / "reference" / name, _CHECKOUT / name):
        if (path / "config.json").is_file():
            return path
    wanted = "a checkout of the repository, which has it in tests/data/models"
    do = "install from a checkout with pip install -e ., or use reference:qwen3"
    raise ModelNotFound(f"{reference} is not in the installed package", wanted=wanted, do=do)


def load_tokenizer(reference: str | Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a model without its weights; None where it has none, as a shape.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The tokenizer cannot be read.
    """
    directory = resolve(reference).directory
    return None if directory is None else read_tokenizer(directory)


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer in a directory; None where there is no file of one."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        return None
    try:
        for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"):
            _check_ids(directory / name)
        for path in (
            *directory.glob("*.jinja"),
            *directory.glob("additional_chat_templates/*.jinja"),
        ):
            read_whole(path, LONGEST_LINE)
        with silence_transformers():
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except (
        BaseException
    ) as error:  # the libraries raise many kinds, down to a panic of Rust, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        wanted = "tokenizer files that need no code of their own"
        do = "save the tokenizer again, or remove its files to load the model without one"
        raise ModelError(
            f"the tokenizer in {directory} cannot be read: {error}", wanted=wanted, do=do
        ) from error


def _check_ids(path: Path) -> None:
    """Refuse a file of a tokenizer that is large, deep or no JSON, or an id for which the library
    needs gigabytes.
    """
    if not path.is_file():
        return
    waiting: list[Any] = [read_json(path)]
    while waiting:
        value = waiting.pop()
        waiting += parts(value)
        ids = [value] if isinstance(value, int) else []
        if (
            path.name == "tokenizer_config.json"
        ):  # its ids are keys, and a length in it is often 10**30
            ids = [int(key) for key in value if key.isdecimal()] if isinstance(value, dict) else []
        if isinstance(value, dict) and isinstance(
            charsmap := value.get("precompiled_charsmap"), str
        ):
            # The library takes the memory that the first four bytes ask for: they are the size of a
            # part.
            size = int.from_bytes(base64.b64decode(charsmap[:8].ljust(8, "A"))[:4], "little")
            if size > len(charsmap):
                raise ValueError(
                    f"{path.name} has a precompiled_charsmap that is shorter than the part it "
                    f"begins with"
                )
        if max(ids, default=0) > _HIGHEST_ID:
            raise ValueError(
                f"{path.name} has the number {max(ids)}, where {_HIGHEST_ID} is the highest token "
                f"id"
            )


def check_tokens(name: str, ids: Iterable[int], rows: int) -> None:
    """Refuse tokens that the embeddings have no row for: on CUDA such a token ends the process.

    Args:
        name: What the tokens are of, as the error names it.
        ids: Token ids.
        rows: Rows of the embeddings.

    Raises:
        UsageError: A token is not below ``rows``.
    """
    if (highest := max(ids, default=0)) >= rows:
        do = "use the tokenizer of this model, or resize its embeddings to the tokenizer"
        raise UsageError(
            f"{name} has token {highest}",
            wanted=f"tokens below {rows}, the rows of the embeddings",
            do=do,
        )


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Ends of the names of files that would execute code when they are read."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
EIGHT_BITS = ("F8_E4M3", "I8")
"""Dtypes of weights in eight bits, as the header of a safetensors file has them."""

STORED_DTYPES = dict(
    zip(("F32", "F16", "BF16"), DTYPES, strict=True)
)  # by their names in a safetensors header
_DTYPES = {name: torch_dtype(dtype) for name, dtype in STORED_DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
}
_OTHERS = {"BOOL", "I32", "I64", *EIGHT_BITS}


def bad_weights(seen: str, wanted: str) -> BadWeights:
    """Return the error of a checkpoint that is not as it was published."""
    return BadWeights(seen, wanted=wanted, do="download or save the checkpoint again")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def without_numbers(self) -> torch.Tensor:
        """Return a tensor of this shape on the meta device, in int64 where weights have no such
        dtype.
        """
        return torch.empty(self.shape, dtype=_DTYPES.get(self.dtype, torch.int64), device="meta")


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, sorted; refuse pickles, and files without or
    beside their index.
    """
    written = sorted(path.name for path in directory.glob("*.safetensors"))
    if (directory / _SINGLE).is_file():
        # vLLM reads whatever lies there; an adapter, or Mistral's own form of the same weights, is
        # another thing.
        others = [
            name
            for name in written
            if not name.startswith((_SINGLE, ".", "adapter_model.", "consolidated"))
        ]
        if others or (directory / _INDEX).is_file():
            seen = f"{directory} holds {_SINGLE} and {[*others, _INDEX][0]}"
            do = "move the other file elsewhere"
            raise BadWeights(seen, wanted="one set of weights: loaders choose differently", do=do)
        return (directory / _SINGLE,)
    index = directory / _INDEX
    wanted = f"{_SINGLE}, or {_INDEX} with its files"
    if not index.is_file():
        pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
        if pickles:
            raise UnsafeCheckpoint(
                f"{directory} holds only a pickle ({pickles[0]}), which would execute code when "
                f"it is read",
                wanted=wanted,
                do="convert it on a machine you can afford to lose: model.save_pretrained writes "
                "safetensors",
            )
        do = "check that the download or the save was complete"
        seen = f"{written[0]} and no file that says what belongs to it" if written else "no weights"
        raise ModelNotFound(f"{directory} holds {seen}", wanted=wanted, do=do)
    try:
        names = set(_places(directory).values())
        files = tuple(directory / name for name in sorted(names))
    except (DataError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad_weights(f"{index} is unreadable: {error}", "JSON with a weight_map") from error
    for file in files:
        if file.parent != directory or not file.is_file():
            raise bad_weights(
                f"{index} names {file.name}, which is not there", "every file beside it"
            )
    return files


def _places(directory: Path) -> dict[str, str]:
    """Return the file of every tensor by the index of a directory."""
    return dict(parse(read_whole(directory / _INDEX, LONGEST_LINE).decode())["weight_map"])


def find_file(directory: Path, tensors: Mapping[str, Stored], name: str) -> Path:
    """Return the file of a tensor; of one that is missing, the file in which the index has it, or
    else the index.
    """
    if name in tensors:
        return tensors[name].file
    if (directory / _SINGLE).is_file():
        return directory / _SINGLE
    placed = _places(directory).get(name)
    return directory / (_INDEX if placed is None else placed)


def list_tensors(directory: Path) -> list[Stored]:
    """Return every tensor of a checkpoint, sorted by name, in a dtype that is read; only headers
    are looked at.
    """
    tensors = sorted(
        (t for file in weight_files(directory) for t in _headers(file)), key=lambda t: t.name
    )
    twice = [name for name, count in Counter(t.name for t in tensors).items() if count > 1]
    if twice or not tensors:
        seen = f"{directory} holds {twice[0]!r} twice" if twice else f"{directory} holds no tensor"
        raise bad_weights(seen, "every tensor of the model once")
    for tensor in tensors:
        if tensor.dtype not in STORED_DTYPES and tensor.dtype not in _OTHERS:
            wanted = "float32, float16 or bfloat16, or a quantised format of docs/models.md"
            do = "use the checkpoint before quantisation"
            raise BadWeights(
                f"{tensor.file} stores {tensor.name!r} as {tensor.dtype}", wanted=wanted, do=do
            )
    return tensors


def _headers(file: Path) -> Iterator[Stored]:
    try:
        check_tensors(file)
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - no mapping
                view = reader.get_slice(name)
                yield Stored(file, name, view.get_dtype(), tuple(view.get_shape()))
    except (SafetensorError, OSError, DataError) as error:
        raise bad_weights(
            f"{file} is corrupt or cut short: {error}", "a whole safetensors file"
        ) from error


def stored_dtype(tensors: list[Stored]) -> torch.dtype:
    """Return the floating dtype in which most of the values are stored."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel() * (tensor.dtype in STORED_DTYPES)
    return torch_dtype(STORED_DTYPES.get(sizes.most_common(1)[0][0], "float32"))


def digest_tensors(tensors: list[Stored], quantisation: object = None) -> str:
    """Return the SHA-256 of all tensors, and of how quantised ones are used, in hex; every value
    must be finite.
    """
    total = sum(math.prod(stored.shape) for stored in tensors)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = []
        done = 0
        for part, stored in zip(pool.map(_digest_tensor, tensors), tensors, strict=True):
            parts.append(part)
            done += math.prod(stored.shape)
            tell("reading weights", done, total)
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

    One pass without a temporary: minimum and maximum are finite only if every value is, for NaN
    propagates.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype == torch.float8_e4m3fn:  # without infinity, and without a minimum in torch
        tensor = torch.where(tensor.view(torch.uint8) % 128 == 127, torch.nan, 0.0)
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise bad_weights(f"{where}: {name!r} holds NaN or infinity", "finite weights")
