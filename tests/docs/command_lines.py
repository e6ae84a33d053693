"""The command lines that pages show, and a reading of each by the program that it starts, which
stops before its work.

``python -m tests.docs.command_lines`` reads lines as JSON and prints what their programs say of
those that they refuse. It is a process of its own because programs for a GPU import triton, in
whose place there may be nothing.
"""

import argparse
import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from assay.cli import run
from assay.framework.commands import Command
from assay.framework.setting import Setting

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S* )+")
TORCHRUN = re.compile(r"^torchrun (?:--nproc-per-node \d+ |--no-python )+(-m )?")
ENDS = (">", "|", "&", "&&", ";", "||")
VARIABLES = {"$DIGEST": "0" * 64, "SHA256": "0" * 64, "$SECRET": f"whsec_{'A' * 32}"}
"""Words that stand for values, some of them set by the shell in lines before, and values that are
read as well.
"""
TRITON = ("triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor")


class _Read(BaseException):
    """A program has read its command line."""


def shown(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of assay and every program of the checkout in the blocks of
    a page.
    """
    for kind, block in FENCED.findall(text):
        for line in ("" if kind not in ("", "sh") else block).replace("\\\n", " ").splitlines():
            command = TORCHRUN.sub(
                lambda found: "" if found[1] else "python ", ENVIRONMENT.sub("", line.strip())
            )
            if command.startswith(("assay ", "python research/", "python scripts/")):
                words = [VARIABLES.get(word, word) for word in shlex.split(command, comments=True)]
                ends = (place for place, word in enumerate(words) if word in ENDS)
                yield words[: next(ends, None)]


def refused(lines: Sequence[Sequence[str]], folder: Path) -> dict[str, str]:
    """Return what programs say of lines that they refuse, in a folder with the files needed."""
    command = [sys.executable, "-m", "tests.docs.command_lines"]
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}:{ROOT / 'research' / 'src'}",
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
    }
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        input=json.dumps(lines),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _with_new_output(words: list[str]) -> list[str]:
    """Return a line whose output is a new file beside it: the real one may be there, or in a folder
    yet to be made.
    """
    before = ("-o", "--output")
    return [
        f"new-{Path(word).name}" if words[0] == "assay" and words[place - 1] in before else word
        for place, word in enumerate(words)
    ]


def _refusal(words: list[str]) -> str:
    """Have a line read by its program; return what it said if it did not take it, else nothing."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code: object = (
                run(_with_new_output(words)[1:]) if words[0] == "assay" else _start(words[1:])
            )
        except _Read:
            return ""
        except SystemExit as end:
            code = end.code
    return f"exit code {code}: {said.getvalue()}"


def _start(arguments: Sequence[str]) -> None:
    """Run a program of the checkout as ``python`` does."""
    with mock.patch.object(sys, "argv", list(arguments)):
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def _stop(*_: object, **__: object) -> NoReturn:
    raise _Read


def _invoke(command: Command, context: Any) -> Any:
    """Take the place of ``Command.invoke``: make the settings of a command, and stop where it would
    read or work.
    """
    stopped = mock.patch.object(command, "function", functools.wraps(command.function)(_stop))
    with (
        stopped,
        mock.patch.object(Setting, "check_files"),
        mock.patch("assay.framework.commands.check_device"),
    ):
        return _INVOKE(command, context)


_INVOKE = Command.invoke
_PARSE = argparse.ArgumentParser.parse_args


def _parse(parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
    _PARSE(parser, *arguments)
    raise _Read


def main() -> None:
    """Read lines from stdin, and print those that are refused."""
    sys.path.insert(0, str(ROOT / "research" / "benchmarks"))
    if find_spec("triton") is None:
        import_module("transformers.models.auto.modeling_auto")  # it asks whether there is triton
        sys.modules.update({name: mock.MagicMock() for name in TRITON})
    with (
        mock.patch.object(Command, "invoke", _invoke),
        mock.patch.object(argparse.ArgumentParser, "parse_args", _parse),
        # A benchmark that hands its flags on to another:
        mock.patch.object(subprocess, "Popen", lambda command, **_: _start(command[1:])),
    ):
        said = {shlex.join(words): _refusal(words) for words in json.load(sys.stdin)}
    print(json.dumps({line: text for line, text in said.items() if text}))


if __name__ == "__main__":
    main()
