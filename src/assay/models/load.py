"""From a reference to a model that is ready to run, with every fault found before it runs; or to
its facts alone.

Random weights are the same bits on every machine. Every parameter ``p`` is ``0.02 ·
normal(seed32("{block}_{p}"), numel)`` in row-major order, multiplied in float32 and cast last. The
name of a parameter is the one that ``named_parameters()`` gives, so a tied head has no stream of
its own: it is the embedding matrix.
"""

import hashlib
import json
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig

from assay import streams
from assay.errors import BadWeights, OutOfMemory, StorageError, UsageError, is_out_of_memory
from assay.files.references import CATALOGUE
from assay.files.storage import check_folder
from assay.memory import keep_freed_memory
from assay.models.checkpoint import (
    EIGHT_BITS,
    Source,
    Stored,
    auto_class,
    bad_weights,
    build,
    check_finite,
    choose_attention,
    digest_tensors,
    find_file,
    list_tensors,
    read_tokenizer,
    resolve,
    silence_transformers,
    stored_dtype,
)
from assay.models.decoder import expert_count
from assay.models.device import parse_device
from assay.models.frame import Frame
from assay.models.quantized import (
    StoredFormat,
    check_device,
    check_quantisation,
    load_stored,
    read_format,
)
from assay.models.quantized import quantise as round_weights
from assay.streams.backends import as_tensor, torch_dtype
from assay.waiting import tell

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


Shape = tuple[int, ...]
_SHAPED = "of another shape"
_MISSING = "missing"
_SURPLUS = "surplus"
_KINDS = {"mismatched_keys": _SHAPED, "missing_keys": _MISSING, "unexpected_keys": _SURPLUS}
_PASSED_OVER = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)position_ids$"
)  # buffers in old files; transformers skips them


def _check_headers(source: Source, tensors: list[Stored], form: StoredFormat | None) -> None:
    """Refuse tensors that are not those of the configuration, and weights in eight bits that it
    does not explain.

    Only headers are used: reading and hashing a large checkpoint takes minutes, so what cannot be
    loaded is refused before. Where tensors are both missing and surplus, names may be of an older
    layout that transformers converts: that is left to the load.
    """
    if form is not None:
        load_stored(source, tensors, form, torch.bfloat16, headers_only=True)
        return
    for odd in (tensor for tensor in tensors if tensor.dtype in EIGHT_BITS):
        raise bad_weights(
            f"{odd.file} stores {odd.name!r} as {odd.dtype}, and config.json has no "
            f"quantization_config",
            "a configuration that says how they are used",
        )
    with torch.device("meta"):
        module = build(source.config, torch.float32)
    stored = {t.name: t for t in tensors}
    wanted = _stored_shapes(module)
    kept = {name for name, _ in module.named_parameters()}
    tied = {
        name for name, _ in module.named_parameters(remove_duplicate=False)
    } - kept  # need not be stored
    ignored = [_PASSED_OVER, *map(re.compile, module._keys_to_ignore_on_load_unexpected or ())]
    shaped = sorted(
        name for name in stored.keys() & wanted.keys() if stored[name].shape != wanted[name]
    )
    missing = sorted(wanted.keys() - stored.keys() - tied)
    surplus = sorted(stored.keys() - wanted.keys() - tied)
    surplus = [name for name in surplus if not any(pattern.search(name) for pattern in ignored)]
    found = {_SHAPED: shaped} | (
        {_MISSING: missing, _SURPLUS: surplus} if bool(missing) != bool(surplus) else {}
    )
    for kind, (name, *_) in ((kind, names) for kind, names in found.items() if names):
        shapes = f": {list(stored[name].shape)}, not {list(wanted[name])}" if shaped else ""
        raise _misfit(str(find_file(source.checkpoint, stored, name)), kind, found[kind], shapes)


def _stored_shapes(module: "PreTrainedModel") -> dict[str, Shape]:
    """Return the shape of every tensor by its name in a file, as today's transformers writes it."""
    inside: dict[str, Tensor] = {
        name: tensor.to("meta") for name, tensor in module.state_dict().items()
    }
    with suppress(
        Exception
    ):  # another version of transformers, or experts that it cannot take apart
        from transformers.core_model_loading import revert_weight_conversion

        inside = revert_weight_conversion(module, inside)
    return {name: tuple(tensor.shape) for name, tensor in inside.items()}


