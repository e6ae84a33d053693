"""``assay poc``: prove, verify, calibrate."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import experiment as _experiment
from assay.cli import ledger as _ledger
from assay.cli import pins as _pins
from assay.cli import replay as _replay
from assay.cli import respond as _respond
from assay.cli import serve as _serve
from assay.cli import validator as _validator
from assay.cli.calibrate import run_calibrate
from assay.cli.commands import App, Resumable
from assay.cli.engines import check_judging, judging_engine, proving_engine
from assay.cli.output import JsonFlag, emit_document, progress_bar, show_values, table
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.poc_settings import CalibrateSettings, ProveSettings, VerifySettings
    from assay.poc.protocol.proof import Proof
    from assay.poc.verdict.judge import Verdict
    from assay.poc.verdict.ledger_entries import Standing


app = App(help="Prove that a model ran, and check such proofs.")


@app.command(
    cls=Resumable,
    epilog="Example: assay poc prove --model reference:qwen3 --block-hash BLOCK --public-key KEY -o proof.jsonl",
)
@settings("assay.cli.poc_settings:ProveSettings")
def prove(chosen: "ProveSettings", as_json: JsonFlag = False) -> None:
    """Prove a range of nonces. An interrupted run continues when the command is repeated.

    Under torchrun all processes work on one proof, and the first one writes it.
    """
    from assay import poc
    from assay.files.storage import check_new_file

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    pipeline = poc.get_pipeline(chosen.preset)
    values = {name: getattr(chosen, name) for name in poc.Round.__dataclass_fields__}
    round = poc.Round(**values | {"preset": pipeline.name})
    nonces = round.nonces(*chosen.nonces)
    dtype: str | None = chosen.dtype or next(iter(pipeline.number_formats), None)
    with proving_engine(chosen, dtype) as made, progress_bar("proving") as progress:
        if made is None:
            return
        pace = _Pace(progress)
        proof = poc.prove(
            made[0],
            round,
            nonces,
            engine=made[1],
            output=chosen.output,
            overwrite=chosen.overwrite,
            progress=pace.update,
        )
    _print_proof(proof, chosen.output, pace, as_json)


@app.command(epilog="Example: assay poc verify proof.jsonl --model reference:qwen3 --block-hash BLOCK --public-key KEY")
@settings("assay.cli.poc_settings:VerifySettings")
def verify(
    chosen: "VerifySettings",
    context: typer.Context,
    proof: Annotated[Path, typer.Argument(help="Proof file.")],
    as_json: JsonFlag = False,
) -> None:
    """Recompute a sample of a proof and judge it. Exit code 0 honest, 1 fraud, 2 undecided or bad input.

    The prover wrote the header of the proof. Exit code 0 needs the block and the key from you, and every other value
    that the prover could choose from you or at its published default. What is neither is shown, with exit code 2.

    With --ledger the audit is added to the ledger of nodes' lives, and the exit code is that of the whole life.
    """
    from assay import poc

    read = poc.Proof.load(proof)
    pins, measured = _pins.expected(chosen, read.header)
    poc.check_proof(read, expect=pins, sample=chosen.sample, calibration=measured)  # before a model is loaded
    _ledger.check_recording(chosen.ledger, chosen.alpha, pins.unpinned(read.header))
    check_judging(chosen, read.header, measured)
    with ExitStack() as held:
        loaded, made = held.enter_context(judging_engine(chosen, read.header, measured))
        made, _ = poc.judging_setup(read.header, loaded, engine=made, calibration=measured)
        # Begun when nothing of the proof can be refused any more, and before anything is computed.
        ledger = held.enter_context(_ledger.recording(chosen.ledger, chosen.alpha))
        progress = held.enter_context(progress_bar("verifying"))
        verdict = poc.verify(
            read,
            loaded,
            engine=made,
            sample=chosen.sample,
            seed=chosen.seed,
            expect=pins,
            calibration=measured,
            alpha=chosen.alpha,
            progress=progress,
        )
        standing = None if ledger is None else ledger.record(verdict, proof=read.footer.sha256)
    _print_verdict(verdict, standing, as_json)
    context.exit(_ledger.exit_code(verdict, standing))


@app.command()
@settings("assay.cli.poc_settings:CalibrateSettings")
def calibrate(
    chosen: "CalibrateSettings",
    proofs: Annotated[
        list[Path] | None, typer.Argument(help="Honest proofs, two or more; or any number, with --valid-rate.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure the honest noise of a build between its machines, or give the r_target of a wanted valid rate.

    The first use takes honest proofs of one checkpoint and preset, two or more of every round, and writes a file for
    `verify --calibration`. Three machines and more also judge a machine that was not measured, and the file says how
    often honest machines that are left out of the measurement are accused. --vectors takes the sets that a network
    published instead of proofs. --merge adds the builds of other files.

    Example: assay poc calibrate mine.jsonl theirs.jsonl others.jsonl -o calibration.json

    Example: assay poc calibrate --vectors nonces.jsonl.gz --sets 2026-05,minimax --digest SHA256 -o calibration.json

    The second use needs no proof; with proofs, of one block or several, it also measures the rate on them. Distances
    of a block are all wider or narrower by one factor, which --model predicts from a few states.

    Example: assay poc calibrate --valid-rate 0.1
    """
    run_calibrate(chosen, proofs or (), as_json)


