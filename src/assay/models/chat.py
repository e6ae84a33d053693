"""Messages for chat models, and the text that the chat template of a checkpoint makes of them.

A template is a program of the model's author. It runs as in transformers, in a sandbox of jinja,
but in a process of its own with bounds (:mod:`assay.models.templates`), and without a clock or
chance, so that a validator renders the text of yesterday's request again; a date is set by
``chat_template_kwargs``.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Field, Json, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.models.template_process import LONGEST_TEXT, TEMPLATE_PROCESS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_OPTIONS = ("tools", "chat_template_kwargs")
"""Fields beside messages: JSON schemas of tools, and values for the template, as TRL and vLLM have.
"""

_RESERVED = {
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "tools",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
"""What transformers takes for itself, or assay sets: never among the values for a template."""


class _Function(TypedDict):
    name: str
    # Clients send the JSON of the object that templates take.
    arguments: Json[dict[str, Any]] | dict[str, Any]


class _Call(TypedDict):
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: _Function


class _Message(TypedDict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[Annotated[list[_Call], Field(fail_fast=True)]]
    tool_call_id: NotRequired[str]


def _plain(message: Any) -> Any:
    """Return a message without the nulls and empty lists that a client's library adds."""
    if not isinstance(message, dict):
        return message
    fields = {name: value for name, value in message.items() if value not in (None, [])}
    # A message with calls may have no content.
    return {"content": ""} | fields if "tool_calls" in fields else fields


@with_config(extra="forbid", strict=True)  # which holds for the parts too
class _Fields(TypedDict):
    messages: Annotated[
        list[Annotated[_Message, BeforeValidator(_plain)]],
        Field(fail_fast=True, min_length=1, max_length=2**12),
    ]
    tools: NotRequired[Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1)]]
    chat_template_kwargs: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Chat:
    """Messages and options of their template as JSON. Make one with :func:`read_chat`."""

    json: str

    @property
    def fields(self) -> dict[str, Any]:
        """The object: ``messages``, and those of :data:`CHAT_OPTIONS` that there are."""
        return dict(json.loads(self.json))


def read_chat(messages: Any, *, is_answer: bool = False, **options: Any) -> Chat:
    """Check messages that ask for an answer, or with ``is_answer`` the one message of an answer.

    Args:
        messages: List of mappings with ``role`` and ``content``, both text, and of tools
            ``tool_calls``, ``tool_call_id`` and ``name`` as OpenAI's clients have them.
        is_answer: Whether this is a completion.
        options: Those of :data:`CHAT_OPTIONS` that are given.

    Raises:
        UsageError: A value has another form or is too large, or the last message has the wrong
            role.
    """
    try:
        fields = TypeAdapter(_Fields).validate_python({"messages": messages, **_plain(options)})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, of {first['input']!r:.80}",
            wanted="messages with a role and a content of text; perhaps tools and "
            "chat_template_kwargs",
            do="correct the messages; images and other parts are not read",
        ) from None
    text = dumps(fields)
    last_role = fields["messages"][-1]["role"]
    roles = ("assistant",) if is_answer else ("user", "tool")
    if last_role not in roles or (is_answer and len(fields["messages"]) > 1):
        raise UsageError(
            f"messages that end by {last_role}",
            wanted="one message by assistant" if is_answer else "messages that end by user or tool",
            do="correct the messages",
            field="messages",
        )
    if len(text) > LONGEST_TEXT:
        raise UsageError(
            f"messages of {len(text)} characters",
            wanted=f"at most {LONGEST_TEXT}",
            do="shorten them",
            field="messages",
        )
    return Chat(text)


