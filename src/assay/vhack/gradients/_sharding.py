"""One set of functions for plain tensors and for those that FSDP2 has spread over processes.

Importing ``torch.distributed.tensor`` takes seconds. A tensor can be a DTensor only after something else has imported
it, so nothing here does.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process has, without gradient; writing to it writes to the tensor."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return the gathered tensor; every process must ask for it."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def gathering(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to gather a tensor beside what is computed meanwhile; return a function that waits for it and returns it.

    Every process must ask for it. Parts of different sizes are only gathered when the function is called.
    """
    if not is_sharded(tensor) or tensor.ndim != 2 or len(tensor.placements) > 1:
        return lambda: whole(tensor)
    dimension = next((at for at in (0, 1) if tensor.placements[0].is_shard(at)), None)
    parts = tensor.device_mesh.size()
    if dimension is None or tensor.shape[dimension] % parts:
        return lambda: whole(tensor)
    part = tensor.to_local().detach().contiguous()
    found = part.new_empty(parts * len(part), *part.shape[1:])
    # Its name in torch 2.13, and before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = gather(found, part, group=tensor.device_mesh.get_group(), async_op=True)

    def wait() -> Tensor:
        work.wait()
        return found if dimension == 0 else torch.cat(found.chunk(parts), dim=1)

    return wait


def local_rows(tensor: Tensor) -> slice:
    """Return which rows of a tensor this process has: all of them, unless it is sharded along its first dimension.

    Raises:
        ModelError: The tensor is sharded along another dimension, as under tensor parallelism, or more than once.
    """
    found = _row_sharding(tensor)
    if found is None:
        return slice(0, len(tensor))
    mesh, dimension = found
    return _rows_of_part(len(tensor), mesh.size(dimension), mesh.get_local_rank(dimension))


def processes(tensor: Tensor) -> dist.ProcessGroup | None:
    """Return the processes that a tensor is spread over; None for a whole one.

    Raises:
        ModelError: The tensor is sharded along another dimension, as under tensor parallelism, or more than once.
    """
    found = _row_sharding(tensor)
    return None if found is None else found[0].get_group(found[1])


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop weights that it has gathered, so that the attributes of the modules are the sharded ones."""
    for unit in fsdp_units(model):
        unit.reshard()


def fsdp_units(model: nn.Module) -> "list[FSDPModule]":
    """Return the modules that ``fully_shard`` was called with."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]


def _row_sharding(tensor: Tensor) -> "tuple[DeviceMesh, int] | None":
    """Return the mesh of processes, and its dimension that the rows of a tensor are spread along, if they are."""
    if not is_sharded(tensor):
        return None
    sharded = [index for index, placement in enumerate(tensor.placements) if placement.is_shard()]
    if len(sharded) > 1 or (sharded and not tensor.placements[sharded[0]].is_shard(0)):
        raise ModelError(
            f"a tensor placed as {tensor.placements}",
            wanted="rows spread over the processes, as fully_shard does it",
            do="leave tensor parallelism out",
        )
    return (tensor.device_mesh, sharded[0]) if sharded else None


def _rows_of_part(length: int, parts: int, index: int) -> slice:
    """Return which of ``length`` rows are those of part ``index``, cut the way `torch.chunk` cuts them."""
    size = -(-length // parts)
    return slice(min(index * size, length), min((index + 1) * size, length))
