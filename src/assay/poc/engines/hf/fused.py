"""The lean decoder between kernels of its own: one pass over memory for all that stands between two products.

Norms and rotation of queries and keys are one kernel. An update of the residual stream is added by the product that
makes it; in eight bits, by the norm that follows, and the kernel before a product rounds its input. Attention is
torch's, and so are most products. Nothing is compiled by Inductor, so the first batch takes a second or two.

Against layers that Inductor compiles, the forward pass in bfloat16 is 1.06, 1.02, 1.03 and 1.01 times as fast for the
shapes of 0.6, 1, 4 and 8 billion parameters on an H200 (`last` over `inductor`), and `prove` in float8 is 1.27, 1.48,
1.53 and 1.64 times as fast as `prove` in bfloat16:

    python research/benchmarks/gpu_prove.py --model shape:qwen3-0.6b --seconds 2

Legend of shapes: as in `lean`.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from assay.models.decoder import Rotation, causal_attention
from assay.models.eight_bits import Arithmetic, Rounded, sort_by_expert
from assay.models.load import Model
from assay.poc.engines.hf.lean import FusedLayer, LayerWeights, Shape, Steps, last_attention, parted, projected

FUSED = "fused"
"""Entry of a fingerprint's kernels: what stands between the products is assay's own, not Inductor's."""

_ACTIVATIONS = ("silu", "swish")
_UPDATES = ("o_proj", "down_proj")


def fusible(model: Model) -> bool:
    """Return whether the kernels serve a model whose decoder is lean: on CUDA, with triton and this activation."""
    in_bfloat16 = not model.quantised or model.dtype == torch.bfloat16
    runs = model.device.type == "cuda" and find_spec("triton") is not None
    return runs and in_bfloat16 and model.config.hidden_act in _ACTIVATIONS


@cache
def kernels() -> ModuleType:
    """Return the module of the kernels, which imports triton."""
    return import_module("assay.poc.engines.hf.kernels")


class Residual:
    """The residual stream [B, T, D], in memory of its own, and an update that the next norm adds to it."""

    def __init__(self, states: Tensor, update: Tensor | None = None) -> None:
        self.states, self.update = states, update

    def normed(self, weight_D: Tensor, epsilon: float, by: Arithmetic | None) -> Any:
        """Add the update and return the norm of the sum, rounded for products in eight bits."""
        self.states, x = kernels().normalised(self.states, self.update, weight_D, epsilon, by)
        self.update = None
        return x

    def with_product(self, update: "Update") -> "Residual":
        """Return the sum with a product, which is added in place and rounds once."""
        self.states.flatten(0, -2).addmm_(update.x.flatten(0, -2), update.weight.t())
        if update.bias is not None:
            self.states.add_(update.bias)
        return self