class _Pace:
    """When batches were done: the first one, which may compile kernels, apart from the rest.

    Nonces that an interrupted run left count for nothing: this one did not spend time on them.
    """

    def __init__(self, show: "Callable[[int, int], None] | None") -> None:
        self._show = show
        self._begun = time.perf_counter()
        self._started = False
        self.resumed = 0  # nonces of the proof that an interrupted run left
        self._marks: list[tuple[float, int]] = []

    def update(self, done: int, total: int) -> None:
        """Note where the proof begins, and then every batch: the first and the newest are kept."""
        if not self._started:
            self._started, self.resumed = True, done
        else:
            self._marks[1:] = [(time.perf_counter(), done)]
        if self._show:
            self._show(done, total)

    @property
    def first(self) -> float:
        """Seconds until the first batch was done."""
        return self._marks[0][0] - self._begun if self._marks else 0.0

    @property
    def rate(self) -> float:
        """Nonces per second after the first batch, or of it where there was no other."""
        if not self._marks:
            return 0.0
        (start, before), (end, done) = self._marks[0], self._marks[-1]
        return (done - before) / (end - start) if done > before else (done - self.resumed) / self.first


def _print_proof(proof: "Proof", path: Path, pace: _Pace, as_json: bool) -> None:
    footer = proof.footer
    values = {
        "path": str(path),
        "model": proof.round.model,
        "preset": proof.round.preset,
        "records": footer.records,
        "valid": footer.valid,
        "valid_rate": round(proof.valid_rate, 4),
        "resumed": pace.resumed,
        "seconds": footer.seconds,
        "first_batch_seconds": round(pace.first, 3),
        "nonces_per_second": round(pace.rate, 2),
        "sha256": footer.sha256,
    }
    show_values("assay.poc.prove/1", values, as_json)


def _print_verdict(verdict: "Verdict", standing: "Standing | None", as_json: bool) -> None:
    if as_json:
        emit_document(verdict.as_dict() | ({} if standing is None else {"life": standing.as_dict()}))
        return
    sequential, count, header = verdict.sequential, verdict.count, verdict.header
    claims = header.claims() | {"nonces": f"{header.count} in {len(header.nonces)} run(s) from {header.nonces[0][0]}"}
    believed = [f"{name} {claims[name]} (pin it with --{name.replace('_', '-')})" for name in verdict.unpinned]
    counted = f"{count.mismatches} of {count.n} mismatches, p = {count.p_value:.3g}"
    condition = ", if the prover's word is taken: exit code 2" if verdict.honest and believed else ""
    rows = [
        ("verdict", f"{verdict.verdict}{condition}"),
        ("why", verdict.reason),
        ("block hash", header.round.block_hash),
        ("public key", header.round.public_key),
        ("model", f"{header.round.model:.80} ({header.digest[:12]})"),
        ("number format", header.fingerprint.dtype),
        ("preset", f"{header.round.preset}, {header.round.seq_len} positions"),
        ("pinned", ", ".join(verdict.pins.given) or "nothing"),
        ("on the prover's word", "\n".join(believed) or "nothing"),
        ("checked", f"{verdict.checked} of {verdict.proved} nonces"),
        ("honest noise", f"{verdict.noise.size:.2g} ({verdict.noise.source})"),
        ("gross residuals", f"{sequential.gross} above {sequential.gross_threshold:.2g}"),
        ("published rule", counted if header.pipeline.texts == "published" else "none for this preset"),
        *_ledger.life_rows(standing),
    ]
    table(("", "result"), rows)


app.command(
    "respond",
    cls=Resumable,
    epilog="Example: assay poc respond --model reference:qwen3 --prompts prompts.jsonl --block-hash BLOCK "
    "--public-key KEY -o receipts.jsonl",
)(_respond.respond)
app.command(
    "replay",
    epilog="Example: assay poc replay receipts.jsonl --model reference:qwen3 --requests prompts.jsonl "
    "--block-hash BLOCK --public-key KEY",
)(_replay.replay)
app.command(
    "calibrate-responses",
    epilog="Example: assay poc calibrate-responses honest.jsonl --model reference:qwen3 -o responses.json",
)(_replay.calibrate_responses)
app.command("serve", epilog="Example: assay poc serve --model reference:qwen3 --api-key-file keys")(_serve.serve)
app.command("receive", epilog="Example: assay poc receive --port 8081")(_serve.receive)
app.command("validator", epilog="Example: assay poc validator --model reference:qwen3 --pins pins.toml")(
    _validator.validator
)
app.add_typer(_serve.callbacks, name="callbacks")
app.add_typer(_experiment.app, name="experiment")
app.add_typer(_pins.app, name="pins")
app.add_typer(_ledger.app, name="ledger")
