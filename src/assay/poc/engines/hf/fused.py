"""Kernels made for one shape: on CUDA a listed family between kernels of assay's own, replayed as
one CUDA graph.

All that stands between two products is one pass over memory. Queries, keys and values are one
product, and gate and up another; norms and rotation of queries and keys are one kernel. An update
of the residual stream is added by the product that makes it; in eight bits, by the norm that
follows, and the kernel before a product rounds its input. Attention is torch's, and so are most
products. Where only the last position is read, the last layer computes keys and values for every
position and all else for the last one. Nothing is compiled by Inductor, so the first batch takes a
second or two.

Any other model is compiled by Inductor, which may not choose kernels by timing them: two processes
with one fingerprint must return the same bits.

`prove` is 1.31, 1.19, 1.15 and 1.09 times as fast as the bare decoder of transformers under
`torch.compile`, for the shapes of 0.6, 1, 4 and 8 billion parameters in bfloat16 on an H200
(`prove_over_compiled` in research/results/gpu_prove_*.json), and in float8, with an earlier kernel
of the gate, 1.27, 1.48, 1.53 and 1.64 times as fast as in bfloat16:

    python research/benchmarks/gpu_prove.py --model shape:qwen3-0.6b --seconds 2

Legend of shapes: B nonces, T positions, D hidden size, H query heads, K key heads, G = H / K, E
head width, F width of the MLP; R is the rows of a fused projection.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from assay.models.decoder import (
    MIXTURES,
    DecoderLayer,
    Family,
    Rotation,
    attention_window,
    backbone,
    causal_attention,
    decoder_layers,
    family_of,
    has_hooks,
)
from assay.models.eight_bits import (
    Arithmetic,
    EightBitExperts,
    EightBitLinear,
    Rounded,
    sort_by_expert,
)
from assay.models.model import Model
from assay.models.precision import own_precision
from assay.poc.protocol.transforms import ROWS_OF_A_PRODUCT

# entry of a fingerprint's kernels: what stands between the products is assay's own, not Inductor's
FUSED = "fused"

_ACTIVATIONS = ("silu", "swish")
_UPDATES = ("o_proj", "down_proj")


@cache
def kernels() -> ModuleType:
    """Return the module of the kernels, which imports triton."""
    return import_module("assay.poc.engines.hf.kernels")


def fusible(model: Model, seq_len: int) -> bool:
    """Return whether the kernels serve a model, for sequences of this length: on CUDA, with triton
    and this activation.

    They do not after a change from outside: hooks, adapters, another attention, split or quantised
    weights.
    """
    in_bfloat16 = not model.quantised or model.dtype == torch.bfloat16
    runs = model.device.type == "cuda" and find_spec("triton") is not None
    return runs and in_bfloat16 and is_lean(model, seq_len)


def is_lean(model: Model, seq_len: int) -> bool:
    """Return whether a model is one of a listed family as transformers has it, for sequences of
    this length.
    """
    body = backbone(model.module)
    config = model.config
    family = family_of(config) or _mixture_of(model)
    window = attention_window(config)
    known = family is not None and family.plain and type(body).__name__ == f"{family.prefix}Model"
    if not known or not type(body).__module__.startswith("transformers.models."):
        return False
    whole = config._attn_implementation == "sdpa" and (window is None or window >= seq_len)
    return whole and config.hidden_act in _ACTIVATIONS and _is_plain(body)


def _mixture_of(model: Model) -> Family | None:
    """Return the family of a model whose every layer has a mixture of experts, or None."""
    family = MIXTURES.get(model.config.model_type)
    return (
        family
        if all(hasattr(layer.mlp, "experts") for layer in decoder_layers(model.module))
        else None
    )


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module and all inside it compute what their classes say, on whole tensors.

    Hooks, forward functions of their own, subclasses of Linear and split or quantised weights all
    say otherwise. All products are in the model's dtype, or all in one format of eight bits: where
    blocks share a scale, rows of several projections are one matrix only if each fills its blocks.
    """
    rounded = []
    others = False
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if (
            has_hooks(part)
            or "forward" in vars(part)
            or any(type(tensor.data) is not Tensor for tensor in own)
        ):
            return False
        if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
            return False
        if isinstance(part, EightBitLinear | EightBitExperts):
            rounded.append(part)
        else:
            others |= isinstance(part, nn.Linear) or any(
                weight.dim() > 2 for weight in own
            )  # of experts
    if not rounded:
        return True
    block = rounded[0].arithmetic.block
    whole = not block or all(
        part.out_features % block[0] == 0 for part in rounded if isinstance(part, EightBitLinear)
    )
    return whole and not others and len({part.arithmetic for part in rounded}) == 1


