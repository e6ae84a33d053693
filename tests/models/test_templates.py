"""A chat template of a stranger costs one request: it is rendered in a process with bounds, as
transformers renders.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from assay.errors import ResourceError, UsageError
from assay.models import chat, read_chat, template_process
from assay.models.load import load_tokenizer
from assay.models.template_process import TEMPLATE_PROCESS
from tests.models.test_chat import TEMPLATE, USER, chat_tokenizer, rendered
from tests.wordings import refuses

NINES = "{% for b in range(99999) %}{% for a in range(99999) %}BODY{% endfor %}{% endfor %}"
NESTED = (
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
)
GROWING = (
    "{% set r = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set r.s = BODY %}{% endfor "
    "%}{{ r.s }}"
)
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
SLOW = [
    NINES,
    NINES.replace("BODY", "{{ ('a' * 999999 ~ 'b') in 'a' * 1999999 }}"),
    "{% for a in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
    "{% set x = namespace(n=3) %}{% for i in range(99) %}{% set x.n = x.n * x.n %}{% endfor %}",
    "{{ 7 ** 9999999 // 3 ** 4999999 }}",
    CALLS,
    "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18
    + "a"
    + "{% endcall %}" * 18,
    "{{ ('a ' * 999999) | wordwrap(1) }}",
    "{{ ('www.a.de ' * 999999) | urlize }}",
    "{{ 1" + "+1" * 99999 + " }}",
    NESTED + "{{ n.x | tojson }}",
    NESTED + "{{ n.x }}",
]
LARGE = [
    NINES.replace("BODY", "{{ messages | tojson(indent=99999) }}"),
    *(
        GROWING.replace("BODY", body)
        for body in (
            "r.s ~ r.s",
            "r.s + r.s",
            "[r.s, r.s] | join",
            "r.s.replace('a', 'aaaaaaaa')",
            "'%s%s' | format(r.s, r.s)",
        )
    ),
    *(
        f"{{{{ {body} }}}}"
        for body in (
            "'a' * 10**10",
            "[0] * 10**9",
            "('&' * 10**7) | escape",
            "'a' | center(10**9)",
            "'a'.zfill(10**9)",
            "('\\t' * 10**4).expandtabs(10**6)",
            "'%1000000000d' % 1",
            "'{:>1000000000}'.format(1)",
            "'%.1000000000f' % 1",
            "'a\\na' | indent(10**9)",
            "[[1]] | tojson(indent=10**9)",
            "('a' * 10**8) | list",
            "('a ' * 10**7).split()",
            "[1] | batch(10**9, 0) | list",
            "range(99999) | map('string') | map('center', 99999) | join",
        )
    ),
]


@pytest.mark.parametrize(
    ("template", "bound"),
    [
        pytest.param(template, bound, marks=[pytest.mark.slow] if number % 3 else [])
        for templates, bound in ((SLOW, {"CPU_SECONDS": 0.2}), (LARGE, {"MEMORY_BYTES": 2**27}))
        for number, template in enumerate(templates)
    ],
)
def test_a_template_without_end_is_refused_by_name_and_the_next_is_rendered(
    monkeypatch, template, bound
):
    TEMPLATE_PROCESS.end()
    ((name, value),) = bound.items()
    monkeypatch.setattr(template_process, name, value)
    with pytest.raises(
        UsageError, match=f"of a model, .* {'0.2 s' if name == 'CPU_SECONDS' else '128 MiB'}"
    ):
        rendered(template)
    assert rendered(TEMPLATE).endswith("<user>Hi;<assistant>")
    TEMPLATE_PROCESS.end()


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "[" * 9999 + "]" * 9999 + " }}",
        "{% if 1 %}" * 999 + "{% endif %}" * 999,
        "{{ 1" + "|string" * 9999 + " }}",
        "{{ range(10**9) | list }}",
        "{{ 10**99999 }}",
        "{{ '\\ud800' }}",
        "{% include '/dev/zero' %}",
        "{{ cycler.__init__.__globals__.os.abort() }}",
    ],
)
def test_a_template_that_fails_is_refused_by_what_it_raised(template):
    with refuses(UsageError, "a template that fails is refused by what it raised"):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{%- for m in messages %}\n {% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}\n{% "
        "endfor %}\n{{ a }} ",
        "{{ messages | tojson(indent=2) }} {{ tools | tojson }}{{ tools | "
        "tojson(ensure_ascii=True, sort_keys=True) }}",
        "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{{ n.i }}{% "
        "continue %}{% endfor %}",
        "{{ documents is none }}{{ tools is none }}{{ unk_token is defined }}{{ nothing }}{{ "
        "nothing is defined }}",
        "{{ documents[0].text }}{{ add_generation_prompt }}{{ 1.0 }}{{ 10**20 }}{{ x | "
        "default('é') }}{{ none }}",
        "{% if messages[0].role == 'a' %}{{ raise_exception('no') }}{% endif %}{{ "
        "messages[0].content | trim }}  \n\n",
        "{{ messages[0].content.split('i')[-1].strip() }}{{ '<b>' | e }}{{ messages | "
        "map(attribute='role') | list }}",
        "{# said #}{% macro m(x, y=2) -%} {{ x }}{{ y }} {%- endmacro %}{{ m(1) }}{{ 'a' ~ 1 }}{{ "
        "{'b': [1, none]} }}",
    ],
)
def test_texts_are_those_of_transformers(template):
    options = (
        {"tools": [{"name": "ü😀", "n": 1.5e-7}]}
        if "tools" in template and "none" not in template
        else {}
    )
    values = (
        {"chat_template_kwargs": {"documents": [{"text": "d", "title": ""}]}}
        if "documents[" in template
        else {}
    )
    tokenizer = chat_tokenizer(template)
    messages = [{"role": "user", "content": " Hi \u2028<é>\n"}]
    theirs = tokenizer.apply_chat_template(
        messages,
        **options,
        **values.get("chat_template_kwargs", {}),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat.render_chat(read_chat(messages, **options, **values), tokenizer) == theirs


@pytest.mark.parametrize("reference", ["reference:qwen3", "pretrained:smollm2"])
def test_texts_of_bundled_models_are_those_of_transformers(reference):
    tokenizer = load_tokenizer(reference)
    messages = [
        {"role": "system", "content": "Be."},
        *USER,
        {"role": "assistant", "content": "é"},
        *USER,
    ]
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.render_chat(read_chat(messages), tokenizer) == theirs


def test_threads_share_the_process_and_forks_interrupts_and_signals_never_mix_its_answers(
    monkeypatch,
):
    ask = [read_chat([{"role": "user", "content": f"{n}" * 99}]) for n in range(64)]
    tokenizer = chat_tokenizer("{{ messages[0].content }}")
    expected = [one.fields["messages"][0]["content"] for one in ask]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: chat.render_chat(one, tokenizer), ask)) == expected
    shared = TEMPLATE_PROCESS.process
    if (child := os.fork()) == 0:
        same = (
            chat.render_chat(ask[1], tokenizer) == expected[1]
            and TEMPLATE_PROCESS.process.pid != shared.pid
        )
        TEMPLATE_PROCESS.end()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert chat.render_chat(ask[2], tokenizer) == expected[2]
    assert TEMPLATE_PROCESS.process is shared

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TEMPLATE_PROCESS.connection, "poll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.render_chat(ask[3], tokenizer)
    assert shared.returncode == -signal.SIGKILL
    assert chat.render_chat(ask[4], tokenizer) == expected[4]
    own = TEMPLATE_PROCESS.process
    own.kill()  # as an operator or the kernel may, between two requests
    own.wait()
    assert chat.render_chat(ask[5], tokenizer) == expected[5]
    own = TEMPLATE_PROCESS.process
    TEMPLATE_PROCESS.connection.close()  # as where this process ends without a word
    assert own.wait(10) == 0
    TEMPLATE_PROCESS.end()


def test_no_process_is_an_error_of_the_machine_and_not_of_the_template(monkeypatch):
    TEMPLATE_PROCESS.end()
    for program in ("/bin/false", "/nothing"):
        monkeypatch.setattr(template_process.sys, "executable", program)
        with refuses(
            ResourceError, "no process is an error of the machine and not of the template"
        ):
            rendered(TEMPLATE)