def chat_template_digest(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Return the SHA-256 in hex of a chat template, or of several as JSON; empty for none."""
    template: Any = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    text = template if isinstance(template, str) else dumps(dict(sorted(template.items())))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def render_chat(
    chat: Chat,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    answer: Chat | None = None,
    reference: str = "a model",
) -> str:
    """Return the text of messages up to the answer, or the text of an ``answer`` after them.

    The text has all special tokens: a tokenizer must add none (``add_special_tokens=False``).

    Raises:
        UsageError: There is no template, which names the ``reference`` of the model; or it refuses
            the messages, does not use the tools, or gives too much text.
    """
    if not chat_template_digest(tokenizer):
        raise UsageError(
            f"messages for {reference} without a chat template",
            wanted="a chat_template.jinja, or a chat_template in tokenizer_config.json, beside the "
            "weights",
            do="take the Instruct or chat model of this kind, or write the prompt as text",
        )
    fields = chat.fields
    name = f"the chat template of {reference}"
    prompt = _render(tokenizer, name, fields, add_generation_prompt=True)
    # A template that ignores tools would let a client believe that the model saw them.
    without_tools = fields | {"tools": None}
    if "tools" in fields and prompt == _render(
        tokenizer, name, without_tools, add_generation_prompt=True
    ):
        raise UsageError(
            "tools, which the chat template does not use",
            wanted="no tools",
            do="leave tools out",
            field="tools",
        )
    if answer is None:
        _check_calls(tokenizer, name, fields, prompt, add_generation_prompt=True)
        return prompt
    (message,) = answer.fields["messages"]
    fields["messages"].append(message)
    conversation = _render(tokenizer, name, fields, add_generation_prompt=False)
    _check_calls(tokenizer, name, fields, conversation, add_generation_prompt=False)
    # Templates may take spaces from the beginning, which are indentation, or drop reasoning.
    content = message["content"].strip("\n").rstrip()
    if not conversation.startswith(prompt) or content not in conversation[len(prompt) :]:
        raise UsageError(
            "a completion that the chat template changes, or after which it renders the prompt in "
            "another way",
            wanted="a prompt and a completion that stay the same",
            do="write the completion as text",
        )
    return conversation.removeprefix(prompt)


def _check_calls(
    tokenizer: Any, name: str, fields: dict[str, Any], text: str, *, add_generation_prompt: bool
) -> None:
    """Refuse messages with tool calls that a template leaves out of the text.

    The first and the last of each shape are tried: a rendering for each message would take a time
    that grows with the square of their number.
    """
    shapes: dict[tuple[str, bool, bool], list[int]] = {}
    for number, message in enumerate(fields["messages"]):
        if calls := message.get("tool_calls"):
            shape = message["role"], bool(message["content"]), len(calls) > 1
            shapes.setdefault(shape, []).append(number)
    for number in sorted(
        {place for places in shapes.values() for place in places[:1] + places[-1:]}
    ):
        message = fields["messages"][number]
        plain = {field: value for field, value in message.items() if field != "tool_calls"}
        messages = [*fields["messages"][:number], plain, *fields["messages"][number + 1 :]]
        try:
            without_calls = _render(
                tokenizer,
                name,
                fields | {"messages": messages},
                add_generation_prompt=add_generation_prompt,
            )
        except UsageError:  # it misses them, so it uses them
            continue
        if without_calls == text:
            raise UsageError(
                f"tool calls of message {number}, which the chat template does not use",
                wanted="no tool calls",
                do="write them into the content, or take a model for tools",
                field="messages",
            )


def _render(
    tokenizer: Any, name: str, fields: dict[str, Any], *, add_generation_prompt: bool
) -> str:
    options = fields.get("chat_template_kwargs") or {}
    if reserved := sorted(_RESERVED & options.keys()):
        raise UsageError(
            f"chat_template_kwargs with {reserved[0]!r}",
            wanted="values for the template only",
            do="leave it out of chat_template_kwargs",
            field="chat_template_kwargs",
        )
    tools = fields.get("tools")
    values = {
        **tokenizer.special_tokens_map,
        "documents": None,
        **options,
        "messages": fields["messages"],
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
    }
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # several, and none is the default
        reason = f"ValueError: {error}"
    else:
        answer = TEMPLATE_PROCESS.ask(name, dumps([template, values]).encode())
        if answer.startswith(b"+"):
            return answer[1:].decode()
        reason = answer[1:].decode()
    raise UsageError(
        f"messages that {name} refuses: {reason:.200}",
        wanted="roles and contents in an order that it takes; it has no clock and no chance",
        do="correct the messages; set what the template needs, such as a date, in "
        "chat_template_kwargs",
    )