class LeanDecoder:
    """The layers of a model for which :func:`is_lean` is true as functions of tensors, for inputs
    of T positions.

    The weights are the model's own: fused ones take their place in memory, and the model's
    parameters become views.
    """

    def __init__(self, model: Model, seq_len: int) -> None:
        body: Any = backbone(model.module)
        layers: list[Any] = list(decoder_layers(model.module))
        cos_1TE, sin_1TE = body.rotary_emb(
            torch.empty(0, dtype=model.dtype, device=model.device),
            torch.arange(seq_len, device=model.device)[None],
        )
        self._rotation: Rotation = cos_1TE[0][:, None], sin_1TE[0][:, None]
        self._weights = [layer_weights(layer) for layer in layers]
        self._norms = [
            *(weights.input_layernorm for weights in self._weights[1:]),
            body.norm.weight,
        ]
        self._shape = layer_shape(layers[0])
        mixture = self._shape.chosen > 0
        self._layer, self._last = (
            (MixtureLayer, LastMixtureLayer) if mixture else (KernelLayer, LastKernelLayer)
        )

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last position's state after the final norm, [B, D] in float32."""
        return self._through(inputs_BTD, self._last).float()

    def hidden(self, inputs_BTD: Tensor, first: int = 0) -> Tensor:
        """Return the states of the positions from ``first`` on after the final norm, in the model's
        dtype.
        """
        return self._through(inputs_BTD, self._layer, first)

    def _through(self, inputs_BTD: Tensor, last: type["KernelLayer"], first: int = 0) -> Tensor:
        shape = self._shape
        by = self._shape.arithmetic
        h: Any = Residual(inputs_BTD.clone() if by is None else inputs_BTD)
        x = h.normed(self._weights[0].input_layernorm, shape.epsilon, by)
        for weights, next_norm in zip(self._weights[:-1], self._norms[:-1], strict=True):
            h = self._layer(shape, weights, self._rotation)(h, x)
            x = h.normed(next_norm, shape.epsilon, by)
        h = last(shape, self._weights[-1], self._rotation, first)(h, x)
        states: Tensor = h.normed(self._norms[-1], shape.epsilon, None)
        return states


@dataclass(frozen=True)
class Shape:
    """What is the same in every layer of a model."""

    heads: int  # H
    key_heads: int  # K
    head_width: int  # E
    scale: float  # of the attention scores
    epsilon: float  # of the norms
    chosen: int = 0  # experts of a position; 0 without a mixture
    shares_of_chosen: bool = False  # whether the shares of the chosen experts add up to one
    arithmetic: Arithmetic | None = None  # of products in eight bits


Projection = tuple[Tensor | Rounded, Tensor | None]
"""Weight [rows, columns] and bias of a projection; where the architecture has no bias it is None.
"""


class LayerWeights(NamedTuple):
    """The weights of one layer; a norm of heads that the architecture does not have is None."""

    input_layernorm: Tensor  # D
    qkv: Projection  # R, D
    q_norm: Tensor | None  # E
    k_norm: Tensor | None
    o_proj: Projection  # D, H·E
    post_attention_layernorm: Tensor  # D
    gate_up: Projection  # R, D; of a mixture E, R, D
    down_proj: Projection  # D, F; of a mixture E, D, F
    router: Tensor | None = None  # E, D


class Residual:
    """The residual stream [B, T, D], in memory of its own, and an update that the next norm adds to
    it.
    """

    def __init__(self, states: Tensor, update: Tensor | None = None) -> None:
        self.states = states
        self.update = update

    def normed(self, weight_D: Tensor, epsilon: float, by: Arithmetic | None) -> Any:
        """Add the update and return the norm of the sum, rounded for products in eight bits."""
        self.states, x = kernels().normalised(self.states, self.update, weight_D, epsilon, by)
        self.update = None
        return x


