"""Requests: what a client asks for, read from JSON Lines before a model is loaded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assay.errors import AssayError, DataError, UsageError
from assay.files.jsonl import read_jsonl
from assay.models.chat import CHAT_OPTIONS, Chat, chat_template_digest, read_chat, render_chat
from assay.models.template_process import LONGEST_TEXT
from assay.poc.protocol.checks import check_name, check_number
from assay.poc.responses.receipts import MOST_RECEIPTS, MOST_TOKENS, Chooser, check_ids, check_word
from assay.poc.responses.sampling import HIGHEST_INDEX, RANGES, ResponseName, Sampling
from assay.poc.responses.stop_search import VIEWS, StopSearch

DEFAULT_MAX_TOKENS = 64  # tokens of an answer whose request names no number
MOST_STOPS = 64
LONGEST_STOP = 1024  # texts that end an answer, and characters of one
_OPTIONAL = {"request_id", "user_seed", "max_tokens", "n", "adapter", "stop", "stop_token_ids"}
_SAMPLED = {*RANGES, "top_k", "logit_bias"}


@dataclass(frozen=True, kw_only=True)
class Request(ResponseName):
    """One request: a prompt, its id and user seed, and its sampling.

    Args:
        user_seed, request_id, index: As of :class:`ResponseName`.
        prompt: Text, messages, or token ids.
        chosen_by: Who chose the request id, ``client`` or ``server``.
        sampling: Parameters of sampling.
        max_tokens: Number of tokens after which the response ends.
        stop: Texts that end the response.
        stop_token_ids: Tokens that end it, beside the end tokens of the model.
        adapter: Name of the LoRA adapter that is to answer; empty for the model itself.
        chat_template: SHA-256 of the template that made the token ids; None without messages.

    Raises:
        UsageError: A value is out of range; names it.
    """

    user_seed: str = ""
    prompt: str | Chat | tuple[int, ...]
    chosen_by: Chooser = "client"
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    adapter: str = ""
    chat_template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("max_tokens", self.max_tokens, 1, MOST_TOKENS)
        check_name("adapter", self.adapter, fewest=0, do="pass the name of an adapter, or none")
        check_word("chosen_by", self.chosen_by, Chooser)
        if isinstance(self.prompt, str):
            if not 0 < len(self.prompt) <= LONGEST_TEXT:
                raise UsageError(
                    f"a prompt of {len(self.prompt)} characters",
                    wanted=f"1 to {LONGEST_TEXT}",
                    do="correct the prompt",
                )
        elif not isinstance(self.prompt, Chat):
            object.__setattr__(self, "prompt", check_ids("the prompt", self.prompt, fewest=1))
        fits = all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in self.stop)
        if not fits or len(self.stop) > MOST_STOPS:
            raise UsageError(
                f"stop is {self.stop!r:.60}",
                wanted=f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters",
                do="correct stop",
            )
        object.__setattr__(
            self, "stop_token_ids", check_ids("stop_token_ids", self.stop_token_ids, fewest=0)
        )

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids of the prompt; a UsageError where it is a text or messages."""
        if not isinstance(self.prompt, tuple):
            raise UsageError(
                "a prompt without token ids", wanted="token ids", do="call encode_requests() first"
            )
        return self.prompt

    def is_ended(
        self,
        output: Sequence[int],
        end_tokens: Collection[int],
        tokenizer: Any,
        *,
        views: Sequence[bool] = VIEWS,
    ) -> bool:
        """Whether an output has come to an end of its own: by its last token, or by a stop text in
        one of the ``views`` of :class:`StopSearch`.
        """
        search = StopSearch(self.stop, self.ids, tokenizer, views=views)
        return output[-1] in {*end_tokens, *self.stop_token_ids} or any(map(search.add, output))


def read_requests(
    path: str | Path,
    *,
    sampling: Sampling | None = None,
    user_seed: str = "",
    max_tokens: int = DEFAULT_MAX_TOKENS,
) -> list[Request]:
    """Read requests: JSON Lines with ``prompt`` or ``messages``, and parameters of each.

    A line may have ``request_id``, ``user_seed``, ``n`` (answers), ``max_tokens``, ``adapter``,
    ``stop`` (a text or a list of texts), ``stop_token_ids`` and every field of :class:`Sampling`;
    ``logit_bias`` has token ids as text. With messages there may be ``tools`` and
    ``chat_template_kwargs``. A prompt without an id is called after its line, and the server chose
    that id.

    Args:
        path: Path of the file.
        sampling: Parameters that a line does not set.
        user_seed: Seed of the client that a line does not set.
        max_tokens: Number of tokens that a line does not set.

    Raises:
        DataError: The file or a line is wrong; names the line.
    """
    common = {"user_seed": user_seed, "max_tokens": max_tokens}
    base = sampling or Sampling()
    requests: list[Request] = []
    names: dict[tuple[str, str], int] = {}
    for number, line in read_jsonl(path):
        try:
            answers = _requests(line, number, common, base)
        except AssayError as error:
            raise DataError(
                f"{path}, line {number}: {error.seen}", wanted=error.wanted, do=error.do
            ) from None
        name = (answers[0].user_seed, answers[0].request_id)
        # The noise of an answer is drawn by this name, so two of one name would share it.
        if name in names:
            raise DataError(
                f"{path}, line {number}: the request id {answers[0].request_id!r:.80} of line "
                f"{names[name]}",
                wanted="an id of its own for every prompt",
                do="change one of them",
            )
        names[name] = number
        requests += answers
        if len(requests) > MOST_RECEIPTS:
            raise DataError(
                f"{path}: more than {MOST_RECEIPTS} answers",
                wanted="fewer in one file",
                do="cut the file in parts",
            )
    if not requests:
        raise DataError(
            f"{path} is empty", wanted="JSON Lines with a prompt each", do='write {"prompt": "…"}'
        )
    return requests