def _misfit(where: str, kind: str, names: list[str], shapes: str = "") -> BadWeights:
    many = f"{len(names)} tensors are" if len(names) > 1 else "a tensor is"
    return BadWeights(
        f"{where}: {many} {kind}, the first is {names[0]!r}{shapes}",
        wanted="exactly the tensors of the configuration",
        do="download or save the checkpoint again; a fused or quantised layout is not read",
    )


STD = 0.02
SHAPE_BLOCK = "assay"
"""The block of a ``shape:`` model that was asked for without one."""

# Facts of a file, not of a model: they must not change the digest of a recipe.
_VOLATILE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def _randomise(module: nn.Module, block: str, device: torch.device, *, unit_norms: bool) -> None:
    """Replace every parameter by its stream of a block, in its dtype, and put it on a device; unit
    norms are one.
    """
    parameters = dict(module.named_parameters())
    done = 0
    total = sum(parameter.numel() for parameter in parameters.values())
    for name, parameter in parameters.items():
        if unit_norms and _is_norm(name):
            parameter.data = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            _draw(name, parameter, block, device)
        done += parameter.numel()
        tell("drawing weights", done, total)


def _is_norm(name: str) -> bool:
    owner = name.split(".")[-2]
    return name.endswith(".weight") and ("norm" in owner or owner.startswith("ln_"))


def _draw(name: str, parameter: nn.Parameter, block: str, device: torch.device) -> None:
    backend = streams.get_backend("auto", device.type)
    normals = backend.normals(streams.seeds([f"{block}_{name}"]), parameter.numel(), "float32")
    values = as_tensor(normals)[0].mul_(STD).reshape(parameter.shape)
    parameter.data = values.to(device, parameter.dtype)


