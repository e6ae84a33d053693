"""Start the engine that proves, judges or replays; refuse its limits before weights are read.

``ASSAY_VLLM_ARGS`` holds options of vLLM, written as on its command line, for the engine ``vllm``.
"""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from assay.errors import ProofMismatch, UsageError
from assay.files.references import CATALOGUE, find_path, stated_positions
from assay.models.frame import Frame
from assay.poc.engines.names import ENGINES, known_engine
from assay.poc.protocol.checks import check_batch_size, check_positions
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import of_weights
from assay.poc.protocol.pipelines import (
    Pipeline,
    check_frame_file,
    get_pipeline,
    runs_on_vllm,
    unsupported,
)
from assay.poc.responses.receipts import Receipts
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.vllm.compatibility import check_installed
from assay.settings import NUMBER_FORMATS

if TYPE_CHECKING:
    from assay.models.model import Model
    from assay.poc.engines.base import Engine
    from assay.poc.responses.adapters import Lora
    from assay.poc.responses.prefill import Prefill

Kernels = Literal["auto", "compiled", "eager"]
ARGUMENTS = "ASSAY_VLLM_ARGS"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
DO_INSTEAD = {
    "model": "pass it to the command",
    "dtype": "pass it to the command",
    "revision": "download that revision, and pass its directory to --model",
    "worker_extension_cls": "leave it out: assay has the workers use its own",
}
"""Engine arguments that are not the operator's, as a proof names them, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which model runs, and where.

    Args:
        model: Reference of the model.
        engine: Name of the engine that runs it, in ``ENGINES``.
        dtype: Number format of the weights. When None, the stored one for a prover, and that of the
            prover, which agrees best, for who judges.
        device: Device of the model; by default cuda where there is one.
        frame: File of the checkpoint's frame, for the presets that have one.
    """

    model: str
    engine: str = "hf"
    dtype: str | None = None
    device: str | None = None
    frame: Path | None = None

    def read_frame(self, pipeline: Pipeline) -> Frame | None:
        """Return the frame that a pipeline needs; a UsageError for a missing or an unused file."""
        check_frame_file(pipeline, self.frame)
        return None if self.frame is None else Frame.load(self.frame)

    def check_loadable(self, dtype: str | None = None) -> None:
        """Refuse what :func:`load` refuses in a number format, without reading weights."""
        if self.engine == "hf":
            check_loadable(self.model, self.dtype or dtype, self.device)

    @property
    def start(self) -> Callable[..., AbstractContextManager[tuple["Model", "Engine"]]]:
        """The function that starts the engine."""
        function: Callable[..., Any] = resolve_name(ENGINES[known_engine(self.engine)])
        return function

    def check_engine(self, pipeline: Pipeline | None = None) -> None:
        """Refuse vLLM for a pipeline that it does not run, or where it is missing."""
        if self.engine == "vllm":
            _refuse_for_vllm(None, self.device, pipeline)


@dataclass(frozen=True, kw_only=True)
class Proving(Launch):
    """How a node runs its model.

    Args:
        preset: Name of the pipeline of the round.
        seq_len: Number of positions of a nonce.
        batch_size: Nonces per forward pass; ``auto`` takes what fits into memory.
        kernels: Kernels of the hf engine; ``auto`` compiles on CUDA.
        deterministic: Whether an operation that may give other bits the next time is refused.
    """

    preset: str
    seq_len: int
    batch_size: int | Literal["auto"] = 32
    kernels: Kernels = "auto"
    deterministic: bool = False

    def check(self, pipeline: Pipeline) -> None:
        """Refuse options that the engine has no use for, which vLLM needs half a minute to say."""
        check_batch_size(1 if self.batch_size == "auto" else self.batch_size)
        if self.engine == "hf":
            if pipeline.steps and self.kernels == "compiled":
                raise UsageError(
                    f"--kernels compiled with --preset {self.preset}",
                    wanted="eager kernels, which decode",
                    do="leave --kernels out",
                )
            return
        of_hf = {
            f"--kernels {self.kernels}": self.kernels != "auto",
            "--deterministic": self.deterministic,
            "--batch-size auto": self.batch_size == "auto",
            f"--dtype {self.dtype}": self.dtype in NUMBER_FORMATS,
        }
        if unusable := [flag for flag, is_given in of_hf.items() if is_given]:
            raise UsageError(
                f"{unusable[0]} with --engine {self.engine}",
                wanted="no --kernels or --deterministic, a batch size in numbers, and a dtype",
                do=f"leave {unusable[0].split()[0]} out; {ARGUMENTS} holds vLLM's own options",
            )
        self.check_engine(pipeline)


