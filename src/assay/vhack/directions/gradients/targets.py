"""The weight matrices that carry δS (attention and MLP projections), and their digests.

transformers keeps the experts of a layer in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``,
[E, …, …]. Here each is a target of its own, ``model.layers.0.mlp.experts.gate_up_proj.7``, as a
Linear that shares the tensor's memory.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.errors import ModelError, UsageError
from assay.models.decoder import FUSED_TARGETS, MLP_TARGETS, TARGETS
from assay.models.model import AnyModel, Model, PreTrained
from assay.vhack.directions.gradients.division import (
    division_of,
    gather_whole,
    loaded,
)

MIN_COVERAGE = 0.9
"""Share of the weights that targets must cover unless a caller accepts less."""

LORA = "lora_"
"""In the names of PEFT's modules, whose matrices are an update, not a part of the model."""


@dataclass(frozen=True)
class Coverage:
    """How much of a model carries δS, of all weight matrices but the embeddings and the head.

    Attributes:
        share: Share of the entries of these matrices that belong to targets, 0 to 1.
        left_out: Names of the matrices that do not.
    """

    share: float = 1.0
    left_out: tuple[str, ...] = ()


def module_of(model: AnyModel) -> PreTrained:
    """Return the transformers model inside, or the model itself."""
    return model.module if isinstance(model, Model) else model


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds experts in the form of transformers' expert functions."""
    stated = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    return all(hasattr(module, name) for name in stated) and all(
        isinstance(tensor := getattr(module, parameter_name, None), nn.Parameter)
        and tensor.ndim == 3
        for parameter_name in fused_names(module)
    )


def expert_matrices(name: str, experts: nn.Module) -> dict[str, nn.Linear]:
    """Return a Linear over the same memory for each matrix of each fused expert."""
    matrices = {}
    for parameter_name in fused_names(experts):
        weights = getattr(experts, parameter_name)
        biases = getattr(experts, f"{parameter_name}_bias", None)
        for expert, weight in enumerate(weights.detach()):
            weight_OI = weight.T if experts.is_transposed else weight
            # Without memory of its own; there may be ten thousand of these.
            outputs, inputs = weight_OI.shape
            matrix = nn.Linear(inputs, outputs, bias=biases is not None, device="meta")
            matrix.weight = nn.Parameter(weight_OI, requires_grad=False)
            if biases is not None:
                matrix.bias = nn.Parameter(biases.detach()[expert], requires_grad=False)
            matrices[f"{name}.{parameter_name}.{expert}"] = matrix
    return matrices


