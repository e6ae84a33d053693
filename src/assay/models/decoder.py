"""The decoder of a causal language model: known families, and what one layer computes.

A family is listed when its layers are attention with rotary positions and a gated MLP, each after
an RMS norm that multiplies by its weight. Every other architecture runs as transformers defines it.
transformers is the definition, and tests hold every use against it. The listed families have one
layer (:class:`DecoderLayer`). The engine compiles it over fused weights. Packed gradients and
attacks run it through the modules of transformers (:class:`ModuleLayer`).

Shapes: B sequences, T positions, D hidden size, H query heads, K key heads, E head width, F width
    of the MLP.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import LayersNotFound

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of the projections of attention, in the order in which a layer uses them."""

MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Names of the projections of a gated MLP, in the order in which a layer uses them."""

TARGETS = ATTENTION_TARGETS + MLP_TARGETS
"""Names of all projections of a layer: the weight matrices that carry δS, which embeddings and the
head do not.
"""

FUSED_TARGETS = ("qkv_proj", "gate_up_proj")
"""Names of projections that hold several of these in one matrix, in other architectures; they carry
δS as a whole.
"""


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of positions, each pair's in both places; they broadcast with the heads."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LISTS_OF_LAYERS = ("layers", "h", "blocks")
_RECORDERS = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class DecoderFamily:
    """One architecture.

    Attributes:
        prefix: Prefix of its classes in transformers, for example ``"Llama"`` of
            ``LlamaAttention``.
        plain: Whether a layer adds what attention and MLP return as it is. Granite multiplies it
            first.
    """

    prefix: str
    plain: bool = True


FAMILIES = {
    "llama": DecoderFamily("Llama"),
    "mistral": DecoderFamily("Mistral"),
    "qwen2": DecoderFamily("Qwen2"),
    "qwen3": DecoderFamily("Qwen3"),
    "granite": DecoderFamily("Granite", plain=False),
}
"""The families by model type, as ``config.json`` names it."""

MIXTURES = {"qwen3_moe": DecoderFamily("Qwen3Moe")}
"""Architectures whose layers have a mixture of experts in place of the MLP, by model type. Only the
engine asks.
"""


def family_of(config: Any) -> DecoderFamily | None:
    """Return the family of a configuration or of its text decoder; None for one not listed."""
    return FAMILIES.get(config.get_text_config().model_type)


def expert_count(config: Any) -> int:
    """Return how many experts a layer chooses among; 0 without a mixture."""
    text_config = config.get_text_config(decoder=True)
    values = [getattr(text_config, name, None) for name in _EXPERT_COUNTS]
    count = max((value for value in values if type(value) is int), default=0)
    return count if count > 1 else 0


def mlp_width(config: Any) -> int:
    """Return the width of the widest MLP that a configuration states; 0 where it states none."""
    stated = getattr(config, "intermediate_size", None) or 0
    # Gemma 3n has one for each layer.
    return max(map(int, stated)) if isinstance(stated, list | tuple) else int(stated)


def attention_window(config: Any) -> int | None:
    """Return how many positions the shortest attention window spans; None if all layers see all.

    Layers of another kind than full or sliding attention count as a view of no positions.
    """
    text_config = config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return 0
    if kinds == {"full_attention"}:
        return None
    window = getattr(text_config, "sliding_window", None)
    return None if window is None else int(window)


def backbone(module: nn.Module) -> nn.Module:
    """Return the decoder without its head; it returns states after the final norm, [B, T, D]."""
    get_decoder = getattr(module, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    # The library finds none in Llama 4, and takes the head of ModernBERT for it.
    if decoder is module or isinstance(decoder, nn.Linear):
        decoder = getattr(module, "model", None)
    if isinstance(decoder, nn.Module) and decoder is not module:
        return decoder
    raise LayersNotFound(
        f"{type(module).__name__} has no decoder below its head",
        wanted="a causal language model of transformers (get_decoder() returns its backbone)",
        do="load the model with assay.models.load_model",
    )


def head_of(module: nn.Module) -> nn.Module:
    """Return the module that makes logits of the last hidden states."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Module):
        return head
    raise LayersNotFound(
        f"{type(module).__name__} has no output embeddings",
        wanted="a decoder with a head",
        do="use another architecture, such as Llama, Qwen3 or Mistral",
    )


def has_hooks(part: nn.Module) -> bool:
    """Return whether a module has forward hooks of its own; its submodules do not count.

    The hooks that transformers leaves behind after one call with ``output_hidden_states`` do
    nothing in a call without, so they do not count.
    """
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != _RECORDERS for hook in hooks)


