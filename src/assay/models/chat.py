"""Conversations as chat models take them: messages, which the chat template of a checkpoint turns
into text.

A template is a program of the model's author. It runs as in transformers, in a sandbox of jinja,
but in a process of its own with bounds (:mod:`assay.models.templates`), and without a clock, so
that a validator renders the text of yesterday's request again; a date is set by
``chat_template_kwargs``.
"""

import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Field, Json, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from assay.errors import ResourceError, UsageError
from assay.files.jsonl import dumps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TEXT = (
    2**24
)  # characters of a prompt, of messages with their tools, and of what a template makes of them


class _Function(TypedDict):
    name: str
    arguments: (
        Json[dict[str, Any]] | dict[str, Any]
    )  # clients send the JSON of the object that templates take


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
    """Return a message without what a client's library adds: nulls and empty lists, and no content
    beside calls.
    """
    if not isinstance(message, dict):
        return message
    said = {name: value for name, value in message.items() if value not in (None, [])}
    return {"content": ""} | said if "tool_calls" in said else said


@with_config(extra="forbid", strict=True)  # which holds for the parts too
class _Fields(TypedDict):
    messages: Annotated[
        list[Annotated[_Message, BeforeValidator(_plain)]], Field(min_length=1, max_length=2**12)
    ]
    tools: NotRequired[Annotated[list[dict[str, Any]], Field(min_length=1)]]
    chat_template_kwargs: NotRequired[dict[str, Any]]


CHAT_OPTIONS = ("tools", "chat_template_kwargs")
"""What a line may have beside messages: JSON schemas of tools, and values for the template, as in
TRL and vLLM.
"""


@dataclass(frozen=True)
class Chat:
    """Messages, and what else their template is given, as the JSON of one object. Make one with
    :func:`read_chat`.
    """

    json: str

    @property
    def fields(self) -> dict[str, Any]:
        """The object: ``messages``, and those of :data:`CHAT_OPTIONS` that there are."""
        return dict(json.loads(self.json))


def read_chat(messages: Any, *, is_answer: bool = False, **options: Any) -> Chat:
    """Return messages that ask for an answer, or with ``is_answer`` the one message that is it.

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
    last = fields["messages"][-1]["role"]
    if last not in (("assistant",) if is_answer else ("user", "tool")) or (
        is_answer and len(fields["messages"]) > 1
    ):
        wanted = "one message by assistant" if is_answer else "messages that end by user or tool"
        raise UsageError(f"messages that end by {last}", wanted=wanted, do="correct the messages")
    if len(text) > LONGEST_TEXT:
        raise UsageError(
            f"messages of {len(text)} characters",
            wanted=f"at most {LONGEST_TEXT}",
            do="shorten them",
        )
    return Chat(text)


def chat_template_digest(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Return the SHA-256 in hex of a chat template, of several that of their texts by name in JSON;
    empty for none.
    """
    template: Any = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else dumps(dict(sorted(template.items())))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() if text else ""


def render_chat(
    chat: Chat,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    answer: Chat | None = None,
    reference: str = "a model",
) -> str:
    """Return the text of messages, up to where the answer begins; or the text of an ``answer`` that
    follows them.

    The text has all special tokens: a tokenizer must add none (``add_special_tokens=False``).

    Raises:
        UsageError: There is no template, which names the ``reference`` of the model; or it refuses
            the messages, does not use the tools, or gives too much text.
    """
    if not chat_template_digest(tokenizer):
        wanted = (
            "a chat_template.jinja, or a chat_template in tokenizer_config.json, beside the weights"
        )
        do = "take the Instruct or chat model of this kind, or write the prompt as text"
        raise UsageError(f"messages for {reference} without a chat template", wanted=wanted, do=do)
    fields = chat.fields
    name = f"the chat template of {reference}"
    text = _rendered(tokenizer, name, **fields, add_generation_prompt=True)
    if "tools" in fields and text == _rendered(
        tokenizer, name, **fields | {"tools": None}, add_generation_prompt=True
    ):
        raise UsageError(
            "tools, which the chat template does not use", wanted="no tools", do="leave tools out"
        )
    if answer is None:
        return text
    fields["messages"] += answer.fields["messages"]
    whole = _rendered(tokenizer, name, **fields, add_generation_prompt=False)
    if not whole.startswith(text):
        seen = "a completion after which the chat template renders the prompt in another way"
        raise UsageError(
            seen, wanted="a prompt that stays the same", do="write the completion as text"
        )
    return whole.removeprefix(text)


