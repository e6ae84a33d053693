"""Messages become text by the template of a checkpoint, or are refused."""

import json
import shutil

import pytest
from tokenizers.processors import TemplateProcessing

from assay.errors import ModelError, UsageError
from assay.models import Chat, load_model, read_chat
from assay.models.chat import render_chat
from assay.models.load import identify
from assay.models.template_process import LONGEST_TEXT, TEMPLATE_PROCESS
from assay.models.tokenizer_files import read_tokenizer
from tests.vhack.conftest import bytewise
from tests.wordings import refuses

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Hello"}]


def chat_tokenizer(template: str):
    """A tokenizer of bytes that begins a text with a token of its own, as the template does."""
    tokenizer = bytewise(bos_token="<s>", eos_token="</s>")
    processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = template
    return tokenizer


def rendered(template: str, messages=USER, answer: Chat | None = None, **options: object) -> str:
    return render_chat(read_chat(messages, **options), chat_tokenizer(template), answer=answer)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([1] * 9, {}),
        ([USER[0] | {"tool_calls": [1] * 9}], {}),
        (USER, {"tools": [1] * 9}),
    ],
)
def test_of_a_list_of_wrong_values_the_first_is_looked_at(messages, options):
    with pytest.raises(UsageError) as caught:
        read_chat(messages, **options)
    assert caught.value.__context__.error_count() == 1


def test_messages_end_where_the_answer_begins_and_know_no_date():
    assert rendered(TEMPLATE).endswith("<user>Hi;<assistant>")
    assert rendered(TEMPLATE, answer=read_chat(ANSWER, is_answer=True)) == "Hello;"
    assert '{"name": "f"}' in rendered(TEMPLATE, tools=[{"name": "f"}])
    assert rendered("{{ date_string }}", chat_template_kwargs={"date_string": "May"}) == "May"
    assert (
        rendered(
            "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}"
        )
        == "2024"
    )


CALLS = (
    "{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments.a }}{% endfor %};{% endfor %}"
)