def _recipe_digest(source: Source, weights: str, block: str, kept: str) -> str:
    """Return the SHA-256 in hex of what random weights were made from: configuration, mode, block,
    and the rest.

    The rest is the digest or the block of the weights that were not drawn for this block; empty if
    all were.
    """
    recipe = {
        "block": block,
        "config": {key: value for key, value in source.published.items() if key not in _VOLATILE},
        "kept": kept or None,
        "std": STD,
        "unit_norms": source.directory is None,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


WEIGHT_MODES = ("trained", "random-all", "random-embed")


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model, ready to run, with the facts that identify it.

    Attributes:
        module: Model of transformers, in evaluation mode, on ``device``, in ``dtype``.
        tokenizer: Tokenizer of the model; a ``shape:`` model has None.
        reference: Reference as it was given.
        digest: SHA-256 in hex. For trained weights: of the stored tensors (names, dtypes, shapes,
            bytes), whatever the sharding, the dtype of loading and the device. For random weights:
            of the recipe.
        weights: Mode, ``"trained"``, ``"random-all"`` or ``"random-embed"``.
        quantised: Format of :data:`assay.models.NUMBER_FORMATS` where the decoder's weights are in
            eight bits, as they were stored or rounded; else empty.
        frame: Frame of the checkpoint, where the network has one (:meth:`with_frame`).
    """

    module: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    reference: str
    digest: str
    weights: str
    quantised: str = ""
    frame: Frame | None = None

    def with_frame(self, frame: "Frame | str | Path | None") -> "Model":
        """Return the model with the frame of its checkpoint, or with that of a file; without one if
        None.

        Raises:
            DataError: The file cannot be read, or is no frame.
            UsageError: The frame is of another checkpoint.
        """
        made = Frame.load(frame) if isinstance(frame, str | Path) else frame
        if made is not None and (made.digest, made.weights) != (self.digest, self.weights):
            seen = f"a frame of another checkpoint ({made.weights}, {made.digest[:12]})"
            wanted = f"that of {self.reference} ({self.weights}, {self.digest[:12]})"
            raise UsageError(
                seen,
                wanted=wanted,
                do="fetch the frame of this model, or make it with `assay poc frame`",
            )
        return replace(self, frame=made)

    @property
    def config(self) -> "PreTrainedConfig":
        """Configuration of the decoder, which is a part of that of a model that reads images
        too.
        """
        return self.module.config.get_text_config(decoder=True)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return int(self.config.vocab_size)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text: those of the generation config, else of the config, and the
        tokenizer's.

        They may differ: a chat model often ends a text by one token and a turn by another.
        """
        generation = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        stated = (
            generation
            if generation is not None
            else getattr(self.module.config, "eos_token_id", None)
        )
        ended = list(stated) if isinstance(stated, list | tuple) else [stated]
        ended.append(getattr(self.tokenizer, "eos_token_id", None))
        return frozenset(token for token in ended if token is not None)

    @property
    def experts(self) -> int:
        """Experts among which a layer of a mixture chooses; 0 for a model without them."""
        return expert_count(self.config)

    @property
    def max_positions(self) -> int:
        """The longest sequence the model is made for, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters that are not quantised."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device the parameters are on."""
        return next(self.module.parameters()).device

    @property
    def architecture(self) -> str:
        """The transformers class, for example ``"Qwen3ForCausalLM"``."""
        return type(self.module).__name__


def load_model(
    reference: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    weights: str = "trained",
    block_hash: str | None = None,
    quantise: str | None = None,
) -> Model:
    """Load a causal language model, checked and ready to run: evaluation mode, ``sdpa`` attention
    if it has any.

    Args:
        reference: Directory, GGUF file, hub id, ``reference:NAME`` (bundled, trained),
            ``pretrained:NAME`` (trained, from an installed package) or ``shape:NAME`` (bundled,
            random weights).
        dtype: Name ``"float32"``, ``"float16"`` or ``"bfloat16"``; None is the dtype the weights
            are stored in, and bfloat16 for a shape.
        device: Name ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` and so on; None is cuda where there is
            one, else cpu.
        weights: Mode: ``"trained"``; ``"random-all"``, every parameter drawn from its stream for
            ``block_hash``; or ``"random-embed"``, only the input embeddings (and a head tied to
            them). A shape has no trained weights: ``"trained"`` gives it ``"random-all"`` for a
            fixed block, and its norms keep the weight one in every mode.
        block_hash: Block of a random mode.
        quantise: Format of the decoder's linear layers: ``"float8"`` rounds them, and the rest
            keeps its dtype. A checkpoint that is stored in eight bits has its own, and None or the
            name of that takes it.

    Raises:
        UsageError: An argument is not one of the above, or a block hash is missing or has no use.
        ModelNotFound: There is no such model, or the hub does not return it.
        UnsafeCheckpoint: The checkpoint is a pickle.
        BadWeights: Weights are corrupt, missing, surplus, of another shape, or not finite.
        ModelError: The configuration or tokenizer cannot be used (unknown architecture, quantised).
        BackendUnavailable: The device is not there, or does not have the format.
        OutOfMemory: The model does not fit on the device.

    Example:
        >>> model = load_model("reference:qwen3", device="cpu")
        >>> model.hidden_size, model.num_layers, model.vocab_size
        (256, 8, 4096)
    """
    source = resolve(reference)
    target = parse_device(device)
    block = block_hash or (SHAPE_BLOCK if source.directory is None else "")
    is_shape = source.directory is None
    drawn = weights != "trained"
    modes = " or ".join(WEIGHT_MODES)
    dtypes = " or ".join(streams.DTYPES)
    for wrong, seen, wanted, do in (
        (weights not in WEIGHT_MODES, f"weights={weights!r}", modes, "choose one of them"),
        (
            not drawn and block_hash is not None,
            "a block hash for trained weights",
            "no block_hash",
            "drop it",
        ),
        (
            drawn and not block,
            f"weights={weights!r} without a block",
            "block_hash",
            "give the block hash",
        ),
        (
            dtype not in (None, *streams.DTYPES),
            f"dtype={dtype!r}",
            dtypes,
            "choose one, or leave it out",
        ),
    ):
        if wrong:
            raise UsageError(seen, wanted=wanted, do=do)
    form = _format_of(source, quantise, weights, target)
    tokenizer = (
        None if source.directory is None else read_tokenizer(source.directory)
    )  # fails before weights are read
    rounded = form.name if form else quantise or ""
    mode = "random-all" if is_shape and weights == "trained" else weights
    try:
        module, kept = _read_weights(source, torch_dtype(dtype) if dtype else None, mode, form)
        if source.directory is not None:
            _read_generation(module, source.directory)
        if is_shape or mode == "random-all":
            _randomise(module, kept or block, target, unit_norms=is_shape)
        if (
            mode == "random-embed"
        ):  # a head that is tied to them changes with them, for it is the same matrix
            weight = module.get_input_embeddings().weight
            name, parameter = next(pair for pair in module.named_parameters() if pair[1] is weight)
            _draw(name, parameter, block, parameter.device)
        cast("nn.Module", module).to(
            target
        ).eval()  # the library's own `to` is wrapped in a way that hides its type
        if rounded and form is None:
            round_weights(module)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        seen = f"the weights do not fit on {target}: {error}"
        do = "use a smaller model or dtype, or --device cpu"
        raise OutOfMemory(seen, wanted="room for all parameters", do=do) from error
    if target.type == "cpu":
        keep_freed_memory()
    digest = kept if mode == "trained" else _recipe_digest(source, mode, block, kept)
    return Model(module, tokenizer, source.reference, digest, mode, rounded)


def _read_weights(
    source: Source, dtype: torch.dtype | None, weights: str, form: StoredFormat | None
) -> "tuple[PreTrainedModel, str]":
    """Return the module on the CPU, and the digest or the block of its weights that are not drawn
    for another.
    """
    if (
        source.directory is None
    ):  # behind random embeddings the other weights are those of the fixed block
        return build(
            source.config, dtype or torch.bfloat16
        ), SHAPE_BLOCK if weights == "random-embed" else ""
    tensors = list_tensors(source.directory)
    dtype = dtype or stored_dtype(tensors)
    if weights == "random-all":
        return build(source.config, dtype), ""
    _check_headers(source, tensors, form)
    kept = digest_tensors(tensors, source.published.get("quantization_config"))
    if form is None:
        module = _load_trained(source, source.directory, dtype)
    else:
        module = load_stored(source, tensors, form, dtype)
    if dtype == torch.float16:  # it cannot hold every value of the other two
        for name, parameter in module.named_parameters():
            check_finite(name, parameter.data, f"{source.reference} as {dtype}")
    return module, kept


def check_loadable(
    reference: str | Path, *, device: str | None = None, quantise: str | None = None
) -> None:
    """Refuse what :func:`load_model` refuses, as far as configuration and headers of the weight
    files show it.
    """
    target = parse_device(device)
    source = resolve(reference)
    form = _format_of(source, quantise, "trained", target)
    if source.directory is not None:
        _check_headers(source, list_tensors(source.directory), form)


def identify(reference: str | Path, *, dtype: str) -> Model:
    """Return digest and shape of a checkpoint as a model on the meta device: it names a proof, but
    cannot run.

    The dtype is that in which an engine runs the model, for example ``"bfloat16"``. It refuses a
    shape, which has no checkpoint, and otherwise what :func:`load_model` refuses.
    """
    source = resolve(reference)
    directory = source.checkpoint
    form = read_format(source.reference, source.published)
    with torch.device("meta"):
        module = build(source.config, torch_dtype(dtype))
    _read_generation(module, directory)
    tensors = list_tensors(directory)
    if form is None:  # engines know layouts of quantised weights that are not read here
        _check_headers(source, tensors, form)
    digest = digest_tensors(tensors, source.published.get("quantization_config"))
    return Model(module, None, source.reference, digest, "trained", form.name if form else "")


def _read_generation(module: "PreTrainedModel", directory: Path) -> None:
    """Give a module the generation config of its folder, which is read by itself only where
    transformers loads it.
    """
    with suppress(OSError, ValueError, TypeError), silence_transformers():
        module.generation_config = GenerationConfig.from_pretrained(
            directory, local_files_only=True
        )


def _format_of(
    source: Source, quantise: str | None, weights: str, device: torch.device
) -> StoredFormat | None:
    """Return the format of a checkpoint that is stored in fewer than 16 bits; refuse to load it in
    another one.
    """
    form = read_format(source.reference, source.published)
    if form is None:
        check_quantisation(quantise, device)
        return None
    if quantise not in (None, form.name) or weights != "trained":
        wanted = "its own weights in its own format"
        do = "leave quantise and weights (--dtype, --weights) out"
        raise UsageError(
            f"{source.reference}, stored in {form.name}, as {quantise or weights}",
            wanted=wanted,
            do=do,
        )
    check_device(form, device)
    return form


def _load_trained(source: Source, directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    module: PreTrainedModel
    try:
        with silence_transformers():
            module, report = auto_class(source.config).from_pretrained(
                directory,
                config=source.config,
                dtype=dtype,
                attn_implementation=choose_attention(source.config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (
        Exception
    ) as error:  # the library reports faults of a checkpoint with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        seen = f"the weights of {source.reference!r} do not load: {error}"
        raise bad_weights(seen, "weights that belong to the configuration beside them") from error
    for fault, kind in _KINDS.items():  # what the headers did not show
        names = sorted(
            str(key[0] if isinstance(key, tuple) else key) for key in report.get(fault) or ()
        )
        if names:
            raise _misfit(repr(source.reference), kind, names)
    return module


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model from its configuration alone.

    ``parameters`` counts a tied matrix once. ``num_kv_heads`` equals ``num_heads`` without grouped
    queries, and ``experts`` is 0 without a mixture of them.
    """

    reference: str
    architecture: str
    parameters: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int
    experts: int
    licence: str
    note: str


def list_models() -> list[ModelInfo]:
    """Return the facts of the bundled reference models, then those of the bundled shapes."""
    names = [field.name for field in fields(ModelInfo)]
    return [ModelInfo(**{name: facts[name] for name in names}) for facts in CATALOGUE.values()]


def model_info(reference: str | Path) -> ModelInfo:
    """Return what is known of a model without reading its weights; parameters are counted on the
    meta device.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The configuration cannot be used.
    """
    source = resolve(reference, with_weights=False)
    config = source.config
    with torch.device("meta"):
        module = build(config, torch.float32)
    known = CATALOGUE.get(source.reference, {})
    config = config.get_text_config(decoder=True)
    return ModelInfo(
        reference=source.reference,
        architecture=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        experts=expert_count(config),
        licence=known.get("licence", "unknown"),
        note=known.get("note", str(source.directory or source.reference)),
    )


def save_random(
    reference: str | Path,
    path: str | Path,
    *,
    weights: str,
    block_hash: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Make the random-weight variant of a model, write it as a checkpoint directory and return its
    path.

    The directory is written under a temporary name and renamed at the end, so ``path`` is whole or
    absent. It includes the tokenizer, if there is one. Loaded again, the weights are the same bits
    and the digest is that of the tensors.

    Args:
        reference: Reference of :func:`load_model`.
        path: Directory to make; it must not exist.
        weights: Mode, ``"random-all"`` or ``"random-embed"``.
        block_hash: Block hash; a shape has a default.
        dtype: Dtype to store; None as for :func:`load_model`.

    Raises:
        UsageError: ``weights`` is not a random mode, or ``path`` exists.
        StorageError: The directory cannot be written.
        ModelError: The model cannot be loaded; :func:`load_model` lists the kinds.
    """
    target = Path(path)
    if weights == "trained":
        raise UsageError(
            "weights='trained'",
            wanted="random-all or random-embed",
            do="copy the directory instead",
        )
    if target.exists():
        raise UsageError(
            f"{target} exists", wanted="a new directory", do="choose another path or remove it"
        )
    check_folder(target)
    model = load_model(reference, dtype=dtype, device="cpu", weights=weights, block_hash=block_hash)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        )
        with beside as temporary, silence_transformers():
            model.module.save_pretrained(temporary)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(temporary)
            Path(temporary).chmod(0o755)
            Path(temporary).rename(target)
    except (OSError, SafetensorError) as error:
        seen = f"{target} cannot be written: {error}"
        raise StorageError(seen, wanted="room and permission", do="try elsewhere") from error
    return target
