"""A forward pass that leaves things out: the engine of every attack that saves work by skipping.

The attacker decides, for every position, through how many layers it goes, and for every layer whether its attention
and its MLP run, are dropped, or are replaced by a linear map. Of an MLP it may also leave out the neurons that a
position hardly uses. What is left out is not counted; all of it is never computed but the neurons, which are set to
zero here and would be skipped by a kernel made for it.

Legend of shapes: B nonces, T positions, A positions that a layer updates, V positions that it sees, D hidden size,
N rows, F neurons of an MLP, H heads, E head size; in the regressions E = D + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.errors import UsageError
from assay.models.decoder import (
    ATTENTION_TARGETS,
    MLP_TARGETS,
    ModuleLayer,
    Rotation,
    backbone,
    causal_attention,
    decoder_layers,
)
from assay.models.eight_bits import EightBitLinear
from assay.models.load import Model
from assay.models.wide import wide_products
from assay.poc.cheats import weight_of
from assay.poc.protocol.transforms import unit

RIDGE = 1e-4  # of the mean square of an input coordinate

Part = Literal["run", "drop", "linear"]


class Guesses:
    """What an attacker can know in advance: inputs are noise of a known law, so maps can be fitted before any round.

    For every layer, a linear map gives the update of the attention and of the MLP from their normed input; for every
    depth, one gives the final unit state from the state at that depth. All are ridge regressions on rounds of the
    attacker's own, so a guess shrinks towards the mean where it knows little.
    """

    def __init__(self, model: Model, inputs_BTD: Tensor) -> None:
        self.cost = model.hidden_size**2
        updates, states = _observe(model, inputs_BTD)
        with torch.inference_mode():
            body: Any = backbone(model.module)
            final_ND = unit(body.norm(states[-1])).float().flatten(0, 1)
            self._updates = {name: _fit(_with_one(x), y) for name, (x, y) in updates.items()}
            self._ends = [_fit(_with_one(unit(x)), final_ND) for x in states[:-1]]

    def update(self, part: str, index: int, x_BAD: Tensor) -> Tensor:
        """Return the update that attention or mlp of a layer would make, from its normed input [B, A, D]."""
        return _with_one(x_BAD) @ self._updates[part, index]

    def end(self, depth: int, x_BAD: Tensor) -> Tensor:
        """Return the final unit state of positions from their state before layer ``depth``."""
        return _with_one(unit(x_BAD)) @ self._ends[depth]


@dataclass(frozen=True)
class Shortcut:
    """What is left out.

    Args:
        depth: Number of layers that each position goes through, [T]; 0 for one that is never looked at.
        stale: Whether positions that left early stay visible to the others, with the state in which they left.
        attention: What happens to the attention of every layer; () runs all.
        mlp: What happens to the MLP of every layer; () runs all.
        window: Number of positions that attention looks back; 0 for all.
        neurons: Share of the neurons of every layer's MLP that are left out where they count least; () for none.
    """

    depth: tuple[int, ...]
    stale: bool = False
    attention: tuple[Part, ...] = ()
    mlp: tuple[Part, ...] = ()
    window: int = 0
    neurons: tuple[float, ...] = ()

    def layer(self, index: int) -> tuple[Part, Part, float]:
        """Return what happens to the attention and to the MLP of a layer, and the share of neurons left out."""
        attention: Part = self.attention[index] if self.attention else "run"
        mlp: Part = self.mlp[index] if self.mlp else "run"
        return attention, mlp, self.neurons[index] if self.neurons else 0.0


class PartialForward:
    """Runs a shortcut on a model of the Llama family; a UsageError where its layers have other parts.

    Guesses stand in for what is left out; without them a state stays as it is.
    """

    def __init__(self, model: Model, shortcut: Shortcut, guesses: Guesses | None = None) -> None:
        self._layers: Sequence[Any] = list(decoder_layers(model.module))
        self._body: Any = backbone(model.module)
        if not all(
            hasattr(getattr(layer, "self_attn", None), name) for layer in self._layers for name in ATTENTION_TARGETS
        ):
            raise UsageError(
                f"attacks by skipping on {model.architecture}",
                wanted="layers with q_proj, k_proj, v_proj and o_proj, as Llama and Qwen3 have them",
                do="attack another model, such as reference:qwen3",
            )
        if any(shortcut.neurons) and not all(
            hasattr(layer.mlp, name) for layer in self._layers for name in MLP_TARGETS
        ):
            raise UsageError(
                f"an attack on the neurons of {model.architecture}",
                wanted="MLPs with gate_proj, up_proj and down_proj",
                do="attack another model, such as reference:qwen3",
            )
        self.shortcut = shortcut
        self.guesses = guesses

    def read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Return what an engine would: the last state, or the weighted sum of the unit states, [B, D] in float32."""
        states_BTD = self.states(inputs_BTD)
        if weights_BT is None:
            return states_BTD[:, -1]
        return torch.bmm(weights_BT.unsqueeze(1), states_BTD).squeeze(1)

    @torch.inference_mode()
    def states(self, inputs_BTD: Tensor) -> Tensor:
        """Return a state for every position, [B, T, D] in float32: computed and made unit, or guessed.

        A guess keeps its length: it is shorter where the attacker knows less. Without guesses, a position that is never
        looked at contributes nothing, and one that left early has the state in which it left.
        """
        depth_T = torch.tensor(self.shortcut.depth, device=inputs_BTD.device)
        x_BTD = inputs_BTD.clone()
        rotary = self._body.rotary_emb(x_BTD, torch.arange(x_BTD.shape[1], device=x_BTD.device)[None])
        for index, layer in enumerate(self._layers):
            active_A = torch.nonzero(depth_T > index).flatten()
            visible_V = torch.nonzero(depth_T > 0).flatten() if self.shortcut.stale else active_A
            if len(active_A):
                seen_BVD = x_BTD[:, visible_V]
                partial = _PartialLayer(layer, self, index, rotary, (active_A, visible_V))
                with wide_products(x_BTD):
                    x_BTD[:, active_A] = partial(seen_BVD, layer.input_layernorm(seen_BVD))
        return self._ends(x_BTD, depth_T)

    def _ends(self, x_BTD: Tensor, depth_T: Tensor) -> Tensor:
        """Take the final norm where all layers ran; guess the final state from the last known one elsewhere."""
        ends_BTD: Tensor = unit(self._body.norm(x_BTD).float())
        for depth in sorted(set(self.shortcut.depth) - {len(self._layers)}):
            left_A = torch.nonzero(depth_T == depth).flatten()
            if self.guesses is not None:
                ends_BTD[:, left_A] = self.guesses.end(depth, x_BTD[:, left_A])
            elif depth == 0:
                ends_BTD[:, left_A] = 0
        return ends_BTD

    @property
    def cost(self) -> float:
        """Multiplications of this forward pass over those of the honest one; both count attention and linear layers."""
        full = Shortcut(depth=(len(self._layers),) * len(self.shortcut.depth))
        return self._count(self.shortcut) / self._count(full)

    def _count(self, shortcut: Shortcut) -> float:
        total = 0.0
        guessing = sum(depth < len(self._layers) for depth in shortcut.depth)
        for index, layer in enumerate(self._layers):
            attention, mlp, left_out = shortcut.layer(index)
            active = [t for t, depth in enumerate(shortcut.depth) if depth > index]
            visible = [t for t, depth in enumerate(shortcut.depth) if depth > 0] if shortcut.stale else active
            linear = layer.self_attn.q_proj.in_features**2
            if attention == "run":
                total += len(active) * (_size(layer.self_attn.q_proj) + _size(layer.self_attn.o_proj))
                total += len(visible) * (_size(layer.self_attn.k_proj) + _size(layer.self_attn.v_proj))
                total += 2 * layer.self_attn.q_proj.out_features * _pairs(active, visible, shortcut.window)
            elif attention == "linear":
                total += len(active) * linear
            if mlp == "run":
                products = (part for part in layer.mlp.modules() if isinstance(part, nn.Linear | EightBitLinear))
                sizes: float = sum(map(_size, products))
                if left_out:
                    sizes -= left_out * (_size(layer.mlp.up_proj) + _size(layer.mlp.down_proj))
                total += len(active) * sizes
            elif mlp == "linear":
                total += len(active) * linear
        return total + guessing * (self.guesses.cost if self.guesses else 0)


