"""What the CPU build of vLLM 0.32 lacks for data-parallel engines of a mixture: gathers of unequal numbers of rows.

Its communicator for CPUs has neither the gather nor the sum that goes back. With them, engines that step together run
on a CPU, so that what assay does around them can be tried without GPUs. They are not fast.
"""

import os

import torch
import torch.distributed as dist
from _vllm import ROOT, distribution


def with_gathers(folder):
    """Return an environment in which every process of vLLM has them; ``folder`` takes their entry point."""
    made = distribution(folder, "gathers", {"vllm.general_plugins": {"gathers": f"{__name__}:register"}})
    path = [str(made), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path), "VLLM_PLUGINS": "assay,gathers"}


def register():
    """Give the communicator what it lacks; the entry point."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self, rows, dim=0, sizes=None):
    """Return the rows of all ranks, one rank after the other, of one tensor or of each of a list."""
    if isinstance(rows, list):
        return [all_gatherv(self, one, dim, sizes) for one in rows]
    sizes = sizes or [len(rows)] * self.world_size
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([one[:size] for one, size in zip(gathered, sizes, strict=True)])


def reduce_scatterv(self, rows, dim=0, sizes=None):
    """Return this rank's rows of the sum over all ranks."""
    total = rows.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes or len(total) // self.world_size)[self.rank_in_group].clone()
