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
IS_FORK = "import sys; print('transformers' in sys.modules)"


@pytest.fixture(scope="module", autouse=True)
def server(warm: None) -> None:
    """Every test here has one."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "seen.py").write_text(SEEN)
    (tmp_path / "linked.py").symlink_to("inside/seen.py")
    (tmp_path / "fork.py").write_text(IS_FORK)
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


def test_the_fault_of_a_program_is_told(place: Path):
    code, out, fault = forked("python -c 1/0", place)
    assert (code, out) == (1, "")
    assert fault.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", ["INT", "TERM", "HUP"])
def test_signals_reach_it(number: str, place: Path):
    (place / "wait.py").write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIG{number}, lambda *_: sys.exit(5))\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    text = (
        f"rm -f out; exec $AHEAD python wait.py >out & until grep -qs ready out; do :; done; kill -{number} $!; wait $!"
    )
    assert forked(text, place) == fresh(text, place) == (5, "", "")


def test_it_ends_when_the_one_that_waits_is_killed(place: Path):
    """Or the run would not return before the limit of this test: the fork has its standard error."""
    (place / "wait.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    text = "exec $AHEAD python wait.py >out & until grep -qs ready out; do :; done; kill -9 $!; wait $!"
    assert forked(text, place)[0] == 137


def test_it_draws_numbers_of_its_own(place: Path):
    line = "python -c 'import random, numpy; print(random.random(), numpy.random.random())'\n"
    assert len(set(forked(2 * line, place)[1].split())) == 4


def test_a_command_is_the_program_of_the_environment(place: Path):
    found = forked("assay --version; assay pox", place)
    assert found == fresh("assay --version; assay pox", place)
    assert found[0] == 2


@pytest.mark.parametrize(
    ("text", "is_fork"),
    [
        ("python fork.py", True),
        ("ASSAY_X=1 python fork.py", True),
        ("OMP_NUM_THREADS=2 python fork.py", False),
        ("HF_HOME=. python fork.py", False),
        ("mkdir other; ln -s /bin/true other/python; PATH=other:$PATH; python fork.py; echo False", False),
        ("python -W error fork.py", False),
        ("python -m fork", False),
        ("python fork.py 3</dev/null", False),
    ],
)
def test_what_only_a_fresh_interpreter_does_is_left_to_it(text: str, is_fork: bool, place: Path):
    assert forked(text, place) == (0, f"{is_fork}\n", "")


def test_it_is_a_fork_after_torch_has_set_variables(place: Path, monkeypatch: pytest.MonkeyPatch):
    """It sets TORCHINDUCTOR_CACHE_DIR when a test imports it, and a script must have the variables of a reader."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    assert forked("python fork.py", place)[1] == "True\n"
    assert fresh("echo ${TORCHINDUCTOR_CACHE_DIR-none}", place)[1] != f"{place}\n"
