"""``assay poc replay`` and ``calibrate-responses``: run responses again, by one prefill each."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import ledger as _ledger
from assay.cli.engines import check_loadable, load, refuse_eight_bits, vllm_prefill
from assay.cli.output import JsonFlag, emit_document, progress_bar, show_values, table
from assay.cli.respond import with_token_ids
from assay.cli.settings import settings
from assay.files.storage import check_new_file

if TYPE_CHECKING:
    from assay.cli.replay_settings import CalibrateResponsesSettings, ReplaySettings
    from assay.models.load import Model
    from assay.poc.responses.adapters import Lora
    from assay.poc.responses.judge import ResponseVerdict
    from assay.poc.responses.pins import ReceiptPins
    from assay.poc.responses.prefill import Prefill
    from assay.poc.responses.receipts import Receipts
    from assay.poc.responses.requests import Request
    from assay.poc.verdict.ledger_entries import Standing


@settings("assay.cli.replay_settings:ReplaySettings")
def replay(
    chosen: "ReplaySettings",
    context: typer.Context,
    receipts: Annotated[Path, typer.Argument(help="File of receipts.")],
    as_json: JsonFlag = False,
) -> None:
    """Run the responses of receipts again and judge them. Exit code 0 honest, 1 fraud, 2 undecided or bad input.

    Each takes one prefill of prompt and output. Tokens that were sampled with seeds are held against the verifier's own
    scores, sketches against its hidden states.

    The node wrote the receipts. Exit code 0 needs the block, the key and the requests from you. What is neither pinned
    nor at its default is shown, with exit code 2; so are requests without a receipt, and those whose answer was
    aborted.

    With --ledger the replay is added to the ledger of nodes' lives, and the exit code is that of the whole life.
    """
    from assay.poc import responses
    from assay.poc.responses.adapters import load_adapter
    from assay.poc.responses.judge import noise_between, sampled
    from assay.poc.responses.pins import chosen_receipts
    from assay.poc.responses.replay import check_adapter, check_runnable

    read = responses.Receipts.load(receipts)
    pins = _pins(chosen, read)
    pins.check(read)  # before a model is loaded
    size = chosen_receipts(read, chosen.sample)
    adapter = None if chosen.lora is None else load_adapter(chosen.lora)
    check_adapter(read, adapter)
    measured = None if chosen.calibration is None else responses.ResponseCalibration.load(chosen.calibration)
    if measured is not None:
        measured.check(read.header)
    _ledger.check_recording(chosen.ledger, chosen.alpha, pins.unpinned(read))
    if chosen.engine == "hf":
        check_loadable(chosen.model, chosen.dtype, chosen.device)
    seed = secrets.randbits(53) if chosen.seed is None else chosen.seed  # exact in every JSON reader
    sample = sampled(read, size, seed) if chosen.sample is not None else read
    with ExitStack() as held:
        loaded, engine = held.enter_context(_engine(chosen, [read], adapter))
        check_runnable(sample, loaded, prompts=pins.prompts)
        noise = noise_between(read.header, engine.fingerprint, measured)
        # Begun when what can be refused without a prefill has been, and before anything is computed.
        ledger = held.enter_context(_ledger.recording(chosen.ledger, chosen.alpha))
        progress = held.enter_context(progress_bar("replaying", "responses"))
        found = responses.replay(
            sample, loaded, prompts=pins.prompts, adapter=adapter, engine=engine, progress=progress
        )
        verdict = responses.judge_responses(
            found,
            read,
            noise,
            pins=pins,
            alpha=chosen.alpha,
            sample_seed=seed if chosen.sample is not None else None,
        )
        standing = None if ledger is None else ledger.append(verdict.updates())[-1]
    _show(verdict, standing, as_json)
    context.exit(_ledger.exit_code(verdict, standing) or (2 if verdict.unanswered else 0))


@settings("assay.cli.replay_settings:CalibrateResponsesSettings")
def calibrate_responses(
    chosen: "CalibrateResponsesSettings",
    receipts: Annotated[list[Path], typer.Argument(help="Files of receipts of honest nodes of one build.")],
    as_json: JsonFlag = False,
) -> None:
    """Measure the honest noise of responses between nodes of one build and this verifier, by replaying their receipts.

    Files of different public keys say how far machines of the build differ.
    """
    from assay.poc import responses
    from assay.poc.responses.calibration import check_enough_tokens, check_one_checkpoint
    from assay.poc.responses.replay import check_adapter, check_runnable

    check_new_file(chosen.output, overwrite=True)
    files = [responses.Receipts.load(path) for path in receipts]
    for read in files:
        check_adapter(read, None)
    check_one_checkpoint([read.header for read in files])
    check_enough_tokens(files)
    prompts = responses.ReceiptPins(requests=_requests(chosen.requests, chosen.model)).prompts
    with _engine(chosen, files) as (loaded, engine), progress_bar("replaying", "responses") as progress:
        for read in files:
            check_runnable(read, loaded, prompts=prompts)
        measured = [
            (read.header, responses.replay(read, loaded, prompts=prompts, engine=engine, progress=progress))
            for read in files
        ]
        calibration = responses.calibrate_responses(measured, engine.fingerprint)
    calibration.save(chosen.output)
    tokens, sketches = calibration.noise.tokens, calibration.noise.sketches
    values = {
        "path": str(chosen.output),
        "checkpoint": calibration.digest,
        "machines": len({read.header.public_key for read in files}),
        "responses": calibration.responses,
        "tokens": calibration.tokens,
        "matching": round(calibration.matches / calibration.tokens, 5) if calibration.tokens else 0.0,
        "typical_difference_of_logits": tokens.law.size,
        "tokens_between_responses": tokens.between,
        "tokens_effect": tokens.effect,
        "typical_distance_of_sketches": sketches.law.size,
        "sketches_between_responses": sketches.between,
    }
    show_values("assay.poc.calibrate-responses/1", values, as_json)


@contextmanager
def _engine(
    options: "ReplaySettings | CalibrateResponsesSettings", files: "Sequence[Receipts]", adapter: "Lora | None" = None
) -> "Iterator[tuple[Model, Prefill]]":
    from assay.poc.protocol.builds import of_weights
    from assay.poc.responses.prefill import HFPrefill
    from assay.poc.vllm.prefill import no_adapter

    dtype = options.dtype or of_weights(files[0].header.fingerprint.dtype)
    if options.engine == "vllm":
        refuse_eight_bits(dtype)
        if adapter is not None:
            raise no_adapter()
        with vllm_prefill(
            options.model,
            dtype=dtype,
            device=options.device,
            batch_size=options.batch_size,
            receipts=[read.header for read in files],
        ) as engine:
            yield engine.model, engine
        return
    loaded = load(options.model, dtype, options.device)
    yield loaded, HFPrefill(loaded, batch_size=options.batch_size)


def _pins(chosen: "ReplaySettings", receipts: "Receipts") -> "ReceiptPins":
    """Return what the receipts are held against: flags, the file of the network, and the requests."""
    from assay.poc.protocol.pins import Pins
    from assay.poc.protocol.pins_file import NetworkPins
    from assay.poc.responses.pins import ReceiptPins

    given = Pins(**chosen.model_dump(include={"block_hash", "public_key", "prover_dtype"}))
    network = NetworkPins.load(chosen.pins) if chosen.pins else None
    requests = _requests(chosen.requests, chosen.model)
    return ReceiptPins.of_network(network, given, receipts.header, requests=requests, evidence=chosen.evidence)


def _requests(path: Path | None, model: str) -> "list[Request] | None":
    """Return the requests of a file, with token ids for prompts; None without a file."""
    from assay.poc.responses.requests import read_requests

    return None if path is None else with_token_ids(read_requests(path), model)


def _show(verdict: "ResponseVerdict", standing: "Standing | None", as_json: bool) -> None:
    if as_json:
        emit_document(verdict.as_dict() | ({} if standing is None else {"life": standing.as_dict()}))
        return
    result, header = verdict.result, verdict.receipts.header
    share = f"{verdict.matches} of {verdict.tokens}" if verdict.tokens else "no token was sampled with seeds"
    e_values = f"e^{result.tokens.log_e_max:.1f} tokens, e^{result.sketches.log_e_max:.1f} sketches"
    rows = [
        ("verdict", verdict.verdict),
        ("reason", verdict.reason),
        ("responses", f"{len(verdict.replayed)} of {verdict.receipts.footer.receipts}"),
        ("tokens that match", share),
        ("e-value at most", f"e^{result.log_e_max:.1f}: {e_values}"),
        ("honest noise", verdict.noise.source),
        ("node", f"{header.fingerprint.library}, {header.fingerprint.dtype}"),
        ("on the node's word", ", ".join(verdict.unpinned) or "nothing"),
        *([("requests unanswered", str(verdict.unanswered))] if verdict.unanswered else []),
        *_ledger.life_rows(standing),
    ]
    table(("", "result"), rows)
