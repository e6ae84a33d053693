"""From a reference to a model that is ready to run, with every fault found before it runs; or to its facts alone."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from assay import streams
from assay.errors import BadWeights, ModelError, OutOfMemory, UsageError, is_out_of_memory
from assay.models.checkpoint import (
    EIGHT_BITS,
    Stored,
    check_finite,
    digest_tensors,
    file_of,
    list_tensors,
    stored_dtype,
)
from assay.models.device import device_named
from assay.models.families import expert_count
from assay.models.formats import StoredFormat, check_device, stored_format
from assay.models.quantise import CHOSEN_FORMATS, NUMBER_FORMATS, check_quantisation
from assay.models.quantise import quantise as round_weights
from assay.models.quiet import quiet
from assay.models.random import SHAPE_BLOCK, attention_of, build, randomise, randomise_embeddings, recipe_digest
from assay.models.resolve import CATALOGUE, Source, auto_class, resolve, tokenizer_in
from assay.models.stored import check_stored, load_stored
from assay.streams.backends import torch_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# --------------------------------------------------------------------------------------------------
# Whether the tensors of a checkpoint fit its configuration, told by the headers of its files alone.
#
# Reading and hashing a large checkpoint takes minutes, so what cannot be loaded is refused before. Where names and shapes
# are not simply those of the configuration, the loader of transformers is asked itself, over tensors without numbers: it
# knows older names, tied weights, and experts that are stored one by one.

Shape = tuple[int, ...]
_SHAPED, _MISSING, _SURPLUS = "of another shape", "missing", "surplus"
_KINDS = {"mismatched_keys": _SHAPED, "missing_keys": _MISSING, "unexpected_keys": _SURPLUS}


class _Header(Tensor):
    """A tensor without numbers that passes for one on every device."""

    def to(self, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        return self if dtype is None else super().to(dtype=dtype)


def check_fits(source: Source, tensors: list[Stored]) -> None:
    """Refuse a checkpoint whose tensors are not those of its configuration; only headers are used.

    What the loader cannot tell without numbers is left to the load.

    Args:
        source: Where the model comes from; its checkpoint is not quantised.
        tensors: All tensors of the checkpoint.

    Raises:
        BadWeights: A tensor is missing, surplus or of another shape; names the first one and its file.
        ModelError: No model can be built from the configuration.
    """
    with torch.device("meta"):
        module = build(source.config, torch.float32)
    stored, wanted = {t.name: t.shape for t in tensors}, _layout(module)
    named = _compared(stored, wanted, _tied(module))
    if not any(named.values()):
        return
    try:
        found = _asked(source, tensors)
    except Exception:  # it stacks experts of two shapes, or what it does needs numbers: names decide
        found = None
    if found is None:  # a surplus tensor may be one that the loader passes over
        found = {**named, _SURPLUS: []} if _is_certain(named) else {}
    faults = named if any(found.values()) and _is_certain(named) else found
    for kind, names in faults.items():
        if names:
            raise _refusal(source, tensors, kind, names, wanted)


def _asked(source: Source, tensors: list[Stored]) -> dict[str, list[str]]:
    """Return the names of the tensors that the loader finds at fault, by kind."""
    heads = {t.name: _header(t) for t in tensors}
    architecture = auto_class(source.config)._model_mapping[type(source.config)]
    with quiet(), no_init_weights():
        _, report = architecture.from_pretrained(
            None,
            config=source.config,
            state_dict=heads,
            dtype=torch.float32,
            attn_implementation=attention_of(source.config),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return faults_of(report)


def _header(stored: Stored) -> Tensor:
    header: Tensor = _Header._make_subclass(_Header, stored.without_numbers())
    return header


def faults_of(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the sorted names of tensors at fault by kind, in words, of a loading report of transformers."""
    return {
        kind: sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get(fault) or ())
        for fault, kind in _KINDS.items()
    }


def _layout(module: "PreTrainedModel") -> dict[str, Shape]:
    """Return the shape of every tensor by its name in a file; names of older layouts are not among them."""
    inside: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    with suppress(Exception):  # another version of transformers, or experts that it cannot take apart
        from transformers.core_model_loading import revert_weight_conversion

        inside = revert_weight_conversion(module, inside)
    return {name: tuple(tensor.shape) for name, tensor in inside.items()}


def _tied(module: "PreTrainedModel") -> set[str]:
    """Return the names of the tensors that are another one too, and need not be stored."""
    kept = {name for name, _ in module.named_parameters()}
    return {name for name, _ in module.named_parameters(remove_duplicate=False)} - kept