@contextmanager
def open_prover(chosen: Proving) -> Iterator[tuple["Model", "Engine"]]:
    """Load a model and its engine; yield both.

    Raises:
        UsageError: The engine has no use for an option, or cannot run the preset.
        BackendUnavailable: What the engine needs is not installed.
        ModelError: The model cannot be loaded.
    """
    pipeline = get_pipeline(chosen.preset)
    size = 1 if chosen.batch_size == "auto" else chosen.batch_size
    chosen.check(pipeline)
    frame = chosen.read_frame(pipeline)
    # Where files state the positions, before torch is imported.
    check_positions(chosen.model, None, seq_len=chosen.seq_len, steps=pipeline.steps)
    from assay.models.catalogue import model_info
    from assay.poc.engines.hf.engine import HFEngine, be_deterministic
    from assay.poc.engines.hf.shapes import auto_batch, check_shape

    check_shape(
        model_info(chosen.model), batch_size=size, seq_len=chosen.seq_len, steps=pipeline.steps
    )
    if chosen.engine != "hf":
        with chosen.start(
            chosen, chosen.dtype, batch_size=size, seq_len=chosen.seq_len, frame=frame
        ) as opened:
            yield opened
        return
    if chosen.deterministic:
        be_deterministic()
    model = load(chosen.model, chosen.dtype, chosen.device).with_frame(frame)
    if chosen.batch_size == "auto":
        size = auto_batch(model, chosen.seq_len + pipeline.steps)
    engine = HFEngine(
        model,
        batch_size=size,
        seq_len=chosen.seq_len,
        compiled=compiles(model, chosen.kernels) and not pipeline.steps,
    )
    yield model, engine


def check_judge(chosen: Launch, header: Header, calibration: Calibration | None) -> None:
    """Refuse before the model loads what :func:`open_judge` or the judge refuses after it.

    Raises:
        ProofMismatch: The proof is of another bundled model, or has more positions than the model.
        CalibrationError: The calibration was measured with another kind of engine.
        AssayError: As of :func:`open_judge`.
    """
    if calibration is not None:
        calibration.check_kind(header, chosen.engine)
    chosen.check_engine(header.pipeline)
    # Digest and positions of a bundled model are known before torch is imported.
    digest = CATALOGUE.get(chosen.model, {}).get("digest")
    if digest is not None:
        header.check_model(chosen.model, digest)
    if (most := stated_positions(chosen.model)) is not None:
        _check_positions(chosen.model, most, header)
    chosen.check_loadable(of_weights(header.fingerprint.dtype))
    from assay.models.catalogue import model_info

    _check_positions(chosen.model, model_info(chosen.model).max_positions, header)


def _check_positions(model: str, max_positions: int, header: Header) -> None:
    if header.positions > max_positions:
        raise ProofMismatch(
            f"a proof of {header.positions} positions",
            wanted=f"at most the {max_positions} of {model}",
            do="pass the round's model with --model, or ask the node for its proof of this round",
        )


@contextmanager
def open_judge(
    chosen: Launch, header: Header, calibration: Calibration | None = None
) -> Iterator[tuple["Model", "Engine | None"]]:
    """Yield the model and the engine that recompute a proof; None is the transformers engine.

    The calibration that will judge the proof says the batch that it was measured with.

    Raises:
        CalibrationError: The calibration is of another model, preset or build than the proof.
        AssayError: As of :func:`open_prover`.
    """
    dtype = chosen.dtype or of_weights(header.fingerprint.dtype)
    frame = chosen.read_frame(header.pipeline)
    if chosen.engine == "hf":
        yield load(chosen.model, dtype, chosen.device).with_frame(frame), None
        return
    # Other engines read these formats from the checkpoint, and have no option for them.
    stored = dtype in NUMBER_FORMATS
    chosen.check_engine(header.pipeline)
    from assay.poc.verifier import judging_batch

    with chosen.start(
        chosen,
        None if stored else dtype,
        frame=frame,
        batch_size=judging_batch(header, engine=chosen.engine, calibration=calibration),
        seq_len=header.round.seq_len,
    ) as opened:
        checkpoint_dtype = of_weights(opened[1].fingerprint.dtype)
        if stored and checkpoint_dtype != dtype:
            raise UsageError(
                f"{dtype} with --engine {chosen.engine}, of a checkpoint in {checkpoint_dtype}",
                wanted="the format of the checkpoint",
                do="use --engine hf for it",
            )
        yield opened


