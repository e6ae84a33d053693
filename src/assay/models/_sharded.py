"""A model spread over several devices: every process holds a part of each large matrix (tensor parallelism)."""

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from assay.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def shard(module: "PreTrainedModel", mesh: "DeviceMesh") -> None:
    """Cut the decoder's weights by the plan that transformers has for the architecture, and install its collectives.

    The head stays whole: it may be tied to the embeddings.

    Raises:
        UsageError: the heads or the width of the MLP cannot be divided by the number of processes.
        ModelError: there is no plan for this architecture.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {name: style for name, style in (module.tp_plan or {}).items() if name.startswith(module.base_model_prefix)}
    if not plan:
        raise ModelError(
            f"{type(module).__name__} over {mesh.size()} devices",
            wanted="an architecture with a tensor parallel plan in transformers, such as Llama or Qwen3",
            do="leave --tensor-parallel out",
        )
    _check_divisible(module.config, mesh.size())
    owner: Any = module
    owner._tp_plan = plan
    apply_tensor_parallelism(module, mesh)  # type: ignore[no-untyped-call]


def fill(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Write a full tensor into a parameter of which this process holds a part."""
    held = parameter.data
    assert isinstance(held, DTensor)
    part = distribute_tensor(values.to(held.dtype), held.device_mesh, held.placements, src_data_rank=None)
    held.to_local().copy_(part.to_local())


def _check_divisible(config: Any, size: int) -> None:
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in names:
        number = getattr(config, name, None) or size
        if number % size:
            raise UsageError(
                f"{name} {number} over {size} devices",
                wanted=f"a number of devices that divides {', '.join(names)}",
                do="choose another --tensor-parallel",
            )