def _compared(stored: dict[str, Shape], wanted: dict[str, Shape], tied: set[str]) -> dict[str, list[str]]:
    return {
        _SHAPED: sorted(name for name in stored.keys() & wanted.keys() if stored[name] != wanted[name]),
        _MISSING: sorted(wanted.keys() - stored.keys() - tied),
        _SURPLUS: sorted(stored.keys() - wanted.keys() - tied),
    }


def _is_certain(faults: dict[str, list[str]]) -> bool:
    """Return whether names say what is wrong: where tensors are both missing and surplus, names may be older ones."""
    return bool(faults[_SHAPED]) or bool(faults[_MISSING]) != bool(faults[_SURPLUS])


def _refusal(
    source: Source, tensors: list[Stored], kind: str, names: list[str], wanted: dict[str, Shape]
) -> BadWeights:
    name = names[0]
    at = {t.name: t for t in tensors}
    shapes = f": {list(at[name].shape)}, not {list(wanted[name])}" if name in at and name in wanted else ""
    many = f"{len(names)} tensors are" if len(names) > 1 else "a tensor is"
    return BadWeights(
        f"{file_of(source.checkpoint, at, name)}: {many} {kind}, the first is {name!r}{shapes}",
        wanted="exactly the tensors of the configuration",
        do=f"download or save {source.reference} again; a fused or quantised layout is not read",
    )


