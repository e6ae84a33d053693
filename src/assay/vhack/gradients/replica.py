"""The pass that leaves the δS gradient of every sample behind, on a copy of a model or on the model itself.

A copy shares the memory of all parameters and buffers, so it takes milliseconds, several may run at the same time, and
the model itself is never touched. What FSDP2 and others hook onto cannot be copied: a model in parts runs itself, and
everything that was put onto it is taken off again. Weights are frozen, the target projections leave gradients behind,
and the rest may be computed in faster ways.

Shapes: N rows of all tokens, M rows that predict a completion token, B samples.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.models.decoder import attention_window, decoder_layers, family_of, has_hooks, head_of
from assay.models.device import current
from assay.models.wide import wide_products
from assay.vhack.gradients.batches import Batch, Encoded, Segments
from assay.vhack.gradients.division import Division, check_logits, reshard
from assay.vhack.gradients.experts import ExpertsPass, is_fused
from assay.vhack.gradients.fused import Norm, TokenLoss, is_plain_norm, load_kernels
from assay.vhack.gradients.packed import PACKED, PackedLayers, register
from assay.vhack.gradients.svd import Factors
from assay.vhack.gradients.taps import Tap
from assay.vhack.gradients.targets import target_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Modules of the last layer that act token by token and reach the loss only through completion tokens; keys and values
# do not.
_LABELS_ONLY = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
# Fields of configurations whose attention sees only the keys that score best (DeepSeek-V3.2, MiniMax-M3, Qwen4, Doge).
# Which ones these are, of equal ones, and whether there is a choice at all, depends on the length, padding included.
_CHOOSES_KEYS = ("index_topk", "index_topk_blocks", "indexer_n_heads", "keep_window_size")


@dataclass(frozen=True)
class Recipe:
    """Switches between ways that differ in time, memory and rounding only.

    Attributes:
        packed: Whether the layers are those of a listed family. Then samples stand end to end in one row, the last
            layer computes only completion tokens where only they matter, and norms, gated activations and sums over
            samples run in fused kernels where there are any. Otherwise samples are padded to one length.
        factored: Whether U, S and Vh stand for the weight where that saves a product that is needed anyway.
        together: Whether a batch takes few large operations, for a GPU; otherwise each sample takes several, whose
            numbers stay in the caches of a CPU.
        equal_lengths: Whether samples of different lengths must not share a batch, because padding would change them.
    """

    packed: bool
    factored: bool
    together: bool
    equal_lengths: bool = False


def recipe_for(module: "PreTrainedModel", division: Division | None = None) -> Recipe:
    """Return the fastest recipe that is known to be exact for this kind of model, and for how it is divided."""
    config = module.config.get_text_config()
    return Recipe(
        # Kernels are tried on one device, and samples packed there.
        packed=_is_listed(module) and (division is None or division.mesh is not None),
        # Products by factors would gather those of a divided model twice.
        factored=module.dtype == torch.float32 and division is None,
        together=module.device.type != "cpu",
        equal_lengths=any(getattr(config, name, None) is not None for name in _CHOOSES_KEYS),
    )


def _is_listed(module: "PreTrainedModel") -> bool:
    """Return whether every layer computes what a listed family computes, with the whole sample in sight.

    Projections and norms are called as modules, so they may have hooks and forward functions of their own.
    """
    config = module.config.get_text_config()
    family = family_of(config)
    # Virtual keys and values of PEFT, as prefix tuning has them, stand before those of every sample.
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        return False
    if family is None or config._attn_implementation not in ("sdpa", "eager") or attention_window(config) is not None:
        return False
    layers: Any = decoder_layers(module)
    if any(type(layer.self_attn).__name__ != f"{family.prefix}Attention" for layer in layers):
        return False
    replaced = [part for layer in layers for part in (layer.self_attn, layer.mlp)]
    hooked = any(has_hooks(part) for part in replaced)
    return not hooked and not any("forward" in vars(part) for part in (*layers, *replaced))


class Computed(NamedTuple):
    """The gradients of a batch, perhaps still on their way to the CPU."""

    batch: Batch
    together: Tensor  # [B, ΣR] float32, all modules side by side
    losses: Tensor  # [M], of the completion tokens
    arrived: torch.cuda.Event | None  # after which the tensors may be read; None if they are there
    tokens: dict[str, Tensor]  # of each sample that came to each expert, [B, E] by module


class Replica:
    """A model that turns batches into δS gradients.

    Args:
        module: Model to copy, or to run itself where it is divided.
        factors: Factors of every target module whose gradients are wanted, whole or as `weight_svd` divides them.
        recipe: Choice among the exact ways.
        factored: Modules whose factors may stand for the weight in products, from `exact_factors`.
        recomputed: Number of layers, the first ones, that the backward pass computes again.
        division: How the model is divided; None for one that is copied.
        undo: Stack that puts a divided model back into the state in which it was; it is needed for such a model.

    Raises:
        LayersNotFound: The model has no head.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        module: "PreTrainedModel",
        factors: Mapping[str, Factors],
        recipe: Recipe,
        *,
        factored: Collection[str] = (),
        recomputed: int = 0,
        division: Division | None = None,
        undo: ExitStack | None = None,
    ) -> None:
        self._undo, self.division = undo or ExitStack(), division
        self.module = _shared_copy(module) if division is None else self._borrow(module)
        self.recipe, self.recomputed = recipe, recomputed
        self.kernels = load_kernels(module.device, module.dtype) if recipe.packed else None
        self._found: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._factors = factors
        self._batch: Batch | None = None
        self._head_sees_completions_only()
        if recipe.packed and (self.kernels is not None or self._on_cpu):
            self._fuse_norms()
        self._tap(factors, factored)
        if recipe.packed:
            self._pack_layers()
        for layer in decoder_layers(self.module)[:recomputed] if recomputed else ():
            self._replace(layer, _recomputed(layer.forward, self.module))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self, encoded: list[Encoded]) -> Computed:
        """Run one forward and one backward pass. On a GPU both are queued when this returns.

        Raises:
            RuntimeError: The batch does not fit (:func:`assay.errors.is_out_of_memory`).
        """
        # In the dtype of the weights, also in a training loop that computes in another one.
        device = self.module.device
        with current(device), torch.autocast(device.type, enabled=False), wide_products(self.module):
            return self._computed(encoded)

    def _computed(self, encoded: list[Encoded]) -> Computed:
        batch = Batch.build(encoded, self.module.device, packed=self.recipe.packed)
        self._batch = batch
        self._found.clear()
        self._tokens.clear()
        places = {} if batch.positions is None else {"position_ids": batch.positions}
        logits_MV = self.module(input_ids=batch.ids, use_cache=False, **places).logits.flatten(0, 1)
        if self.division is not None:
            check_logits(logits_MV, self.module.config.get_text_config().vocab_size, self.head)
        there = logits_MV.device  # another one than that of the ids, where the model is on several
        losses_M = TokenLoss.apply(logits_MV, batch.labels.to(there))  # type: ignore[no-untyped-call]
        del logits_MV
        tokens = dict(self._tokens)  # before the backward pass, in which layers that are computed again count again
        losses_M.backward(batch.loss_weights.to(there))
        together_BR = torch.cat([self._rows(name).to(there) for name in self.names], dim=1)
        arrived = torch.cuda.Event() if together_BR.is_cuda else None  # type: ignore[no-untyped-call]
        together_BR, losses_M = (part.to("cpu", non_blocking=True) for part in (together_BR, losses_M.detach()))
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(there))
        return Computed(batch, together_BR, losses_M, arrived, tokens)

    def _borrow(self, module: "PreTrainedModel") -> "PreTrainedModel":
        """Prepare the model itself for the pass, and note how to put it back."""
        self._undo.callback(reshard, module)
        modes = [(part, part.training) for part in module.modules()]
        required = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._undo.callback(lambda: [vars(part).update(training=mode) for part, mode in modes])
        self._undo.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in required])
        self._undo.callback(setattr, module.config, "_attn_implementation", module.config._attn_implementation)
        for part, _ in modes:
            part.training = False
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            # A trainer's forward function returns other things; that of device_map moves inputs to their device.
            self._undo.callback(vars(module).__setitem__, "forward", vars(module).pop("forward"))
        return module

    def _replace(self, part: nn.Module, forward: Callable[..., Any]) -> None:
        """Give a module another forward function."""
        if "forward" in vars(part):
            self._undo.callback(vars(part).__setitem__, "forward", vars(part)["forward"])
        else:
            self._undo.callback(vars(part).pop, "forward")
        vars(part)["forward"] = forward

    def _rows(self, name: str) -> Tensor:
        """Return what the pass left of a target, [B, R]: zeros where the loss of no sample goes through it."""
        found_BR = self._found.get(name)
        return torch.zeros(len(self.batch.encoded), self._factors[name].rank) if found_BR is None else found_BR

    @property
    def batch(self) -> Batch:
        """The batch that is being computed."""
        assert self._batch is not None
        return self._batch

    @property
    def _on_cpu(self) -> bool:
        return self.module.device.type == "cpu" and self.module.dtype in (torch.float32, torch.bfloat16)

    def _head_sees_completions_only(self) -> None:
        """Let the head see only the hidden states that predict a completion token, [1, M, hidden].

        With a large vocabulary the head takes most of the memory. Whatever the model does with the logits afterwards
        (scaling, capping) still happens.
        """
        self.head = head_of(self.module)
        # Before hooks that divide the hidden states over processes.
        self._undo.callback(self.head.register_forward_pre_hook(self._completions, prepend=True).remove)

    def _completions(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_ND = arguments[0].flatten(0, 1)
        return (hidden_ND.index_select(0, self.batch.label_rows.to(hidden_ND.device))[None],)

    def _fuse_norms(self) -> None:
        for part in self.module.modules():
            if is_plain_norm(part):
                self._replace(part, _norm_forward(part, self.kernels))

    def _pack_layers(self) -> None:
        register()
        self.module.config._attn_implementation = PACKED
        *_, last = layers = decoder_layers(self.module)
        together = self.recipe.together
        in_blocks = self._on_cpu and not together
        packed = PackedLayers(lambda: self.batch, self.kernels, together=together, in_blocks=in_blocks)
        for layer in layers:
            self._replace(layer, packed.forward(layer, labels_only=layer is last))

    def _tap(self, factors: Mapping[str, Factors], factored: Collection[str]) -> None:
        modules = {name: linear for name, linear in target_modules(self.module).items() if name in factors}
        self.names = list(modules)
        labels_only = _labels_only_prefixes(self.module) if self.recipe.packed else ()
        again = _prefixes(self.module, decoder_layers(self.module)[: self.recomputed]) if self.recomputed else ()
        experts = {name: part for name, part in self.module.named_modules() if is_fused(part)}
        # A model on several devices of one process has every matrix whole.
        division = self.division if self.division is not None and self.division.mesh is not None else None
        taps: dict[str, Tap] = {}
        for name, linear in modules.items():
            is_expert = name.rsplit(".", 2)[0] in experts
            taps[name] = Tap(
                name,
                linear,
                factors[name],
                self._found,
                self._label_segments if name.startswith(labels_only) else self._segments,
                factored=name in factored,
                together=self.recipe.together,
                checkpointing=name.startswith(again),
                kernels=None if is_expert else self.kernels,  # they want rows of every sample
                division=division,
            )
            if not is_expert:
                self._replace(linear, taps[name])
        for name, part in experts.items():
            apply = {each: tap.apply for each, tap in taps.items() if each.startswith(f"{name}.")}
            self._replace(part, ExpertsPass(name, part, apply, lambda: self.batch, self._tokens))

    def _segments(self) -> Segments:
        return self.batch.segments

    def _label_segments(self) -> Segments:
        return self.batch.label_segments


def _labels_only_prefixes(module: "PreTrainedModel") -> tuple[str, ...]:
    (name,) = _prefixes(module, decoder_layers(module)[-1:])
    return tuple(f"{name}{part}" for part in _LABELS_ONLY)


def _prefixes(module: nn.Module, parts: Iterable[nn.Module]) -> tuple[str, ...]:
    """Return what the names of all modules inside of these parts begin with, a dot at its end."""
    wanted = {id(part) for part in parts}
    return tuple(f"{name}." for name, part in module.named_modules() if id(part) in wanted)


def _shared_copy(module: "PreTrainedModel") -> "PreTrainedModel":
    """Return the tree of modules over the same memory, frozen, in evaluation mode, with a configuration of its own.

    By hand this takes 1.1 ms for the bundled models and 9 ms for Qwen3-4B; ``copy.deepcopy`` takes 14 and 55 ms, where
    the gradients of 24 samples take 38 and 585 ms on an H200 (research/results/vhack_gradients_h200_bfloat16.json).
    A module with a forward function of its own needs the deep copy: the function is bound to the module.
    """
    memo: dict[int, Any] = {id(part): nn.Parameter(part.detach(), requires_grad=False) for part in module.parameters()}
    memo |= {id(part): part for part in module.buffers()}
    # A trainer such as TRL gives the model itself another forward function, which returns other things and would run
    # the model instead of the copy. The copy computes by the function of the class.
    trainers = vars(module).pop("forward", None)
    try:
        if any("forward" in vars(part) for part in module.modules()):
            return cast("PreTrainedModel", copy.deepcopy(module, memo).eval())  # type: ignore[no-untyped-call]
        memo[id(module.config)] = copy.deepcopy(module.config)
        return cast("PreTrainedModel", _twin(module, memo))
    finally:
        if trainers is not None:
            vars(module)["forward"] = trainers


def _twin(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(part) in memo:
        return cast("nn.Module", memo[id(part)])
    twin = memo[id(part)] = object.__new__(type(part))
    for name, value in vars(part).items():
        twin.__dict__[name] = memo.get(id(value), value.copy() if isinstance(value, dict) else value)
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = {name: memo.get(id(value)) for name, value in part._parameters.items()}
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, memo) for name, child in part._modules.items()
    }
    return twin


def _recomputed(plain: Callable[..., Any], module: "PreTrainedModel") -> Callable[..., Any]:
    # The backward pass is outside of the contexts of the forward pass, and must compute the same.
    contexts = lambda: (nullcontext(), wide_products(module))  # noqa: E731
    # The first layer's input requires no gradient, which only the newer kind of checkpointing allows.
    return lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _norm_forward(part: nn.Module, kernels: ModuleType | None) -> Callable[[Tensor], Tensor]:
    norm: Any = part

    def forward(hidden_states: Tensor) -> Tensor:
        # The weight of now: FSDP2 puts another one there while the layer computes.
        result: Tensor = Norm.apply(hidden_states, norm.weight, norm.variance_epsilon, kernels)  # type: ignore[no-untyped-call]
        return result

    return forward
