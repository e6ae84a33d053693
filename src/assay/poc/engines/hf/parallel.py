"""Many devices, one proof: every process runs an engine of its own, and the first one collects.

Batches are dealt out in turn to the *replicas*. A replica is one process with one device; or, where the weights are
spread, the several processes that hold one model together and run every batch in step. What the processes tell each
other goes over the CPU, behind the next forward pass: a batch's outputs are a few hundred bytes.

Legend of shapes: B nonces of a batch.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import override

from assay.errors import AssayError, ResourceError, UsageError
from assay.models.device import parse_device
from assay.models.load import Model
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.round import Round


@dataclass(frozen=True)
class World:
    """The processes of one proof, as torchrun starts them, and which of them this is."""

    rank: int  # number of this process
    size: int  # number of processes
    device: str  # device of this process
    tensor_parallel: int  # number of processes that hold one model together
    control: dist.ProcessGroup  # group over which the processes talk
    mesh: DeviceMesh | None  # devices that hold the model together with this one; None where a process holds it alone

    @property
    def leads(self) -> bool:
        """Whether this process writes the proof."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """How many whole models there are."""
        return self.size // self.tensor_parallel


def processes() -> int:
    """Return how many processes torchrun has started, 1 without it; a UsageError names a value that is not a number."""
    return _numbers("WORLD_SIZE")[0] if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def _numbers(*names: str) -> list[int]:
    """Return variables that torchrun sets; other launchers set some of them."""
    given = {name: os.environ.get(name, "") for name in names}
    wrong = {name: text for name, text in given.items() if not (text.isascii() and text.isdigit())}
    if wrong:
        seen = ", ".join(f"{name}={text!r:.40}" if text else f"no {name}" for name, text in wrong.items())
        wanted = "the numbers that torchrun gives each of its processes"
        raise UsageError(seen, wanted=wanted, do="start the processes with torchrun, or unset RANK for a single one")
    return [int(text) for text in given.values()]


@contextmanager
def joined(*, tensor_parallel: int = 1, device: str | None = None) -> Iterator[World]:
    """Join the other processes of torchrun, of which ``tensor_parallel`` hold one model together.

    A process takes the device of its local rank: cuda where there is one, when None.

    Raises:
        UsageError: The processes cannot be divided that way, a device has a number, or torchrun has not started them.
        BackendUnavailable: There is no device for this process.
        ResourceError: The processes do not meet.
    """
    rank, size, local = _numbers("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if tensor_parallel < 1 or size % tensor_parallel:
        seen = f"--tensor-parallel {tensor_parallel} of {size} processes"
        do = f"start torchrun with --nproc-per-node {max(1, tensor_parallel)}, or a multiple of it"
        raise UsageError(seen, wanted="a number that divides them", do=do)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {kind} under torchrun", wanted="cpu or cuda", do="leave the number out")
    if kind == "cuda":
        torch.cuda.set_device(parse_device(f"cuda:{local}"))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:  # an address that is missing or wrong, or processes that did not come
        seen = f"the processes did not meet: {str(error).splitlines()[0]:.200}"
        wanted = "all processes at the place that MASTER_ADDR and MASTER_PORT name"
        raise ResourceError(seen, wanted=wanted, do="start them with torchrun") from error
    try:
        mesh = None
        if tensor_parallel > 1:
            shape = (size // tensor_parallel, tensor_parallel)
            mesh = init_device_mesh(kind, shape, mesh_dim_names=("replica", "tensor"))["tensor"]
        name = f"cuda:{local}" if kind == "cuda" else kind
        yield World(rank, size, name, tensor_parallel, dist.new_group(backend="gloo"), mesh)
    finally:
        dist.destroy_process_group()


class ParallelEngine(HFEngine, AbstractContextManager["ParallelEngine"]):
    """The engine on transformers over several processes, each of which has the model on its device.

    As a context: where it ends, the other processes are told to end too. The first process uses it as any engine;
    the others call :meth:`work`. An error of any process, or a ResourceError where one has ended, is raised there.
    """

    def __init__(self, model: Model, world: World, **shape: Any) -> None:
        super().__init__(model, **shape)
        self._world = world

    def __exit__(self, *error: object) -> None:
        if self._world.leads:
            self._tell(None)

    @override
    def outputs(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[NDArray[Any]]:
        self._tell((round, pipeline, nonces))
        return self._share(round, pipeline, nonces)

    @override
    def supports(self, pipeline: Pipeline) -> bool:
        return not pipeline.steps  # those decode on one process

    def work(self) -> None:
        """Do this process's part of everything that the first one begins, until that ends."""
        while (job := self._tell(None)) is not None:
            for _ in self._share(*job):
                pass

    def _share(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[NDArray[Any]]:
        """Compute this replica's batches; in the first process, yield those of all."""
        world = self._world
        starts = range(0, len(nonces), self.batch_size)
        dealt = starts[world.rank // world.tensor_parallel :: world.replicas]
        mine = [nonce for start in dealt for nonce in nonces[start : start + self.batch_size]]
        own = _guarded(super().outputs(round, pipeline, mine))
        left = len(starts)
        try:
            while left > 0 and self._tell(True):
                wanted = left
                left -= world.replicas  # before an error can end the loop, after whose last round no process listens
                yield from self._gather(next(own))[:: world.tensor_parallel][:wanted]
        finally:
            own.close()
            if world.leads and left > 0:
                self._tell(False)

    def _tell(self, message: Any) -> Any:
        """Return the first process's message."""
        box = [message]
        with _connected():
            dist.broadcast_object_list(box, src=0, group=self._world.control)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        """Return what every process gave, in the first one, or raise the error that one gave; nothing in the others."""
        world = self._world
        said: list[Any] = [None] * world.size
        with _connected():
            dist.gather_object(value, said if world.leads else None, dst=0, group=world.control)
        for error in said:
            if isinstance(error, BaseException):
                raise error
        return said if world.leads else []


def _guarded(outputs: Generator[NDArray[Any]]) -> "Generator[NDArray[Any] | AssayError | None]":
    """Yield the batches and then None, or the error, for ever: a failed process must not leave others waiting."""
    last = None
    try:
        yield from outputs
    except AssayError as error:
        last = error
    while True:
        yield last


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no other
        seen = f"a process of this proof has gone: {str(error).splitlines()[0]:.120}"
        do = "see what the other processes say; the same command continues the proof"
        raise ResourceError(seen, wanted="all processes until the end", do=do) from error