_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
WEIGHT_MODES = ("trained", "random-all", "random-embed")


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model, ready to run, with the facts that identify it.

    Attributes:
        module: Model of transformers, in evaluation mode, on ``device``, in ``dtype``.
        tokenizer: Tokenizer of the model; a ``shape:`` model has None.
        reference: Reference as it was given.
        digest: SHA-256 in hex. For trained weights: of the stored tensors (names, dtypes, shapes, bytes),
            whatever the sharding, the dtype of loading and the device. For random weights: of the recipe.
        weights: Mode, ``"trained"``, ``"random-all"`` or ``"random-embed"``.
        quantised: Format of :data:`assay.models.NUMBER_FORMATS` where the decoder's weights are in eight bits, as they
            were stored or rounded; else empty.
        devices: Number of devices over which the weights are spread.
    """

    module: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    reference: str
    digest: str
    weights: str
    quantised: str = ""
    devices: int = 1

    @property
    def config(self) -> "PreTrainedConfig":
        """Configuration of the decoder, which is a part of that of a model that reads images too."""
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
    mesh: "DeviceMesh | None" = None,
) -> Model:
    """Load a causal language model, checked and ready to run: evaluation mode, ``sdpa`` attention if it has any.

    Args:
        reference: Directory, hub id, ``reference:NAME`` (bundled, trained) or ``shape:NAME`` (bundled, random weights).
        dtype: Name ``"float32"``, ``"float16"`` or ``"bfloat16"``; None is the dtype the weights are stored in, and
            bfloat16 for a shape.
        device: Name ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` and so on; None is cuda where there is one, else cpu.
        weights: Mode: ``"trained"``; ``"random-all"``, every parameter drawn from its stream for ``block_hash``; or
            ``"random-embed"``, only the input embeddings (and a head tied to them). A shape has no trained weights:
            ``"trained"`` gives it ``"random-all"`` for a fixed block, and its norms keep the weight one in every mode.
        block_hash: Block of a random mode.
        quantise: Format of the decoder's linear layers: ``"int8"`` or ``"float8"`` rounds them, and the rest keeps its
            dtype. A checkpoint that is stored in eight bits has its own, and None or the name of that takes it.
        mesh: Devices over which the weights are spread, one process for each; all processes call this.

    Raises:
        UsageError: An argument is not one of the above, or a block hash is missing or has no use.
        ModelNotFound: There is no such model, or the hub does not return it.
        UnsafeCheckpoint: The checkpoint is a pickle.
        BadWeights: Weights are corrupt, missing, surplus, of another shape, or not finite.
        ModelError: The configuration or tokenizer cannot be used (unknown architecture, quantised).
        BackendUnavailable: The device is not there, or torchao, which eight-bit weights need, is missing.
        OutOfMemory: The model does not fit on the device.

    Example:
        >>> model = load_model("reference:qwen3", device="cpu")
        >>> model.hidden_size, model.num_layers, model.vocab_size
        (256, 8, 4096)
    """
    _check_mode(weights, block_hash, is_shape=str(reference).startswith("shape:"))
    target = device_named(device)
    if dtype is not None and dtype not in streams.DTYPES:
        raise UsageError(f"dtype={dtype!r}", wanted=" or ".join(streams.DTYPES), do="choose one, or leave it out")
    wanted = None if dtype is None else torch_dtype(dtype)
    source = resolve(reference)
    form = _format_of(source, quantise, weights, target)
    if form is None:
        check_quantisation(quantise, target)
    tokenizer = None if source.directory is None else tokenizer_in(source.directory)  # fails before weights are read
    rounded = form.name if form else quantise or ""
    if rounded and mesh is not None:
        raise UsageError(f"{rounded} weights over several devices", wanted="one of the two", do="leave one out")
    try:
        module, digest, mode = _materialise(source, wanted, target, mesh, weights, block_hash, form)
        if rounded and form is None:
            round_weights(module, rounded)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the weights do not fit on {target}: {error}",
            wanted="room for all parameters",
            do="use a smaller model or dtype, or --device cpu",
        ) from error
    return Model(module, tokenizer, source.reference, digest, mode, rounded, mesh.size() if mesh else 1)


def check_loadable(reference: str | Path, *, device: str | None = None, quantise: str | None = None) -> None:
    """Refuse what :func:`load_model` refuses of the same arguments, as far as no weights must be read for it.

    The configuration and the headers of the weight files are read.

    Args:
        reference: Reference of :func:`load_model`.
        device: Name of the device, as there.
        quantise: Format of the decoder's linear layers, as there.

    Raises:
        AssayError: As :func:`load_model`.
    """
    target, source = device_named(device), resolve(reference)
    form = _format_of(source, quantise, "trained", target)
    if form is None:
        check_quantisation(quantise, target)
    if source.directory is not None:
        _check_headers(source, list_tensors(source.directory), form)


def identify(reference: str | Path, *, dtype: str) -> Model:
    """Return digest and shape of a checkpoint as a model on the meta device: it names a proof, but cannot run.

    Args:
        reference: Reference of :func:`load_model` that is not a shape.
        dtype: Dtype in which an engine runs the model, for example ``"bfloat16"``.

    Raises:
        UsageError: The reference is a shape, which has no checkpoint.
        ModelNotFound: There is no such model.
        BadWeights: The weights are corrupt, missing, surplus, of another shape, or not finite.
        ModelError: The configuration cannot be used.
    """
    source = resolve(reference)
    directory = source.checkpoint
    form = stored_format(source.reference, source.published)
    with torch.device("meta"):
        module = build(source.config, torch_dtype(dtype))
    tensors = list_tensors(directory)
    if form is None:  # engines know layouts of quantised weights that are not read here
        _check_headers(source, tensors, form)
    digest = _digest(source, tensors, form)
    return Model(module, None, source.reference, digest, "trained", form.name if form else "")


def _format_of(source: Source, quantise: str | None, weights: str, device: torch.device) -> StoredFormat | None:
    """Return the format of a checkpoint that is stored in eight bits.

    Raises:
        UsageError: Another format is asked for, or random weights of such a checkpoint.
        ModelError: The configuration states a format that is not read.
        BackendUnavailable: The format was not tested on the device.
    """
    form = stored_format(source.reference, source.published)
    if form is None:
        if quantise in NUMBER_FORMATS and quantise not in CHOSEN_FORMATS:
            raise UsageError(
                f"{source.reference} in {quantise}", wanted="a checkpoint that is stored so", do="choose int8 or float8"
            )
        return None
    if quantise not in (None, form.name) or weights != "trained":
        raise UsageError(
            f"{source.reference}, stored in {form.name}, as {quantise or weights}",
            wanted="its own weights in its own format",
            do="leave quantise and weights (--dtype, --weights) out",
        )
    check_device(form, device)
    return form


def _check_headers(source: Source, tensors: list[Stored], form: StoredFormat | None) -> None:
    """Refuse tensors that are not those of the configuration, and weights in eight bits that it does not explain.

    Only headers are used: hashing a large checkpoint takes minutes.
    """
    if form is not None:
        check_stored(source, tensors, form)
        return
    odd = next((tensor for tensor in tensors if tensor.dtype in EIGHT_BITS), None)
    if odd is not None:
        raise BadWeights(
            f"{odd.file} stores {odd.name!r} as {odd.dtype}, and config.json has no quantization_config",
            wanted="a configuration that says how they are used",
            do="download or save the checkpoint again",
        )
    check_fits(source, tensors)


def _digest(source: Source, tensors: list[Stored], form: StoredFormat | None) -> str:
    """Return the digest of a checkpoint whose headers were checked."""
    return digest_tensors(tensors, None if form is None else source.published["quantization_config"])


def _check_mode(weights: str, block_hash: str | None, *, is_shape: bool) -> None:
    if weights not in WEIGHT_MODES:
        raise UsageError(f"weights={weights!r}", wanted=" or ".join(WEIGHT_MODES), do="choose one of them")
    if weights == "trained" and block_hash is not None:
        raise UsageError(
            "a block hash for trained weights", wanted="no block_hash", do="drop it, or ask for random-all"
        )
    if weights != "trained" and not block_hash and not is_shape:
        raise UsageError(f"weights={weights!r} without a block", wanted="block_hash", do="give the block hash")


def _materialise(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device,
    mesh: "DeviceMesh | None",
    weights: str,
    block_hash: str | None,
    form: StoredFormat | None,
) -> "tuple[PreTrainedModel, str, str]":
    """Return the module on its device, its digest, and the weight mode that it really has."""
    is_shape = source.directory is None
    block = block_hash or (SHAPE_BLOCK if is_shape else "")
    kept = ""
    if source.directory is None:
        weights = "random-all" if weights == "trained" else weights
        # Behind random embeddings the other weights are those of the fixed block.
        kept = SHAPE_BLOCK if weights == "random-embed" else ""
        module = build(source.config, dtype or torch.bfloat16)
    else:
        tensors = list_tensors(source.directory)
        dtype = dtype or stored_dtype(tensors)
        if weights == "random-all":
            module = build(source.config, dtype)
        else:
            _check_headers(source, tensors, form)
            kept = _digest(source, tensors, form)
            if form is None:
                module = _load_trained(source, source.directory, dtype)
            else:
                module = load_stored(source, tensors, form, dtype)
            if dtype == torch.float16:  # it cannot hold every value of the other two
                for name, parameter in module.named_parameters():
                    check_finite(name, parameter.data, f"{source.reference} as {dtype}")
    if mesh is not None:
        _shard(module, mesh)
    if is_shape or weights == "random-all":
        randomise(module, kept or block, device, unit_norms=is_shape)
    if weights == "random-embed":
        randomise_embeddings(module, block)
    cast("nn.Module", module).to(device).eval()  # the library's own `to` is wrapped in a way that hides its type
    digest = kept if weights == "trained" else recipe_digest(source, weights, block, kept)
    return module, digest, weights


def _shard(module: "PreTrainedModel", mesh: "DeviceMesh") -> None:
    """Cut the decoder's weights by the plan that transformers has for the architecture, and install its collectives.

    The head stays whole: it may be tied to the embeddings.

    Raises:
        UsageError: The heads or the width of the MLP cannot be divided by the number of processes.
        ModelError: There is no plan for this architecture.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {name: style for name, style in (module.tp_plan or {}).items() if name.startswith(module.base_model_prefix)}
    if not plan:
        raise ModelError(
            f"{type(module).__name__} over {mesh.size()} devices",
            wanted="an architecture with a tensor parallel plan in transformers, such as Llama or Qwen3",
            do="leave --tensor-parallel out",
        )
    for name in _DIVIDED:
        number = getattr(module.config, name, None) or mesh.size()
        if number % mesh.size():
            raise UsageError(
                f"{name} {number} over {mesh.size()} devices",
                wanted=f"a number of devices that divides {', '.join(_DIVIDED)}",
                do="choose another --tensor-parallel",
            )
    owner: Any = module
    owner._tp_plan = plan
    apply_tensor_parallelism(module, mesh)  # type: ignore[no-untyped-call]


def _load_trained(source: Source, directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    module: PreTrainedModel
    try:
        with quiet():
            module, report = auto_class(source.config).from_pretrained(
                directory,
                config=source.config,
                dtype=dtype,
                attn_implementation=attention_of(source.config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # the library reports faults of a checkpoint with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        raise BadWeights(
            f"the weights of {source.reference!r} do not load: {error}",
            wanted="weights that belong to the configuration beside them",
            do="download or save the checkpoint again",
        ) from error
    _check_complete(source.reference, report)
    return module


def _check_complete(reference: str, report: dict[str, Any]) -> None:
    """Refuse what the headers did not show; :func:`check_fits` has refused the rest before anything was read."""
    for kind, names in faults_of(report).items():
        if names:
            raise BadWeights(
                f"{reference!r}: {len(names)} tensors are {kind}, the first is {names[0]!r}",
                wanted="exactly the tensors of the configuration",
                do="download or save the checkpoint again; a fused or quantised layout is not read",
            )


# --------------------------------------------------------------------------------------------------
# What is known of a model from its configuration alone.


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model from its configuration alone.

    ``parameters`` counts a tied matrix once. ``num_kv_heads`` equals ``num_heads`` without grouped queries,
    and ``experts`` is 0 without a mixture of them.
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
    return [model_info(reference) for reference in CATALOGUE]


def model_info(reference: str | Path) -> ModelInfo:
    """Return what is known of a model without reading its weights; parameters are counted on the meta device.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The configuration cannot be used.
    """
    source = resolve(reference)
    config = source.config
    with torch.device("meta"):
        module = build(config, torch.float32)
    entry, config = CATALOGUE.get(source.reference), config.get_text_config(decoder=True)
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
        licence=entry.licence if entry else "unknown",
        note=entry.note if entry else str(source.directory),
    )
