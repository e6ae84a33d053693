"""Tensors that FSDP2 has spread over processes, and plain ones, in the same words.

``torch.distributed.tensor`` takes seconds to import. A tensor can be a DTensor only where somebody has done that, so
nothing here does.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn

from assay.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "local", "local_rows", "local_slice", "processes", "reshard", "whole"]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process has, without gradient; writing to it writes to the tensor."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; every process must ask for it."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def local_slice(length: int, parts: int, index: int) -> slice:
    """Which of ``length`` rows are those of part ``index``, cut the way `torch.chunk` cuts them."""
    size = -(-length // parts)
    return slice(min(index * size, length), min((index + 1) * size, length))


def local_rows(tensor: Tensor) -> slice:
    """Which rows of a tensor this process has: all of them, unless it is sharded along its first dimension.

    Raises:
        ModelError: it is sharded along another dimension, as under tensor parallelism, or more than once.
    """
    if not is_sharded(tensor):
        return slice(0, len(tensor))
    sharded = [index for index, placement in enumerate(tensor.placements) if placement.is_shard()]
    if not sharded:
        return slice(0, len(tensor))
    if len(sharded) > 1 or not tensor.placements[sharded[0]].is_shard(0):
        raise ModelError(
            f"a tensor placed as {tensor.placements}",
            wanted="rows spread over the processes, as fully_shard does it",
            do="leave tensor parallelism out",
        )
    mesh = tensor.device_mesh
    return local_slice(len(tensor), mesh.size(sharded[0]), mesh.get_local_rank(sharded[0]))


def processes(tensor: Tensor) -> dist.ProcessGroup | None:
    """Those that a tensor is spread over; None for a plain one.

    Raises:
        ModelError: it is sharded in more than one dimension of its mesh.
    """
    if not is_sharded(tensor):
        return None
    local_rows(tensor)
    sharded = [index for index, placement in enumerate(tensor.placements) if placement.is_shard()]
    return tensor.device_mesh.get_group(sharded[0]) if sharded else None


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop weights that it has put together, so that the attributes of the modules are the sharded ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
