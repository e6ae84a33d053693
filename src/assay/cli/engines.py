"""``--engine``: which engine proves or recomputes, on which devices and with which kernels."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.cli.poc_settings import ProveSettings, VerifySettings
    from assay.models.load import Model
    from assay.poc.engines.base import Engine
    from assay.poc.engines.hf.parallel import World
    from assay.poc.protocol.pipelines import Pipeline
    from assay.poc.protocol.record import Header
    from assay.poc.responses.receipts import ReceiptHeader
    from assay.poc.verdict.calibration import Calibration
    from assay.poc.vllm.prefill import VLLMPrefill


# --------------------------------------------------------------------------------------------------
# The vLLM engine that ``--engine vllm`` starts.
#
# ``ASSAY_VLLM_ARGS`` holds options of vLLM, written as on its command line, and ``ASSAY_VLLM_FORWARD`` says whose forward
# pass computes nonces.

ARGUMENTS, FORWARD = "ASSAY_VLLM_ARGS", "ASSAY_VLLM_FORWARD"
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
) -> "Iterator[tuple[Model, Engine]]":
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
    options = _options(os.environ.get(ARGUMENTS, ""))
    options["forward"] = os.environ.get(FORWARD, "vllm")
    with VLLMEngine(model, batch_size=batch_size, seq_len=seq_len, dtype=dtype, **options) as engine:
        yield engine.model, engine


@contextmanager
def vllm_prefill(
    model: str, *, dtype: str, device: str | None, batch_size: int, receipts: "Sequence[ReceiptHeader]"
) -> "Iterator[VLLMPrefill]":
    """Start an offline vLLM that reads whole responses.

    Raises:
        UsageError: A device was named, or a number format that vLLM is not given.
        ProofMismatch: The receipts are of another checkpoint.
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        ModelError: The model cannot be loaded.
    """
    _prepare(device)
    from assay.poc.vllm.prefill import VLLMPrefill

    options = _options(os.environ.get(ARGUMENTS, ""))
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


def _options(text: str) -> dict[str, Any]:
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


@contextmanager
def proving_engine(options: "ProveSettings", dtype: str | None) -> "Iterator[tuple[Model, Engine] | None]":
    """Load a model and its engine; yield both, or None in a process that works for another one.

    Args:
        options: Settings that name the model and the engine.
        dtype: Number format of the weights; None keeps the stored dtype.

    Raises:
        UsageError: The engine has no use for an option.
        BackendUnavailable: What the engine needs is not installed.
        ModelError: The model cannot be loaded.
    """
    from assay.poc.engines.hf.engine import HFEngine, be_deterministic
    from assay.poc.engines.hf.parallel import ParallelEngine, joined, processes

    if options.engine == "vllm":
        _refuse_for_vllm(options, dtype)
        shape = {"batch_size": _number(options.batch_size), "seq_len": options.seq_len}
        with vllm_engine(options.model, dtype=dtype, device=options.device, **shape) as made:
            yield made
        return
    _refuse_shape(options)
    if options.deterministic:
        be_deterministic()
    if processes() == 1:
        _refuse_tensor_parallel(options)
        loaded = load(options.model, dtype, options.device)
        yield loaded, HFEngine(loaded, **_shape(loaded, options))
        return
    with joined(tensor_parallel=options.tensor_parallel, device=options.device) as world:
        loaded = load(options.model, dtype, world.device, world)
        with ParallelEngine(loaded, world, **_shape(loaded, options)) as engine:
            if world.leads:
                yield loaded, engine
            else:
                engine.work()
                yield None


@contextmanager
def judging_engine(
    options: "VerifySettings", header: "Header", measured: "Calibration | None" = None
) -> "Iterator[tuple[Model, Engine | None]]":
    """Yield the model and the engine that recompute a proof; None stands for the transformers engine.

    Args:
        options: Settings that name the model and the engine.
        header: Header of the proof. The prover's dtype agrees best, and is used where the settings have none.
        measured: Calibration that will judge the proof, for the batch that it was measured with.

    Raises:
        UsageError: The engine has no use for an option, or cannot run the preset of the proof.
        BackendUnavailable: vLLM is not installed, or not in a version that was tested.
        CalibrationError: The calibration is of another model, preset or build than the proof.
        ModelError: The model cannot be loaded.
    """
    from assay.poc.protocol.builds import of_weights

    dtype = options.dtype or of_weights(header.fingerprint.dtype)
    if options.engine == "hf":
        yield load(options.model, dtype, options.device), None
        return
    from assay.models.quantise import STORED_FORMATS
    from assay.poc.verifier import judging_batch

    _refuse_pipeline_for_vllm(header.pipeline)
    stored = dtype in STORED_FORMATS  # which vLLM reads of the checkpoint, and cannot be told
    if not stored:
        refuse_eight_bits(dtype)
    size = judging_batch(header, engine="vllm", calibration=measured)
    shape = {"batch_size": size, "seq_len": header.round.seq_len}
    with vllm_engine(options.model, dtype=None if stored else dtype, device=options.device, **shape) as made:
        _, engine = made
        if stored and of_weights(engine.fingerprint.dtype) != dtype:
            raise UsageError(
                f"{dtype} on vLLM, of a checkpoint in {engine.fingerprint.dtype}",
                wanted="the format in which the checkpoint is stored",
                do="use --engine hf for it",
            )
        yield made


def load(model: str, dtype: str | None, device: str | None, world: "World | None" = None) -> "Model":
    """Load a model in the dtype or the eight-bit number format that ``--dtype`` names."""
    from assay.models.load import load_model
    from assay.models.quantise import in_format

    return load_model(model, **in_format(dtype), device=device, mesh=world.mesh if world else None)


def check_loadable(model: str, dtype: str | None, device: str | None) -> None:
    """Refuse what :func:`load` refuses, as far as no weights must be read for it."""
    from assay.models.load import check_loadable
    from assay.models.quantise import in_format

    check_loadable(model, quantise=in_format(dtype)["quantise"], device=device)


def check_judging(options: "VerifySettings", header: "Header", measured: "Calibration | None") -> None:
    """Refuse a model that does not load or is made for fewer positions, and noise that is not known, before it loads.

    Raises:
        ProofMismatch: The model has fewer positions than the proof.
        CalibrationError: There is no calibration, and no default for the number formats; or it was measured with
            another kind of engine.
        AssayError: As of :func:`judging_engine`.
    """
    from assay.errors import ProofMismatch
    from assay.models.load import model_info
    from assay.poc.protocol.builds import of_weights
    from assay.poc.verdict.noise import default_noise

    stated = header.fingerprint.dtype
    dtype = options.dtype or of_weights(stated)
    if measured is None:
        default_noise(header.pipeline.noise, stated, dtype)
    else:
        measured.check_kind(header, options.engine)
    if options.engine == "hf":
        check_loadable(options.model, dtype, options.device)
    info, positions = model_info(options.model), header.round.seq_len + header.pipeline.steps
    if positions > info.max_positions:
        raise ProofMismatch(
            f"a proof of {positions} positions",
            wanted=f"at most the {info.max_positions} of {info.reference}",
            do="pass the model of the round with --model, or ask the node for its proof of this round",
        )


def _eight_bits(dtype: str | None) -> bool:
    from assay.models.quantise import NUMBER_FORMATS

    return dtype in NUMBER_FORMATS


def refuse_eight_bits(dtype: str) -> None:
    """Refuse an eight-bit number format, which vLLM is not given."""
    if _eight_bits(dtype):
        raise UsageError(f"{dtype} on vLLM", wanted="a dtype", do="use --engine hf for it")


def _refuse_shape(options: "ProveSettings") -> None:
    """Refuse what no model runs, and what this one does not, before its weights are read."""
    from assay.models.load import model_info
    from assay.poc.engines.hf.memory import check_shape
    from assay.poc.protocol.pipelines import get_pipeline

    steps = get_pipeline(options.preset).steps
    if steps and options.kernels == "compiled":
        raise UsageError(
            f"--kernels compiled with --preset {options.preset}",
            wanted="eager kernels, which decode",
            do="leave --kernels out",
        )
    size = 1 if options.batch_size == "auto" else _number(options.batch_size)
    check_shape(model_info(options.model), batch_size=size, seq_len=options.seq_len, steps=steps)


def _shape(model: "Model", options: "ProveSettings") -> dict[str, Any]:
    from assay.poc.engines.hf.memory import auto_batch
    from assay.poc.protocol.pipelines import get_pipeline

    steps = get_pipeline(options.preset).steps
    automatic = options.batch_size == "auto"
    size = auto_batch(model, options.seq_len + steps) if automatic else _number(options.batch_size)
    compiled = compiles(model, options.kernels) and not steps
    return {"batch_size": size, "seq_len": options.seq_len, "compiled": compiled}


def compiles(model: "Model", kernels: str) -> bool:
    """Return whether ``--kernels`` asks for compiled kernels of a model."""
    from assay.poc.engines.hf.compiled import worth_compiling

    return worth_compiling(model) if kernels == "auto" else kernels == "compiled"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"--batch-size {text:.40}", wanted="a number, or auto", do="try --batch-size 32")
    return int(text)


def _refuse_tensor_parallel(options: "ProveSettings") -> None:
    if options.tensor_parallel != 1:
        raise UsageError(
            f"--tensor-parallel {options.tensor_parallel} in one process",
            wanted="a process for each device",
            do=f"torchrun --nproc-per-node {max(2, options.tensor_parallel)} -m assay poc prove …",
        )


def _refuse_for_vllm(options: "ProveSettings", dtype: str | None) -> None:
    from assay.models.load import model_info
    from assay.poc.engines.hf.memory import check_shape
    from assay.poc.protocol.pipelines import get_pipeline

    pipeline = get_pipeline(options.preset)
    _refuse_pipeline_for_vllm(pipeline)
    of_hf = {
        f"--kernels {options.kernels}": options.kernels != "auto",
        "--deterministic": options.deterministic,
        f"--tensor-parallel {options.tensor_parallel}": options.tensor_parallel != 1,
        "--batch-size auto": options.batch_size == "auto",
        f"--dtype {dtype}": _eight_bits(dtype),
    }
    if given := [flag for flag, is_given in of_hf.items() if is_given]:
        raise UsageError(
            f"{given[0]} with --engine vllm",
            wanted="no --kernels, --deterministic or --tensor-parallel, a batch size in numbers, and a dtype",
            do=f"leave {given[0].split()[0]} out; ASSAY_VLLM_ARGS holds vLLM's own options",
        )
    # vLLM needs half a minute before it can say this.
    size = _number(options.batch_size)
    check_shape(model_info(options.model), batch_size=size, seq_len=options.seq_len, steps=pipeline.steps)


def _refuse_pipeline_for_vllm(pipeline: "Pipeline") -> None:
    from assay.poc.engines.base import unsupported
    from assay.poc.vllm.engine import runs

    if not runs(pipeline):
        raise unsupported(pipeline, "vllm", runs)