class Update(NamedTuple):
    """A product that is still to be made."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class KernelLayer(FusedLayer):
    """A layer for every position, over a :class:`Residual`; x is a tensor, or rounded for products in eight bits."""

    def __init__(self, shape: Shape, weights: LayerWeights, rotation: Rotation) -> None:
        super().__init__(shape, weights, rotation)
        self.by = shape.arithmetic

    @override
    def project(self, name: str, x: Any) -> Any:
        if self.by is not None and not isinstance(x, Rounded):
            x = kernels().rounded(x, self.by)
        if name in _UPDATES and self.by is None:
            return Update(x, *getattr(self.weights, name))
        return projected(x, getattr(self.weights, name), self.by)

    @override
    def norm(self, name: str, x: Any) -> Any:
        return x.normed(getattr(self.weights, name), self.shape.epsilon, self.by)

    @override
    def heads(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        qkv_BTR = self.project("qkv", x)
        self.turn(qkv_BTR, queries=shape.heads, heads=shape.heads + shape.key_heads)
        parts = qkv_BTR.view(*qkv_BTR.shape[:-1], -1, self.head_width).split(
            [shape.heads, shape.key_heads, shape.key_heads], dim=-2
        )
        return parts[0], parts[1], parts[2]

    def turn(self, x: Tensor, *, queries: int, heads: int, first_position: int = 0) -> None:
        """Norm and rotate the first heads of every row in place."""
        norms, counts = (self.weights.q_norm, self.weights.k_norm), {"queries": queries, "heads": heads}
        kernels().turned(
            x, norms, self.rotation, self.shape.epsilon, **counts, width=self.head_width, first_position=first_position
        )

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, self.shape.scale).contiguous()

    @override
    def mlp(self, x: Any) -> Any:
        return self.project("down_proj", kernels().gated(self.project("gate_up", x), self.by))

    @override
    def add(self, h: Any, update: Any) -> Any:
        return h.with_product(update) if isinstance(update, Update) else Residual(h.states, update)


class LastKernelLayer(KernelLayer):
    """The last layer for the last position; only keys and values are computed for every one."""

    @override
    def updated(self, x: Any) -> Any:
        if isinstance(x, Residual):
            return Residual(x.states[:, -1].contiguous())
        return Rounded(*(part[:, -1].contiguous() for part in x)) if isinstance(x, Rounded) else x[:, -1].contiguous()

    @override
    def heads(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape, rows = self.shape, self.shape.heads * self.head_width
        q, kv = parted(self.weights.qkv, rows, self.by)
        kv_BTR = projected(x, kv, self.by)
        q_BR = projected(self.updated(x), q, self.by)
        self.turn(kv_BTR, queries=0, heads=shape.key_heads)
        self.turn(q_BR, queries=shape.heads, heads=shape.heads, first_position=kv_BTR.shape[1] - 1)
        k_BTKE, v_BTKE = kv_BTR.view(*kv_BTR.shape[:-1], -1, self.head_width).chunk(2, dim=-2)
        return q_BR.view(len(q_BR), -1, self.head_width), k_BTKE, v_BTKE

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return last_attention(q, k, v, self.shape.scale)


class MixtureLayer(KernelLayer):
    """A layer with a mixture of experts, whose router reads its input unrounded."""

    @override
    def norm(self, name: str, x: Any) -> Any:
        return x.normed(getattr(self.weights, name), self.shape.epsilon, None)

    @override
    def mlp(self, x: Any) -> Tensor:
        use, weights = kernels(), self.weights
        rows_ND = x.flatten(0, -2)
        assert weights.router is not None
        shares_NK, chosen_NK = self.routed(rows_ND, weights.router)
        order_S, ends_E = sort_by_expert(chosen_NK, len(weights.router))
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        spread = use.spread(rows_ND, places_S, self.by)
        hidden = use.gated(self.grouped(spread, weights.gate_up[0], ends_E), self.by)
        sums_ND: Tensor = use.combined(self.grouped(hidden, weights.down_proj[0], ends_E), places_S, shares_NK)
        return sums_ND.view_as(x)

    def routed(self, x_ND: Tensor, router_ED: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of every row and their shares, as the router of transformers chooses them."""
        shares_NE = functional.linear(x_ND, router_ED).softmax(dim=-1, dtype=torch.float)
        shares_NK, chosen_NK = shares_NE.topk(self.shape.chosen, dim=-1)
        if self.shape.shares_of_chosen:
            shares_NK = shares_NK / shares_NK.sum(dim=-1, keepdim=True)
        return shares_NK.to(x_ND.dtype), chosen_NK

    def grouped(self, x: Any, weights: Any, ends_E: Tensor) -> Tensor:
        """Return the products of rows that stand together with their expert's weight."""
        if self.by is None:
            return torch._grouped_mm(x, weights.transpose(-2, -1), offs=ends_E)
        return self.by.grouped_product(x, weights, ends_E, torch.bfloat16)


class LastMixtureLayer(MixtureLayer, LastKernelLayer):
    """The last layer of a mixture for the last position."""


def fused_steps(shape: Shape) -> Steps:
    """Return the steps of a decoder over the kernels, from the shape of its layers."""
    by = shape.arithmetic
    layer, last_layer = (MixtureLayer, LastMixtureLayer) if shape.chosen else (KernelLayer, LastKernelLayer)

    def norm(h: Tensor, weight: Tensor) -> tuple[Residual, Any]:
        residual = Residual(h.clone() if by is None else h)
        return residual, residual.normed(weight, shape.epsilon, by)

    def full(h: Any, x: Any, weights: LayerWeights, rotation: Rotation, next_norm: Tensor) -> tuple[Any, Any]:
        residual: Any = layer(shape, weights, rotation)(h, x)
        return residual, residual.normed(next_norm, shape.epsilon, by)

    def final(h: Any, x: Any, weights: LayerWeights, rotation: Rotation, final_norm: Tensor) -> Tensor:
        residual: Any = layer(shape, weights, rotation)(h, x)
        states: Tensor = residual.normed(final_norm, shape.epsilon, None)
        return states

    def last(h: Any, x: Any, weights: LayerWeights, rotation: Rotation, final_norm: Tensor) -> Tensor:
        residual: Any = last_layer(shape, weights, rotation)(h, x)
        states: Tensor = residual.normed(final_norm, shape.epsilon, None)
        return states.float()

    return Steps(norm, full, final, last)