class Update(NamedTuple):
    """A product that is still to be made."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class KernelLayer(DecoderLayer):
    """A layer over a :class:`Residual`; x is a tensor, or rounded for products in eight bits.

    It updates the positions from ``first`` on. All of them attend, because their mask is the fast
    one.
    """

    def __init__(
        self, shape: Shape, weights: LayerWeights, rotation: Rotation, first: int = 0
    ) -> None:
        super().__init__(shape.head_width, rotation)
        self.shape, self.weights, self.by, self.first = shape, weights, shape.arithmetic, first

    @override
    def updated(self, x: Any) -> Any:
        return Residual(x.states[:, self.first :].contiguous()) if self.first else x

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
        norms = (self.weights.q_norm, self.weights.k_norm)
        counts = {"queries": queries, "heads": heads}
        kernels().turned(
            x,
            norms,
            self.rotation,
            self.shape.epsilon,
            **counts,
            width=self.head_width,
            first_position=first_position,
        )

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, self.shape.scale)[:, self.first :].contiguous()

    @override
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        raise AssertionError  # gate and up are one product, whose kernel is called by mlp()

    @override
    def mlp(self, x: Any) -> Any:
        return self.project("down_proj", kernels().gated(self.project("gate_up", x), self.by))

    @override
    def add(self, h: Any, update: Any) -> Any:
        if not isinstance(update, Update):
            return Residual(h.states, update)
        h.states.flatten(0, -2).addmm_(
            update.x.flatten(0, -2), update.weight.t()
        )  # in place, and rounds once
        if update.bias is not None:
            h.states.add_(update.bias)
        return h


class LastKernelLayer(KernelLayer):
    """The last layer for the last position; only keys and values are computed for every one."""

    @override
    def updated(self, x: Any) -> Any:
        if isinstance(x, Residual):
            return Residual(x.states[:, -1].contiguous())
        return (
            Rounded(*(part[:, -1].contiguous() for part in x))
            if isinstance(x, Rounded)
            else x[:, -1].contiguous()
        )

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
        q_BKGE = q.view(len(q), k.shape[2], -1, q.shape[-1])
        scores_BKGT = torch.matmul(q_BKGE, k.permute(0, 2, 3, 1)).float() * self.shape.scale
        return torch.matmul(scores_BKGT.softmax(dim=-1).to(v.dtype), v.transpose(1, 2)).flatten(1)


class MixtureLayer(KernelLayer):
    """A layer with a mixture of experts, whose router reads its input unrounded."""

    @override
    def norm(self, name: str, x: Any) -> Any:
        return x.normed(getattr(self.weights, name), self.shape.epsilon, None)

    @override
    def mlp(self, x: Any) -> Tensor:
        use = kernels()
        weights = self.weights
        rows_ND = x.flatten(0, -2)
        assert weights.router is not None
        shares_NK, chosen_NK = self.routed(rows_ND, weights.router)
        order_S, ends_E = sort_by_expert(chosen_NK, len(weights.router))
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        spread = use.spread(rows_ND, places_S, self.by)
        hidden = use.gated(self.grouped(spread, weights.gate_up[0], ends_E), self.by)
        sums_ND: Tensor = use.combined(
            self.grouped(hidden, weights.down_proj[0], ends_E), places_S, shares_NK
        )
        return sums_ND.view_as(x)

    def routed(self, x_ND: Tensor, router_ED: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of every row and their shares, as the router of transformers chooses
        them.
        """
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


def projected(x: Any, projection: tuple[Any, Tensor | None], by: Arithmetic | None) -> Tensor:
    """Return x Wᵀ + b, of an input that is rounded where the weight is."""
    if by is None:
        return functional.linear(x, *projection)
    return by.product(x, *projection, torch.bfloat16)


def parted(
    projection: Projection, rows: int, by: Arithmetic | None
) -> tuple[Projection, Projection]:
    """Return the first rows of a projection's weight and bias, and the others."""
    weight, bias = projection
    cuts = slice(rows), slice(rows, None)
    biases = [None if bias is None else bias[cut] for cut in cuts]
    if not isinstance(weight, Rounded):
        return (weight[cuts[0]], biases[0]), (weight[cuts[1]], biases[1])
    of_scales = rows // by.block[0] if by and by.block else rows
    scales = weight.scales[:of_scales], weight.scales[of_scales:]
    first, second = (
        Rounded(weight.values[cut], part) for cut, part in zip(cuts, scales, strict=True)
    )
    return (first, biases[0]), (second, biases[1])