class _PartialLayer(ModuleLayer):
    """What a shortcut leaves of a layer, which updates the positions A among the positions V that it sees."""

    def __init__(
        self, layer: Any, forward: PartialForward, index: int, rotary: Rotation, positions: tuple[Tensor, Tensor]
    ) -> None:
        self.active_A, self.visible_V = positions
        at_active, at_visible = ((rotary[0][0, at, None], rotary[1][0, at, None]) for at in positions)
        super().__init__(layer, at_visible, at_active)
        self.forward, self.index = forward, index
        self.attention_kind, self.mlp_kind, self.neurons = forward.shortcut.layer(index)

    def updated(self, x: Tensor) -> Tensor:
        return x[:, torch.searchsorted(self.visible_V, self.active_A)]

    def attention(self, x: Tensor) -> Tensor:
        if self.attention_kind == "run":
            return super().attention(x)
        return self._guessed("attention", self.attention_kind, self.updated(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        back_AV = self.active_A[:, None] - self.visible_V[None]
        mask_AV = back_AV >= 0
        if window := self.forward.shortcut.window:
            mask_AV &= back_AV < window
        return causal_attention(q, k, v, self.layer.self_attn.scaling, mask_AV)

    def mlp(self, x: Tensor) -> Tensor:
        if self.mlp_kind != "run":
            return self._guessed("mlp", self.mlp_kind, x)
        whole: Tensor = super().mlp(x) if self.neurons else self.layer.mlp(x)
        return whole

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Leave out the neurons of least |gate| · ‖what it reads‖ · ‖what it writes‖, over the whole batch.

        The gate has to be computed to know them; with it, they are spared two of three products.
        """
        mlp = self.layer.mlp
        gate_BAF = mlp.act_fn(gate)
        norms_F = weight_of(mlp.up_proj).norm(dim=1) * weight_of(mlp.down_proj).norm(dim=0)
        worth_BAF = gate_BAF.float().abs() * norms_F
        least = worth_BAF.flatten().kthvalue(max(1, round(self.neurons * worth_BAF.numel()))).values
        kept: Tensor = torch.where(worth_BAF <= least, torch.zeros_like(gate_BAF), gate_BAF) * up
        return kept

    def _guessed(self, part: str, kind: Part, x_BAD: Tensor) -> Tensor:
        if kind == "drop" or self.forward.guesses is None:
            return torch.zeros_like(x_BAD)
        return self.forward.guesses.update(part, self.index, x_BAD).to(x_BAD.dtype)


def _size(layer: Any) -> int:
    return int(layer.in_features * layer.out_features)


def _pairs(active: Sequence[int], visible: Sequence[int], window: int) -> int:
    if not active or not visible:
        return 0
    back_AV = torch.tensor(active)[:, None] - torch.tensor(visible)[None]
    return int(((back_AV >= 0) & (back_AV < (window or 1 << 30))).sum())


def _observe(model: Model, inputs_BTD: Tensor) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], list[Tensor]]:
    """Run the honest model; return inputs and outputs of its parts, and the state before every layer and after all."""
    updates: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    states: list[Tensor] = []
    handles = []
    layers: Any = decoder_layers(model.module)

    def keep(part: str, index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, keywords: Any, output: Any) -> None:
            x = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            updates[part, index] = (x, output[0] if isinstance(output, tuple) else output)

        return hook

    for index, layer in enumerate(layers):
        handles.append(layer.self_attn.register_forward_hook(keep("attention", index), with_kwargs=True))
        handles.append(layer.mlp.register_forward_hook(keep("mlp", index), with_kwargs=True))
        handles.append(layer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0])))
    body: Any = backbone(model.module)
    handles.append(body.norm.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0])))
    try:
        with torch.inference_mode(), wide_products(model):
            body(inputs_embeds=inputs_BTD, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return updates, states


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression of y on x, rows over all leading dimensions."""
    x_NE, y_ND = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    gram_EE = x_NE.T @ x_NE
    ridge = RIDGE * gram_EE.diagonal().mean()
    solved: Tensor = torch.linalg.solve(
        gram_EE + ridge * torch.eye(len(gram_EE), dtype=torch.float64, device=gram_EE.device), x_NE.T @ y_ND
    )
    return solved.float()


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.float(), torch.ones_like(x[..., :1], dtype=torch.float32)], dim=-1)
