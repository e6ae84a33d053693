import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from assay.vhack.environment import Call, Limits, jobs, run, server
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
    for process in [*family(started.pid), psutil.Process(started.pid)]:
        with suppress(psutil.NoSuchProcess):  # the end of one ends the others
            process.send_signal(signal.SIGKILL)
    assert run("print(1)", allow_unsandboxed=True).stdout == "1\n"
    until(lambda: not started.alive, 30)
    assert run("print(2)", allow_unsandboxed=True).stdout == "2\n"
    assert server.server(shut_in) is not started


@every_server
def test_a_server_that_dies_under_a_job_does_not_lose_it(shut_in, started):
    before = family(started.pid)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            run,
            "import time\ntime.sleep(1)\nprint('finished')\n",
            limits=Limits(seconds=60),
            allow_unsandboxed=True,
        )
        until(lambda: len(family(started.pid)) >= len(before) + 2, 30)
        for process in [*family(started.pid), psutil.Process(started.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert job.result().stdout == "finished\n"


@pytest.mark.parametrize("shut_in", ["landlock", "unsandboxed"], indirect=True)
def test_a_program_ends_with_the_process_that_watches_it(shut_in, started, monkeypatch):
    """Whatever kills the keeper, such as the kernel where memory runs out."""

    def refuse(backend):
        raise OSError("no second run")

    with ThreadPoolExecutor(1) as pool:
        limits = Limits(seconds=60)
        job = pool.submit(run, SLEEPS, limits=limits, allow_unsandboxed=True)
        until(lambda: len(family(started.pid)) >= 2, 30)
        keeper, runner = family(started.pid)
        monkeypatch.setattr(server, "Server", refuse)
        keeper.kill()
        until(lambda: not alive([runner]), 10)
        with pytest.raises(OSError, match="no second run"):
            job.result()


@every_server
def test_a_server_that_is_closed_ends_its_jobs_and_leaves_nothing(shut_in):
    own = server.Server(shut_in)
    root = own.root
    text = jobs.job_text(SLEEPS, Limits(seconds=600), backend=shut_in)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(own.perform, text, Limits(seconds=600))
        until(lambda: len(family(own.pid)) >= (4 if shut_in == "bwrap" else 2), 30)
        children = family(own.pid)
        own.close()
        with suppress(OSError):
            job.result()
    until(lambda: not alive(children), 10)
    assert not (root and Path(root).exists())


def test_there_is_no_server_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(server, "python", lambda *arguments: ["false"])
    monkeypatch.setattr(server, "_servers", {})
    assert server.server("unsandboxed") is None
    assert server.server("unsandboxed") is None


PARENT = """
import os, sys, threading, time
import psutil
from assay.vhack.environment import Limits, run, server
backend, once, forks = sys.argv[1], sys.argv[2] == "once", sys.argv[3] == "forks"
if once:
    server.server = lambda backend: None
options = {"backend": backend, "allow_unsandboxed": True, "limits": Limits(seconds=600)}
run("", **options)
me = psutil.Process()
before = {process.pid for process in me.children(recursive=True)}  # one of them may be ending
job = threading.Thread(target=run, args=("import time\\ntime.sleep(600)",), kwargs=options)
job.start()
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    if len({process.pid for process in me.children(recursive=True)} - before) >= 2:
        break
    time.sleep(0.02)
children = [process.pid for process in me.children(recursive=True)]
forked = os.fork() if forks else 0
if forks and not forked:
    time.sleep(60)
    os._exit(0)
print(forked, *children, flush=True)
job.join(60)
"""


@pytest.mark.parametrize("forks", ["forks", "alone"])
@pytest.mark.parametrize("way", ["bwrap", "bwrap once", "landlock", "landlock once", "unsandboxed"])
def test_nothing_outlives_the_process_that_started_it(way, forks, isolated):
    """Killed without a chance to clean up, in the middle of a job, also beside a forked child."""
    backend, _, once = way.partition(" ")
    isolated(backend)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, backend, once, forks], stdout=subprocess.PIPE, text=True
    ) as parent:
        forked, *numbers = map(int, parent.stdout.readline().split())
        children = [psutil.Process(number) for number in numbers]
        assert len(children) >= 2
        parent.kill()
        parent.wait()
        try:
            until(lambda: not alive(children), 10)
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)