def layer_shape(layer: Any) -> Shape:
    """Return the shape of a transformers layer."""
    attention = layer.self_attn
    router = getattr(layer.mlp, "gate", layer.mlp)
    mixture = hasattr(layer.mlp, "experts")
    return Shape(
        heads=attention.q_proj.out_features // attention.head_dim,
        key_heads=attention.k_proj.out_features // attention.head_dim,
        head_width=attention.head_dim,
        scale=float(attention.scaling),
        epsilon=float(layer.input_layernorm.variance_epsilon),
        chosen=int(router.top_k) if mixture else 0,
        shares_of_chosen=mixture and bool(router.norm_topk_prob),
        arithmetic=getattr(attention.q_proj, "arithmetic", None),
    )


def layer_weights(layer: Any) -> LayerWeights:
    """Return the weights of a transformers layer; fused ones take their place, and its parameters
    become views.
    """
    attention = layer.self_attn
    mlp = layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    mixture = hasattr(mlp, "experts")
    return LayerWeights(
        input_layernorm=layer.input_layernorm.weight.data,
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=None if q_norm is None else q_norm.weight.data,
        k_norm=None if k_norm is None else k_norm.weight.data,
        o_proj=_fused(attention.o_proj),
        post_attention_layernorm=layer.post_attention_layernorm.weight.data,
        gate_up=_stacked(mlp.experts, "gate_up_proj")
        if mixture
        else _fused(mlp.gate_proj, mlp.up_proj),
        down_proj=_stacked(mlp.experts, "down_proj") if mixture else _fused(mlp.down_proj),
        router=mlp.gate.weight.data if mixture else None,
    )


def _stacked(experts: Any, name: str) -> Projection:
    """Return the weights of all experts."""
    return experts.rounded(name) if isinstance(experts, EightBitExperts) else getattr(
        experts, name
    ).data, None


