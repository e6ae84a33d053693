"""From a reference to a model that is ready to run, with every fault found before it runs.

:func:`load_model` resolves the reference and has its weights read (:func:`open_trained`) or drawn
(:func:`open_random`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from assay.errors import (
    ModelError,
    OutOfMemory,
    StorageError,
    UsageError,
    check_choice,
    is_out_of_memory,
)
from assay.files.storage import check_new_folder
from assay.files.weights import bad_weights, check_served
from assay.memory import keep_freed_memory
from assay.models.checkpoint import (
    StoredTensor,
    check_finite,
    check_headers,
    check_report,
    digest_tensors,
    list_tensors,
    stored_dtype,
)
from assay.models.configuration import (
    auto_class,
    build,
    build_empty,
    choose_attention,
    silence_transformers,
)
from assay.models.decoder import backbone
from assay.models.device import parse_device
from assay.models.eight_bits import round_linears
from assay.models.model import Model
from assay.models.number_formats import (
    NUMBER_FORMATS,
    StoredFormat,
    check_format,
    check_rounding,
    read_format,
)
from assay.models.random_weights import SHAPE_BLOCK, randomise, randomise_embeddings, recipe_digest
from assay.models.resolve import ModelSource, resolve
from assay.models.stored_weights import load_stored
from assay.models.tokenizer_files import read_tokenizer
from assay.streams.arrays import DTYPES, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_MODES = ("trained", "random-all", "random-embed")


def load_model(
    reference: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    weights: str = "trained",
    block_hash: str | None = None,
    quantise: str | None = None,
) -> Model:
    """Load a causal language model, checked and in evaluation mode, with ``sdpa`` attention.

    Args:
        reference: Directory, GGUF file, hub id, ``reference:NAME`` (bundled, trained),
            ``pretrained:NAME`` (trained, from an installed package) or ``shape:NAME`` (bundled,
            random weights).
        dtype: Name ``"float32"``, ``"float16"`` or ``"bfloat16"``; None is the dtype the weights
            are stored in, and bfloat16 for a shape. A name of :data:`NUMBER_FORMATS` stands for
            ``quantise`` with it, and the stored dtype for the rest.
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
    # A number format of weights may stand in either argument.
    if dtype in NUMBER_FORMATS and quantise in (None, dtype):
        quantise = dtype
        dtype = None
    _check_names(dtype, weights, block_hash)
    source = resolve(reference)
    target = parse_device(device)
    narrow = None if dtype is None else torch_dtype(dtype)
    is_shape = source.directory is None
    block = _choose_block(weights, block_hash, SHAPE_BLOCK if is_shape else "")
    mode = "random-all" if is_shape and weights == "trained" else weights
    form = _choose_format(source, quantise, weights, target)
    # It fails before weights are read.
    tokenizer = None if is_shape else read_tokenizer(source.checkpoint)
    with _refuse_out_of_memory(target):
        if is_shape or mode == "random-all":
            # Where embeddings alone are drawn for the block, a shape has no trained weights beside.
            others = SHAPE_BLOCK if mode == "random-embed" else ""
            module = open_random(source, narrow, others or block, target)
        else:
            module, others = open_trained(source, narrow, form)
        # The library's own `to` is wrapped in a way that hides its type.
        cast("torch.nn.Module", module).to(target).eval()
        if quantise is not None and form is None:
            round_linears(backbone(module))
        if mode == "random-embed":
            randomise_embeddings(module, block)
    digest = others
    if mode != "trained":
        digest = recipe_digest(source.published, mode, block, others=others, unit_norms=is_shape)
    if target.type == "cpu":
        keep_freed_memory()
    quantised = form.name if form else quantise or ""
    return Model(module, tokenizer, source.reference, digest, mode, quantised)


