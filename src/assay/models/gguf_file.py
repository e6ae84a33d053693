"""GGUF files, as llama.cpp writes them: found, bounded, checked, and restored to a checkpoint.

transformers reads a file and restores its numbers in float32. They are written once, as safetensors
with configuration and tokenizer, to a folder in the user's cache, and everything else reads that
folder: so digests, tokenizers, stop tokens and servers of vLLM are as for any checkpoint. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from assay.errors import (
    BackendUnavailable,
    BadWeights,
    ModelError,
    ModelNotFound,
    StorageError,
    how_to_install,
    is_out_of_memory,
)
from assay.files.reading import digest_file
from assay.files.storage import cache_folder, check_folder, write_atomic
from assay.files.weights import warn_of_unread
from assay.models.configuration import (
    auto_class,
    build,
    build_config,
    build_empty,
    count_parameters,
    silence_transformers,
)
from assay.models.tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_READS = 3 * 2**20
"""Reads of one header: each key, and each text or number of an array. Vocabularies need 2**21."""

_LAYOUT = 4
"""Version of how a folder is made; a higher number makes the folders of all files again."""

_PIECES = ("tokens", "scores", "token_type")
"""Arrays of the header that say what the tokens of a vocabulary are."""

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
"""Keys that transformers passes over, each with the setting that must have the same value."""


@dataclass(frozen=True)
class GGUFHeader:
    """What the header of a GGUF file states.

    Attributes:
        values: Numbers and texts by key; of an array, ``an array of`` so many.
        shapes: Shape of every tensor by name, in the file's order of axes: the reverse of torch's.
        pieces: Text, score and ``gguf.TokenType`` of every token; a vocabulary of byte pairs has no
            scores, and they are zero.
    """

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    pieces: list[tuple[str, float, int]] = field(default_factory=list)


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file at a path or in a folder without safetensors; refuse to choose.

    Raises:
        ModelError: The folder holds several.
    """
    candidates = [path] if path.is_file() else sorted(path.iterdir())
    if any(file.suffix.lower() == ".safetensors" for file in candidates):
        return None
    files = [file for file in candidates if file.suffix.lower() == ".gguf"]
    if len(files) > 1:
        raise ModelError(
            f"{path} holds {len(files)} GGUF files",
            wanted="one file with the whole model",
            do=f"pass one of them, such as {files[0]}",
        )
    if files and path.is_dir():
        warn_of_unread(path, {files[0].name})
    return files[0] if files else None


def find_in_wheel(
    reference: str, packages: Collection[str], install: str, digest: str = ""
) -> Path:
    """Return the GGUF file of installed packages, which are not imported.

    Where each has a part, in their order, the parts are joined once to the file of this SHA-256.

    Raises:
        ModelNotFound: A package is not installed; names the command.
        BadWeights: The parts are those of another file.
        StorageError: The joined file cannot be written.
    """
    specs = [importlib.util.find_spec(package) for package in packages]
    places = [spec.submodule_search_locations or () for spec in specs if spec]
    folders = [Path(place) for package_places in places for place in package_places]
    files = [file for folder in folders for file in folder.rglob("*.gguf*")]
    if len(files) != len(packages):
        raise ModelNotFound(
            f"the weights of {reference} are not installed",
            wanted=f"{' and '.join(packages)} with a GGUF file or a part of it each",
            do=f"run {install}",
        )
    if not digest:
        return files[0]
    joined = cache_folder() / "gguf" / f"{digest}.gguf"
    if not joined.is_file():
        content = b"".join(file.read_bytes() for file in files)
        if hashlib.sha256(content).hexdigest() != digest:
            seen = f"the parts of {reference} make another file"
            raise BadWeights(seen, wanted=f"SHA-256 {digest}", do=f"run {install}")
        check_folder(joined.parent)
        joined.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(joined, content)
    return joined


def read_header(file: Path) -> GGUFHeader:
    """Return the header of a GGUF file, read by the package gguf within the bounds of the file.

    Raises:
        BadWeights: The file is cut short, no GGUF, or states what cannot be.
        ModelError: A tensor is in a format that the package gguf does not restore.
    """
    from gguf import GGUFReader, GGUFValueType, TokenType

    class BoundedReader(GGUFReader):
        """Reader that ends where the file does: counts and lengths are claims of its author."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            self.reads += 1
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data) or self.reads > MOST_READS:
                raise ValueError("it ends inside its header or tensors, or has no end")
            return super()._get(offset, dtype, count, *order, **named)

    try:
        # Sums of hostile offsets would wrap.
        with np.errstate(all="raise"):
            reader = BoundedReader(file)
        values = {
            key: f"an array of {len(field.data)}"
            if field.types[0] == GGUFValueType.ARRAY
            else field.contents()
            for key, field in reader.fields.items()
        }
        shapes = {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
        columns = [reader.fields.get(f"tokenizer.ggml.{name}") for name in _PIECES]
        tokens, scores, forms = (column.contents() if column else [] for column in columns)
        scores = scores or [0.0] * len(tokens)
        forms = forms or [TokenType.NORMAL] * len(tokens)
        pieces = list(zip(tokens, scores, forms, strict=True))
    except Exception as error:  # the library fails on a damaged file with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        raise BadWeights(
            f"{file} is no whole GGUF file: {error!s:.200}",
            wanted="the file as it was published",
            do="download it again",
        ) from error
    for form in sorted({tensor.tensor_type for tensor in reader.tensors}):
        _check_restored(file, form)
    return GGUFHeader(values, shapes, pieces)


def _check_restored(file: Path, form: Any) -> None:
    """Refuse a format of tensors that the package gguf cannot turn into numbers."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[form][1]), np.uint8), form)
    except NotImplementedError as error:
        raise ModelError(
            f"{file} has tensors in {form.name}",
            wanted="a format that the package gguf restores",
            do="update gguf, or take another format, such as Q8_0",
        ) from error


