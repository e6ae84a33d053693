"""Conversations as chat models take them: messages, which the chat template of a checkpoint turns into text.

A template is a program of the model's author. transformers renders it in a sandbox of jinja. Here it has no clock
either, so that a validator renders the text of yesterday's request again; a date is set by ``chat_template_kwargs``.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError, reason_of
from assay.files.jsonl import dumps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TEXT = 2**24  # characters of a prompt, of messages with their tools, and of what a template makes of them
MOST_MESSAGES = 2**12
ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT_OPTIONS = {"tools": list, "chat_template_kwargs": dict}
"""What a line may have beside messages, as in TRL and vLLM."""


@dataclass(frozen=True, order=True)
class Chat:
    """Messages, and what else their template is given. Make one with :func:`read_chat`.

    Args:
        json: Object with ``messages``, and ``tools`` and ``chat_template_kwargs`` where there are any, as JSON.
    """

    json: str

    @property
    def fields(self) -> dict[str, Any]:
        """The fields, as a line of a file has them."""
        found: dict[str, Any] = json.loads(self.json)
        return found

    @property
    def content(self) -> str:
        """The contents of all messages, one after another."""
        return "\n".join(message["content"] for message in self.fields["messages"])


def read_chat(messages: Any, *, is_answer: bool = False, **options: Any) -> Chat:
    """Return messages that ask for an answer, or with ``is_answer`` the one message that is it.

    Args:
        messages: List of mappings with ``role`` and ``content``, both text.
        is_answer: Whether this is a completion.
        options: The fields of :data:`CHAT_OPTIONS` that are given: ``tools``, a list of JSON schemas, and
            ``chat_template_kwargs``, a mapping of what the template is told beside.

    Raises:
        UsageError: A value has another form, is too large, or the last message is of the wrong role.
    """
    listed = messages if isinstance(messages, list | tuple) else ()
    if not 0 < len(listed) <= MOST_MESSAGES:
        seen = f"{len(listed)} messages" if listed == messages else f"messages of {type(messages).__name__}"
        raise UsageError(seen, wanted=f"a list of 1 to {MOST_MESSAGES}", do="correct the messages")
    for place, message in enumerate(listed):
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"} or message["role"] not in ROLES:
            wanted = f"role and content, and a role of {', '.join(ROLES)}"
            raise UsageError(f"message {place} is {message!r:.80}", wanted=wanted, do="correct or remove it")
        if not isinstance(message["content"], str):
            seen = f"message {place} with content {message['content']!r:.60}"
            raise UsageError(seen, wanted="text; images and parts are not read", do="write the text as the content")
    last, ends = listed[-1]["role"], ("assistant",) if is_answer else ("user", "tool")
    if last not in ends or (is_answer and len(listed) > 1):
        seen, wanted = f"{len(listed)} messages, the last by the role {last}", f"an end by {' or '.join(ends)}"
        raise UsageError(seen, wanted=f"one message by {ends[0]}" if is_answer else wanted, do="correct the messages")
    for name, value in options.items():
        if name not in CHAT_OPTIONS or not isinstance(value, CHAT_OPTIONS[name]) or not value:
            wanted = "tools as a list of JSON schemas, chat_template_kwargs as an object"
            raise UsageError(f"{name} is {value!r:.60}", wanted=wanted, do=f"correct {name}, or leave it out")
    text = dumps({"messages": [dict(message) for message in listed], **options})
    if len(text) > LONGEST_TEXT:
        raise UsageError(f"messages of {len(text)} characters", wanted=f"at most {LONGEST_TEXT}", do="shorten them")
    return Chat(text)


def chat_template_digest(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Return the SHA-256 in hex of the text of a chat template, of several that of their names and texts in JSON.

    It is empty where there is none.
    """
    template: Any = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    text = template if isinstance(template, str) else dumps(dict(sorted(template.items())))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def render_chat(
    chat: Chat, tokenizer: "PreTrainedTokenizerBase | None", *, reference: str = "the model", answer: Chat | None = None
) -> str:
    """Return the text of messages, up to where the answer begins; or the text of an ``answer`` that follows them.

    The text has all special tokens: a tokenizer must add none (``add_special_tokens=False``).

    Raises:
        UsageError: There is no template, or it refuses the messages, does not use the tools, or gives too much text.
    """
    if not chat_template_digest(tokenizer):
        raise UsageError(
            f"messages for {reference}, which has no chat template",
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
    whole = _rendered(tokenizer, **fields)
    if not whole.startswith(text):
        seen = "a completion after which the chat template renders the prompt in another way"
        raise UsageError(seen, wanted="a prompt that stays the same", do="write the completion as text")
    return whole.removeprefix(text)


def _rendered(
    tokenizer: Any, *, messages: Any, tools: Any = None, chat_template_kwargs: Any = None, **how: bool
) -> str:
    import jinja2

    told = chat_template_kwargs or {}
    if reserved := sorted(told.keys() & {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}):
        seen = f"chat_template_kwargs with {reserved[0]!r:.60}"
        raise UsageError(seen, wanted="names that the template itself reads", do=f"leave {reserved[0]:.60} out")
    no_clock = {"strftime_now": jinja2.Undefined(name="strftime_now")}
    try:
        text = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **no_clock | told, **how))
    except Exception as error:  # what the author's program raises: of jinja, or of Python
        raise UsageError(
            f"messages that the chat template refuses: {reason_of(error):.200}",
            wanted="roles and contents in an order that it takes; it has no clock",
            do="correct the messages; set what the template needs, such as a date, in chat_template_kwargs",
        ) from None
    if not 0 < len(text) <= LONGEST_TEXT:
        wanted = f"1 to {LONGEST_TEXT}"
        raise UsageError(f"messages that are rendered to {len(text)} characters", wanted=wanted, do="correct them")
    return text