def _fused(*linears: nn.Linear | EightBitLinear) -> Projection:
    """Put the rows of several projections into one matrix, of which their weights become views."""
    weight = _joined([linear.weight for linear in linears])
    scales = [linear.scales for linear in linears if isinstance(linear, EightBitLinear)]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _joined(biases) if len(biases) == len(linears) else None
    return Rounded(weight, _joined(scales)) if scales else weight, bias


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parameters as one tensor, along the first axis, and make them views of it; done twice,
    nothing moves.
    """
    rows = [len(part) for part in parts]
    first = parts[0].data
    starts = [part.data.data_ptr() for part in parts]
    ends = [start + part.data.nbytes for start, part in zip(starts, parts, strict=True)]
    in_one = {part.data.untyped_storage().data_ptr() for part in parts}
    if len(in_one) == 1 and starts[1:] == ends[:-1]:
        return torch.as_strided(
            first, (sum(rows), *first.shape[1:]), first.stride(), first.storage_offset()
        )
    whole = torch.cat([part.data for part in parts])
    for part, piece in zip(parts, torch.split(whole, rows), strict=True):
        part.data = piece
    return whole


# In the order of preference; each serves what those before it do not.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Of Inductor: kernels follow from what they compute, never from a timing, whatever the process has
# set. They go with each function that is compiled: Dynamo puts torch's deterministic mode back
# after every trace, and with it Inductor's setting of that name, so a patch around many functions
# would hold for the first.
_KERNELS = {
    "deterministic": True,  # reductions have one configuration, and matrices are not padded
    "triton.autotune_pointwise": False,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "coordinate_descent_check_all_directions": False,
    "force_fuse_int_mm_with_mul": False,
}

# Every shape, dtype and model that a process proves is a variant of the same few functions.
_VARIANTS = 512


def worth_compiling(model: Model) -> bool:
    """Return whether ``prove`` compiles a model by default: on a CUDA device, where triton is
    installed.
    """
    return model.device.type == "cuda" and find_spec("triton") is not None


class CompiledForward:
    """Runs the decoder of a model on inputs of one fixed shape, B nonces of T positions.

    A model of a listed family runs between assay's own kernels where they serve it
    (:class:`LeanDecoder`), and any other one is compiled as a whole, as transformers has it. The
    last layer serves the last position alone where B rows are enough for products in which the
    place of a row does not matter: from :data:`ROWS_OF_A_PRODUCT` on.
    """

    def __init__(self, model: Model, batch_size: int, seq_len: int) -> None:
        self._model = model
        self.fused = fusible(model, seq_len)
        if self.fused:
            decoder = LeanDecoder(model, seq_len)
            hidden = decoder.hidden
            last_hidden = decoder.last_hidden
        else:
            body = torch.compile(backbone(model.module), dynamic=False, options=dict(_KERNELS))
            positions_1T = torch.arange(seq_len, device=model.device)[None]

            def hidden(inputs_BTD: Tensor, first: int = 0) -> Tensor:
                positions = {"position_ids": positions_1T.expand(len(inputs_BTD), -1)}
                states_BTD: Tensor = body(
                    inputs_embeds=inputs_BTD, use_cache=False, **positions
                ).last_hidden_state
                return states_BTD

        if not (self.fused and batch_size >= ROWS_OF_A_PRODUCT):

            def last_hidden(inputs_BTD: Tensor) -> Tensor:
                return hidden(inputs_BTD)[:, -1].float()

        self._last_hidden = _Graph(last_hidden) if self.fused else last_hidden
        self._hidden = cache(
            lambda first: _Graph(partial(hidden, first=first)) if self.fused else hidden
        )

    @cached_property
    def attention(self) -> str:
        """Which kernel attends. Asked for late: the question sets torch's choice for all threads of
        the process.
        """
        if not self.fused:
            return "sdpa"
        shape = layer_shape(decoder_layers(self._model.module)[0])
        model = self._model
        q, k = (
            torch.empty(1, count, 64, shape.head_width, dtype=model.dtype, device=model.device)
            for count in (shape.heads, shape.key_heads)
        )
        with sdpa_kernel(_ATTENTION, set_priority=True):
            chosen = torch._fused_sdp_choice(
                q, k, k, is_causal=True, enable_gqa=shape.heads != shape.key_heads
            )
        return f"sdpa {SDPBackend(chosen).name.removesuffix('_ATTENTION').lower()}"

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last position's state after the final norm, [B, D] in float32."""
        with _settings(inputs_BTD):
            return self._last_hidden(inputs_BTD)

    def hidden(self, inputs_BTD: Tensor, first: int = 0) -> Tensor:
        """Return the states after the final norm, in the model's dtype, of positions from ``first``
        on, or of all.
        """
        batch_size, seq_len, _ = inputs_BTD.shape
        with _settings(inputs_BTD):
            return self._hidden(
                first if batch_size * (seq_len - first) >= ROWS_OF_A_PRODUCT else 0
            )(inputs_BTD)


class _Graph:
    """A function of one tensor of fixed shape, recorded as a CUDA graph at its first call: a replay
    is one launch.

    It keeps nothing alive but its input and output, so what the function reads besides must stay
    where it is. It is recorded on a stream of its own, of the device of its input. Torch's own
    choice is one stream for the whole process: on that the products of a graph write to memory that
    another graph may give back; and it is of one device, so of a function on another one nothing
    would be recorded.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Tensor) -> Tensor:
        """Return what the function gives for a tensor."""
        if self._graph is None:
            self._input = given.clone()
            self._graph = torch.cuda.CUDAGraph()
            self._function(
                self._input
            )  # compiles; nothing may be compiled while a graph is recorded
            # Other threads, such as those of a service, may use the device meanwhile.
            stream: Any = torch.cuda.Stream(given.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = self._function(self._input)
        self._input.copy_(given)
        self._graph.replay()
        return self._output.clone()


@contextmanager
def _settings(inputs_BTD: Tensor) -> Iterator[None]:
    """Hold what decides about kernels, beside Inductor's settings, while they are compiled and
    while they run.
    """
    from torch._dynamo import config as dynamo

    with (
        dynamo.patch(recompile_limit=_VARIANTS, accumulated_recompile_limit=8 * _VARIANTS),
        sdpa_kernel(_ATTENTION, set_priority=True),
        own_precision(inputs_BTD),
    ):
        yield