def read_gguf_config(
    name: str, file: Path, header: GGUFHeader
) -> "tuple[dict[str, Any], PreTrainedConfig]":
    """Return the configuration that transformers makes of a header, as JSON and as its class.

    Raises:
        ModelError: The file is a part, no model, of an architecture that transformers does not
            read, or says something that transformers passes over.
        BadWeights: It has other tensors than its configuration.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    kind = header.values.get("general.type", "model")
    part_count = header.values.get("split.count", 0)
    if kind != "model" or part_count not in (0, 1):
        raise ModelError(
            f"{file} is a GGUF file of type {kind!r:.40}, in {part_count or 1} parts",
            wanted="one file with the whole model",
            do="join its parts, or take another file",
        )
    try:
        published: dict[str, Any] = load_gguf_checkpoint(str(file))["config"]  # type: ignore[no-untyped-call]
    except Exception as error:  # the library fails on unusual values with exceptions of many kinds
        architecture = header.values.get("general.architecture")
        raise ModelError(
            f"{file} of architecture {architecture!r:.60} is not read: {error!s:.200}",
            wanted="an architecture that transformers reads from GGUF",
            do="update transformers, or use safetensors",
        ) from error
    config = build_config(name, published)
    _check_settings(file, header, config)
    _check_count(file, header, count_parameters(build_empty(config)))
    return published, config


def _check_settings(file: Path, header: GGUFHeader, config: "PreTrainedConfig") -> None:
    """Refuse a setting that transformers passes over, such as the keys of rope scaling."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = str(header.values["general.architecture"])
    model_type = str(config.model_type).removesuffix("_text")
    mapping: dict[str, Any] = GGUF_CONFIG_MAPPING
    read = mapping.get(architecture, {}) | mapping.get(model_type, {})
    if not any(key.endswith("epsilon") for key in header.values):
        raise BadWeights(
            f"{file} says no epsilon of its norms",
            wanted="the number that the model was trained with",
            do="take the file as it was published, or the checkpoint as safetensors",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, value in header.values.items():
        name = key.removeprefix(f"{architecture}.")
        # What is of no architecture, what transformers reads, and what is switched off.
        is_off = value in (0, "", "none")
        if name == "attention.causal":
            is_off = not is_off
        if name == key or read.get(name) or is_off:
            continue
        setting = _SAME_AS.get(name, "")
        expected = head_dim if setting == "head_dim" else getattr(config, setting, None)
        if not setting or value != expected:
            raise ModelError(
                f"{file} says {key} = {value!r:.60}, which transformers does not read",
                wanted="a model that is computed as its file says",
                do="use the checkpoint as safetensors",
            )


def _check_count(file: Path, header: GGUFHeader, parameters: int) -> None:
    """Refuse other tensors than the configuration has: Llama 3.1 stores rope scaling as one."""
    stored = sum(map(math.prod, header.shapes.values()))
    if stored == parameters:
        return
    unusual = [
        name for name in header.shapes if not name.startswith(("blk.", "output", "token_embd"))
    ]
    example = f", among them {unusual[0]!r:.60}" if unusual else ""
    raise BadWeights(
        f"{file} stores {stored} numbers{example}, and its configuration has {parameters}",
        wanted="exactly the tensors of the configuration",
        do="use the checkpoint as safetensors",
    )


def folder_of(file: Path) -> Path:
    """Return the cache folder of a GGUF file's checkpoint, named for its bytes and its readers.

    Raises:
        BackendUnavailable: The package gguf, which reads such files, is missing.
    """
    try:
        readers = f"{version('transformers')}-{version('gguf')}"
    except PackageNotFoundError as error:
        raise BackendUnavailable(
            f"{file} is a GGUF file, and the package gguf is missing",
            wanted="gguf 0.17 or newer",
            do=how_to_install("smollm2"),
        ) from error
    digest = digest_file(file).hex()
    return cache_folder() / "gguf" / f"{digest}-{readers}-{_LAYOUT}"


def convert(file: Path, header: GGUFHeader, config: "PreTrainedConfig", folder: Path) -> None:
    """Write the checkpoint folder of a GGUF file: configuration, tokenizer and float32 weights.

    It is made under a temporary name and renamed at the end, so that ``folder`` is whole or absent.

    Raises:
        BadWeights: The tokenizer or the weights are not read.
        OutOfMemory, StorageError: There is no room.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as work:
            checkpoint = Path(work) / "checkpoint"
            _write_checkpoint(file, header, config, checkpoint)
            read_tokenizer(checkpoint)
            checkpoint.chmod(0o755)
            checkpoint.rename(folder)
    except Exception as error:  # the library fails on unusual values with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        # Another process made it meanwhile.
        if (folder / "config.json").is_file():
            return
        if isinstance(error, SafetensorError) or getattr(error, "errno", None):
            raise StorageError(
                f"{folder} cannot be written: {error}",
                wanted="room and permission",
                do="make room there, or name another cache in XDG_CACHE_HOME",
            ) from error
        raise BadWeights(
            f"{file} does not load: {error!s:.300}",
            wanted="weights and a tokenizer that transformers reads",
            do="download it again, or use the checkpoint as safetensors",
        ) from error


def _write_checkpoint(
    file: Path, header: GGUFHeader, config: "PreTrainedConfig", target: Path
) -> None:
    # transformers looks for a tokenizer beside the file, so the file stands alone.
    alone = target.parent / "alone"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(file.resolve())
    with silence_transformers(), np.errstate(all="ignore"):
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        # transformers takes one of these tokens for the other.
        for name in ("bos_token", "eos_token"):
            token = header.values.get(f"tokenizer.ggml.{name}_id")
            if token is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
        of_pieces = header.values.get("tokenizer.ggml.model") == "llama"
        if of_pieces and isinstance(tokenizer.backend_tokenizer.model, Unigram):
            tokenizer = _restore_merges(tokenizer, header)
        else:
            tokenizer = _restore_tokens(tokenizer, header)
        # It would drop spaces of a decoded text.
        tokenizer.clean_up_tokenization_spaces = False
        restored, report = auto_class(config).from_pretrained(
            alone, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
        )
        faults = [*(report.get("missing_keys") or ()), *(report.get("mismatched_keys") or ())]
        if faults:
            raise ValueError(f"{faults[0]} is missing, or of another shape")
        # The restored module counts as quantised, which transformers does not save.
        module = build(config, torch.float32)
        cast("torch.nn.Module", module).load_state_dict(restored.state_dict(), assign=True)
        module.tie_weights()
        module.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _restore_merges(tokenizer: Any, header: GGUFHeader) -> Any:
    """Return a tokenizer of pieces that merges pairs of them, the highest score first.

    transformers takes the scores of Gemma's merges for those of a unigram model, and loses them
    when it saves the tokenizer: every text is then spelled in single characters.
    """
    from gguf import TokenType

    vocabulary = {piece: token for token, (piece, _, _) in enumerate(header.pieces)}
    scores = {piece: score for piece, score, _ in header.pieces}
    whole = {piece for piece, _, form in header.pieces if form != TokenType.NORMAL}
    restored = type(tokenizer)(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores, whole),
        add_bos_token=header.values.get("tokenizer.ggml.add_bos_token", True),
        **tokenizer.special_tokens_map,
    )
    restored.add_tokens(_added_tokens(header))
    return restored


def _restore_tokens(tokenizer: Any, header: GGUFHeader) -> Any:
    """Return a tokenizer with the added tokens of its file and no others, and its first token.

    transformers adds to every Qwen the three that it knows by name, past the rows of the embedding
    where the file has them not, and spells the others in letters.
    """
    vocabulary = {piece for piece, _, _ in header.pieces}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = backend["added_tokens"]
    backend["added_tokens"] = [token for token in added if token["content"] in vocabulary]
    special = {
        name: token for name, token in tokenizer.special_tokens_map.items() if token in vocabulary
    }
    if len(backend["added_tokens"]) < len(added):
        # Where none is stated, the class of Qwen adds its own again.
        special |= dict.fromkeys(("unk_token", "pad_token"), tokenizer.eos_token)
    restored = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        chat_template=tokenizer.chat_template,
        **special,
    )
    # Those of Phi-3 take in the spaces after them, which a file does not say.
    known = {token["content"] for token in backend["added_tokens"]}
    restored.add_tokens([token for token in _added_tokens(header) if token.content not in known])
    of_pieces = header.values.get("tokenizer.ggml.model") == "llama"
    if restored.bos_token and header.values.get("tokenizer.ggml.add_bos_token", of_pieces):
        first = restored.bos_token
        restored.backend_tokenizer.post_processor = TemplateProcessing(
            single=[first, "$A"],
            pair=[first, "$A", first, "$B:1"],
            special_tokens=[(first, restored.bos_token_id)],
        )
    return restored


def _added_tokens(header: GGUFHeader) -> list[AddedToken]:
    """Return the tokens that are cut out of a text first, before its spaces are marked."""
    from gguf import TokenType

    return [
        AddedToken(piece, special=form == TokenType.CONTROL, normalized=False)
        for piece, _, form in header.pieces
        if form in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
