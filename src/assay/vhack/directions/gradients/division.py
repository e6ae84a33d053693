"""Models whose weights are divided over processes, spread over devices, or offloaded.

Whole weights exist one matrix at a time. FSDP2 and tensor parallelism leave parameters that are
DTensors, which all processes gather together; accelerate keeps offloaded ones in a map of its own,
and puts them back around a call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from assay.errors import DataError, ModelError


@dataclass(frozen=True)
class Division:
    """How a model is divided.

    Attributes:
        device: Device that inputs are for, and on which processes add up what they found.
        devices: All devices that compute.
        group: Processes that share the weights; None where one process has all of them.
    """

    device: torch.device
    devices: tuple[torch.device, ...]
    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Number of this process among those that share the weights."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def own(self, names: list[str]) -> list[str]:
        """Return the matrices whose factors this process keeps, a share of all."""
        if self.group is None:
            return names
        return names[self.rank :: dist.get_world_size(self.group)]

    def gather(self, value: Any) -> list[Any]:
        """Return what each process passes, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_same(self, value: object) -> None:
        """Refuse samples that differ between processes, which would wait for each other."""
        if len({repr(other) for other in self.gather(value)}) > 1:
            raise DataError(
                "other samples in each process",
                wanted="all samples in every process: each keeps the factors of some matrices",
                do="pass the same list everywhere, or gather it with all_gather_object",
            )


def division_of(model: nn.Module) -> Division | None:
    """Return how a model is divided, or None where its weights are whole on one device.

    Raises:
        ModelError: It is divided in a way in which no matrix can be had whole.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # After a pass the root of FSDP2 keeps its whole weights until the next one.
            part.reshard()
    parameters = dict(model.named_parameters())
    shards = {name: value for name, value in parameters.items() if isinstance(value, DTensor)}
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise _refusal("FSDP1 keeps flat parameters, without matrices", "take fully_shard (FSDP2)")
    if any(hasattr(value, "ds_id") for value in parameters.values()):
        raise _refusal("DeepSpeed keeps flat parameters", "take fully_shard (FSDP2)")
    devices = _devices(model)
    if not shards:
        is_offloaded = any(value.device.type == "meta" for value in parameters.values())
        if len(devices) == 1 and not is_offloaded:
            return None
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: model)()
        return Division(_place(embeddings) or devices[0], devices)
    meshes = {value.device_mesh for value in shards.values()}
    mesh = next(iter(meshes))
    if len(meshes) > 1 or (mesh.ndim != 1 and mesh.size() != dist.get_world_size()):
        raise _refusal("several meshes, or one that leaves processes out", "divide it by one mesh")
    device = torch.device(mesh.device_type)
    return Division(device, (device,), mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD)


@contextmanager
def loaded(part: nn.Module) -> Iterator[None]:
    """Have the parameters of a module itself in memory, where accelerate has offloaded them."""
    if not hasattr(part, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(part):
        yield


def gather_whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, for which every process that has a part must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_features(tensor: Tensor, width: int, weight: Tensor) -> Tensor:
    """Return the rows of an input or an output with all of their ``width`` features, [N, width].

    transformers' tensor parallelism hands a process its part of them as a plain tensor.
    """
    if (
        not isinstance(tensor, DTensor)
        and tensor.shape[-1] != width
        and isinstance(weight, DTensor)
    ):
        tensor = DTensor.from_local(tensor, weight.device_mesh, [Shard(tensor.ndim - 1)])
    return gather_whole(tensor).reshape(-1, width)


def _devices(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices that compute, in the order of the modules."""
    devices: dict[torch.device, None] = {}
    for name, part in model.named_modules():
        has_parameters = any(True for _ in part.parameters(recurse=False))
        place = _place(part) if has_parameters else None
        if place is not None and place.type == "meta":
            raise _refusal(
                f"{name} has no memory of its own, and no hook of accelerate",
                "load it with device_map, or on a larger device",
            )
        if place is not None:
            devices[place] = None
    return tuple(devices)


def _place(part: nn.Module) -> torch.device | None:
    """Return the device on which a module computes."""
    hook = getattr(part, "_hf_hook", None)
    if getattr(hook, "offload", False):
        place = getattr(hook, "execution_device", "cpu")
        return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return next((parameter.device for parameter in part.parameters()), None)


def _refusal(seen: str, do: str) -> ModelError:
    return ModelError(
        f"a model in parts: {seen}",
        wanted="weights that are whole, or divided by fully_shard, by tensor parallelism or by "
        "device_map",
        do=do,
    )
