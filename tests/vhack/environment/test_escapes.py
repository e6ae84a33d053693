"""The programs of `escapes` and `forgeries`: none gets out, forges a verdict, or leaves anything
behind.
"""

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from assay.vhack.environment import Call, Episode, Limits, grade, run, server, tasks
from tests.vhack.environment.escapes import ESCAPES, MEANS
from tests.vhack.environment.forgeries import FORGERIES
from tests.waiting import until

PROGRAMS = ESCAPES | FORGERIES
ENDLESS = {"closed_descriptors", "ignored_signals", "sleep", "spin", "stdin"}
"""Those that would go on until they are stopped."""

SLOW = {"huge_values", "recursion", "stopped_group"}
"""Those that end by themselves or are stopped, whichever comes first."""

TOKEN = "s3cr3t-5f1c"
BACKENDS = ["bwrap", "bwrap once", "landlock", "landlock once"]
# A wrong solution for those that bring none of their own, so that the tests have something to ask.
WRONG = "def solve(x):\n    return x\n"
EPISODE = Episode(tasks(1, seed=2, families=["arithmetic"], difficulty=2)[0], "none")


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """What a program might reach for: open sockets, a secret, a file that must stay as it is."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text(TOKEN)
    (folder / "canary").write_text("alive")
    name = f"assay-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen()
        for listener in (tcp, unix):
            listener.setblocking(False)
        places = {"pid": os.getpid(), "port": tcp.getsockname()[1], "socket": name}
        places |= {"secret": str(folder / "secret"), "canary": str(folder / "canary")}
        yield places, (tcp, unix), folder


# Without the server: those that wait for the end of their time are in test_sandbox, and bubblewrap
# alone cannot bound the number of files.
CASES = [
    (b, n)
    for b in BACKENDS
    for n in PROGRAMS
    if not b.endswith("once") or n not in ENDLESS | SLOW | {"files", "deep_folders"}
]


@pytest.mark.parametrize(("shut_in", "name"), CASES, indirect=["shut_in"])
def test_no_program_escapes_or_forges_its_verdict(name, shut_in, surroundings, monkeypatch):
    places, listeners, folder = surroundings
    monkeypatch.setenv("ASSAY_TOKEN", TOKEN)
    program = WRONG + "\n" + PROGRAMS[name].replace("{{", "{").replace("}}", "}")
    for place, value in places.items():
        program = program.replace("{" + place + "}", str(value))
    before = set(psutil.Process().children(recursive=True))
    limits = Limits(seconds=1.0 if name in ENDLESS | SLOW else 60.0, memory_mib=256)
    found = grade(EPISODE, program, limits=limits)
    said = found.result.stdout + found.result.stderr
    assert not found.correct
    assert not found.paid
    assert "ESCAPED" not in said
    assert TOKEN not in said
    assert name in FORGERIES or found.result.raised in (
        "",
        "MemoryError",
        "PermissionError",
    )  # and not its own mistake
    assert name in SLOW or found.result.timed_out == (name in ENDLESS)
    assert (folder / "canary").read_text() == "alive"
    assert sorted(path.name for path in folder.iterdir()) == ["canary", "secret"]
    for listener in listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
    until(lambda: set(psutil.Process().children(recursive=True)) <= before, 30)
    assert run("print(6 * 7)").stdout == "42\n"


def test_the_attempts_that_need_no_sandbox_would_succeed_without_one(surroundings):
    """The suite can fail: outside, in this very process, its means do work."""
    places, _, _ = surroundings
    assert Path(places["secret"]).read_text() == TOKEN
    os.kill(places["pid"], 0)
    with socket.create_connection(("127.0.0.1", places["port"]), 5):
        pass
    with contextlib.suppress(BlockingIOError):
        surroundings[1][0].accept()[0].close()


def test_there_are_at_least_twenty_five_programs_and_all_are_python():
    assert len(PROGRAMS) >= 25
    for name, program in PROGRAMS.items():
        compile(
            program.replace("{{", "{")
            .replace("}}", "}")
            .replace("{pid}", "9")
            .replace("{port}", "9"),
            name,
            "exec",
        )


@pytest.mark.parametrize("shut_in", BACKENDS, indirect=True)
def test_one_job_finds_nothing_of_another(shut_in):
    writes = (
        "open('left.txt', 'w').write('x')\nimport os, sys\nos.environ['LEFT'] = 'x'\nsys.left = 1\n"
        "import json\njson.left = 1\nprint(os.getcwd())\n"
    )
    looks = (
        "import json, os, sys\n"
        "print(os.listdir('.'), os.environ.get('LEFT'), hasattr(sys, 'left'), hasattr(json, "
        "'left'))\n"
    )
    before = run(writes)
    assert before.returncode == 0
    assert run(looks).stdout == "[] None False False\n"
    assert not Path(before.stdout.strip(), "left.txt").exists()


@pytest.mark.parametrize("shut_in", BACKENDS, indirect=True)
def test_jobs_at_the_same_time_do_not_see_each_other(shut_in):
    program = (
        "import os, time\nopen('mine', 'w').write('x')\ntime.sleep(0.3)\nothers = ()\n"
        "try:\n    others = [p for p in os.listdir('/proc') if p.isdigit()]\n"
        "except PermissionError:\n    pass\n"
        "def solve(x):\n    return [os.listdir('.'), len(others) > 2]\n"
    )
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: run(program, calls=[Call("solve", (1,))]), range(3)))
    assert [result.outcomes[0].value for result in results] == [[["mine"], False]] * 3


@pytest.mark.parametrize("shut_in", ["landlock"], indirect=True)
def test_a_job_cannot_reach_the_directory_of_another_whose_name_it_knows(shut_in, tmp_path):
    waits = (
        "import os, time\nopen('mine', 'w').write('x')\nprint(os.getcwd(), flush=True)\n"
        "while os.path.exists('mine') and not os.path.exists({stop!r}):\n    time.sleep(0.02)\n"
        "print(os.listdir('.'), open('mine').read())\n"
    )
    stop = tmp_path / "stop"
    root = Path(server.server("landlock").root)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run, waits.format(stop=str(stop)), limits=Limits(seconds=60))
        until(lambda: [path for path in root.glob("*/mine") if path.read_text()])
        folder = next(root.glob("*/mine")).parent
        reaches = MEANS + (
            f"place = {str(folder)!r}\n"
            "attempt(os.listdir, place)\n"
            "attempt(lambda path: os.open(path, os.O_RDONLY), place + '/mine')\n"
            "attempt(lambda path: os.open(path, os.O_WRONLY | os.O_CREAT), place + '/mine', place "
            "+ '/new')\n"
            "attempt(os.remove, place + '/mine')\n"
            "open('forged', 'w').close()\n"
            "attempt(lambda path: os.rename('forged', path), place + '/forged', place + '/mine')\n"
            "attempt(lambda path: os.link(path, 'linked'), place + '/mine')\n"
            "os.chdir(place)\n"
            "attempt(lambda path: os.open(path, os.O_RDONLY), 'mine')\n"
            "print('tried')\n"
        )
        found = run(reaches, limits=Limits(seconds=60))
        stop.touch()
        untouched = waiting.result()
    assert (found.stdout, found.stderr) == ("tried\n", "")
    assert untouched.stdout == f"{folder}\n['mine'] x\n"
    assert not folder.exists()
