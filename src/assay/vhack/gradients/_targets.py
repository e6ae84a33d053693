"""Which weight matrices carry δS: the attention and MLP projections, never embeddings or the head."""

from typing import TYPE_CHECKING

from torch import nn

from assay.errors import ModelError
from assay.models.families import MLP_TARGETS, TARGETS
from assay.vhack.gradients._digest import module_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.models import Model

__all__ = ["target_modules"]


def target_modules(model: "Model | PreTrainedModel") -> dict[str, nn.Linear]:
    """The target Linears by name, in the order of ``named_modules()``.

    Raises:
        ModelError: there is none, or the model keeps the weights of its experts in one three-dimensional tensor; the
            message names the module.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in module_of(model).named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and any(target.removesuffix("_proj") in own for target in MLP_TARGETS):
                raise ModelError(
                    f"{name}.{own} holds the weights of {len(parameter)} experts in one tensor",
                    wanted="projections that are nn.Linear modules, one matrix each",
                    do="use a dense model, or one whose experts are separate Linears",
                )
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            found[name] = module
    if not found:
        raise ModelError(
            f"{type(module_of(model)).__name__} has no target projection",
            wanted="nn.Linear modules named " + ", ".join(TARGETS),
            do="use a model of the Llama or Qwen family",
        )
    return found
