"""The gradient pass on the model itself, for models in parts: what FSDP2 and others hook onto cannot be copied.

Everything that is put onto the model is taken off again, whatever happens: forward functions, the mode of every module,
``requires_grad`` and the name of the attention.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from assay.vhack.gradients.batches import Segments
from assay.vhack.gradients.division import COLUMNS, ROWS, WHOLE, Division, gathering, is_sharded, lost_width, reshard
from assay.vhack.gradients.factors import Factors
from assay.vhack.gradients.replica import Recipe, Replica, recipe_for
from assay.vhack.gradients.taps import Tap, Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class InPlace(Replica):
    """A model in parts that turns batches into δS gradients; use it as a context manager.

    Args:
        module: Model, which is as it was after the block.
        factors: Factors of every target module whose gradients are wanted, whole or as `decompose` divides them.
        division: How the model is divided.
        recipe: Choice from `recipe_in_parts`.
        recomputed: Number of layers, the first ones, that the backward pass computes again.
    """

    def __init__(
        self,
        module: "PreTrainedModel",
        factors: Mapping[str, Factors],
        division: Division,
        recipe: Recipe,
        *,
        recomputed: int,
    ) -> None:
        self.division = division
        self._undo = ExitStack()
        with ExitStack() as failed:
            failed.callback(self._undo.close)
            super().__init__(module, factors, recipe, factored=(), recomputed=recomputed)
            self._undo.callback(self._on_head.remove)
            failed.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _taken(self, module: "PreTrainedModel") -> "PreTrainedModel":
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
        if "forward" in vars(part):
            self._undo.callback(vars(part).__setitem__, "forward", vars(part)["forward"])
        else:
            self._undo.callback(vars(part).pop, "forward")
        super()._replace(part, forward)

    def _made_tap(self, name: str, linear: nn.Linear, factors: Factors, **how: Any) -> Tap:
        if self.division.mesh is None:
            return super()._made_tap(name, linear, factors, **how)
        return PartTap(name, linear, factors, self._found, division=self.division, **how)

    def _check_logits(self, logits_MV: Tensor) -> None:
        vocabulary = self.module.config.get_text_config().vocab_size
        if is_sharded(logits_MV) or logits_MV.shape[-1] < vocabulary:
            raise lost_width(logits_MV, vocabulary, self.head)


def recipe_in_parts(module: "PreTrainedModel", division: Division) -> Recipe:
    """Return the fastest recipe that is exact: products by factors would gather them twice."""
    found = replace(recipe_for(module), factored=False)
    # Kernels are tried on one device, and samples packed there.
    return found if division.mesh is not None else replace(found, packed=False, fused=False, late=False)


class PartTap(Tap):
    """A tap of which each process computes its own terms, with its own part of the factors."""

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        factors: Factors,
        found: dict[str, Tensor],
        *,
        division: Division,
        **how: Any,
    ) -> None:
        super().__init__(name, linear, factors, found, **how)
        self.division, self.layout = division, division.layout(linear)
        self._coming: dict[str, Callable[[], Tensor]] = {}
        if self.layout != WHOLE and self.plain is None:
            self.plain = linear.forward  # whose product knows the placement of the weight

    def way(self, inputs_NI: Tensor, segments: Segments) -> Way:
        """Return the one way that is bilinear in what processes have parts of.

        Where whole samples are computed once, long inputs are kept as their few coordinates: Vh is then gathered in the
        forward pass and not in the other one.
        """
        is_once = self.division.by_samples and self.plain is None and not self.checkpointing
        is_shorter = self.factors.rank < self.linear.weight.shape[1]
        return Way("project", early=is_once and is_shorter, output=False, input=False)

    def fetch(self, *sides: str) -> None:
        own = {ROWS: "left", COLUMNS: "right"}.get(self.layout)
        self._coming |= {side: gathering(getattr(self.factors, side)) for side in sides if side != own}

    def _gathered(self, side: str) -> Tensor:
        coming = self._coming.pop(side, None)
        return (coming or gathering(getattr(self.factors, side)))()

    def left(self) -> Tensor:
        return self.division.part(self.factors.left, 0) if self.layout == ROWS else self._gathered("left")

    def right(self) -> Tensor:
        return self.division.part(self.factors.right, 1) if self.layout == COLUMNS else self._gathered("right")

    def own(self, gradient: Tensor) -> Tensor:
        if not is_sharded(gradient):
            return gradient
        from torch.distributed.tensor import Replicate, Shard

        wanted = Shard(gradient.ndim - 1) if self.layout == ROWS else Replicate()
        return gradient.redistribute(placements=[wanted]).to_local()

    def rows(self, kept: Tensor, second: Tensor, projected_NR: Tensor | None, segments: Segments, way: Way) -> Tensor:
        rows_BR = super().rows(kept, second, projected_NR, segments, way)
        # What every process computes whole, from all samples, is counted once.
        is_twice = not self.division.by_samples and self.layout == WHOLE and self.division.rank
        return torch.zeros_like(rows_BR) if is_twice else rows_BR