def open_trained(
    source: ModelSource, dtype: torch.dtype | None, form: StoredFormat | None
) -> "tuple[PreTrainedModel, str]":
    """Return the module of a checkpoint on the CPU, and the digest of its tensors.

    Args:
        source: Checkpoint.
        dtype: Dtype of weights that are not stored in eight bits; None is the stored one.
        form: Format of weights in eight or four bits; None without such weights.
    """
    tensors = list_tensors(source.checkpoint)
    dtype = dtype or stored_dtype(tensors)
    _check_tensors(source, tensors, form)
    digest = digest_tensors(tensors, source.published.get("quantization_config"))
    if form is None:
        module = _read_plain(source, dtype)
    else:
        module = load_stored(source, tensors, form, dtype)
    _read_generation(module, source.checkpoint)
    # Values that float16 cannot hold, where the other dtypes can.
    if dtype == torch.float16:
        for name, parameter in module.named_parameters():
            check_finite(name, parameter.data, f"{source.reference} as {dtype}")
    return module, digest


def open_random(
    source: ModelSource, dtype: torch.dtype | None, block: str, device: torch.device
) -> "PreTrainedModel":
    """Return the module of a configuration with every weight drawn for a block on a device.

    The norms of a shape are ones, and its dtype is bfloat16 by default. Of a checkpoint's tensors
    only the dtype is used.
    """
    if source.directory is None:
        module = build(source.config, dtype or torch.bfloat16)
    else:
        module = build(source.config, dtype or stored_dtype(list_tensors(source.directory)))
        _read_generation(module, source.directory)
    randomise(module, block, device, unit_norms=source.directory is None)
    return module


def _check_names(dtype: str | None, weights: str, block_hash: str | None) -> None:
    check_choice("weights", weights, WEIGHT_MODES, "weights")
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES, "dtype")
    if weights == "trained" and block_hash is not None:
        raise UsageError(
            "a block hash for trained weights",
            wanted="no block_hash",
            do="drop it",
            field="block_hash",
        )


def _choose_block(weights: str, block_hash: str | None, default: str) -> str:
    """Return the block that weights are drawn for."""
    block = block_hash or default
    if weights != "trained" and not block:
        raise UsageError(
            f"weights={weights!r} without a block",
            wanted="block_hash",
            do="give the block hash",
            field="block_hash",
        )
    return block


def _choose_format(
    source: ModelSource, quantise: str | None, weights: str, device: torch.device
) -> StoredFormat | None:
    """Return the format of a quantised checkpoint; refuse to load it in another one."""
    if (form := read_format(source.reference, source.published)) is None:
        check_rounding(quantise, device)
        return None
    if quantise not in (None, form.name) or weights != "trained":
        raise UsageError(
            f"{source.reference}, stored in {form.name}, as {quantise or weights}",
            wanted="its own weights in its own format",
            do="leave dtype, quantise and weights out (--dtype)",
        )
    check_format(form, device)
    return form


@contextmanager
def _refuse_out_of_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the weights do not fit on {device}: {error}",
            wanted="room for all parameters",
            do="use a smaller model or dtype, or --device cpu",
        ) from error


def _check_tensors(
    source: ModelSource, tensors: list[StoredTensor], form: StoredFormat | None
) -> None:
    """Refuse other tensors than those of the configuration, as far as headers show it."""
    if form is None:
        check_headers(source, tensors)
    else:
        load_stored(source, tensors, form, torch.bfloat16, headers_only=True)


