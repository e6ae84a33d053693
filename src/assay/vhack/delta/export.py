"""What δS has made of a model, in the forms that others read: plain weights under plain names, and LoRA.

*Plain weights* are what an inference engine is given after a step. δS is in them already; LoRA of PEFT beside it is
merged on the way, one layer after the other, and taken out again by writing the old weights back, bit by bit.

*As LoRA*: ``U diag(δS) Vh`` has orthonormal U and Vh, so |δS| are its singular values, and its best approximation of
rank r keeps the r largest (Eckart and Young, 1936). The relative error in the Frobenius norm is exact:
``√(Σ dropped δS² / Σ δS²)``.

Shapes: O outputs, I inputs, R coordinates of δS, L rank of LoRA.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from assay.errors import ModelError, UsageError
from assay.files.storage import storage_error, write_atomic
from assay.models import checkpoint as adapters
from assay.vhack.gradients.division import is_sharded, whole
from assay.vhack.gradients.svd import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OWN = "delta_s."
_LORA = "lora_"
_BASE = ".base_layer"
# What PEFT puts around the names of a model, and of modules that it trains whole.
_PREFIXES = (adapters.PREFIX, "modules_to_save.default.")


def plain_name(name: str) -> str:
    """Return the name that a parameter or module has in the model without PEFT."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name.replace(f"{_BASE}.", ".").removesuffix(_BASE)


def plain_weights(model: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model without δS and LoRA in them as parameters; :meth:`DeltaS.weights` describes it."""
    for name, parameter in model.named_parameters():
        if name.startswith(_OWN) or f".{_OWN}" in name or _LORA in name or "original_module" in name:
            continue
        if name.endswith(f"{_BASE}.weight"):
            layer = model.get_submodule(name.removesuffix(f"{_BASE}.weight"))
            yield plain_name(name), _with_lora(name, layer, parameter)
        else:
            yield plain_name(name), whole(parameter).detach()


@torch.no_grad()
def _with_lora(name: str, layer: Any, weight: nn.Parameter) -> Tensor:
    """Return the weight of a layer of PEFT with LoRA merged as PEFT merges it; the layer stays as it is."""
    if is_sharded(weight) or layer.merged:
        raise ModelError(
            f"{name} is {'sharded, with LoRA beside it' if is_sharded(weight) else 'merged with its LoRA already'}",
            wanted="whole weights without LoRA in them",
            do="train LoRA and δS without FSDP2" if is_sharded(weight) else "call unmerge_adapter of the model of PEFT",
        )
    before = weight.detach().clone()
    layer.merge()
    merged = weight.detach().clone()
    layer.unmerge()
    weight.copy_(before)  # subtracting has left the error of rounding
    return merged


@dataclass(frozen=True)
class LoRA:
    """δS as LoRA.

    Attributes:
        rank: Rank of every matrix.
        error: Error ‖δW − B A‖ / ‖δW‖ in the Frobenius norm, over all matrices together.
        errors: Error of each matrix, by module name; 0 where δS is.
    """

    rank: int
    error: float
    errors: dict[str, float]

    @property
    def worst(self) -> str:
        """Name of the matrix with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])


def save_lora(folder: Path, delta: dict[str, Tensor], factors: dict[str, Factors], rank: int, base: str) -> LoRA:
    """Write δS as a directory of PEFT; :meth:`DeltaS.save_lora` describes it."""
    if rank < 1:
        raise UsageError(f"LoRA of rank {rank}", wanted="at least 1", do="choose a larger one")
    tensors: dict[str, Tensor] = {}
    errors, dropped, total = {}, 0.0, 0.0
    for name, delta_R in delta.items():
        squares_R, order_R = delta_R.double().square().cpu().sort(descending=True)
        lost, all_of_it = float(squares_R[rank:].sum()), float(squares_R.sum())
        errors[plain_name(name)] = (lost / all_of_it) ** 0.5 if all_of_it else 0.0
        dropped, total = dropped + lost, total + all_of_it
        a_LI, b_OL = _parts(delta_R, factors[name], order_R[:rank], rank)
        tensors |= {
            f"{adapters.PREFIX}{plain_name(name)}{end}": factor
            for end, factor in zip(adapters.FACTORS, (a_LI, b_OL), strict=True)
        }
    made = LoRA(rank, (dropped / total) ** 0.5 if total else 0.0, errors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the product is not scaled
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({plain_name(name).rpartition(".")[2] for name in delta}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    metadata = {"format": "pt", "relative_error": repr(made.error)}
    write_atomic(folder / adapters.WEIGHTS, save(tensors, metadata=metadata))
    write_atomic(folder / adapters.CONFIG, json.dumps(config, indent=2) + "\n")
    return made


def _parts(delta_R: Tensor, factors: Factors, kept: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A, [L, I], and B, [O, L], float32 on the CPU; what the rank is too large for is zero."""
    kept = kept.to(delta_R.device)
    a_LI = torch.zeros(rank, factors.right.shape[1])
    b_OL = torch.zeros(factors.left.shape[0], rank)
    a_LI[: len(kept)] = factors.right[kept].float().cpu()
    b_OL[:, : len(kept)] = (factors.left[:, kept].float() * delta_R[kept]).cpu()
    return a_LI, b_OL
