"""What FSDP2 makes of a tensor: a DTensor of which each process has some rows, gathered whole while it is used."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from assay.errors import ModelError


def local_part(tensor: Tensor) -> Tensor:
    """Return the part that this process has, without gradient; writing to it writes to the tensor."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach()


def gather_whole(tensor: Tensor) -> Tensor:
    """Return the gathered tensor; every process must ask for it."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def local_rows(tensor: Tensor) -> slice:
    """Return which rows this process has: all of them, or those that `torch.chunk` gives it of a sharded tensor."""
    found = _row_sharding(tensor)
    if found is None:
        return slice(0, len(tensor))
    mesh, dimension = found
    size = -(-len(tensor) // mesh.size(dimension))
    start = mesh.get_local_rank(dimension) * size
    return slice(min(start, len(tensor)), min(start + size, len(tensor)))


def process_group_of(tensor: Tensor) -> dist.ProcessGroup | None:
    """Return the processes that a tensor is spread over; None for a whole one."""
    found = _row_sharding(tensor)
    return None if found is None else found[0].get_group(found[1])


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop weights that it has gathered, so that the attributes of the modules are the sharded ones."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _row_sharding(tensor: Tensor) -> tuple[DeviceMesh, int] | None:
    """Return the mesh of processes, and its dimension that the rows of a tensor are spread along, if they are.

    Raises:
        ModelError: The tensor is sharded along another dimension, or more than once.
    """
    if not isinstance(tensor, DTensor):
        return None
    sharded = [index for index, placement in enumerate(tensor.placements) if placement.is_shard()]
    if len(sharded) > 1 or (sharded and not tensor.placements[sharded[0]].is_shard(0)):
        raise ModelError(
            f"a tensor placed as {tensor.placements}",
            wanted="rows spread over the processes, as fully_shard does it",
            do="divide the model with fully_shard alone",
        )
    return (tensor.device_mesh, sharded[0]) if sharded else None
