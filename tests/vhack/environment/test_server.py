import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from assay.vhack.environment import Call, Limits, run, sandbox
from tests.waiting import until


@pytest.fixture
def started():
    """The fork server of this process."""
    if not sandbox.working():
        pytest.skip("bubblewrap does not work on this machine")
    found = sandbox.server()
    assert found is not None
    return found


def test_jobs_of_many_threads_go_through_one_server(started):
    def ask(x):
        return (
            run("def solve(x):\n    return x * x\n", calls=[Call("solve", (x,))]).outcomes[0].value
        )

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(48))) == [x * x for x in range(48)]
    assert sandbox.server() is started


def test_a_server_that_was_killed_is_replaced(started):
    for process in [
        *psutil.Process(started._process.pid).children(recursive=True),
        started._process,
    ]:
        with suppress(psutil.NoSuchProcess):  # the end of one ends the others
            process.send_signal(signal.SIGKILL)
    assert run("print(1)").stdout == "1\n"
    until(lambda: not started.alive, 30)
    assert run("print(2)").stdout == "2\n"
    assert sandbox.server() is not started


def test_a_server_that_dies_under_a_job_does_not_lose_it(started):
    processes = psutil.Process(started._process.pid).children(recursive=True)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            run, "import time\ntime.sleep(1)\nprint('done')\n", limits=Limits(seconds=60)
        )
        until(
            lambda: (
                len(psutil.Process(started._process.pid).children(recursive=True)) > len(processes)
            ),
            30,
        )
        started._process.kill()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert job.result().stdout == "done\n"


def test_there_is_no_server_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(sandbox, "_bwrap", lambda disk_mib, server: ["false"])
    monkeypatch.setattr(sandbox, "_servers", {})
    assert sandbox.server() is None
    assert sandbox.server() is None


def test_nothing_outlives_the_process_that_started_it():
    """Killed without a chance to clean up, in the middle of a job."""
    program = (
        "from assay.vhack.environment import run, Limits\n"
        "import sys, threading\n"
        "threading.Thread(target=run, args=('import time\\ntime.sleep(600)',), "
        "kwargs={'limits': Limits(seconds=600)}).start()\n"
        "import time, psutil\n"
        "while len(psutil.Process().children(recursive=True)) < 4:\n    time.sleep(0.02)\n"
        "print('ready', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    until(
        lambda: (
            not any(process.is_running() and process.status() != "zombie" for process in family)
        ),
        30,
    )