def _read_plain(source: ModelSource, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the module of a checkpoint as transformers reads it, on the CPU in a dtype."""
    module: PreTrainedModel
    try:
        with silence_transformers():
            module, report = auto_class(source.config).from_pretrained(
                source.checkpoint,
                config=source.config,
                dtype=dtype,
                attn_implementation=choose_attention(source.config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # the library reports faults with exceptions of many kinds
        if is_out_of_memory(error):
            raise
        raise bad_weights(
            f"the weights of {source.reference!r} do not load: {error}",
            "weights that belong to the configuration beside them",
        ) from error
    check_report(source.reference, report)
    return module


def _read_generation(module: "PreTrainedModel", directory: Path) -> None:
    """Give a module the generation config of its folder, as transformers does where it loads.

    An end token, of that config or of the module's own, is refused where it is not a token.
    """
    # The library reads odd values with exceptions of many kinds.
    with suppress(Exception), silence_transformers():
        module.generation_config = GenerationConfig.from_pretrained(
            directory, local_files_only=True
        )
    for config in (module.generation_config, module.config):
        stated = getattr(config, "eos_token_id", None)
        tokens = stated if isinstance(stated, list) else [stated]
        if stated is not None and not all(type(token) is int and token >= 0 for token in tokens):
            raise ModelError(
                f"{directory} says eos_token_id = {stated!r:.80}",
                wanted="the number of a token, or a list of them",
                do="correct generation_config.json and config.json, or download them again",
            )


@contextmanager
def plain_generation(module: "PreTrainedModel") -> Iterator[None]:
    """Leave out the generation config of a module, which holds what its checkpoint says."""
    own = module.generation_config
    module.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        module.generation_config = own


def check_loadable(
    reference: str | Path, *, device: str | None = None, dtype: str | None = None
) -> None:
    """Refuse what :func:`load_model` refuses, as far as configuration and headers show it."""
    target = parse_device(device)
    source = resolve(reference)
    form = _choose_format(source, dtype if dtype in NUMBER_FORMATS else None, "trained", target)
    if source.directory is not None:
        _check_tensors(source, list_tensors(source.directory), form)


def identify(reference: str | Path, *, dtype: str) -> Model:
    """Return the model of a checkpoint on the meta device: it names a proof, but cannot run.

    The dtype is that in which an engine runs the model, for example ``"bfloat16"``. It refuses a
    shape, which has no checkpoint, and a folder of which a server would load other weights; and
    otherwise what :func:`load_model` refuses.
    """
    source = resolve(reference)
    check_served(source.checkpoint)
    form = read_format(source.reference, source.published)
    module = build_empty(source.config, torch_dtype(dtype))
    _read_generation(module, source.checkpoint)
    tensors = list_tensors(source.checkpoint)
    # Engines know layouts of quantised weights that are not read here.
    if form is None:
        check_headers(source, tensors)
    digest = digest_tensors(tensors, source.published.get("quantization_config"))
    return Model(module, None, source.reference, digest, "trained", form.name if form else "")


def load_tokenizer(reference: str | Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a model without its weights; None where it has none, as a shape.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The tokenizer cannot be read.
    """
    directory = resolve(reference).directory
    return None if directory is None else read_tokenizer(directory)


def save_random(
    reference: str | Path,
    path: str | Path,
    *,
    weights: str,
    block_hash: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the random-weight variant of a model as a checkpoint directory; return its path.

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
        UsageError: ``weights`` is not a random mode, ``dtype`` no dtype, or ``path`` exists.
        StorageError: The directory cannot be written.
        ModelError: The model cannot be loaded; :func:`load_model` lists the kinds.
    """
    target = Path(path)
    if weights == "trained":
        raise UsageError(
            "weights='trained'",
            wanted="random-all or random-embed",
            do="copy the directory instead",
            field="weights",
        )
    # A rounded model has no form in which a checkpoint could be loaded again.
    check_choice("dtype", dtype, (None, *DTYPES), "dtype")
    check_new_folder(target)
    model = load_model(reference, dtype=dtype, device="cpu", weights=weights, block_hash=block_hash)
    save_checkpoint(model.module, model.tokenizer, target)
    return target


def save_checkpoint(
    module: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", target: Path
) -> None:
    """Write a module and its tokenizer as a checkpoint directory, which is whole or absent.

    Files of a directory that exists are replaced once all are written.

    Raises:
        StorageError: The directory cannot be written.
    """
    generation = module.generation_config
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix=".assay-",
            dir=target if target.is_dir() else target.parent,
            ignore_cleanup_errors=True,
        )
        with temporary as name, silence_transformers():
            folder = Path(name)
            # The library refuses to save what it reads: a temperature without sampling.
            with plain_generation(module):
                module.save_pretrained(folder)
            if generation is not None:
                generation.to_json_file(folder / "generation_config.json")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if target.is_dir():
                for path in filter(Path.is_file, folder.rglob("*")):
                    place = target / path.relative_to(folder)
                    place.parent.mkdir(exist_ok=True)
                    path.replace(place)
            else:
                # A temporary directory is its owner's alone.
                folder.chmod(0o755)
                folder.rename(target)
    except (OSError, SafetensorError, ValueError) as error:
        raise StorageError(
            f"{target} cannot be written: {error}",
            wanted="room and permission",
            do="try elsewhere",
        ) from error
