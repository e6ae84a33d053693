"""The processes of one run (torchrun, accelerate): each samples and grades its share.

δS is in every process, and DistributedDataParallel takes the mean of its gradients before the gate.
What must be the same everywhere and is not random (factors, axes) is sent by the first process,
which alone writes files.
"""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from assay.errors import UsageError
from assay.vhack.directions.gradients.svd import SVDCache

_Shared = TypeVar("_Shared")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        count: Number of processes.
        index: Rank of this one; the first, 0, writes the files.
        device: Device of this process; None where the settings choose it.
    """

    count: int = 1
    index: int = 0
    device: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def broadcast(self, value: _Shared) -> _Shared:
        """Return an object of the first process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_factors(self, svd: SVDCache) -> None:
        """Copy process 0's factors into this process.

        Singular vectors of nearly equal values are not unique, and means over processes need one
        set of coordinates.
        """
        if self.count == 1:
            return
        for factors in svd.values():
            for part in (factors.left, factors.values, factors.right):
                dist.broadcast(part, src=0)


def join_processes(device: str | None) -> Processes:
    """Connect to the processes that this one was started with, and return them.

    They connect over gloo where the settings say ``"cpu"``, else over NCCL, one GPU for each
    process.

    Raises:
        UsageError: The launcher asks for FSDP or DeepSpeed, or the settings name one GPU for
            several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"a run in several processes with {name}",
                wanted="a whole model in every process, as torchrun or accelerate launch "
                "--multi_gpu has it",
                do="leave it out",
            )
    if device is not None and ":" in device:
        raise UsageError(
            f"--device {device} for several processes",
            wanted="a device for each",
            do="leave it out, or say cuda or cpu",
        )
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    own_device = "cpu" if state.device.type == "cpu" else str(state.device)
    return Processes(state.num_processes, state.process_index, own_device)
