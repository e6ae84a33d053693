"""A copy of a model whose passes give the δS gradient of every sample of a batch.

It shares the memory of all parameters and buffers, so it takes milliseconds, several may run at the
same time, and the model itself is never touched. Weights are frozen, the target projections leave
gradients behind, and the rest may be computed in faster ways.

Shapes: N rows of all tokens, M rows that predict a completion token, B samples.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.models.decoder import attention_window, decoder_layers, family_of, has_hooks, head_of
from assay.models.device import current
from assay.models.model import PreTrained
from assay.models.precision import own_precision, wide_products
from assay.vhack.directions.gradients.batches import Encoded, SampleBatch
from assay.vhack.directions.gradients.experts import ExpertsPass
from assay.vhack.directions.gradients.gradient_operations import (
    Norm,
    TokenLoss,
    is_plain_norm,
    load_kernels,
)
from assay.vhack.directions.gradients.packed import PACKED, packed_forward, register
from assay.vhack.directions.gradients.svd import Factors
from assay.vhack.directions.gradients.taps import Tap
from assay.vhack.directions.gradients.targets import is_fused, target_modules

# Modules of the last layer that act token by token and reach the loss only through completion
# tokens; keys and values do not.
_LABELS_ONLY = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


@dataclass(frozen=True)
class Recipe:
    """Switches between ways that differ in time, memory and rounding only."""

    # The layers are those of a listed family. Then samples stand end to end in one row, the last
    # layer computes only completion tokens where only they matter, and norms, gated activations and
    # sums over samples run in fused kernels where there are any. Otherwise samples are padded to
    # one length.
    packed: bool
    # U, S and Vh stand for the weight where that saves a product that is needed anyway.
    factored: bool
    # A batch takes few large operations, for a GPU; otherwise each sample takes several, whose
    # numbers stay in the caches of a CPU.
    together: bool


def recipe_for(module: PreTrained) -> Recipe:
    """Return the fastest recipe that is known to be exact for this kind of model."""
    return Recipe(
        packed=_is_listed(module),
        factored=module.dtype == torch.float32,
        together=module.device.type != "cpu",
    )


def _is_listed(module: PreTrained) -> bool:
    """Return whether every layer computes full attention of a listed family.

    Projections and norms are called as modules, so they may have hooks and forward functions of
    their own.
    """
    config = module.config.get_text_config()
    family = family_of(config)
    # Virtual keys and values of PEFT, as prefix tuning has them, stand before those of every
    # sample.
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        return False
    if (
        family is None
        or config._attn_implementation not in ("sdpa", "eager")
        or attention_window(config) is not None
    ):
        return False
    layers: Any = decoder_layers(module)
    if any(type(layer.self_attn).__name__ != f"{family.prefix}Attention" for layer in layers):
        return False
    replaced = [part for layer in layers for part in (layer.self_attn, layer.mlp)]
    return not any(map(has_hooks, replaced)) and not any(
        "forward" in vars(part) for part in (*layers, *replaced)
    )


class Computed(NamedTuple):
    """The gradients of a batch, perhaps still on their way to the CPU."""

    batch: SampleBatch
    together: Tensor  # [B, ΣR] float32, all modules side by side
    losses: Tensor  # [M], of the completion tokens
    arrived: torch.cuda.Event | None  # after which the tensors may be read; None if they are there
    tokens: dict[str, Tensor]  # of each sample that came to each expert, [B, E] by module


class Replica:
    """A copy of a model that turns batches into δS gradients.

    Modules ``factored`` may have their factors stand for the weight in products. With checkpointing
    the backward pass computes every layer again.
    """

    batch: SampleBatch  # that is being computed

    @torch.inference_mode(False)
    def __init__(
        self,
        module: PreTrained,
        factors: Mapping[str, Factors],
        recipe: Recipe,
        *,
        factored: Collection[str] = (),
        checkpointing: bool = False,
    ) -> None:
        self.module = _shared_copy(module)
        self.recipe = recipe
        self.checkpointing = checkpointing
        self.kernels = load_kernels(module.device, module.dtype) if recipe.packed else None
        self._found: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        # The head sees only the hidden states that predict a completion token, [1, M, hidden]: with
        # a large vocabulary it takes most of the memory. Whatever the model does with the logits
        # afterwards (scaling, capping) still happens. It comes before the hooks that the head has.
        head_of(self.module).register_forward_pre_hook(self._completions, prepend=True)
        if recipe.packed and (self.kernels is not None or self.module.device.type == "cpu"):
            for part in self.module.modules():
                if is_plain_norm(part):
                    vars(part)["forward"] = partial(_normalised, part, self.kernels)
        self._tap(factors, factored)
        if recipe.packed:
            register()
            self.module.config._attn_implementation = PACKED
            *_, last = layers = decoder_layers(self.module)
            for layer in layers:
                vars(layer)["forward"] = packed_forward(
                    layer, lambda: self.batch, self.kernels, labels_only=layer is last
                )
        for layer in decoder_layers(self.module) if checkpointing else ():
            vars(layer)["forward"] = recomputed_forward(layer.forward, self.module)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self, encoded: list[Encoded]) -> Computed:
        """Run one forward and one backward pass; the result may still be on its way from a GPU.

        Without memory it raises what torch raises.
        """
        device = self.module.device
        self.batch = batch = SampleBatch.build(encoded, device, packed=self.recipe.packed)
        self._found.clear()
        self._tokens.clear()
        places = {} if batch.positions is None else {"position_ids": batch.positions}
        # In the dtype of the weights, also in a training loop that computes in another one.
        with current(device), own_precision(self.module):
            logits = self.module(input_ids=batch.ids, use_cache=False, **places).logits
            losses_M = TokenLoss.apply(logits.flatten(0, 1), batch.labels)  # type: ignore[no-untyped-call]
            del logits
            # Before the backward pass, in which layers that are computed again count again.
            tokens = dict(self._tokens)
            losses_M.backward(batch.loss_weights)
            together_BR = stack_rows(self._found, self._lengths, len(encoded), device)
            arrived = torch.cuda.Event() if together_BR.is_cuda else None  # type: ignore[no-untyped-call]
            together_BR, losses_M = (
                part.to("cpu", non_blocking=True) for part in (together_BR, losses_M.detach())
            )
            if arrived is not None:
                arrived.record(torch.cuda.current_stream(device))
        return Computed(batch, together_BR, losses_M, arrived, tokens)

    def _completions(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (arguments[0].flatten(0, 1).index_select(0, self.batch.label_rows)[None],)

    def _tap(self, factors: Mapping[str, Factors], factored: Collection[str]) -> None:
        modules = {
            name: linear for name, linear in target_modules(self.module).items() if name in factors
        }
        self._lengths = {name: factors[name].rank for name in modules}
        is_packed = self.recipe.packed
        layers = _layer_names(self.module) if is_packed or self.checkpointing else ()
        labels_only = tuple(f"{layers[-1]}{part}" for part in _LABELS_ONLY) if is_packed else ()
        experts = {name: part for name, part in self.module.named_modules() if is_fused(part)}
        taps: dict[str, Tap] = {}
        for name, linear in modules.items():
            is_expert = name.rsplit(".", 2)[0] in experts
            only = name.startswith(labels_only)
            taps[name] = Tap(
                name,
                linear,
                factors[name],
                self._found,
                (lambda: self.batch.label_segments) if only else (lambda: self.batch.segments),
                factored=name in factored,
                together=self.recipe.together,
                checkpointing=self.checkpointing and name.startswith(layers),
                kernels=None if is_expert else self.kernels,  # they want rows of every sample
            )
            if not is_expert:
                vars(linear)["forward"] = taps[name]
        for name, part in experts.items():
            apply = {
                expert_name: tap.apply
                for expert_name, tap in taps.items()
                if expert_name.startswith(f"{name}.")
            }
            vars(part)["forward"] = ExpertsPass(name, part, apply, lambda: self.batch, self._tokens)


def stack_rows(
    rows: Mapping[str, Tensor], lengths: Mapping[str, int], samples: int, device: torch.device
) -> Tensor:
    """Return the gradients of targets of these lengths side by side, [B, ΣR] float32.

    They are zero where no loss goes through a target, or another process has its factors.
    """
    parts = [
        rows[name].to(device)
        if name in rows
        else torch.zeros(samples, length, dtype=torch.float32, device=device)
        for name, length in lengths.items()
    ]
    return torch.cat(parts, dim=1)


def _layer_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the decoder layers in order, a dot at the end of each."""
    layer_ids = set(map(id, decoder_layers(module)))
    return tuple(f"{name}." for name, part in module.named_modules() if id(part) in layer_ids)