def decoder_layers(module: nn.Module) -> nn.ModuleList:
    """Return the decoder layers in order, exactly ``config.num_hidden_layers`` of them."""
    decoder = backbone(module)
    lists = [getattr(decoder, name, None) for name in _LISTS_OF_LAYERS]
    layers = next((entry for entry in lists if isinstance(entry, nn.ModuleList)), None)
    config: Any = getattr(module, "config", None)
    expected = None
    if config is not None:
        expected = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is not None and len(layers) == expected:
        return layers
    count = (
        "no list of layers"
        if layers is None
        else f"{len(layers)} layers where the configuration says {expected}"
    )
    raise LayersNotFound(
        f"{type(decoder).__name__} has {count}",
        wanted=f"an nn.ModuleList named {', '.join(_LISTS_OF_LAYERS)} with "
        f"config.num_hidden_layers entries",
        do="use a model whose decoder layers can be found; hooks on a guess would measure "
        "something else",
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of the last axis by angles of positions (Su et al. 2021).

    Args:
        x: Queries or keys, [..., E].
        cos: Cosines of the angles, each pair's in both of its places; they broadcast with ``x``.
        sin: Sines of the angles, in the layout of the cosines.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_attention(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    scale: float | None = None,
    mask_TS: Tensor | None = None,
) -> Tensor:
    """Return what T queries gather from S keys, the heads side by side, [B, T, H·E].

    Args:
        q_BTHE: Queries.
        k_BSKE: Keys.
        v_BSKE: Values.
        scale: Scale of the scores; None is 1 / √E.
        mask_TS: Whether a query sees a key; None lets every position see itself and what stands
            before it.
    """
    a_BHTE = functional.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        scale=scale,
        enable_gqa=q_BTHE.shape[2] != k_BSKE.shape[2],
    )
    return a_BHTE.transpose(1, 2).flatten(2)


class DecoderLayer(ABC):
    """One layer of a listed family: attention and a gated MLP, each after a norm.

    The order of a layer is written here and nowhere else. Every use is a subclass that says how the
    steps are computed: projections, norms, attention and the gate. A layer may update only some of
    the positions that it sees; then ``updated`` chooses them. Leading axes are those of the use,
    and steps act on the last ones.

    Args:
        head_width: E.
        rotation: Rotation of the keys; None where ``attend`` rotates queries and keys.
        query_rotation: Rotation of the queries; None is that of the keys.
    """

    def __init__(
        self, head_width: int, rotation: Rotation | None, query_rotation: Rotation | None = None
    ) -> None:
        self.head_width = head_width
        self.rotation = rotation
        self.query_rotation = query_rotation or rotation

    def __call__(self, h: Tensor, x: Tensor) -> Tensor:
        """Return the residual stream after the layer, of the positions that it updates.

        Args:
            h: Residual stream of all positions that the layer sees, [..., D].
            x: Residual stream after the layer's input norm, [..., D].
        """
        h = self.add(self.updated(h), self.attention(x))
        return self.add(h, self.mlp(self.norm("post_attention_layernorm", h)))

    def attention(self, x: Tensor) -> Tensor:
        """Return what attention adds to the residual stream, from the normed input."""
        return self.project("o_proj", self.attend(*self.heads(x)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [..., H, E], keys and values [..., K, E], normed and rotated."""
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_width) for part in self.qkv(x))
        q = self.norm("q_norm", q)
        k = self.norm("k_norm", k)
        if self.rotation is not None and self.query_rotation is not None:
            q = rotate(q, *self.query_rotation)
            k = rotate(k, *self.rotation)
        return q, k, v

    def mlp(self, x: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream, from its normed input."""
        return self.project("down_proj", self.gated(*self.gate_up(x)))

    @abstractmethod
    def project(self, name: str, x: Tensor) -> Tensor:
        """Return the output of a projection, named as in :data:`assay.models.decoder.TARGETS`."""

    @abstractmethod
    def norm(self, name: str, x: Tensor) -> Tensor:
        """Return x after ``post_attention_layernorm``, ``q_norm`` or ``k_norm``, if it exists."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the queries gather, the heads side by side, [..., H·E]."""

    @abstractmethod
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the activated gate times the other projection into the MLP, [..., F]."""

    def qkv(self, x: Tensor) -> Iterable[Tensor]:
        """Return queries of the updated positions, and keys and values of all, unnormed."""
        return (
            self.project("q_proj", self.updated(x)),
            self.project("k_proj", x),
            self.project("v_proj", x),
        )

    def gate_up(self, x: Tensor) -> Iterable[Tensor]:
        """Return the outputs of the two projections into the MLP."""
        return self.project("gate_proj", x), self.project("up_proj", x)

    def updated(self, x: Tensor) -> Tensor:
        """Return the rows of the positions that the layer updates: here all."""
        return x

    def add(self, h: Tensor, update: Tensor) -> Tensor:
        """Return the residual stream after an update."""
        return h + update


class ModuleLayer(DecoderLayer):
    """A layer whose steps are the modules of transformers, with their hooks; ``attend`` is open.

    ``layer`` is of a listed family, and rotations are as in :class:`DecoderLayer`.
    """

    def __init__(
        self, layer: Any, rotation: Rotation | None, query_rotation: Rotation | None = None
    ) -> None:
        super().__init__(layer.self_attn.head_dim, rotation, query_rotation)
        self.layer = layer

    def project(self, name: str, x: Tensor) -> Tensor:
        """Return the output of a projection."""
        owner = self.layer.self_attn if name in ATTENTION_TARGETS else self.layer.mlp
        output: Tensor = getattr(owner, name)(x)
        return output

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Return x after a norm of the layer or of its attention."""
        owner = self.layer if name == "post_attention_layernorm" else self.layer.self_attn
        norm = getattr(owner, name, None)
        return x if norm is None else norm(x)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the activated gate times the other projection."""
        neurons: Tensor = self.layer.mlp.act_fn(gate) * up
        return neurons

    def add(self, h: Tensor, update: Tensor) -> Tensor:
        """Return the residual stream after an update, which Granite multiplies first."""
        multiplier: float | None = getattr(self.layer, "residual_multiplier", None)
        return h + (update if multiplier is None else update * multiplier)
