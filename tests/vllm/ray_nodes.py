"""Two nodes of Ray on one host, for vLLM on a CPU or on two GPUs: a worker of tensor parallel on
each.

Both listen with a token that only their children know, as Ray listens on every address of the host.
On a CPU vLLM's workers run under :mod:`_ray_platform`; of two GPUs each node sees one.
"""

import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from _vllm import ROOT, distribution, end_processes, free_port

BESIDE = Path(sys.prefix) / "ray"
"""Where ``make test-vllm`` puts Ray, beside the environment."""

ADDRESSES = (
    "127.0.0.2",
    "127.0.0.3",
)  # a node has one of its own; Ray takes 127.0.0.1 for that of the host
OPTIONS = {
    "--tensor-parallel-size": "2",
    "--distributed-executor-backend": "ray",
    "--disable-custom-all-reduce": None,
}
PLATFORM = {"vllm.platform_plugins": {"ray_cpu": "tests.vllm.ray_platform:name"}}
STARTED = "Ray runtime started"


def installed():
    """Return whether Ray is there, in the environment or beside it."""
    return importlib.util.find_spec("ray") is not None or (BESIDE / "ray").is_dir()


def with_ray(*folders):
    """Return an environment in which Ray can be imported, and what is in other folders."""
    path = [*map(str, folders), str(ROOT / "src"), str(ROOT), str(BESIDE)]
    return {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}


class Nodes:
    """Two nodes of Ray. ``environment`` is that of a server or an engine whose workers are to run
    on them.
    """

    def __init__(self):
        self._ends = contextlib.ExitStack()
        # The sockets of Ray are in its folder, and their paths may have 107 bytes.
        self.folder = Path(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))
        port = free_port()
        on_cpu = not torch.cuda.is_available()
        platform = [distribution(self.folder / "platform", "ray_cpu", PLATFORM)] if on_cpu else []
        self.environment = with_ray(*platform) | {
            "RAY_ADDRESS": f"{ADDRESSES[0]}:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": ADDRESSES[0],
            "VLLM_PLUGINS": "assay,ray_cpu" if on_cpu else "assay",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        self._places = (
            [
                "--head",
                "--port",
                str(port),
                "--include-dashboard",
                "false",
                "--temp-dir",
                str(self.folder),
            ],
            ["--address", self.environment["RAY_ADDRESS"]],
        )
        self._places[0].extend(("--ray-client-server-port", str(free_port())))
        self._processes = []

    def __enter__(self):
        with contextlib.ExitStack() as ends:
            ends.push(self.__exit__)
            for device, (address, place) in enumerate(zip(ADDRESSES, self._places, strict=True)):
                self._start(address, place, device)
            ends.pop_all()
        return self

    def __exit__(self, *error):
        for process in reversed(self._processes):
            children = _children(process)
            process.terminate()
            process.wait()
            end_processes(children, grace=20.0)
        self._ends.close()

    def workers(self):
        """Return the workers of vLLM on each node."""
        found = []
        for process in self._processes:
            names = [_name(child) for child in _children(process)]
            found.append([name for name in names if "RayWorkerProc" in name])
        return found

    def _start(self, address, place, device, timeout=120.0):
        """Start a node that sees one GPU, if there is one, and wait until it runs."""
        words = [
            "--block",
            "--num-gpus",
            "1",
            "--num-cpus",
            "1",
            "--object-store-memory",
            "80000000",
        ]
        words += ["--node-ip-address", address, "--disable-usage-stats"]
        log = self.folder / f"{address}.log"
        environment = (
            os.environ
            | self.environment
            | {"VLLM_HOST_IP": address, "CUDA_VISIBLE_DEVICES": str(device)}
        )
        with log.open("wb") as file:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, *words]
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self._processes.append(process)
        deadline = time.monotonic() + timeout
        while STARTED not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)


def _children(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _name(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).strip()
    return ""