def _shared_copy(module: PreTrained) -> PreTrained:
    """Return a frozen copy in evaluation mode over the same memory, with its own configuration.

    By hand this takes 1.1 ms for the bundled models and 9 ms for Qwen3-4B; ``copy.deepcopy`` takes
    14 and 55 ms, where the gradients of 24 samples take 38 and 585 ms on an H200
    (research/results/vhack_gradients_h200_bfloat16.json). A module with a forward function of its
    own needs the deep copy: the function is bound to the module.
    """
    memo: dict[int, Any] = {
        id(part): nn.Parameter(part.detach(), requires_grad=False) for part in module.parameters()
    }
    memo |= {id(part): part for part in module.buffers()}
    # A trainer such as TRL gives the model itself another forward function, which returns other
    # things and would run the model instead of the copy. The copy computes by the function of the
    # class.
    trainers = vars(module).pop("forward", None)
    try:
        if any("forward" in vars(part) for part in module.modules()):
            return cast("PreTrained", copy.deepcopy(module, memo).eval())  # type: ignore[no-untyped-call]
        memo[id(module.config)] = copy.deepcopy(module.config)
        return cast("PreTrained", _twin(module, memo))
    finally:
        if trainers is not None:
            vars(module)["forward"] = trainers


def _twin(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(part) in memo:
        return cast("nn.Module", memo[id(part)])
    twin = memo[id(part)] = object.__new__(type(part))
    for name, value in vars(part).items():
        twin.__dict__[name] = memo.get(
            id(value), value.copy() if isinstance(value, dict) else value
        )
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = {
        name: memo.get(id(value)) for name, value in part._parameters.items()
    }
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, memo) for name, child in part._modules.items()
    }
    return twin


def recomputed_forward(plain: Callable[..., Any], module: PreTrained) -> Callable[..., Any]:
    """Return the forward function of a layer that the backward pass computes again."""
    # The backward pass is outside of the contexts of the forward pass, and must compute the same.
    # The first layer's input requires no gradient, which only the newer kind of checkpointing
    # allows.
    return partial(
        checkpoint,
        plain,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), wide_products(module)),
    )


def _normalised(norm: Any, kernels: ModuleType | None, hidden_states: Tensor) -> Tensor:
    return cast("Tensor", Norm.apply(hidden_states, norm.weight, norm.variance_epsilon, kernels))  # type: ignore[no-untyped-call]
