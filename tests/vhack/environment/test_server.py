import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from assay.errors import BackendUnavailable
from assay.vhack.environment import Call, Limits, run, server
from tests.waiting import until

every_server = pytest.mark.parametrize(
    "shut_in", ["bwrap", "landlock", "unsandboxed"], indirect=True
)
SLEEPS = "import time\ntime.sleep(600)"


@pytest.fixture
def started(shut_in):
    """The fork server of this process for a backend."""
    return server.server(shut_in)


def family(process):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).children(recursive=True)
    return []


def alive(processes):
    living = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


@every_server
def test_jobs_of_many_threads_go_through_one_server(shut_in, started):
    def ask(x):
        program = "def solve(x):\n    return x * x\n"
        result = run(program, calls=[Call("solve", (x,))], allow_unsandboxed=True)
        return result.outcomes[0].value

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(48))) == [x * x for x in range(48)]
    assert server.server(shut_in) is started


@every_server
def test_a_server_that_was_killed_is_replaced(shut_in, started):
    for process in [*family(started.process.pid), psutil.Process(started.process.pid)]:
        with suppress(psutil.NoSuchProcess):  # the end of one ends the others
            process.send_signal(signal.SIGKILL)
    assert run("print(1)", allow_unsandboxed=True).stdout == "1\n"
    until(lambda: started.process.poll() is not None, 30)
    assert run("print(2)", allow_unsandboxed=True).stdout == "2\n"
    assert server.server(shut_in) is not started


