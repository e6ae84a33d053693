import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pytest

from assay.errors import BackendUnavailable, UsageError
from assay.vhack.environment import Call, Limits, backends, bubblewrap, confinement, run
from tests.wordings import refuses

every_backend = pytest.mark.parametrize(
    "shut_in", ["bwrap", "bwrap once", "landlock", "landlock once", "unsandboxed"], indirect=True
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
def test_event_loops_and_executors_work_in_one_thread(shut_in):
    program = (
        "import asyncio, concurrent.futures\nasync def work(x):\n    await asyncio.sleep(0.001)\n"
        "    return await asyncio.to_thread(int, x)\n"
        "def solve(x):\n    with concurrent.futures.ThreadPoolExecutor() as pool:\n"
        "        return [asyncio.run(work(x)), *pool.map(abs, [-x])]\n"
        "def fail():\n    import threading\n    threading.Thread(target=print).start()\n"
    )
    result = started(program, calls=[Call("solve", (4,)), Call("fail", ())])
    assert [(o.kind, o.value) for o in result.outcomes] == [("value", [4, 4]), ("error", None)]
    assert result.outcomes[1].name == "ThreadsForbidden"
    assert result.stderr == ""


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


FILLS = {
    "bytes": "open(f'f{i}', 'wb').write(b'x' * (1 << 20))",
    "a hole": "open(f'f{i}', 'wb').truncate(5 << 20)",
    "files": "open(f'f{i}', 'w').close()",
    "folders": "os.mkdir('d', 0o300)\n    os.chdir('d')",
    "links": "os.symlink('x', f'f{i}')",
    "deleted files": (
        "open_files = globals().get('open_files', [])\n    open_files.append(open('f', 'wb'))\n"
        "    open_files[-1].write(b'x' * (1 << 20))\n    os.unlink('f')"
    ),
    "an unreadable folder": "os.mkdir('d', 0)\n    time.sleep(600)",
}


@pytest.mark.parametrize("shut_in", ["landlock once"], indirect=True)
@pytest.mark.parametrize("fill", FILLS)
def test_a_directory_on_disk_is_bounded_and_leaves_nothing_behind(
    shut_in, fill, tmp_path, monkeypatch
):
    """It ends the job, where a directory in memory only refuses to grow."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = f"import os, time\nfor i in range(10**9):\n    {FILLS[fill]}\n"
    if fill == "a hole":  # the bound of one file
        assert started(program, limits=Limits(disk_mib=4)).raised == "OSError"
    elif fill == "an unreadable folder" and os.geteuid() == 0:
        limits = Limits(seconds=1.0)
        assert started(program, limits=limits).timed_out  # root reads it, and it is empty
    else:
        result = started(program, limits=Limits(disk_mib=4, seconds=60.0))
        assert result.overflowed
        assert result.returncode is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shut_in", ["landlock", "landlock once"], indirect=True)
def test_files_of_a_directory_on_disk_are_read_and_removed(shut_in):
    program = (
        "import os, shutil, tempfile\nopen('result.txt', 'w').write('PASS')\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    open(folder + '/x', 'w').write('y')\n"
        "    os.rename(folder + '/x', 'moved')\n"
        "shutil.copyfile('moved', 'copied')\nos.link('copied', 'linked')\nos.remove('moved')\n"
        "print(os.getcwd(), sorted(os.listdir('.')))\n"
    )
    result = started(program, files=["result.txt", "absent"])
    folder, _, names = result.stdout.partition(" ")
    assert result.files == {"result.txt": "PASS"}
    assert names == "['copied', 'linked', 'result.txt']\n"
    assert not Path(folder).exists()


@every_backend
def test_modules_of_the_standard_library_can_be_imported(shut_in):
    names = "asyncio collections csv decimal email sqlite3 ssl unittest xml.dom zoneinfo"
    program = "import importlib\nfor name in NAMES.split():\n    importlib.import_module(name)\n"
    assert started(f"NAMES = {names!r}\n{program}").stderr == ""


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
    endless = "def solve():\n    while True:\n        yield 1\n"
    assert len(run(endless, calls=[Call("solve", ())]).outcomes[0].value) == 1 << 16


@pytest.fixture
def bare(monkeypatch):
    """A machine where no backend works."""
    monkeypatch.setattr(shutil, "which", lambda name, **options: None)
    monkeypatch.setattr(confinement, "landlock_version", lambda: 2)
    forget = (backends.unusable, bubblewrap.unusable)
    for known in forget:
        known.cache_clear()
    yield
    monkeypatch.undo()
    for known in forget:
        known.cache_clear()


def test_a_run_without_a_sandbox_is_refused_unless_allowed(bare):
    with pytest.raises(BackendUnavailable) as refusal:
        run("print(1)")
    assert "not installed" in refusal.value.seen
    assert "version 2" in refusal.value.seen
    assert "--allow-unsandboxed" in refusal.value.do
    assert run("print(1)", allow_unsandboxed=True).backend == "unsandboxed"


@pytest.mark.parametrize("backend", ["bwrap", "landlock"])
def test_a_backend_that_is_named_and_does_not_work_is_refused_by_name(backend, bare):
    with pytest.raises(BackendUnavailable) as refusal:
        run("print(1)", backend=backend, allow_unsandboxed=True)
    assert {"bwrap": "bubblewrap", "landlock": "Landlock"}[backend] in refusal.value.seen


def test_a_kernel_without_landlock_is_named(bare, monkeypatch):
    monkeypatch.setattr(confinement, "landlock_version", lambda: 0)
    with pytest.raises(BackendUnavailable) as refusal:
        run("print(1)", backend="landlock")
    assert "no Landlock" in refusal.value.seen


def test_a_run_without_a_sandbox_that_is_named_must_be_allowed_too():
    with pytest.raises(BackendUnavailable):
        run("print(1)", backend="unsandboxed")


def test_a_backend_of_another_name_is_refused():
    with pytest.raises(UsageError):
        run("print(1)", backend="docker")


@pytest.mark.parametrize(
    "limit", [{"seconds": 0}, {"seconds": 1e9}, {"memory_mib": 2**44}, {"disk_mib": 2**60}]
)
def test_limits_must_be_positive(limit):
    with refuses(UsageError, "limits must be positive"):
        run("print(1)", limits=Limits(**limit))
