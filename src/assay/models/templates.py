"""The program that renders chat templates, in a process that a template without end may lose.

:mod:`assay.models.chat` starts this file as a program. It imports nothing of assay, so that it is
there in a tenth of a second. Its environment of jinja is that of transformers (the tests compare
their texts), but without a clock and without chance.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """The block that marks what the assistant says. Its text is that of what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> Any:
        return caller()


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _as_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    # They give another text to each who renders.
    del environment.filters["random"]
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _answer(request: bytes, longest: int) -> bytes:
    """Return ``+`` and the text of a template with its values, or ``-`` and what went wrong."""
    template, values = json.loads(request)
    try:
        text = _compiled(template).render(values)
        if not 0 < len(text) <= longest:
            raise ValueError(
                f"it makes {len(text)} characters of them, and 1 to {longest} are a prompt"
            )
        # An unpaired surrogate is no text.
        return b"+" + text.encode()
    except MemoryError:
        raise
    except Exception as error:  # what the author's program raises: of jinja, or of Python
        return f"-{type(error).__name__}: {error}"[:200].encode(errors="replace")


def main(descriptor: int, seconds: float, memory: int, longest: int) -> None:
    """Answer requests until the connection closes.

    What takes longer, or more memory, ends this process: no template can catch the timer of the
    kernel.
    """
    connection = Connection(descriptor)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(ValueError):  # a lower bound holds already
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    connection.send_bytes(b"+")
    with suppress(EOFError):
        while request := connection.recv_bytes():
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _answer(request, longest)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
