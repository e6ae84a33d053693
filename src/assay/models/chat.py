"""Conversations as chat models take them: messages, which the chat template of a checkpoint turns into text.

A template is a program of the model's author. transformers renders it in a sandbox of jinja. Here it has no clock
either, so that a validator renders the text of yesterday's request again; a date is set by ``chat_template_kwargs``.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Field, Json, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from assay.errors import UsageError, reason_of
from assay.files.jsonl import dumps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TEXT = 2**24  # characters of a prompt, of messages with their tools, and of what a template makes of them


class _Function(TypedDict):
    name: str
    arguments: Json[dict[str, Any]] | dict[str, Any]  # clients send the JSON of the object that templates take


class _Call(TypedDict):
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: _Function


class _Message(TypedDict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[_Call]]
    tool_call_id: NotRequired[str]


def _plain(message: Any) -> Any:
    """Return a message without what a client's library adds: nulls and empty lists, and no content beside calls."""
    if not isinstance(message, dict):
        return message
    said = {name: value for name, value in message.items() if value not in (None, [])}
    return {"content": ""} | said if "tool_calls" in said else said


@with_config(extra="forbid", strict=True)  # which holds for the parts too
class _Fields(TypedDict):
    messages: Annotated[list[Annotated[_Message, BeforeValidator(_plain)]], Field(min_length=1, max_length=2**12)]
    tools: NotRequired[Annotated[list[dict[str, Any]], Field(min_length=1)]]
    chat_template_kwargs: NotRequired[dict[str, Any]]


CHAT_OPTIONS = ("tools", "chat_template_kwargs")
"""What a line may have beside messages: JSON schemas of tools, and values for the template, as in TRL and vLLM."""


@dataclass(frozen=True)
class Chat:
    """Messages, and what else their template is given, as the JSON of one object. Make one with :func:`read_chat`."""

    json: str

    @property
    def fields(self) -> dict[str, Any]:
        """The object: ``messages``, and those of :data:`CHAT_OPTIONS` that there are."""
        return dict(json.loads(self.json))


def read_chat(messages: Any, *, is_answer: bool = False, **options: Any) -> Chat:
    """Return messages that ask for an answer, or with ``is_answer`` the one message that is it.

    Args:
        messages: List of mappings with ``role`` and ``content``, both text, and of tools ``tool_calls``,
            ``tool_call_id`` and ``name`` as OpenAI's clients have them.
        is_answer: Whether this is a completion.
        options: Those of :data:`CHAT_OPTIONS` that are given.

    Raises:
        UsageError: A value has another form or is too large, or the last message has the wrong role.
    """
    try:
        fields = TypeAdapter(_Fields).validate_python({"messages": messages, **_plain(options)})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, of {first['input']!r:.80}",
            wanted="messages with a role and a content of text; perhaps tools and chat_template_kwargs",
            do="correct the messages; images and other parts are not read",
        ) from None
    text, last = dumps(fields), fields["messages"][-1]["role"]
    if last not in (("assistant",) if is_answer else ("user", "tool")) or (is_answer and len(fields["messages"]) > 1):
        wanted = "one message by assistant" if is_answer else "messages that end by user or tool"
        raise UsageError(f"messages that end by {last}", wanted=wanted, do="correct the messages")
    if len(text) > LONGEST_TEXT:
        raise UsageError(f"messages of {len(text)} characters", wanted=f"at most {LONGEST_TEXT}", do="shorten them")
    return Chat(text)


def chat_template_digest(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Return the SHA-256 in hex of a chat template, of several that of their texts by name in JSON; empty for none."""
    template: Any = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else dumps(dict(sorted(template.items())))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() if text else ""


def render_chat(
    chat: Chat, tokenizer: "PreTrainedTokenizerBase | None", *, answer: Chat | None = None, reference: str = "a model"
) -> str:
    """Return the text of messages, up to where the answer begins; or the text of an ``answer`` that follows them.

    The text has all special tokens: a tokenizer must add none (``add_special_tokens=False``).

    Raises:
        UsageError: There is no template, which names the ``reference`` of the model; or it refuses the messages, does
            not use the tools, or gives too much text.
    """
    if not chat_template_digest(tokenizer):
        raise UsageError(
            f"messages for {reference} without a chat template",
            wanted="a chat_template.jinja, or a chat_template in tokenizer_config.json, beside the weights",
            do="take the Instruct or chat model of this kind, or write the prompt as text",
        )
    fields = chat.fields
    text = _rendered(tokenizer, **fields, add_generation_prompt=True)
    if "tools" in fields and text == _rendered(tokenizer, **fields | {"tools": None}, add_generation_prompt=True):
        raise UsageError("tools, which the chat template does not use", wanted="no tools", do="leave tools out")
    if answer is None:
        return text
    fields["messages"] += answer.fields["messages"]
    whole = _rendered(tokenizer, **fields, add_generation_prompt=False)
    if not whole.startswith(text):
        seen = "a completion after which the chat template renders the prompt in another way"
        raise UsageError(seen, wanted="a prompt that stays the same", do="write the completion as text")
    return whole.removeprefix(text)


_NO_CLOCK = "{% set strftime_now = no_clock %}{{ '' }}"
"""Begins a template that asks for the time, so that it has none: no argument of transformers takes its clock away."""


def _rendered(tokenizer: Any, *, messages: Any, tools: Any = None, chat_template_kwargs: Any = None, **how: Any) -> str:
    # Given here, these cannot be among the values for the template: a TypeError says so.
    how |= {"tools": tools, "continue_final_message": False, "tokenize": False}
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if "strftime_now" in template and "strftime_now" not in (chat_template_kwargs or {}):
            template = f"{_NO_CLOCK}{template}"
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, **how, **chat_template_kwargs or {}))
        text.encode()  # an unpaired surrogate is no text
    except Exception as error:  # what the author's program raises: of jinja, or of Python
        raise UsageError(
            f"messages that the chat template refuses: {reason_of(error):.200}",
            wanted="roles and contents in an order that it takes; it has no clock",
            do="correct the messages; set what the template needs, such as a date, in chat_template_kwargs",
        ) from None
    if not 0 < len(text) <= LONGEST_TEXT:
        seen, wanted = f"messages that are rendered to {len(text)} characters", f"1 to {LONGEST_TEXT}"
        raise UsageError(seen, wanted=wanted, do="correct them")
    return text