@contextmanager
def open_prefill(
    chosen: Launch,
    files: Sequence[Receipts],
    *,
    batch_size: int = 16,
    adapter: "Lora | None" = None,
) -> Iterator[tuple["Model", "Prefill"]]:
    """Yield the model and the engine that replay at most ``batch_size`` responses at once.

    Without a number format, the first node's is taken; ``adapter`` is that of the receipts.

    Raises:
        AssayError: As of :func:`open_prover`.
    """
    dtype = chosen.dtype or of_weights(files[0].header.fingerprint.dtype)
    if chosen.engine == "hf":
        from assay.poc.responses.prefill import HFPrefill

        loaded = load(chosen.model, dtype, chosen.device)
        yield loaded, HFPrefill(loaded, batch_size=batch_size)
        return
    if chosen.engine != "vllm":
        raise UsageError(
            f"responses with --engine {chosen.engine}", wanted="hf or vllm", do="use --engine hf"
        )
    _refuse_for_vllm(dtype, chosen.device)
    from assay.poc.vllm.vllm_prefill import VLLMPrefill, refuse_adapter

    if adapter is not None:
        raise refuse_adapter()
    with VLLMPrefill(
        chosen.model,
        dtype=dtype,
        batch_size=batch_size,
        receipts=[read.header for read in files],
        **_prepare_vllm(chosen.device),
    ) as opened:
        yield opened.model, opened


def usual_preset(reference: str) -> str:
    """Return the preset of a model where none is chosen.

    It is ``tokens-1``, and the published one for a reference model or shape of assay and for a
    model without a tokenizer.
    """
    if reference.startswith(("reference:", "shape:")):
        return "poc-2.0"
    path = find_path(reference)
    if path is None or path.is_file() or any(path.glob("*.[gG][gG][uU][fF]")):
        return "tokens-1"
    return "tokens-1" if any((path / name).is_file() for name in TOKENIZERS) else "poc-2.0"


def load(model: str, dtype: str | None, device: str | None) -> "Model":
    """Load a model in the dtype or the eight-bit number format that a name stands for."""
    from assay.models.load import load_model

    return load_model(model, dtype=dtype, device=device)


def check_loadable(model: str, dtype: str | None, device: str | None) -> None:
    """Refuse what :func:`load` refuses, as far as no weights must be read for it."""
    from assay.models.load import check_loadable as check_model

    check_model(model, dtype=dtype, device=device)


def compiles(model: "Model", kernels: Kernels) -> bool:
    """Return whether compiled kernels are asked for, or are the faster ones of a model."""
    from assay.poc.engines.hf.compiled_forward import worth_compiling

    return worth_compiling(model) if kernels == "auto" else kernels == "compiled"


@contextmanager
def vllm_engine(
    chosen: Launch,
    dtype: str | None,
    *,
    batch_size: int,
    seq_len: int,
    frame: Frame | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[tuple["Model", "Engine"]]:
    """Start vLLM, with ``options`` beside those of the operator; yield its model and engine."""
    arguments = _prepare_vllm(chosen.device) | dict(options or {})
    from assay.poc.vllm.vllm_engine import VLLMEngine

    with VLLMEngine(
        chosen.model, dtype=dtype, frame=frame, batch_size=batch_size, seq_len=seq_len, **arguments
    ) as engine:
        yield engine.model, engine


def _prepare_vllm(device: str | None) -> dict[str, Any]:
    """Send what vLLM says to stderr, because stdout is for results, and return its options."""
    _refuse_for_vllm(None, device)
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    return vllm_options(os.environ.get(ARGUMENTS, ""))


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
    captured = StringIO()
    try:
        with redirect_stderr(captured):
            values = vars(parser.parse_args(shlex.split(text)))
            # Only what was set is passed on: the engine has defaults of its own.
            unset = vars(parser.parse_args([]))
    except (SystemExit, ValueError) as error:
        reason = captured.getvalue().strip().rpartition("error: ")[2] or str(error)
        raise UsageError(
            f"{ARGUMENTS}={text!r:.200}: {reason}",
            wanted="engine arguments of vLLM",
            do="see `vllm serve --help`",
        ) from None
    options = {name: value for name, value in values.items() if value != unset[name]}
    for name in DO_INSTEAD.keys() & options.keys():
        raise UsageError(
            f"--{name.replace('_', '-')} in {ARGUMENTS}",
            wanted="other engine arguments of vLLM",
            do=DO_INSTEAD[name],
        )
    return options


def _refuse_for_vllm(
    dtype: str | None, device: str | None, pipeline: Pipeline | None = None
) -> None:
    """Refuse what vLLM is not given or does not run, and a vLLM that was not tested."""
    if pipeline is not None and not runs_on_vllm(pipeline):
        raise unsupported(pipeline, "vllm", runs_on_vllm)
    if dtype in NUMBER_FORMATS:
        raise UsageError(f"{dtype} on vLLM", wanted="a dtype", do="use --engine hf for it")
    if device is not None:
        raise UsageError(
            f"--device {device} with vllm",
            wanted="no --device: a build of vLLM is for one kind of device",
            do="leave it out",
        )
    check_installed()