def fused_names(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the two tensors that hold the experts of a module."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"


def check_whole(model: AnyModel) -> None:
    """Refuse a model whose weights are divided over processes, on several devices or offloaded."""
    if (division := division_of(module_of(model))) is not None:
        places = " and ".join(map(str, division.devices))
        raise ModelError(
            "a model that is divided over processes" if division.group else f"a model on {places}",
            wanted="all weights whole on one device",
            do="load it there, or use a smaller model or bfloat16",
        )


def target_modules(model: AnyModel) -> dict[str, nn.Linear]:
    """Return the target Linears by name, in the order of ``named_modules()``.

    A projection that fuses several, such as ``qkv_proj`` of Phi-3, counts as one matrix. A Linear
    that PEFT has wrapped is found as ``q_proj.base_layer``. Experts in one three-dimensional tensor
    are a matrix each, such as ``experts.down_proj.7``: a Linear over the same memory, which is not
    a module of the model.

    Raises:
        ModelError: There is no target, or the weights of experts are in a tensor of an unknown
            form; the message names the module.
    """
    targets: dict[str, nn.Linear] = {}
    for name, module in module_of(model).named_modules():
        if is_fused(module):
            targets |= expert_matrices(name, module)
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and any(
                target.removesuffix("_proj") in parameter_name for target in MLP_TARGETS
            ):
                raise ModelError(
                    f"{name}.{parameter_name} holds {len(parameter)} matrices in one tensor",
                    wanted="projections that are nn.Linear modules, or experts in the form of "
                    "transformers",
                    do="use a dense model, or one whose experts are separate Linears",
                )
        leaf = name.removesuffix(".base_layer").rpartition(".")[2]
        if isinstance(module, nn.Linear) and leaf in (*TARGETS, *FUSED_TARGETS):
            targets[name] = module
    if not targets:
        raise ModelError(
            f"{type(module_of(model)).__name__} has no target projection",
            wanted="nn.Linear modules named " + ", ".join((*TARGETS, *FUSED_TARGETS)),
            do="use a model of the Llama or Qwen family",
        )
    first: dict[int, str] = {}
    for name, linear in targets.items():
        # Codes, whose scales are elsewhere.
        if linear.weight.dtype.itemsize < 2:
            raise ModelError(
                f"{name} has weights in {linear.weight.dtype}",
                wanted="weights that are not quantised",
                do="load the model in bfloat16, or take probe",
            )
        # Modules of Zamba share weights: two δS of one matrix would undo each other when merged.
        if (shared_with := first.setdefault(id(linear.weight), name)) != name:
            raise ModelError(
                f"{name} has the weight of {shared_with}",
                wanted="projections with a weight each",
                do="use a model whose layers share no projection",
            )
    return targets


def _check_causal(module: PreTrained, modules: Collection[str]) -> None:
    """Refuse attention that sees later tokens.

    Padding and packing would be seen, and the loss be known.
    """
    sees_all = (
        name for name, part in module.named_modules() if getattr(part, "is_causal", True) is False
    )
    seen = next(
        (name for name in sees_all if any(target.startswith(f"{name}.") for target in modules)),
        None,
    )
    config = getattr(module, "config", None)
    if (
        seen is None
        and config is not None
        and getattr(config.get_text_config(), "is_causal", True) is False
    ):
        seen = "its configuration"
    if seen is not None:
        raise ModelError(
            f"{type(module).__name__} whose attention is not causal, by {seen}",
            wanted="a decoder in which no token sees a later one",
            do="use a causal language model",
        )


def chosen_modules(model: AnyModel, names: Collection[str] | None) -> dict[str, nn.Linear]:
    """Return the target Linears of these names, or all, in the order of the model.

    It refuses names of no target, and models of which gradients would not be exact.
    """
    division_of(module_of(model))  # refuses weights that cannot be had whole
    targets = target_modules(model)
    _check_causal(module_of(model), targets)
    if names is None:
        return targets
    unknown = sorted(set(names) - set(targets))
    if unknown or not names:
        raise UsageError(
            f"{unknown[0]!r}, which carries no δS" if unknown else "no module at all",
            wanted="names of target_modules, such as " + next(iter(targets)),
            do="name some of these, or leave the names out for all",
        )
    return {name: module for name, module in targets.items() if name in names}


def coverage(model: AnyModel) -> Coverage:
    """Return how much of a model its target modules cover."""
    module = module_of(model)
    targets = target_modules(model)
    head = getattr(module, "get_output_embeddings", lambda: None)()
    sizes = {
        name if parameter_name == "weight" else f"{name}.{parameter_name}": parameter.numel()
        for name, part in module.named_modules()
        if not isinstance(part, nn.Embedding | nn.ParameterList)  # δS has lists of parameters
        and part is not head
        and LORA not in name
        for parameter_name, parameter in part.named_parameters(recurse=False)
        if parameter.ndim > 1 and not parameter_name.endswith("bias")
    }
    # A tensor of experts by any of them.
    covered = {*targets, *(name.rpartition(".")[0] for name in targets)}
    left_out = {name: size for name, size in sizes.items() if name not in covered}
    return Coverage(1 - sum(left_out.values()) / sum(sizes.values()), tuple(left_out))


def check_coverage(model: AnyModel, least: float) -> None:
    """Refuse a model whose targets cover less than this share of the weights.

    The error names what is left out.
    """
    covered = coverage(model)
    if covered.share < least:
        kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in covered.left_out)
        raise ModelError(
            f"targets cover {covered.share:.0%} of the weights of "
            f"{type(module_of(model)).__name__}; left out are "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
            wanted=f"at least {least:.0%}, so that directions and training are those of the "
            f"model, not of a part",
            do="use a model whose projections are all found, or accept a part with "
            "--set allow_partial=true (min_coverage=0)",
        )


def weights_digest(model: AnyModel) -> str:
    """Return the SHA-256 of all parameters in memory: names, dtypes, shapes and bytes.

    Tied parameters count once.

    Unlike ``Model.digest`` it changes when the model is trained, and with the dtype it was loaded
    in. It does not say how the model is divided; all processes of a divided one must ask.

    Raises:
        ModelError: The model is divided in a way in which no weight can be had whole.
    """
    module = module_of(model)
    division = division_of(module)
    names = sorted(name for name, _ in module.named_parameters())

    def digest_line(name: str) -> str:
        owner_name, _, own_name = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        with loaded(owner):
            return f"{name}\n{tensor_digest(gather_whole(getattr(owner, own_name)))}\n"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Processes that gather must ask for one parameter after the other.
        in_turn = map if division else pool.map
        lines = list(in_turn(digest_line, names))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 in hex of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
