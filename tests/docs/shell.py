"""Blocks of pages as scripts, and a shell for them with the commands of this environment and one
thread.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.end_to_end.server import free_port

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import page_blocks  # noqa: E402

FOLDERS = ("docs", "research/pages", "tests/docs")
"""Where pages are: for users, of studies, and the list of what no test runs."""

PAGES = {path.stem: path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))}
PORTS = ("8100", "8081", "8082", "8090")
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
"""Variables of scripts: those of now, for torch sets some that no reader has when tests import it.
"""
ROW = re.compile(r"^\| \[([\w-]+)\]\(\S+\) \| (`.+?) \| (.+?) \| (.*?) ?\|$", re.MULTILINE)
SHELL = """\
assay() {
  local port=
  case "$*" in
    *--help*) ;;
    "poc serve"*) port=$PORT_8100;;
    "poc validator"*) port=$PORT_8090;;
  esac
  if [ -n "$port" ]; then set -- "$@" --port "$port"; fi
  case "$*" in %s "") ;; esac
  if [ $BASHPID != $$ ]; then exec $AHEAD assay "$@"; fi
  case "$*" in
    "poc serve"* | "poc validator"*)
      command $AHEAD assay "$@" & local server=$!
      until curl --silent --fail "http://127.0.0.1:$port/ready"; do kill -0 $server; sleep 0.5; done
      kill $server && wait $server;;
    *) command $AHEAD assay "$@";;
  esac
}
python() {
  case "$*" in %s "") ;; esac
  command $AHEAD python "$@"
}
torchrun() {
  case "$*" in %s "") ;; esac
  command torchrun "$@"
}
pip() { :; }
"""
"""Commands with further flags after their own, which make their work small. A server that a page
starts in the foreground is ended once it is ready, and must end with 0. What pages install is what
the tests run with."""
ahead = ""
"""Words ahead of a program of Python: none for a fresh interpreter, or those of `fork_server`."""


@cache
def not_run() -> dict[str, dict[str, tuple[str, str]]]:
    """Return the lines that blocks.md lists, by page: what they begin with, and why they do
    not run, or what does instead."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name, begins, why, instead in ROW.findall(page("blocks")):
        for words in re.findall(r"`(.+?)`", begins):
            found.setdefault(name, {})[words] = (why, instead)
    return found


def run(text: str, place: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a folder, and return what became of it."""
    command = ["bash", "-c", text]
    return subprocess.run(
        command, cwd=place, env=ENVIRONMENT | variables, capture_output=True, text=True, check=False
    )


@contextmanager
def fork_server() -> Iterator[tuple[str, ...]]:
    """Run a server that forks programs of Python, which warm.py describes.

    Yields the words that stand ahead of ``python`` or ``assay`` to have it fork one: none where
    there are no forks. They do so with the variables of `ENVIRONMENT`.
    """
    if not hasattr(os, "pidfd_open"):
        yield ()
        return
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as listener:
        path = f"{place}/socket"
        listener.bind(path)
        listener.listen()
        known = {"python": sys.executable, "variables": ENVIRONMENT}
        Path(f"{path}.json").write_text(json.dumps(known), encoding="utf-8")
        program = str(Path(__file__).with_name("warm.py"))
        server = subprocess.Popen(
            [sys.executable, program, "serve", str(listener.fileno())],
            env=ENVIRONMENT, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield ("python", "-I", "-S", program, path)
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # and with it what a script left behind
            server.communicate()


def page(name: str) -> str:
    """Return the text of a page by its name; those of research and of tests lie beside them."""
    return PAGES[name].read_text(encoding="utf-8")


def script(
    name: str, *, before: str = "", instead: Mapping[str, str] = {}, small: Mapping[str, str] = {}
) -> str:
    """Return all blocks of a page, but for the lines that blocks.md lists, as a script after
    the lines ``before``.

    ``instead`` of its words others stand there, and ``small`` has flags that are added after
    beginnings of commands.
    """
    text = page_blocks.script(page(name), leave_out=tuple(not_run().get(name, ())))
    for word, other in instead.items():
        assert word in text, word
        text = text.replace(word, other)
    head = page_blocks.HEAD
    return head + shell(small) + before + text.removeprefix(head)


def shell(small: Mapping[str, str]) -> str:
    """Return the functions that stand in the place of commands."""
    cases: dict[str, str] = {"assay": "", "python": "", "torchrun": ""}
    for command, flags in small.items():
        program, _, arguments = command.partition(" ")
        cases[program] += f'"{arguments}"*) set -- "$@" {flags};;\n    '
    return SHELL % tuple(cases.values())


def held(text: str, place: Path) -> str:
    """Run a script on free ports, and return what it printed, which must have no refusal in it."""
    ports = {known: str(free_port()) for known in PORTS}
    for known, free in ports.items():
        text = text.replace(f"127.0.0.1:{known}", f"127.0.0.1:{free}").replace(
            f"--port {known}", f"--port {free}"
        )
    text = f"AHEAD={shlex.quote(ahead)}\n{text}"
    done = run(
        text, place, KEY="k" * 20, **{f"PORT_{known}": free for known, free in ports.items()}
    )
    assert done.returncode == 0, done.stderr
    assert '"wanted"' not in done.stdout
    return done.stdout
