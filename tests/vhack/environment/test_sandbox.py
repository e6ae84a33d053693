import json
import socket
import tempfile
import time
from pathlib import Path

import pytest

from assay.errors import BackendUnavailable, UsageError
from assay.vhack.environment import Call, Limits, run, sandbox

every_backend = pytest.mark.parametrize(
    "shut_in", ["bwrap", "bwrap once", "unsandboxed"], indirect=True
)


def started(program, **options):
    return run(program, allow_unsandboxed=True, **options)


@every_backend
def test_it_runs_a_program_and_answers_questions(shut_in):
    program = (
        "import sys\ndef solve(x):\n    return [x, (x + 1, 'a')]\nsolve.valid = "
        "True\nprint(input())\nsys.exit(3)\n"
    )
    calls = [
        Call("solve", (4,)),
        Call("solve.valid"),
        Call("absent"),
        Call("solve", ()),
        Call("solve", (4,), equals=9),
    ]
    result = started(program, stdin="héllo\n", calls=calls)
    assert (result.returncode, result.stdout, result.finished, result.backend) == (
        3,
        "héllo\n",
        True,
        shut_in,
    )
    assert [(o.kind, o.value, o.name) for o in result.outcomes] == [
        ("value", [4, [5, "a"]], ""),
        ("value", True, ""),
        ("error", None, "KeyError"),
        ("error", None, "TypeError"),
        ("value", False, ""),
    ]


ENDS = {
    "exception": (
        "print('before')\n1 / 0\n",
        {},
        {"returncode": 1, "raised": "ZeroDivisionError", "finished": False},
    ),
    "no python": ("def broken(:\n", {}, {"returncode": 1, "raised": "SyntaxError"}),
    "left": ("import os\ndef solve():\n    os._exit(0)\n", {}, {"returncode": 0}),
    "endless": (
        "while True:\n    pass\n",
        {"seconds": 0.7},
        {"returncode": None, "timed_out": True},
    ),
    "closed pipes": (
        "import os, time\nos.closerange(1, 64)\ntime.sleep(60)\n",
        {"seconds": 0.7},
        {"returncode": None, "timed_out": True},
    ),
    **{
        stream: (
            f"import sys\nwhile True:\n    sys.{stream}.write('x' * 4096)\n",
            {"output_bytes": 10_000},
            {"overflowed": True, stream: "x" * 10_000},
        )
        for stream in ("stdout", "stderr")
    },
    "huge value": ("def solve():\n    return 'x' * 3_000_000\n", {}, {"overflowed": True}),
    "memory": (
        "hold = bytearray(2 << 30)\nprint('had it')\n",
        {"memory_mib": 256},
        {"raised": "MemoryError", "stdout": ""},
    ),
}


@every_backend
@pytest.mark.parametrize("name", ENDS)
def test_whatever_becomes_of_a_program_is_a_result_without_answers(shut_in, name):
    program, limits, said = ENDS[name]
    began = time.monotonic()
    result = started(program, calls=[Call("solve", ())], limits=Limits(**limits))
    assert {field: getattr(result, field) for field in said} == said
    assert [outcome.kind for outcome in result.outcomes] == ["none"]
    assert ("ZeroDivisionError" in result.stderr) == (name == "exception")
    assert time.monotonic() - began < 30


@every_backend
def test_a_fork_bomb_starts_no_process(shut_in):
    program = (
        "import os, threading\n"
        "spawn, execute = lambda: os.posix_spawn('/bin/sh', ['sh'], {}), lambda: "
        "os.execv('/bin/sh', ['sh'])\n"
        "for start in (os.fork, spawn, execute):\n"
        "    try:\n        start()\n        print('started')\n"
        "    except OSError as error:\n        print(type(error).__name__)\n"
        "try:\n    threading.Thread(target=print).start()\n    print('started')\n"
        "except RuntimeError:\n    print('RuntimeError')\n"
    )
    assert started(program).stdout.split() == ["PermissionError"] * 3 + ["RuntimeError"]


@every_backend
def test_there_is_no_network(shut_in):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), "
            f"2)\nprint('connected')\n"
        )
        result = started(program)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert result.raised == "PermissionError"


@every_backend
def test_the_environment_of_the_parent_does_not_reach_it(shut_in, monkeypatch):
    monkeypatch.setenv("ASSAY_SECRET", "s3cr3t-value")
    program = "import os\nprint(dict(os.environ))\nprint(open('/proc/self/environ').read())\n"
    assert "s3cr3t-value" not in started(program).stdout


@pytest.mark.parametrize("shut_in", ["bwrap", "bwrap once"], indirect=True)
def test_its_directory_is_small_and_leaves_nothing_behind(shut_in, tmp_path, monkeypatch):
    program = (
        "open('result.txt', 'w').write('PASS')\n"
        "try:\n    for i in range(40):\n        open(f'f{i}', 'wb').write(b'x' * (1 << 20))\n     "
        "   print(i)\n"
        "except OSError:\n    print('full')\n"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = started(program, files=["result.txt", "absent"], limits=Limits(disk_mib=4))
    assert result.files == {"result.txt": "PASS"}
    assert result.stdout.split()[-1] == "full"
    assert len(result.stdout.split()) <= 5
    assert not list(tmp_path.iterdir())
    assert not [path for folder in ("/tmp", "/mnt") for path in Path(folder).glob("result.txt")]
    assert not list(Path("/mnt").glob("work"))


def test_writing_on_the_report_descriptor_without_the_nonce_answers_nothing():
    forged = {
        "nonce": "00",
        "finished": True,
        "raised": "",
        "files": {},
        "outcomes": [{"kind": "value", "value": 7}],
    }
    program = (
        f"import os\nline = {json.dumps(forged).encode()!r}\nfor fd in range(3, 64):\n"
        "    try:\n        os.write(fd, line)\n    except OSError:\n        pass\nos._exit(0)\n"
    )
    assert run(program, calls=[Call("solve", (1,))]).outcomes[0].kind == "none"


def test_values_are_those_of_the_builtin_type_whatever_is_overridden():
    program = (
        "class Sly(int):\n    def __eq__(self, other):\n        return True\n"
        "    def __int__(self):\n        return 99\n"
        "class Odd:\n    pass\n"
        "def sly():\n    return Sly(5)\ndef odd():\n    return Odd()\n"
        "def loop():\n    x = []\n    x.append(x)\n    return x\n"
        "def nan():\n    return float('nan')\n"
    )
    result = run(program, calls=[Call("sly", ()), Call("odd", ()), Call("loop", ())])
    assert [(o.kind, o.value, o.name) for o in result.outcomes] == [
        ("value", 5, ""),
        ("opaque", None, "Odd"),
        ("opaque", None, "list"),
    ]
    assert run(program, calls=[Call("nan", ())]).outcomes[0].kind == "opaque"


def test_a_run_without_a_sandbox_is_refused_unless_allowed(monkeypatch):
    """Where bubblewrap is not installed."""
    known = (sandbox.unusable, sandbox.working)
    monkeypatch.setattr(sandbox, "_bwrap", lambda disk_mib: ["assay-no-such-command"])
    for each in known:
        each.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match="bubblewrap does not work"):
            run("print(1)")
        assert run("print(1)", allow_unsandboxed=True).backend == "unsandboxed"
    finally:
        for each in known:
            each.cache_clear()


def test_limits_must_be_positive():
    with pytest.raises(UsageError, match="positive"):
        run("print(1)", limits=Limits(seconds=0))
