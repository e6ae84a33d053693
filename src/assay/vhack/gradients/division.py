"""How the weights of a model are divided: over processes, by FSDP2 or by tensor parallelism, or over several devices.

The gradient of a sample is a sum, and each process takes its own terms of it:

- *FSDP2*: each process has rows of every weight and computes some of the samples, whole. A layer's weights are gathered
  while it computes, and a factor of one matrix just before coordinates are taken by it, in either pass.
- *tensor parallelism*: each process computes all samples with its part of every matrix. With rows of W, and so of
  ``∂L/∂y`` and of U, ``g_b = Σ_p Σ_t (U_pᵀ ∂L/∂y_pt) ⊙ (Vh x_t)``; with columns of W, and so of x and of Vh,
  ``g_b = Σ_p Σ_t (Uᵀ ∂L/∂y_t) ⊙ (Vh_p x_pt)``. Both are bilinear, so no token's coordinates are ever sent.

In the end the terms are added up: R numbers per matrix and sample are all that the gradients themselves cost in
traffic. Of the factors each process keeps rows of U and columns of Vh. Several devices of one process divide nothing
but memory: each matrix has its factors and its gradient where it is.

Shapes: O outputs, I inputs, R coordinates of δS.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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


def start_gathering(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to gather a tensor beside what is computed meanwhile; return a function that waits for it and returns it.

    Every process must ask for it. Parts of different sizes are only gathered when the function is called.
    """
    if not isinstance(tensor, DTensor) or tensor.ndim != 2 or len(tensor.placements) > 1:
        return lambda: gather_whole(tensor)
    dimension = next((at for at in (0, 1) if tensor.placements[0].is_shard(at)), None)
    parts = tensor.device_mesh.size()
    if dimension is None or tensor.shape[dimension] % parts:
        return lambda: gather_whole(tensor)
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
        ModelError: The tensor is sharded along another dimension, as under tensor parallelism, or more than once.
    """
    if not isinstance(tensor, DTensor):
        return None
    sharded = [index for index, placement in enumerate(tensor.placements) if placement.is_shard()]
    if len(sharded) > 1 or (sharded and not tensor.placements[sharded[0]].is_shard(0)):
        raise ModelError(
            f"a tensor placed as {tensor.placements}",
            wanted="rows spread over the processes, as fully_shard does it",
            do="leave tensor parallelism out",
        )
    return (tensor.device_mesh, sharded[0]) if sharded else None


WHOLE, ROWS, COLUMNS = "whole", "rows", "columns"
_AT_ONCE = 8  # matrices whose gradients are added up over the processes at once


@dataclass(frozen=True, eq=False)
class Division:
    """How a model that is not whole on one device is divided."""

    mesh: DeviceMesh | None  # processes that have parts; None where one process has everything on several devices
    by_samples: bool  # each process computes some samples by whole weights, as under FSDP2, or all by parts of them

    @property
    def processes(self) -> int:
        """Number of processes."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def rank(self) -> int:
        """Place of this process among them."""
        return 0 if self.mesh is None else int(self.mesh.get_local_rank())

    def layout(self, linear: nn.Linear) -> str:
        """Return which part of a weight this process computes with: ``"whole"``, ``"rows"`` or ``"columns"``."""
        weight = linear.weight
        if self.by_samples or not isinstance(weight, DTensor) or not weight.placements[0].is_shard():
            return WHOLE
        return ROWS if weight.placements[0].is_shard(0) else COLUMNS

    def part(self, tensor: Tensor, dimension: int) -> Tensor:
        """Return the part of a matrix that goes with this process's part of a weight, cut along a dimension."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        parts = tensor.chunk(self.processes, dimension)
        return parts[self.rank] if self.rank < len(parts) else tensor.narrow(dimension, 0, 0)

    def gathered(self, what: Any) -> list[Any]:
        """Return one object of every process, in the order of their ranks."""
        if self.mesh is None:
            return [what]
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, what, group=self.mesh.get_group())
        return found

    def add_up(self, parts: Iterable[Tensor]) -> None:
        """Replace every tensor on the CPU by its sum over the processes.

        Many go at once: one by one, those of 448 matrices wait 448 times for the device and for the other processes.
        """
        waiting = list(parts) if self.mesh is not None else []
        for start in range(0, len(waiting), _AT_ONCE):
            assert self.mesh is not None
            some = waiting[start : start + _AT_ONCE]
            total = torch.cat([part.flatten() for part in some]).to(self.mesh.device_type)
            dist.all_reduce(total, group=self.mesh.get_group())
            sizes = [part.numel() for part in some]
            for part, summed in zip(some, torch.split(total.cpu(), sizes), strict=True):
                part.copy_(summed.view(part.shape))


def of_one_tensor(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return which of these target matrices are parts of a tensor of experts, and so no modules of their own."""
    own = {name for name, _ in model.named_modules()}
    return [name for name in names if name not in own]


