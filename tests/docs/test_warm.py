"""A program that is forked for a page sees, does and tells what it would as a fresh interpreter."""

import json
import os
from pathlib import Path

import pytest

from tests.docs import shell

if not hasattr(os, "pidfd_open"):
    pytest.skip("forks are waited for by pidfd_open, which is of Linux", allow_module_level=True)

SEEN = """\
import json, os, signal, sys, threading
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
found = {
    "name": __name__, "file": globals().get("__file__"), "arguments": sys.argv, "path": sys.path,
    "names": sorted(set(globals()) - {"__annotations__", "__cached__"}),
    "main": vars(sys.modules["__main__"]) is globals(),
    "flags": list(sys.flags), "python": sys.executable, "folder": os.getcwd(), "umask": os.umask(0),
    "variables": dict(os.environ) | {"_": "", "TORCHINDUCTOR_CACHE_DIR": ""}, "input": sys.stdin.read(),
    "signals": [str(signal.getsignal(number)) for number in numbers], "threads": threading.active_count(),
    "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering], "assay": "assay" in sys.modules,
    "files": sorted(number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")),
}
print(json.dumps(found, sort_keys=True))
"""


@pytest.fixture(scope="module", autouse=True)
def server(warm: None) -> None:
    """Every test here has one."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "seen.py").write_text(SEEN)
    (tmp_path / "linked.py").symlink_to("inside/seen.py")
    return tmp_path


def told(text: str, place: Path, *, ahead: str) -> tuple[int, str, str]:
    """Run a script, and return its exit code and what it told."""
    done = shell.run(f"AHEAD='{ahead}'\n{shell.shell({})}{text}", place)
    return done.returncode, done.stdout, done.stderr


def forked(text: str, place: Path) -> tuple[int, str, str]:
    return told(text, place, ahead=shell.ahead)


def fresh(text: str, place: Path) -> tuple[int, str, str]:
    return told(text, place, ahead="")


@pytest.mark.parametrize(
    "text",
    [
        f"umask 027; cd inside; export ASSAY_SEEN=1; echo text | python -c '{SEEN.replace(chr(39), chr(34))}' a 'b c'",
        f"python - a <<'END'\n{SEEN}END\n",
        f"python <<'END'\n{SEEN}END\n",
        "trap '' INT HUP; echo text | python linked.py -c --flag",
        "cd inside; python seen.py </dev/null >out; cat out",
    ],
)
def test_a_fork_sees_what_a_fresh_interpreter_sees(text: str, place: Path):
    wanted = fresh(text, place)
    assert json.loads(wanted[1])["name"] == "__main__"
    assert forked(text, place) == wanted


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import atexit, sys; atexit.register(print, 1); print(2, end=str()); sys.exit(7)", 7),
        ("import sys; sys.exit(str(3))", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_it_ends_as_a_fresh_interpreter_ends(program: str, code: int, place: Path):
    text = f"python -c '{program}'; (exit $?)"
    found = forked(text, place)
    assert found == fresh(text, place)
    assert found[0] == code