def called(arguments: object, **more: object) -> list[dict[str, object]]:
    """A conversation that goes on after a tool was called."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    return [*USER, said, {"role": "tool", "tool_call_id": "c", "content": "4"}]


def test_calls_of_tools_are_read_as_clients_and_as_trl_have_them():
    """Clients write arguments as text, and add fields that are null or empty."""
    for messages in (called('{"a": 3}', refusal=None, annotations=[]), called({"a": 3})):
        assert rendered(CALLS, messages, tools=[]) == "Hi;3;4;"


def test_the_calls_of_a_long_conversation_are_few_renderings(monkeypatch):
    """The prompt, and the first and the last message with calls left out of it."""
    texts = []
    ask = TEMPLATE_PROCESS.ask

    def counted(name, request):
        texts.append(request)
        return ask(name, request)

    monkeypatch.setattr(TEMPLATE_PROCESS, "ask", counted)
    rendered(CALLS, called({"a": 3}) * 9, tools=[])
    assert len(texts) == 3


TRIMMED = TEMPLATE.replace("message.content", "message.content | trim")
FORGETS = TEMPLATE.replace("message.content", "message.content.split('</think>')[-1]")


@pytest.mark.parametrize(
    ("template", "content"),
    [(TRIMMED, "    return x"), (FORGETS, "<think>so</think>Yes"), (TEMPLATE, "    return x")],
)
def test_a_completion_that_a_template_changes_is_refused(template, content):
    """Spaces at its beginning are indentation; line ends around it are of no use."""
    answer = read_chat([{"role": "assistant", "content": content}], is_answer=True)
    if template == TEMPLATE:
        assert rendered(template, answer=answer) == f"{content};"
        return
    with refuses(UsageError, "a completion that a template changes is refused"):
        rendered(template, answer=answer)
    lines = read_chat([{"role": "assistant", "content": "\nYes\n"}], is_answer=True)
    assert "Yes" in rendered(template, answer=lines)


@pytest.mark.parametrize(
    ("template", "match", "options"),
    [
        ("", "without a chat template", {}),
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses: TemplateError: roles must alternate",
            {},
        ),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined", {}),
        ("{{ 'ab' | random }}", "No filter named 'random'", {}),
        ("{{ lipsum() }}", "'lipsum' is undefined", {}),
        ("{{ messages.__class__.__mro__ }}", "SecurityError", {}),
        (f"{{{{ 'a' * {LONGEST_TEXT + 1} }}}}", "makes 16777217 characters", {}),
        ("hi", "does not use", {"tools": [{"name": "f"}]}),
        (
            TEMPLATE,
            "chat_template_kwargs with 'chat_template'",
            {"chat_template_kwargs": {"chat_template": ""}},
        ),
        (
            "{{ messages | length }}",
            "in another way",
            {"answer": read_chat(ANSWER, is_answer=True)},
        ),
        (CALLS, "arguments.*valid dictionary", {"messages": called("[3]")}),
        (TEMPLATE, "tool calls of message 1", {"messages": called({"a": 3})}),
        (
            TEMPLATE,
            "tool calls of message 1",
            {"answer": read_chat([called({"a": 3})[1]], is_answer=True)},
        ),
        (
            TEMPLATE,
            "messages.0.reasoning_content",
            {"messages": [USER[0] | {"reasoning_content": "so"}]},
        ),
        (
            TEMPLATE,
            "messages.0.content: Field required",
            {"messages": [{"role": "user", "content": None}]},
        ),
        (TEMPLATE, "messages: List should have at least 1", {"messages": []}),
        (
            TEMPLATE,
            "0.content: Input should be a valid string",
            {"messages": [{"role": "user", "content": [{}]}]},
        ),
        (TEMPLATE, "end by assistant", {"messages": USER + ANSWER}),
        (
            TEMPLATE,
            "messages of 1677\\d{4} characters",
            {"messages": [USER[0] | {"content": "a" * LONGEST_TEXT}]},
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused(template, match, options):
    with pytest.raises(UsageError, match=match):
        rendered(template, **options)


def test_a_checkpoint_that_transformers_does_not_load_has_its_generation_config(
    small_checkpoint, tmp_path
):
    path = shutil.copytree(small_checkpoint, tmp_path / "model")
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    for made in (
        identify(path, dtype="float32"),
        load_model(path, weights="random-all", block_hash="B", device="cpu"),
    ):
        assert made.end_tokens == {5, 7}


@pytest.mark.parametrize("text", ["[]", '{"a": ' * 5000 + "1" + "}" * 5000])
def test_a_generation_config_that_cannot_be_read_is_left_out(text, small_checkpoint, tmp_path):
    path = shutil.copytree(small_checkpoint, tmp_path / "model")
    (path / "generation_config.json").write_text(text)
    assert identify(path, dtype="float32").end_tokens == frozenset()


@pytest.mark.parametrize("tokens", [[[1]], "x", 1.5, -1, True])
def test_ends_that_are_no_tokens_are_refused(tokens, small_checkpoint, tmp_path):
    path = shutil.copytree(small_checkpoint, tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))
    with refuses(ModelError, "ends that are no tokens are refused"):
        identify(path, dtype="float32")


def test_a_template_is_bounded_before_it_is_read(tmp_path):
    chat_tokenizer(TEMPLATE).save_pretrained(tmp_path)
    with (tmp_path / "chat_template.jinja").open("r+b") as file:
        file.truncate(2**28)
    with refuses(ModelError, "a template is bounded before it is read"):
        read_tokenizer(tmp_path)


def test_end_tokens_are_those_of_the_generation_config_and_of_the_tokenizer(small_model):
    model = load_model("reference:qwen3", device="cpu")
    model.tokenizer.eos_token = "a"
    ended = model.tokenizer.eos_token_id
    model.module.generation_config.eos_token_id = [5, 7]
    assert model.end_tokens == {5, 7, ended}
    model.module.generation_config.eos_token_id = None
    assert model.end_tokens == {model.module.config.eos_token_id, ended}
    assert small_model.end_tokens == frozenset()