def division_of(model: nn.Module, modules: Mapping[str, nn.Linear]) -> Division | None:
    """Return how a model is divided, or None if its target weights are whole and on one device.

    Weights that FSDP2 has gathered are dropped, so the model must not be in the middle of a pass. It refuses models
    that are divided in a way in which gradients would not be exact, or could not be computed.
    """
    reshard(model)
    weights = {name: linear.weight for name, linear in modules.items()}
    meshes = {weight.device_mesh for weight in weights.values() if isinstance(weight, DTensor)}
    devices = {parameter.device for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise _refusal(
                f"{name} has no memory of its own, as with offloading to a disk or to the memory of the CPU",
                "load it over more devices, or in bfloat16; --rank leaves room for the factors",
            )
    if not meshes and len(devices) == 1:
        return None
    if experts := of_one_tensor(model, modules):
        raise _refusal(f"{experts[0]} is an expert in one tensor with others", "load it whole on one device")
    if not meshes:
        return Division(None, by_samples=False)
    if len(meshes) > 1 or (mesh := next(iter(meshes))).ndim > 1:
        raise _refusal(
            "its weights are on a mesh of several dimensions, or on several meshes",
            "divide it by FSDP2 or by tensor parallelism alone, over one dimension",
        )
    for name, weight in weights.items():
        if isinstance(weight, DTensor) and not (weight.placements[0].is_shard() or weight.placements[0].is_replicate()):
            raise _refusal(f"{name} is placed as {weight.placements[0]}", "divide it with fully_shard or by rows")
    units = [part for part in model.modules() if isinstance(part, FSDPModule)]
    _check_units(units, next(iter(devices)).type, mesh.device_type)
    return Division(mesh, by_samples=bool(units))


def _check_units(units: list[Any], kept_on: str, computed_on: str) -> None:
    """Refuse FSDP2 that computes in another dtype, or keeps weights elsewhere, than the model says."""
    if kept_on != computed_on:
        raise _refusal(f"its weights are kept on {kept_on} and used on {computed_on}", "leave CPUOffloadPolicy out")
    policies = [policy for unit in units if (policy := unit._get_fsdp_state()._mp_policy) is not None]
    dtypes = {dtype for policy in policies for dtype in (policy.param_dtype, policy.output_dtype) if dtype is not None}
    kept = {parameter.dtype for unit in units for parameter in unit.parameters()}
    if dtypes - kept:
        raise _refusal(
            f"FSDP2 computes in {', '.join(sorted(map(str, dtypes - kept)))}, and keeps weights in another dtype",
            "load the model in the dtype to compute in, and leave MixedPrecisionPolicy out",
        )


def _refusal(seen: str, do: str) -> ModelError:
    return ModelError(
        f"a model in parts: {seen}",
        wanted="whole weights, or parts by fully_shard, parallelize_module or device_map of which gradients are exact",
        do=do,
    )


def check_logits(logits: Tensor, vocabulary: int, head: nn.Module) -> None:
    """Raise a ModelError about a head that gives each process its part of the vocabulary."""
    if isinstance(logits, DTensor) or logits.shape[-1] < vocabulary:
        raise _refusal(
            f"{type(head).__name__} of {vocabulary} tokens gives {logits.shape[-1]} logits to this process",
            "let the head give all logits to every process (ColwiseParallel with output_layouts=Replicate())",
        )