def _requests(
    line: dict[str, Any], number: int, common: dict[str, Any], base: Sampling
) -> list[Request]:
    options = {name: line[name] for name in CHAT_OPTIONS if name in line and "messages" in line}
    unknown = sorted(line.keys() - {"prompt", "messages"} - options.keys() - _OPTIONAL - _SAMPLED)
    if unknown or ("prompt" in line) == ("messages" in line):
        seen = "both prompt and messages" if "prompt" in line else "no prompt and no messages"
        raise UsageError(
            f"a field {unknown[0]!r:.60}" if unknown else seen,
            wanted=", ".join(["prompt or messages", *sorted(_OPTIONAL), *sorted(_SAMPLED)]),
            do="correct the line",
        )
    values = {name: line[name] for name in _SAMPLED & line.keys()}
    if "logit_bias" in values:
        biases = values["logit_bias"]
        if not isinstance(biases, dict) or not all(
            t.isascii() and t.isdigit() and len(t) < 10 for t in biases
        ):
            raise UsageError(
                f"logit_bias is {biases!r:.60}",
                wanted="numbers by token id",
                do="correct logit_bias",
            )
        values["logit_bias"] = {int(token): bias for token, bias in biases.items()}
    prompt = read_chat(line["messages"], **options) if "messages" in line else line["prompt"]
    if not isinstance(prompt, str | list | Chat):
        raise UsageError(
            f"prompt is {prompt!r:.60}",
            wanted="a text or a list of token ids",
            do="correct the prompt",
        )
    texts, tokens = (
        [] if line.get(name) is None else line[name] for name in ("stop", "stop_token_ids")
    )
    # One text stands for itself, as clients of chat servers send it.
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not isinstance(tokens, list):
        raise UsageError(
            f"stop is {texts!r:.60}, stop_token_ids {tokens!r:.60}",
            wanted="a text or a list of texts, and a list of token ids",
            do="correct them",
        )
    first = Request(
        **(common | {name: line[name] for name in ("user_seed", "max_tokens") if name in line}),
        prompt=tuple(prompt) if isinstance(prompt, list) else prompt,
        request_id=line.get("request_id", f"line-{number}"),
        chosen_by="client" if "request_id" in line else "server",
        sampling=replace(base, **values),
        stop=tuple(texts),
        stop_token_ids=tuple(tokens),
        adapter=line.get("adapter", ""),
    )
    answers = line.get("n", 1)
    check_number("n", answers, 1, HIGHEST_INDEX + 1)
    return [replace(first, index=index) for index in range(answers)]


def encode_requests(
    requests: Sequence[Request],
    tokenizer: Any,
    *,
    reference: str,
    vocab_size: int,
    max_positions: int,
) -> list[Request]:
    """Return requests with token ids, all of which fit the model.

    Raises:
        UsageError: A text has no tokenizer or no tokens, messages have no template or one that
            refuses them, a token is not in the vocabulary, or prompt and ``max_tokens`` together
            are longer than the model's positions.
    """
    from assay.models.token_text import check_tokens

    encoded = []
    for request in requests:
        name = f"request {request.request_id!r:.80}"
        try:
            with_ids = _with_ids(request, tokenizer, reference)
        except UsageError as error:
            raise UsageError(f"{name}: {error.seen}", wanted=error.wanted, do=error.do) from None
        check_tokens(name, with_ids.ids, vocab_size)
        if any(token >= vocab_size for token in with_ids.sampling.logit_bias):
            raise UsageError(
                f"{name} has a logit_bias of token {max(with_ids.sampling.logit_bias)}",
                wanted=f"tokens below {vocab_size}",
                do="leave it out of logit_bias",
            )
        room = max_positions - len(with_ids.ids)
        if with_ids.max_tokens > room:
            raise UsageError(
                f"{name} has {len(with_ids.ids)} tokens and asks for {with_ids.max_tokens}",
                wanted=f"at most {max_positions} together, the positions of {reference}",
                do=f"pass --max-tokens {room}, or a shorter prompt"
                if room > 0
                else "give it a shorter prompt (--prompts or --requests)",
            )
        encoded.append(with_ids)
    return encoded


def _with_ids(request: Request, tokenizer: Any, reference: str) -> Request:
    prompt = request.prompt
    if isinstance(prompt, Chat):
        # The template writes the special tokens, and a tokenizer that adds its own would begin the
        # text twice.
        text = render_chat(prompt, tokenizer, reference=reference)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return replace(request, prompt=tuple(ids), chat_template=chat_template_digest(tokenizer))
    if tokenizer is None and (isinstance(prompt, str) or request.stop):
        raise UsageError(
            f"text for {reference}, which has no tokenizer",
            wanted="prompts and stops of token ids",
            do='write {"prompt": [1, 2, 3], "stop_token_ids": [4]}',
        )
    return (
        replace(request, prompt=tuple(tokenizer(prompt)["input_ids"]))
        if isinstance(prompt, str)
        else request
    )
