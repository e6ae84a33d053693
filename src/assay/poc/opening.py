"""Engines by name: start the one that proves, judges or replays, and refuse what it cannot do before weights are read.

``ASSAY_VLLM_ARGS`` holds options of vLLM, written as on its command line, for the engine ``vllm``.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

from assay.errors import ProofMismatch, UsageError
from assay.models.load import Model, load_model, model_info
from assay.models.load import check_loadable as check_model
from assay.models.quantized import NUMBER_FORMATS, STORED_FORMATS, in_format
from assay.poc.engines.base import Engine, unsupported
from assay.poc.engines.hf.compiled import worth_compiling
from assay.poc.engines.hf.engine import HFEngine, auto_batch, be_deterministic, check_shape
from assay.poc.engines.hf.parallel import ParallelEngine, World, joined, processes
from assay.poc.protocol.builds import of_weights
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.record import Header
from assay.poc.responses.adapters import Lora
from assay.poc.responses.prefill import HFPrefill, Prefill
from assay.poc.responses.receipts import ReceiptHeader, Receipts
from assay.poc.verdict.calibration import Calibration
from assay.poc.verdict.noise import default_noise
from assay.poc.verifier import judging_batch

if TYPE_CHECKING:
    from assay.poc.vllm.prefill import VLLMPrefill

EngineName = Literal["hf", "vllm"]
Kernels = Literal["auto", "compiled", "eager"]
ARGUMENTS = "ASSAY_VLLM_ARGS"
DO_INSTEAD = {
    "model": "pass it to the command",
    "dtype": "pass it to the command",
    "revision": "download that revision, and pass its directory to --model",
    "worker_extension_cls": "leave it out: assay has the workers use its own",
}
"""Engine arguments that are not the operator's, and what to do instead: a proof names the model and the format that the
command was given."""


@contextmanager
def vllm_engine(
    model: str, *, dtype: str | None, device: str | None, batch_size: int, seq_len: int
) -> Iterator[tuple[Model, Engine]]:
    """Start vLLM with a model; yield the model's identity and the engine.

    Raises:
        UsageError: A device was named.
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        ModelError: The model cannot be loaded.
    """
    _prepare(device)
    from assay.poc.vllm.compatibility import check_installed
    from assay.poc.vllm.engine import VLLMEngine

    check_installed()
    options = vllm_options(os.environ.get(ARGUMENTS, ""))
    with VLLMEngine(model, batch_size=batch_size, seq_len=seq_len, dtype=dtype, **options) as engine:
        yield engine.model, engine


@contextmanager
def vllm_prefill(
    model: str, *, dtype: str, device: str | None, batch_size: int, receipts: Sequence[ReceiptHeader]
) -> Iterator["VLLMPrefill"]:
    """Start an offline vLLM that reads whole responses.

    Raises:
        UsageError: A device was named, or a number format that vLLM is not given.
        ProofMismatch: The receipts are of another checkpoint.
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        ModelError: The model cannot be loaded.
    """
    _prepare(device)
    from assay.poc.vllm.prefill import VLLMPrefill

    options = vllm_options(os.environ.get(ARGUMENTS, ""))
    with VLLMPrefill(model, dtype=dtype, batch_size=batch_size, receipts=receipts, **options) as engine:
        yield engine


def _prepare(device: str | None) -> None:
    """Refuse a device, and send what vLLM says to stderr: stdout is for results."""
    if device is not None:
        raise UsageError(
            f"--device {device} with vllm",
            wanted="no --device: a build of vLLM is for one kind of device",
            do="leave it out",
        )
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def vllm_options(text: str) -> dict[str, Any]:
    """Read engine arguments with vLLM's own parser; return those that differ from its defaults.

    Raises:
        UsageError: vLLM has no such argument, or it is not the operator's.
    """
    if not text.strip():
        return {}
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    said = StringIO()
    try:
        with redirect_stderr(said):
            values, unset = vars(parser.parse_args(shlex.split(text))), vars(parser.parse_args([]))
    except (SystemExit, ValueError) as error:
        reason = said.getvalue().strip().rpartition("error: ")[2] or str(error)
        raise UsageError(
            f"{ARGUMENTS}={text!r:.200}: {reason}", wanted="engine arguments of vLLM", do="see `vllm serve --help`"
        ) from None
    options = {name: value for name, value in values.items() if value != unset[name]}
    for name in DO_INSTEAD.keys() & options.keys():
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} in {ARGUMENTS}", wanted="other engine arguments of vLLM", do=DO_INSTEAD[name])
    return options


@dataclass(frozen=True, kw_only=True)
class Proving:
    """How a node runs its model.

    Args:
        model: Reference of the model.
        preset: Name of the pipeline of the round.
        seq_len: Number of positions of a nonce.
        engine: Engine that runs the model.
        dtype: Number format of the weights; None keeps the stored dtype.
        device: Device of the model; by default cuda where there is one.
        batch_size: Nonces per forward pass; ``auto`` takes what fits into memory.
        kernels: Kernels of the hf engine; ``auto`` compiles on CUDA.
        deterministic: Whether an operation that may give other bits the next time is refused.
        tensor_parallel: Processes of torchrun that hold one model together.
    """

    model: str
    preset: str
    seq_len: int
    engine: EngineName = "hf"
    dtype: str | None = None
    device: str | None = None
    batch_size: int | Literal["auto"] = 32
    kernels: Kernels = "auto"
    deterministic: bool = False
    tensor_parallel: int = 1


@contextmanager
def open_prover(chosen: Proving) -> Iterator[tuple[Model, Engine] | None]:
    """Load a model and its engine; yield both, or None in a process that works for another one.

    Raises:
        UsageError: The engine has no use for an option.
        BackendUnavailable: What the engine needs is not installed.
        ModelError: The model cannot be loaded.
    """
    pipeline, size = get_pipeline(chosen.preset), 1 if chosen.batch_size == "auto" else chosen.batch_size
    if chosen.engine == "vllm":
        _refuse_for_vllm(chosen, pipeline)
    elif pipeline.steps and chosen.kernels == "compiled":
        raise UsageError(
            f"--kernels compiled with --preset {chosen.preset}",
            wanted="eager kernels, which decode",
            do="leave --kernels out",
        )
    check_shape(model_info(chosen.model), batch_size=size, seq_len=chosen.seq_len, steps=pipeline.steps)
    if chosen.engine == "vllm":
        shape = {"batch_size": size, "seq_len": chosen.seq_len}
        with vllm_engine(chosen.model, dtype=chosen.dtype, device=chosen.device, **shape) as made:
            yield made
        return
    if chosen.deterministic:
        be_deterministic()
    if processes() == 1:
        if chosen.tensor_parallel != 1:
            raise UsageError(
                f"--tensor-parallel {chosen.tensor_parallel} in one process",
                wanted="a process for each device",
                do=f"torchrun --nproc-per-node {max(2, chosen.tensor_parallel)} -m assay poc prove …",
            )
        loaded = load(chosen.model, chosen.dtype, chosen.device)
        yield loaded, HFEngine(loaded, **_shape(loaded, chosen, pipeline))
        return
    with joined(tensor_parallel=chosen.tensor_parallel, device=chosen.device) as world:
        loaded = load(chosen.model, chosen.dtype, world.device, world)
        with ParallelEngine(loaded, world, **_shape(loaded, chosen, pipeline)) as engine:
            if world.leads:
                yield loaded, engine
            else:
                engine.work()
                yield None


def _shape(model: Model, chosen: Proving, pipeline: Pipeline) -> dict[str, Any]:
    size = chosen.batch_size
    size = auto_batch(model, chosen.seq_len + pipeline.steps) if size == "auto" else size
    compiled = compiles(model, chosen.kernels) and not pipeline.steps
    return {"batch_size": size, "seq_len": chosen.seq_len, "compiled": compiled}


def _refuse_for_vllm(chosen: Proving, pipeline: Pipeline) -> None:
    """Refuse options that vLLM has no use for, which it needs half a minute to say."""
    _refuse_pipeline_for_vllm(pipeline)
    of_hf = {
        f"--kernels {chosen.kernels}": chosen.kernels != "auto",
        "--deterministic": chosen.deterministic,
        f"--tensor-parallel {chosen.tensor_parallel}": chosen.tensor_parallel != 1,
        "--batch-size auto": chosen.batch_size == "auto",
        f"--dtype {chosen.dtype}": chosen.dtype in NUMBER_FORMATS,
    }
    if given := [flag for flag, is_given in of_hf.items() if is_given]:
        raise UsageError(
            f"{given[0]} with --engine vllm",
            wanted="no --kernels, --deterministic or --tensor-parallel, a batch size in numbers, and a dtype",
            do=f"leave {given[0].split()[0]} out; ASSAY_VLLM_ARGS holds vLLM's own options",
        )


@contextmanager
def open_judge(
    model: str,
    header: Header,
    *,
    engine: EngineName = "hf",
    dtype: str | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
) -> Iterator[tuple[Model, Engine | None]]:
    """Yield the model and the engine that recompute a proof; None stands for the transformers engine.

    Args:
        model: Reference of the model.
        header: Header of the proof.
        engine: Engine that recomputes.
        dtype: Number format of the weights; the prover's, which agrees best, when None.
        device: Device of the model.
        calibration: Calibration that will judge the proof, for the batch that it was measured with.

    Raises:
        UsageError: The engine has no use for an option, or cannot run the preset of the proof.
        BackendUnavailable: vLLM is not installed, or not in a version that was tested.
        CalibrationError: The calibration is of another model, preset or build than the proof.
        ModelError: The model cannot be loaded.
    """
    dtype = dtype or of_weights(header.fingerprint.dtype)
    if engine == "hf":
        yield load(model, dtype, device), None
        return
    _refuse_pipeline_for_vllm(header.pipeline)
    stored = dtype in STORED_FORMATS  # which vLLM reads of the checkpoint, and cannot be told
    if not stored:
        _refuse_eight_bits(dtype)
    size = judging_batch(header, engine="vllm", calibration=calibration)
    shape = {"batch_size": size, "seq_len": header.round.seq_len}
    with vllm_engine(model, dtype=None if stored else dtype, device=device, **shape) as made:
        found = of_weights(made[1].fingerprint.dtype)
        if stored and found != dtype:
            raise UsageError(
                f"{dtype} on vLLM, of a checkpoint in {found}",
                wanted="the format in which the checkpoint is stored",
                do="use --engine hf for it",
            )
        yield made


def check_judge(
    model: str,
    header: Header,
    *,
    engine: EngineName = "hf",
    dtype: str | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Refuse a model that does not load or is made for fewer positions, and noise that is not known, before it loads.

    The arguments are those of :func:`open_judge`.

    Raises:
        ProofMismatch: The model has fewer positions than the proof.
        CalibrationError: There is no calibration, and no default for the number formats; or it was measured with
            another kind of engine.
        AssayError: As of :func:`open_judge`.
    """
    stated = header.fingerprint.dtype
    dtype = dtype or of_weights(stated)
    if calibration is None:
        default_noise(header.pipeline.noise, stated, dtype)
    else:
        calibration.check_kind(header, engine)
    if engine == "hf":
        check_loadable(model, dtype, device)
    info, positions = model_info(model), header.round.seq_len + header.pipeline.steps
    if positions > info.max_positions:
        raise ProofMismatch(
            f"a proof of {positions} positions",
            wanted=f"at most the {info.max_positions} of {info.reference}",
            do="pass the model of the round with --model, or ask the node for its proof of this round",
        )


