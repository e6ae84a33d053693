"""``assay poc respond``: answer prompts with seeded sampling."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from assay.cli.engines import load
from assay.cli.output import JsonFlag, progress_bar, show_values
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.respond_settings import RespondSettings
    from assay.poc.responses.requests import Request


@settings("assay.cli.respond_settings:RespondSettings")
def respond(chosen: "RespondSettings", as_json: JsonFlag = False) -> None:
    """Answer prompts with seeded sampling, and write receipts. An interrupted run continues when it is repeated.

    A prompt is a line such as {"prompt": "def add(a, b):", "request_id": "r1", "temperature": 0.7}. The prompt may be
    token ids. Any of user_seed, n, max_tokens and the parameters of sampling may follow; the flags are for the rest.
    """
    from assay.files.storage import check_new_file
    from assay.poc import responses
    from assay.poc.protocol.round import check_name

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    for name in ("block_hash", "public_key"):
        check_name(name, getattr(chosen, name), do=f"pass --{name.replace('_', '-')} as the chain prints it")
    names = set(responses.Sampling.__dataclass_fields__) - {"logit_bias"}
    sampling = responses.Sampling(**{name: getattr(chosen, name) for name in names})
    requests = responses.read_requests(
        chosen.prompts, sampling=sampling, user_seed=chosen.user_seed, max_tokens=chosen.max_tokens
    )
    requests = with_token_ids(requests, chosen.model)
    loaded = load(chosen.model, chosen.dtype, chosen.device)
    with progress_bar("answering", "tokens") as progress:
        made = responses.respond(
            loaded,
            requests,
            block_hash=chosen.block_hash,
            public_key=chosen.public_key,
            hash_prompts=chosen.hash_prompts,
            output=chosen.output,
            overwrite=chosen.overwrite,
            progress=progress,
        )
    footer = made.footer
    values = {
        "path": str(chosen.output),
        "model": made.header.reference,
        "receipts": footer.receipts,
        "tokens": footer.tokens,
        "seconds": footer.seconds,
        "tokens_per_second": round(footer.tokens / footer.seconds, 2) if footer.seconds else 0.0,
        "sha256": footer.sha256,
    }
    show_values("assay.poc.respond/1", values, as_json)


def with_token_ids(requests: "Sequence[Request]", model: str) -> "list[Request]":
    """Return requests with token ids for prompts; one that does not fit is refused before the weights are read."""
    from assay.models.load import model_info
    from assay.models.resolve import load_tokenizer
    from assay.poc.responses.requests import encoded

    info = model_info(model)
    return encoded(
        requests,
        load_tokenizer(model) if any(isinstance(request.prompt, str) for request in requests) else None,
        reference=model,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
    )