@every_server
def test_a_server_that_dies_under_a_job_does_not_lose_it(shut_in, started):
    before = family(started.process.pid)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            run,
            "import time\ntime.sleep(1)\nprint('finished')\n",
            limits=Limits(seconds=60),
            allow_unsandboxed=True,
        )
        until(lambda: len(family(started.process.pid)) >= len(before) + 2, 30)
        for process in [*family(started.process.pid), psutil.Process(started.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert job.result().stdout == "finished\n"


@pytest.mark.parametrize("shut_in", ["landlock", "unsandboxed"], indirect=True)
def test_a_program_ends_with_the_process_that_watches_it(shut_in, started, monkeypatch):
    """Whatever kills the keeper, such as the kernel where memory runs out."""

    def refuse(*_):
        raise OSError("no second run")

    with ThreadPoolExecutor(1) as pool:
        limits = Limits(seconds=60)
        job = pool.submit(run, SLEEPS, limits=limits, allow_unsandboxed=True)
        until(lambda: len(family(started.process.pid)) >= 2, 30)
        keeper, runner = family(started.process.pid)
        monkeypatch.setattr(server, "Server", refuse)
        keeper.kill()
        until(lambda: not alive([runner]), 10)
        with pytest.raises(BackendUnavailable, match="no second run"):
            job.result()


@every_server
def test_a_server_that_is_closed_ends_its_jobs_and_leaves_nothing(shut_in):
    own = server.Server(shut_in)
    root = own.root
    text = server.job_text(SLEEPS, Limits(seconds=600), backend=shut_in)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(own.perform, text, Limits(seconds=600))
        until(lambda: len(family(own.process.pid)) >= (4 if shut_in == "bwrap" else 2), 30)
        children = family(own.process.pid)
        own.close()
        with suppress(OSError):
            job.result()
    until(lambda: not alive(children), 10)
    assert not (root and Path(root).exists())


@every_server
def test_a_server_that_cannot_be_started_leaves_no_descriptor_open(shut_in, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError("no process more")

    monkeypatch.setattr(server.subprocess, "Popen", refuse)
    before = psutil.Process().num_fds()
    with pytest.raises(BlockingIOError):
        server.Server(shut_in)
    assert psutil.Process().num_fds() == before


def test_there_is_no_server_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(server, "python", lambda *arguments: ["false"])
    monkeypatch.setattr(server, "servers", {})
    assert server.server("unsandboxed") is None
    assert server.server("unsandboxed") is None


PARENT = """
import os, sys, threading, time
import psutil
from assay.vhack.environment import Limits, run, server
backend, once, forks = sys.argv[1], sys.argv[2] == "once", sys.argv[3] == "forks"
options = {"backend": backend, "allow_unsandboxed": True, "limits": Limits(seconds=600)}
me = psutil.Process()
before = set()
def children():
    return {process.pid for process in me.children(recursive=True)}
class Server(server.Server):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        # Those of its trial may be ending.
        before.update(children() - {self.process.pid})
server.Server = Server
if once:
    server.server = lambda backend: None
run("", **options)
before.update(children())
job = threading.Thread(target=run, args=("import time\\ntime.sleep(600)",), kwargs=options)
job.start()
least = 3 if once else 2
deadline = time.monotonic() + 60
while len(children() - before) < least and time.monotonic() < deadline:
    time.sleep(0.02)
numbers = children()
forked = os.fork() if forks else 0
if forks and not forked:
    time.sleep(60)
    os._exit(0)
print(forked, *numbers, flush=True)
job.join(60)
"""


@contextmanager
def busy(*arguments, **options):
    """A process in the middle of a job, the number of the child that it forked or 0, and its processes."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True, **options
    ) as parent:
        try:
            forked, *numbers = map(int, parent.stdout.readline().split())
            processes = []
            for number in numbers:
                with suppress(psutil.NoSuchProcess):  # it was ending
                    processes.append(psutil.Process(number))
            assert len(processes) >= 2
            yield parent, forked, processes
        finally:
            parent.kill()


@pytest.mark.parametrize("forks", ["forks", "alone"])
@pytest.mark.parametrize("way", ["bwrap", "bwrap once", "landlock", "landlock once", "unsandboxed"])
def test_nothing_outlives_the_process_that_started_it(way, forks, isolated):
    """Killed without a chance to clean up, in the middle of a job, also beside a forked child."""
    backend, _, once = way.partition(" ")
    isolated(backend)
    with busy(backend, once, forks) as (parent, forked, processes):
        parent.kill()
        parent.wait()
        try:
            until(lambda: not alive(processes), 10)
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)


SUCCESSOR = """
import sys
from assay.vhack.environment import run
assert run("print(1)", backend=sys.argv[1], allow_unsandboxed=True).stdout == "1\\n"
"""


@pytest.mark.parametrize("backend", ["landlock", "unsandboxed"])
def test_the_next_server_removes_the_folders_of_killed_ones_only(backend, isolated, tmp_path):
    isolated(backend)
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "assay-sandbox-link").symlink_to(target)

    def folders():
        return {path for path in tmp_path.glob("assay-sandbox-*") if not path.is_symlink()}

    with busy(backend, "", "", env=environment):
        of_the_living = folders()
        with busy(backend, "", "", env=environment) as (killed, _, processes):
            (abandoned,) = folders() - of_the_living
            for process in [killed, *processes]:
                with suppress(psutil.NoSuchProcess):  # the end of one ends the others
                    process.kill()
            until(lambda: not alive(processes), 10)
        deep = abandoned / "job" / "deep"
        deep.mkdir(parents=True)
        (deep / "file").write_text("written by a job")
        subprocess.run([sys.executable, "-c", SUCCESSOR, backend], check=True, env=environment)
        assert folders() == of_the_living
        assert target.exists()


@pytest.mark.parametrize("ended", [True, False])
def test_what_a_job_wrote_in_time_counts_where_the_reader_is_late(ended):
    reader, writer = os.pipe()
    os.write(writer, b"answer")
    try:
        if ended:
            os.close(writer)
        result = server.pump({"stdout": (reader, 100)}, time.monotonic() - 1)
    finally:
        os.close(reader)
        if not ended:
            os.close(writer)
    assert (result.output["stdout"], result.timed_out) == (b"answer", not ended)
