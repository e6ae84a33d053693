"""δS in the FSDP2 workers of verl, whose optimizer is a :class:`ProjectedOptimizer`; importing this imports verl.

A module of one's own says what to train with, and ``actor_rollout_ref.model.external_lib`` names it::

    from assay.vhack.training.verl import train_delta

    train_delta("pairs.jsonl", arm="displaced-0.4+erase-update-two-sided")

From then on verl's actor is a :class:`DeltaEngine`. Its workers for the reference policy stay as they are.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_clip_grad_norm_
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from assay.errors import UsageError
from assay.vhack.basis.basis import Basis
from assay.vhack.basis.extract import extract
from assay.vhack.delta.arms import Arm, arm_named, gating_arm
from assay.vhack.delta.delta import DeltaS
from assay.vhack.delta.optimizer import ProjectedOptimizer
from assay.vhack.gradients.svd import weight_svd
from assay.vhack.names import DEFAULT_ARM
from assay.vhack.pairs.generate import find_pairs
from assay.vhack.pairs.pairs import Pair
from assay.vhack.training.processes import Processes

_WHOLE = ("fp32", "float32")


class DeltaEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's engine of a language model, with δS trained in place of the weights.

    Each process decomposes the whole weights, takes the factors and axes of the first one, attaches δS and then shards.
    ``grad_clip`` acts behind the gate. The rollout engine is given merged weights, and beside verl's own files a
    checkpoint has ``delta.safetensors``.

    Attributes:
        adapter: Adapter of the module.
        optimizer: The :class:`ProjectedOptimizer`, whose ``measures`` are those of the last step.
    """

    pairs: ClassVar[list[Pair]] = []
    arm: ClassVar[Arm] = arm_named(DEFAULT_ARM)
    k_use: ClassVar[int] = 5
    method: ClassVar[str] = "lda"

    adapter: DeltaS
    optimizer: ProjectedOptimizer

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if self.engine_config.forward_only:
            built: nn.Module = super()._build_fsdp_module(module)
            return built
        _check(self)
        whole: Any = _whole(module)
        processes = Processes(dist.get_world_size(), self.rank)
        svd = weight_svd(whole)
        processes.broadcast_factors(svd)
        tokenizer, basis = self.model_config.tokenizer, None
        if processes.is_first:
            how: dict[str, Any] = {"n_heldout": 0, "top_k": self.k_use, "method": self.method}
            basis = extract(self.pairs, whole, tokenizer=tokenizer, svd=svd, **how)
        self._basis: Basis | None = processes.broadcast(basis)
        self.adapter = DeltaS(whole, svd)
        how = {"mesh": self.device_mesh, "reshard_after_forward": self.engine_config.reshard_after_forward}
        apply_fsdp2(whole, how, self.engine_config)
        self._autocast_dtype = torch.float32
        return module

    def _build_optimizer(self, module: nn.Module) -> ProjectedOptimizer:
        inner = build_optimizer(list(self.adapter.delta), self.optimizer_config)
        clip = self.optimizer_config.clip_grad or None
        return ProjectedOptimizer(inner, self.adapter, self._basis, arm=self.arm, max_norm=clip)

    def optimizer_step(self) -> float:
        """Take a step, which gates and then clips; return the norm of the gradient before both."""
        norm: Any = fsdp2_clip_grad_norm_(list(self.adapter.delta), max_norm=math.inf)  # which clips nothing
        found = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(found):
            self.optimizer.step()
        else:  # as verl does
            self.optimizer.zero_grad()
        return found

    def get_per_tensor_param(self, **others: Any) -> tuple[Iterator[tuple[str, Tensor]], None]:
        """Return the merged weights, for the engine that generates."""
        if self.engine_config.forward_only:
            given: tuple[Iterator[tuple[str, Tensor]], None] = super().get_per_tensor_param(**others)
            return given
        return self.adapter.weights(), None

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Compute as before training, for a reference policy without a model of its own."""
        return self.adapter.disabled()

    def save_checkpoint(self, local_path: str, *others: Any, **named: Any) -> None:
        """Save what verl saves, and δS in a file of its own."""
        super().save_checkpoint(local_path, *others, **named)
        if not self.engine_config.forward_only:
            self.adapter.save(Path(local_path) / "delta.safetensors")
            dist.barrier()


def train_delta(
    pairs: str | list[Pair], *, arm: str = DEFAULT_ARM, k_use: int = 5, method: str = "lda"
) -> type[DeltaEngine]:
    """Let verl's FSDP2 workers train δS, held back from what the pairs show; return the engine that they will use.

    Pairs may be a name or file as for ``assay vhack extract``; the arm is one with axes of the pairs, ``k_use`` per
    module, by a method of extraction.

    Raises:
        UsageError: There is no such arm, or it needs more than the axes of the pairs.
        DataError: The pairs cannot be read.
    """
    chosen = gating_arm(arm)
    if chosen.basis != "true" or chosen.advantage:
        raise UsageError(
            f"the arm {arm} in verl", wanted="one that acts along the axes of the pairs", do="take another arm"
        )
    found = find_pairs(pairs) if isinstance(pairs, str) else list(pairs)
    made = type("DeltaEngine", (DeltaEngine,), {"pairs": found, "arm": chosen, "k_use": k_use, "method": method})
    # An engine for this very vendor comes before verl's own, which is for any.
    register: Any = EngineRegistry.register
    register("language_model", "fsdp2", device=get_device_name(), vendor=get_vendor())(made)
    return made


def _whole(module: nn.Module) -> nn.Module:
    """Return the module on the device, with the weights of the first process, which alone may have loaded them."""
    device = get_device_id()
    is_empty = any(parameter.is_meta for parameter in module.parameters())
    module = module.to_empty(device=device) if is_empty else module.to(device)
    named = [*module.named_parameters(), *sorted(module.named_buffers())]
    for _, tensor in named:
        dist.broadcast(tensor.detach(), src=0)
    return module


def _check(engine: Any) -> None:
    """Refuse settings under which δS would not be trained as it says, or that it was never run with."""
    config, model = engine.engine_config, engine.model_config
    mixed = (config.mixed_precision or {}).get("param_dtype", "bf16")
    for name, seen, wanted in (
        ("fsdp_config.model_dtype", config.model_dtype, _WHOLE),
        ("fsdp_config.mixed_precision.param_dtype", mixed, _WHOLE),
        ("fsdp_config.param_offload", config.param_offload, (False,)),
        ("fsdp_config.optimizer_offload", config.optimizer_offload, (False,)),
        ("fsdp_config.offload_policy", config.offload_policy, (False,)),
        ("ulysses_sequence_parallel_size", config.ulysses_sequence_parallel_size, (1,)),
        ("model.lora_rank", model.lora_rank, (0,)),
    ):
        if seen not in wanted:
            raise UsageError(f"{name}={seen} with δS", wanted=str(wanted[0]), do=f"set {name}")
