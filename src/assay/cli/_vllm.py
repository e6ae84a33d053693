"""The vLLM engine that ``--engine vllm`` starts.

``ASSAY_VLLM_ARGS`` holds options of vLLM, written as on its command line, and ``ASSAY_VLLM_FORWARD`` says whose forward
pass computes nonces.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.models import Model
    from assay.poc import Engine
    from assay.poc.responses import ReceiptHeader, VLLMPrefill

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
    from assay.poc.engines.vllm import VLLMEngine, check_installed

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
    from assay.poc.responses import VLLMPrefill

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
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

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
