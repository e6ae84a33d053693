"""``assay poc respond``, ``replay``, ``calibrate-responses``: seeded answers and their replay."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

import assay.poc.responses
from assay.cli.flags import (
    ARGUMENT,
    RECEIPTS,
    AuditSettings,
    FileSettings,
    LaunchSettings,
    ModelSettings,
    NewFileSettings,
)
from assay.cli.poc import life_rows, noting_new, poc
from assay.framework.output import emit_document, progress_bar, show_values, table
from assay.settings import Flag

REQUESTS = Flag(reads="assay.poc.responses.requests:read_requests")
RequestFile = Annotated[
    Path | None,
    REQUESTS,
    Field(description="Requests that were sent: for exit code 0, and for hashed prompts."),
]
Batch = Annotated[
    int,
    "RESPONSES",
    Field(ge=1, le=1024, description="Responses at once; 1 where bits must not depend."),
]


class RespondSettings(FileSettings, ModelSettings):
    """Settings of ``assay poc respond``."""

    prompts: Annotated[Path, REQUESTS] = Field(
        description="Lines with prompt or messages, and their own settings."
    )
    block_hash: Annotated[str, "HASH"] = Field(
        description="Block that became known after the requests."
    )
    public_key: Annotated[str, "KEY"] = Field(description="Key of the node.")
    user_seed: Annotated[str, "TEXT"] = Field(
        "", description="Client's seed, for prompts that have none."
    )
    max_tokens: Annotated[int, "TOKENS"] = Field(
        64, ge=1, description="Tokens after which a response ends."
    )
    temperature: float = Field(
        1.0, description="Divisor of the logits; 0 takes the likeliest token."
    )
    top_k: int = Field(0, description="Number of likeliest tokens to keep; 0 keeps all.")
    top_p: float = Field(
        1.0, description="Probability that the kept tokens have together at least."
    )
    min_p: float = Field(
        0.0, description="Least probability of a kept token, relative to the likeliest one."
    )
    repetition_penalty: float = Field(
        1.0, description="Divisor of positive logits of tokens that were there."
    )
    frequency_penalty: float = Field(
        0.0, description="Subtracted from a logit for every time it was made."
    )
    presence_penalty: float = Field(
        0.0, description="Subtracted from a logit if the token was made."
    )
    hash_prompts: bool = Field(
        False, description="Write the hash of a prompt in place of its token ids."
    )


class ReplaySettings(AuditSettings):
    """Settings of ``assay poc replay``: the validator's values, and how it recomputes."""

    calibration: Annotated[
        Path | None, Flag(reads="assay.poc.responses.response_calibration:ResponseCalibration.load")
    ] = Field(None, description="Measured honest noise of responses; else the default.")
    receipts: Annotated[Path, ARGUMENT, RECEIPTS] = Field(description="File of receipts.")
    requests: RequestFile = None
    sample: Annotated[int | None, "RESPONSES"] = Field(
        None, description="Responses to replay; all by default."
    )
    evidence: Literal["both", "tokens", "sketches"] = Field(
        "both", description="What receipts must have."
    )
    lora: Annotated[Path | None, Flag(reads="assay.poc.responses.receipts:digest_adapter")] = Field(
        None, description="Directory of the LoRA adapter of receipts that name one."
    )
    batch_size: Batch = 16


class CalibrateResponsesSettings(NewFileSettings, LaunchSettings):
    """Settings of ``assay poc calibrate-responses``."""

    receipts: Annotated[tuple[Path, ...], ARGUMENT, RECEIPTS] = Field(
        description="File of receipts."
    )
    requests: RequestFile = None
    batch_size: Batch = 16


@poc.add(
    "respond",
    RespondSettings,
    panel="Node",
    shown="model prompts block_hash public_key output user_seed max_tokens dtype device overwrite",
    example="assay poc respond --model reference:qwen3 --prompts prompts.jsonl --block-hash BLOCK "
    "--public-key KEY -o receipts.jsonl",
    resumable=True,
)
def respond(chosen: RespondSettings, as_json: bool) -> None:
    """Answer prompts with seeds, and write receipts.

    An interrupted run continues when it is repeated.

    A prompt is a line such as {"prompt": "def add(a, b):", "request_id": "r1", "temperature": 0.7}.
    The prompt may be token ids. With {"messages": [{"role": "user", "content": "Hi"}]} the model's
    chat template makes it. Any of user_seed, n, max_tokens and the parameters of sampling may
    follow; the settings are for the rest.
    """
    from assay.poc.audit import with_token_ids
    from assay.poc.protocol.checks import check_name

    for name in ("block_hash", "public_key"):
        check_name(
            name,
            getattr(chosen, name),
            do=f"pass --{name.replace('_', '-')} as the chain prints it",
        )
    sampling = assay.poc.responses.Sampling(**chosen.values_for(assay.poc.responses.Sampling))
    requests = with_token_ids(
        assay.poc.responses.read_requests(
            chosen.prompts,
            sampling=sampling,
            user_seed=chosen.user_seed,
            max_tokens=chosen.max_tokens,
        ),
        chosen.model,
    )
    loaded = assay.models.load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)
    with progress_bar("answering", "tokens") as progress:
        written = assay.poc.responses.respond(
            loaded,
            requests,
            **chosen.model_dump(
                include={"block_hash", "public_key", "hash_prompts", "output", "overwrite"}
            ),
            progress=progress,
        )
    footer = written.footer
    show_values(
        "assay.poc.respond/1",
        {
            "path": str(chosen.output),
            "model": written.header.reference,
            **asdict(footer),
            "tokens_per_second": round(footer.tokens / footer.seconds, 2)
            if footer.seconds
            else 0.0,
        },
        as_json,
    )