@contextmanager
def open_prefill(
    model: str,
    files: Sequence[Receipts],
    *,
    engine: EngineName = "hf",
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int = 16,
    adapter: Lora | None = None,
) -> Iterator[tuple[Model, Prefill]]:
    """Yield the model and the engine that replay receipts.

    Args:
        model: Reference of the model.
        files: Receipts that will be replayed.
        engine: Engine that replays.
        dtype: Number format of the weights; that of the first node when None.
        device: Device of the model.
        batch_size: Number of responses that are run at once, at most.
        adapter: LoRA adapter of receipts that name one.

    Raises:
        UsageError: The engine has no use for an option.
        BackendUnavailable: vLLM is not installed, or not in a version that was tested.
        ModelError: The model cannot be loaded.
    """
    dtype = dtype or of_weights(files[0].header.fingerprint.dtype)
    if engine == "hf":
        loaded = load(model, dtype, device)
        yield loaded, HFPrefill(loaded, batch_size=batch_size)
        return
    from assay.poc.vllm.prefill import refuse_adapter

    _refuse_eight_bits(dtype)
    if adapter is not None:
        raise refuse_adapter()
    headers = [read.header for read in files]
    with vllm_prefill(model, dtype=dtype, device=device, batch_size=batch_size, receipts=headers) as made:
        yield made.model, made


def load(model: str, dtype: str | None, device: str | None, world: World | None = None) -> Model:
    """Load a model in the dtype or the eight-bit number format that a name stands for."""
    return load_model(model, **in_format(dtype), device=device, mesh=world.mesh if world else None)


def check_loadable(model: str, dtype: str | None, device: str | None) -> None:
    """Refuse what :func:`load` refuses, as far as no weights must be read for it."""
    check_model(model, quantise=in_format(dtype)["quantise"], device=device)


def compiles(model: Model, kernels: Kernels) -> bool:
    """Return whether compiled kernels are asked for, or are the faster ones of a model."""
    return worth_compiling(model) if kernels == "auto" else kernels == "compiled"


def _refuse_eight_bits(dtype: str) -> None:
    """Refuse an eight-bit number format, which vLLM is not given."""
    if dtype in NUMBER_FORMATS:
        raise UsageError(f"{dtype} on vLLM", wanted="a dtype", do="use --engine hf for it")


def _refuse_pipeline_for_vllm(pipeline: Pipeline) -> None:
    from assay.poc.vllm.engine import supports_pipeline

    if not supports_pipeline(pipeline):
        raise unsupported(pipeline, "vllm", supports_pipeline)
