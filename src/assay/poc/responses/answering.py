"""The reference loop: prompts in, receipts out, one request at a time."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from assay.errors import UsageError
from assay.files.storage import PartialFile
from assay.models.chat import Chat
from assay.models.decoder import head_of
from assay.models.model import Model
from assay.models.shared_passes import steps_of_passes
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import SKETCH_EVERY, sketch_steps
from assay.poc.responses.prefill import read_on, sketch_response
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts, parse_receipt
from assay.poc.responses.requests import DEFAULT_MAX_TOKENS, Request, encode_requests
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.sampling import ResponseSeed, Sampling, mark_tokens
from assay.poc.responses.stop_search import StopSearch
from assay.streams.arrays import as_tensor


def respond(
    model: Model,
    prompts: Sequence[Request | Chat | str | Sequence[int]],
    *,
    block_hash: str,
    public_key: str,
    sampling: Sampling | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    user_seed: str = "",
    end_tokens: Collection[int] | None = None,
    hash_prompts: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Receipts:
    """Answer prompts with seeded sampling, and return what a server would state about its answers.

    Requests are run one at a time, so a response does not depend on the others.

    Args:
        model: Model that answers.
        prompts: Requests, or prompts in text, messages or token ids, which are called ``prompt-0``
            and so on.
        block_hash: Beacon that became known after the requests were accepted.
        public_key: Key of the node.
        sampling: Parameters for prompts that are not requests; the defaults of :class:`Sampling`
            when None.
        max_tokens: Number of tokens after which a response ends, for prompts that are not requests.
        user_seed: Seed of the client, for prompts that are not requests.
        end_tokens: Tokens that end every response; :attr:`Model.end_tokens` when None.
        hash_prompts: Whether the receipts have the hash of a prompt in place of its ids.
        output: File of receipts, written as it grows to ``<output>.partial``. If an interrupted run
            with the same requests left that file, this one continues after its last whole line.
        overwrite: Whether an existing file may be replaced.
        progress: Function that is called with (tokens made, tokens at most in all) after every
            token.

    Returns:
        The receipts, in the order of the prompts.

    Raises:
        UsageError: A prompt does not fit the model, a value is out of range, or the file exists
            already.
        ModelError: The model cannot be run, or (BadWeights) gives NaN or infinity.
        OutOfMemory: The device has no room for a request.
        StorageError: The file cannot be written. The responses so far stay in the partial file.

    Example:
        >>> import assay
        >>> from assay.poc.responses import Sampling, respond
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> made = respond(
        ...     model,
        ...     ["def add(a, b):"],
        ...     block_hash="B",
        ...     public_key="K",
        ...     sampling=Sampling(top_k=20),
        ...     max_tokens=8,
        ... )
        >>> made.receipts[0].request_id, len(made.receipts[0].output), made.receipts[0].finish
        ('prompt-0', 8, 'length')
    """
    if isinstance(prompts, str):
        raise UsageError(
            f"one prompt {prompts!r:.60}",
            wanted="a list of prompts",
            do="write respond(model, [prompt])",
        )
    common: dict[str, Any] = {
        "sampling": sampling or Sampling(),
        "max_tokens": max_tokens,
        "user_seed": user_seed,
        "chosen_by": "server",
    }
    requests = encode_requests(
        [_request(prompt, f"prompt-{place}", common) for place, prompt in enumerate(prompts)],
        model.tokenizer,
        reference=model.reference,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
    )
    if not requests:
        raise UsageError("no prompts", wanted="one or more", do="give a prompt")
    longest = max(len(request.ids) + request.max_tokens for request in requests)
    header = ReceiptHeader(
        public_key=public_key,
        reference=model.reference,
        digest=model.digest,
        weights=model.weights,
        fingerprint=HFEngine(model, batch_size=1, seq_len=longest).fingerprint,
    )
    seeds = [header.seed(request, block_hash) for request in requests]
    if len({seed.text() for seed in seeds}) < len(seeds):
        raise UsageError(
            "two requests of one id, seed and index",
            wanted="a seed of its own for every response",
            do="give one of them another request_id",
        )
    # Refuses a model without one before a file is begun.
    head_of(model.module)
    ends = model.end_tokens if end_tokens is None else frozenset(end_tokens)

    def receipt_of(request: Request, **answer: Any) -> Receipt:
        stated = ("user_seed", "request_id", "index", "chosen_by", "sampling", "chat_template")
        names = {name: getattr(request, name) for name in stated}
        receipt = Receipt(block_hash=block_hash, prompt=Prompt.of(request.ids), **names, **answer)
        return receipt.without_prompt() if hash_prompts else receipt

    def read_left(number: int, line: bytes) -> Receipt:
        """Read a receipt that an interrupted run left; refuse one of another request."""
        receipt = parse_receipt(line, source=f"{output}.partial", number=number)
        request = requests[number - 2]
        answer = {name: getattr(receipt, name) for name in ("output", "sketches", "finish")}
        if receipt.line() != receipt_of(request, **answer).line():
            raise UsageError(
                f"a partial file with the answer to request {receipt.request_id!r:.80}",
                wanted=f"that to request {request.request_id!r:.80}, as the interrupted command "
                f"asked",
                do="repeat that command, or remove the partial file to start again",
            )
        return receipt

    started = time.perf_counter()
    with nullcontext() if output is None else PartialFile(output, overwrite=overwrite) as out:
        receipts = out.resume(header.line(), len(requests), read_left) if out else []
        for place in range(len(receipts), len(requests)):
            before = sum(len(receipt.output) for receipt in receipts)
            most = before + sum(request.max_tokens for request in requests[place:])
            tell = (
                partial(lambda before, most, done: progress(before + done, most), before, most)
                if progress
                else None
            )
            receipts.append(
                receipt_of(
                    requests[place], **_response(model, requests[place], seeds[place], ends, tell)
                )
            )
            if out:
                out.append_lines([receipts[-1].line()])
        answers = Receipts.build(header, receipts, float(f"{time.perf_counter() - started:.3f}"))
        if out:
            out.append_lines([answers.footer.line()])
            out.commit()
    return answers


def _response(
    model: Model,
    request: Request,
    seed: ResponseSeed,
    ends: frozenset[int],
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Return the tokens of a response, its sketches and why it ended, as a receipt has them."""
    sampling = request.sampling
    tokens = list[int]()
    states = list[torch.Tensor]()
    logits_1V, hidden_1D, cache = read_on(model, request.ids)
    sampler = Sampler([sampling], logits_1V.shape[1], model.device)
    prompt_V = counts_1V = None
    if sampling.penalises:
        prompt_V = as_tensor(mark_tokens(request.ids, logits_1V.shape[1])).to(model.device)
        counts_1V = torch.zeros_like(logits_1V, dtype=torch.int32)
    seeds_N = seed.step_seeds(range(request.max_tokens))
    anew = {
        steps.start for steps in steps_of_passes(model.config, len(request.ids), request.max_tokens)
    }
    search = StopSearch(request.stop, request.ids, model.tokenizer)
    ending = {*ends, *request.stop_token_ids}
    while True:
        step = len(tokens)
        if step % SKETCH_EVERY == 0:
            states.append(hidden_1D[0])
        scores_1V = sampler.scores(
            logits_1V, seeds_N[step : step + 1], prompt_NV=prompt_V, counts_NV=counts_1V
        )
        tokens.append(int(scores_1V.argmax(dim=1)))
        if progress:
            progress(len(tokens))
        ended = search.add(tokens[-1]) or tokens[-1] in ending
        if ended or len(tokens) == request.max_tokens:
            break
        if counts_1V is not None:
            counts_1V[0, tokens[-1]] += 1
        # Positions from which on the architecture computes the whole row in another way.
        again = len(tokens) in anew
        new, cache = ([*request.ids, *tokens], None) if again else (tokens[-1:], cache)
        cached = 0 if again else len(request.ids) + len(tokens) - 1
        logits_1V, hidden_1D, cache = read_on(model, new, cache, cached=cached)
    sketches = (
        sketch_response(torch.stack(states), seed.words("sketch"), sketch_steps(len(tokens)))
        .cpu()
        .numpy()
    )
    return {"output": tuple(tokens), "sketches": sketches, "finish": "stop" if ended else "length"}


def _request(
    prompt: Request | Chat | str | Sequence[int], name: str, common: dict[str, Any]
) -> Request:
    if isinstance(prompt, Request):
        if prompt.adapter:
            raise UsageError(
                f"request {prompt.request_id!r:.80} for the adapter {prompt.adapter!r:.80}",
                wanted="requests for the model itself",
                do="serve adapters with vLLM",
            )
        return prompt
    content = prompt if isinstance(prompt, str | Chat) else tuple(prompt)
    return Request(prompt=content, request_id=name, **common)
