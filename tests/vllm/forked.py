"""Engines of a test's own process, forked from one process that has imported vLLM: imports are most
of a start.

On a CPU vLLM has the process of an engine, and that of its worker, import everything anew. Servers
are forked by ``_vllm``; this does the same for engines, whose parent has threads and so cannot fork
them itself.
"""

import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import _vllm
import pytest

PARENT = "tests.vllm.forked_parent"


class Process(ForkServerProcess):
    """A process with the environment of the one that starts it, and not that of the process it is
    forked from.
    """

    def start(self) -> None:
        """Fork it."""
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        """Run its target."""
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Context(ForkServerContext):
    """What vLLM starts the process of an engine with."""

    Process = Process


def fork_engines(patch: pytest.MonkeyPatch) -> None:
    """Start the process that imports vLLM, and have vLLM start engines from it."""
    from vllm.v1.engine import utils

    root = Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as started:
        # The process is given the paths of this one, but Python 3.11 does not use them.
        folders = root, root / "src", Path(_vllm.__file__).parent
        started.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        forkserver.set_forkserver_preload([PARENT])
        forkserver.ensure_running()
    patch.setattr(utils, "get_mp_context", Context)