@poc.add(
    "replay",
    ReplaySettings,
    panel="Validator",
    shown="model pins requests block_hash public_key sample calibration lora device ledger",
    rare="engine",
    example="assay poc replay receipts.jsonl --model reference:qwen3 --requests prompts.jsonl "
    "--block-hash BLOCK --public-key KEY",
)
def replay(chosen: ReplaySettings, as_json: bool) -> int:
    """Run the responses of receipts again and judge.

    Exit code 0 honest, 1 fraud, 2 undecided or bad input. Each response takes one prefill of prompt
    and output. Tokens that were sampled with seeds are held against the verifier's own scores,
    sketches against its hidden states.

    The node wrote the receipts. Exit code 0 needs the block, the key and the requests from you.
    What is neither pinned nor at its default is shown, with exit code 2; so are requests without a
    receipt, and those whose answer was aborted.

    With --ledger the replay is added to a life, and the exit code is that of the life.
    """
    from assay.poc.audit import Auditor

    with noting_new(chosen.ledger), progress_bar("replaying", "responses") as progress:
        outcome = Auditor(**chosen.values_for(Auditor), progress=progress).audit_receipts(
            chosen.receipts,
            given=assay.poc.Pins(**chosen.values_for(assay.poc.Pins) | {"model": None}),
            **chosen.model_dump(include={"requests", "evidence", "lora", "batch_size"}),
        )
    if as_json:
        emit_document(outcome.as_dict())
        return outcome.exit_code
    verdict = outcome.verdict
    fingerprint = verdict.receipts.header.fingerprint
    share = (
        f"{verdict.matches} of {verdict.tokens}"
        if verdict.tokens
        else "no token was sampled with seeds"
    )
    e_values = "none"
    if result := verdict.result:
        e_values = (
            f"e^{result.log_e_max:.1f}: e^{result.tokens.log_e_max:.1f} tokens, "
            f"e^{result.sketches.log_e_max:.1f} sketches"
        )
    rows = [
        ("verdict", verdict.verdict),
        ("reason", verdict.reason),
        ("responses", f"{len(verdict.replayed)} of {verdict.receipts.footer.receipts}"),
        ("tokens that match", share),
        ("e-value at most", e_values),
        ("honest noise", "not measured" if verdict.noise is None else verdict.noise.source),
        ("node", f"{fingerprint.library}, {fingerprint.dtype}"),
        ("on the node's word", ", ".join(verdict.unpinned) or "nothing"),
        *([("requests unanswered", str(verdict.unanswered))] if verdict.unanswered else []),
        *life_rows(outcome.standing),
    ]
    table(("", "result"), rows)
    return outcome.exit_code


@poc.add(
    "calibrate-responses",
    CalibrateResponsesSettings,
    panel="Noise",
    example="assay poc calibrate-responses honest.jsonl --model reference:qwen3 -o responses.json",
)
def calibrate_responses(chosen: CalibrateResponsesSettings, as_json: bool) -> None:
    """Measure the honest noise of responses.

    Receipts of nodes of one build are replayed by this verifier. Files of different public keys say
    how far machines of the build differ.
    """
    from assay.poc.audit import requests_of
    from assay.poc.launch import Launch, open_prefill
    from assay.poc.responses.response_calibration import check_enough_tokens, check_one_checkpoint

    files = [
        assay.poc.responses.Receipts.load(path) for path in chosen.receipts
    ]  # first what needs no torch
    check_one_checkpoint([read.header for read in files])
    check_enough_tokens(files)
    engine_choice = Launch(**chosen.values_for(Launch))
    engine_choice.check_engine()
    from assay.poc.responses.replaying import check_adapter, check_runnable

    for read in files:
        check_adapter(read, None)
    known_requests = requests_of(chosen.requests, chosen.model)
    with (
        open_prefill(engine_choice, files, batch_size=chosen.batch_size) as (loaded, engine),
        progress_bar("replaying", "responses") as progress,
    ):
        for read in files:
            check_runnable(read, loaded, requests=known_requests)
        measured = [
            (
                read.header,
                assay.poc.responses.replay(
                    read, loaded, requests=known_requests, engine=engine, progress=progress
                ),
            )
            for read in files
        ]
        calibration = assay.poc.responses.calibrate_responses(measured, engine.fingerprint)
    calibration.save(chosen.output)
    noise = calibration.noise
    show_values(
        "assay.poc.calibrate-responses/1",
        {
            "path": str(chosen.output),
            "checkpoint": calibration.digest,
            "machines": len({read.header.public_key for read in files}),
            "responses": calibration.responses,
            "tokens": calibration.tokens,
            "matching": round(calibration.matches / calibration.tokens, 5)
            if calibration.tokens
            else 0.0,
            "typical_difference_of_logits": noise.tokens.law.size,
            "tokens_between_responses": noise.tokens.between,
            "tokens_effect": noise.tokens.effect,
            "typical_distance_of_sketches": noise.sketches.law.size,
            "sketches_between_responses": noise.sketches.between,
        },
        as_json,
    )