_TAKEN = {
    *(
        "messages",
        "conversation",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    ),
    *(
        "tools",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    ),
    "tokenizer_kwargs",
}
"""What transformers takes for itself, or assay sets: never among the values for a template."""


def _rendered(
    tokenizer: Any, name: str, *, chat_template_kwargs: Any = None, tools: Any = None, **own: Any
) -> str:
    given = chat_template_kwargs or {}
    if taken := sorted(_TAKEN & given.keys()):
        do = "leave it out of chat_template_kwargs"
        raise UsageError(
            f"chat_template_kwargs with {taken[0]!r}", wanted="values for the template only", do=do
        )
    values = {**tokenizer.special_tokens_map, "documents": None, **given, **own, "tools": tools}
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # several, and none is the default
        refused = f"ValueError: {error}"
    else:
        answer = _TEMPLATES.ask(name, dumps([template, values]).encode())
        if answer.startswith(b"+"):
            return answer[1:].decode()
        refused = answer[1:].decode()
    wanted = "roles and contents in an order that it takes; it has no clock"
    do = (
        "correct the messages; set what the template needs, such as a date, in chat_template_kwargs"
    )
    raise UsageError(f"messages that {name} refuses: {refused:.200}", wanted=wanted, do=do)


_SECONDS = 2
_MEMORY = 2**29
"""What one text may take: time of a processor, so that a busy machine refuses nothing, and bytes of
address space.
"""
_PATIENCE = 60  # seconds of the wall, after which something else is wrong


class _Templates:
    """The process that renders: started when it is first asked, ended with this one and by whatever
    goes wrong.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, name: str, request: bytes) -> bytes:
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                self._connection.send_bytes(request)
                if not self._connection.poll(_PATIENCE):
                    raise TimeoutError
                return self._connection.recv_bytes(4 * LONGEST_TEXT + 1)
            except (EOFError, OSError) as error:
                late = self.end() == -signal.SIGPROF or isinstance(error, TimeoutError)
            except BaseException:  # else what it answers is taken for an answer to the next
                self.end()
                raise
        most = f"{_SECONDS} s" if late else f"{_MEMORY >> 20} MiB, or ends the process that renders"
        wanted = "a template that writes messages one after another"
        do = "take the template of a publisher whom you trust, or write the prompt as text"
        raise UsageError(
            f"{name}, which takes more for these messages than {most}", wanted=wanted, do=do
        )

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        bounds = (theirs.fileno(), _SECONDS, _MEMORY, LONGEST_TEXT)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-S",
                        str(Path(__file__).with_name("templates.py")),
                        *map(str, bounds),
                    ],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            seen = (
                f"no process that renders chat templates: {type(error).__name__} {error}, ended "
                f"with {self.end()}"
            )
            raise ResourceError(
                seen, wanted="Python with jinja2", do="install assay again"
            ) from None

    def end(self) -> int | None:
        """End the process, and return what ended it."""
        if self._process is None:
            return None
        self._connection.close()
        self._process.kill()
        ended = self._process.wait()
        self._process = None
        return ended

    def forget(self) -> None:
        """Leave the process to the one that this one is a fork of."""
        if self._process is not None:
            self._process.returncode = 0  # it is not waited for here
        self.__init__()  # type: ignore[misc]


_TEMPLATES = _Templates()
atexit.register(_TEMPLATES.end)
os.register_at_fork(after_in_child=_TEMPLATES.forget)
