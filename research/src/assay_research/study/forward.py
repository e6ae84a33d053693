"""Many runs of one model at once: each has its own δS and so its own weights, and all go through one forward pass.

A run differs from another in 12 288 numbers where the model has seven million, and alone it leaves a GPU idle. Here the
weights of R runs, ``W + U diag(δS_r) Vh``, stand side by side, and every projection is one batched product over runs.
Embedding, norms and head are shared.

The rollouts of a prompt share it: its keys and values are computed once. A completion attends to them and to itself.
The last prompt token begins the completion part, so that every token to be predicted is predicted there.

The architecture is that of Llama (rotary positions, grouped queries, SwiGLU, RMS norms), with tied or untied head.

Shapes: R runs, P prompts of a run, G rollouts of a prompt, L prompt tokens without the last, T completion tokens, N any
number of tokens, H hidden, D head, Q query heads, K key heads, O outputs, I inputs, M modules, C coordinates of δS.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from assay.errors import ModelError
from assay.models.decoder import ATTENTION_TARGETS, DecoderLayer, Rotation, causal_attention
from assay.vhack.delta.groups import group_modules
from assay.vhack.gradients.svd import SVDCache, weight_svd
from assay.vhack.gradients.taps import delta_gradient
from assay.vhack.gradients.targets import module_of, target_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.models.load import Model


Keys = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values [R·P, K, L, D]."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_NEVER = -1e30  # not infinity: a row of nothing but those would be NaN


class StackedModel:
    """The weights of R runs and their forward pass.

    Args:
        model: Model from which all runs start; float32 for exact factors.
        runs: Number of runs, R.
        svd: Factors of its weights; None computes them.
        dtype: Dtype of the weights of the runs and of all activations; None is that of the model.

    Attributes:
        groups: Modules by shape, as in :class:`assay.vhack.delta.DeltaS`.
        weights: Weights per module name, [R, O, I], leaves of the graph; `merge` writes them.

    Raises:
        ModelError: The model is not a Llama.
    """

    def __init__(
        self, model: "Model | PreTrainedModel", runs: int, svd: SVDCache | None = None, dtype: torch.dtype | None = None
    ) -> None:
        module = module_of(model)
        config = module.config
        if config.model_type != "llama":
            raise ModelError(
                f"a {config.model_type} model", wanted="a model of type llama", do="use reference:llama or its organism"
            )
        self.runs, self.dtype = runs, dtype or module.dtype
        modules = target_modules(module)
        self.groups = group_modules(modules, svd if svd is not None else weight_svd(module))
        self.weights = {
            name: linear.weight.detach().to(self.dtype).expand(runs, -1, -1).clone().requires_grad_()
            for name, linear in modules.items()
        }
        self.key_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.eps, self.n_layers = config.rms_norm_eps, config.num_hidden_layers
        state = {name: value.detach().to(self.dtype) for name, value in module.named_parameters()}
        self.embedding = state["model.embed_tokens.weight"]
        self.head = state.get("lm_head.weight", self.embedding)
        self.norms = {name.removesuffix(".weight"): value for name, value in state.items() if "norm" in name}
        exponent = torch.arange(0, self.head_dim, 2, device=module.device, dtype=torch.float32) / self.head_dim
        self._frequencies = config.rope_parameters["rope_theta"] ** -exponent

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.device

    def some(self, rows: Tensor) -> "StackedModel":
        """Return some of the runs, with copies of their weights as they are now."""
        part = copy.copy(self)
        part.runs = len(rows)
        part.weights = {name: weight.detach()[rows].requires_grad_() for name, weight in self.weights.items()}
        return part

    @torch.no_grad()
    def merge(self, delta: Sequence[Tensor]) -> None:
        """Write ``W + U diag(δS) Vh`` of every run into its weights.

        Args:
            delta: Values of δS per group, [R, M, C] float32.
        """
        for group, delta_RMC in zip(self.groups, delta, strict=True):
            for m, name in enumerate(group.names):
                scaled_ROC = group.left[m] * delta_RMC[:, m, None]
                self.weights[name].copy_(torch.matmul(scaled_ROC, group.right[m]).add_(group.base[m]))

    @torch.no_grad()
    def delta_gradient(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of δS from that of the weights, ``diag(Uᵀ G Vhᵀ)``, per group [R, M, C] float32.

        Args:
            gradients: Gradients of `weights`, in its order, [R, O, I].
        """
        by_name = dict(zip(self.weights, gradients, strict=True))
        found = []
        for group in self.groups:
            matrices = zip(group.names, group.left, group.right, strict=True)
            rows = [delta_gradient(by_name[name].float(), left, right) for name, left, right in matrices]
            found.append(torch.stack(rows, dim=1))
        return found

    def read(self, ids_RPL: Tensor) -> Keys:
        """Return keys and values of the prompts. Padding is on the right, where causal attention does not look."""
        runs, prompts, length = ids_RPL.shape
        positions_N = torch.arange(length, device=self.device).repeat(prompts)
        found: Keys = []

        def attend(_: int, q_RNQD: Tensor, k_RNKD: Tensor, v_RNKD: Tensor) -> Tensor:
            q, k, v = (x.reshape(runs * prompts, length, -1, self.head_dim) for x in (q_RNQD, k_RNKD, v_RNKD))
            found.append((k.transpose(1, 2), v.transpose(1, 2)))
            return causal_attention(q, k, v).view(runs, prompts * length, -1)

        self._layers(self.embedding[ids_RPL.flatten(1)], positions_N.expand(runs, -1), attend, keys_only=True)
        return found

    def complete(self, ids_RPGT: Tensor, keys: Keys, lengths_RP: Tensor, *, layer: int | None = None) -> Tensor:
        """Return hidden states of the completion part after the last norm, [R, P, G, T, H].

        Args:
            ids_RPGT: Last prompt token, then completion tokens.
            keys: Keys and values of the prompts, from `read`.
            lengths_RP: Number of prompt tokens without the last.
            layer: Layer, counted from 0, whose output to return instead, without the norm.
        """
        runs, prompts, rollouts, length = ids_RPGT.shape
        steps_T = torch.arange(length, device=self.device)
        positions_RN = (lengths_RP[:, :, None, None] + steps_T).expand(-1, -1, rollouts, -1).flatten(1)
        before_BL = _padding(lengths_RP.flatten(), keys[0][0].shape[2], self.dtype)
        causal_TT = torch.where(steps_T <= steps_T[:, None], 0.0, _NEVER).to(self.dtype)

        def attend(i: int, q_RNQD: Tensor, k_RNKD: Tensor, v_RNKD: Tensor) -> Tensor:
            own = tuple(_by_rollout(x, runs * prompts, rollouts) for x in (k_RNKD, v_RNKD))
            return _attention(q_RNQD, keys[i], own, before_BL, causal_TT)

        x_RNH = self._layers(self.embedding[ids_RPGT.flatten(1)], positions_RN, attend, until=layer)
        return x_RNH.view(runs, prompts, rollouts, length, -1)

    def next_hidden(self, ids_RPG: Tensor, keys: Keys, own: Keys, lengths_RP: Tensor, step: Tensor) -> Tensor:
        """Return hidden states of one more token of every rollout, [R, P, G, H], for generation.

        Args:
            ids_RPG: Token of every rollout.
            keys: Keys and values of the prompts.
            own: Per layer, keys and values of the completions, [R·P, K, G, T, D]; position ``step`` is written.
            lengths_RP: Number of prompt tokens without the last.
            step: Number of the token, int64 [1], on the device: a captured graph reads it anew.
        """
        runs, prompts, rollouts = ids_RPG.shape
        positions_RN = (lengths_RP[:, :, None] + step).expand(-1, -1, rollouts).flatten(1)
        before_BL = _padding(lengths_RP.flatten(), keys[0][0].shape[2], self.dtype)
        steps_T = torch.arange(own[0][0].shape[3], device=self.device)
        seen_1T = torch.where(steps_T <= step, 0.0, _NEVER).to(self.dtype)[None]

        def attend(i: int, q_RNQD: Tensor, k_RNKD: Tensor, v_RNKD: Tensor) -> Tensor:
            for stored, new in zip(own[i], (k_RNKD, v_RNKD), strict=True):
                stored.index_copy_(3, step, _by_rollout(new, runs * prompts, rollouts))
            return _attention(q_RNQD, keys[i], own[i], before_BL, seen_1T)

        x_RNH = self._layers(self.embedding[ids_RPG.flatten(1)], positions_RN, attend)
        return x_RNH.view(runs, prompts, rollouts, -1)

    def _layers(
        self, x_RNH: Tensor, positions_RN: Tensor, attend: Attend, *, keys_only: bool = False, until: int | None = None
    ) -> Tensor:
        rotation = self._rotation(positions_RN)
        for i in range(self.n_layers):
            layer = _StackedLayer(self, i, rotation, attend)
            h_RNH = layer.norm("input_layernorm", x_RNH)
            if keys_only and i == self.n_layers - 1:
                attend(i, *layer.heads(h_RNH))
                return x_RNH
            x_RNH = layer(x_RNH, h_RNH)
            if i == until:
                return x_RNH
        return self.normed(x_RNH, "model.norm")

    def normed(self, x_RNH: Tensor, name: str) -> Tensor:
        """Return x after a norm of the model."""
        return functional.rms_norm(x_RNH, x_RNH.shape[-1:], self.norms[name], self.eps)

    def _rotation(self, positions_RN: Tensor) -> Rotation:
        angles_RND = (positions_RN[..., None].float() * self._frequencies).repeat(1, 1, 2)
        return angles_RND.cos().to(self.dtype)[:, :, None], angles_RND.sin().to(self.dtype)[:, :, None]


class _StackedLayer(DecoderLayer):
    """A layer of all runs: a projection is one batched product, and ``attend`` is that of the pass."""

    def __init__(self, model: StackedModel, index: int, rotation: Rotation, attend: Attend) -> None:
        super().__init__(model.head_dim, rotation)
        self.model, self.index, self.gather, self.prefix = model, index, attend, f"model.layers.{index}"

    def project(self, name: str, x: Tensor) -> Tensor:
        part = "self_attn" if name in ATTENTION_TARGETS else "mlp"
        return torch.bmm(x, self.model.weights[f"{self.prefix}.{part}.{name}"].transpose(1, 2))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x if name in ("q_norm", "k_norm") else self.model.normed(x, f"{self.prefix}.{name}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.gather(self.index, q, k, v)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up


def _padding(lengths_B: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.where(torch.arange(width, device=lengths_B.device) < lengths_B[:, None], 0.0, _NEVER).to(dtype)


def _by_rollout(x_RNKD: Tensor, batch: int, rollouts: int) -> Tensor:
    """Return keys or values as [B, K, G, T, D]."""
    return x_RNKD.reshape(batch, rollouts, -1, *x_RNKD.shape[2:]).permute(0, 3, 1, 2, 4)


def _attention(
    q_RNQD: Tensor, shared: tuple[Tensor, ...], own: tuple[Tensor, ...], before_BL: Tensor, after_ST: Tensor
) -> Tensor:
    """Return attention over the prompt's keys, which all rollouts share, and a rollout's own keys, [R, N, Q·D].

    Args:
        q_RNQD: Queries; N = P·G·S for S query tokens of a rollout.
        shared: Keys and values of the prompt, [B, K, L, D], B = R·P.
        own: Keys and values of the rollouts, [B, K, G, T, D].
        before_BL: Mask added to the scores of the prompt.
        after_ST: Mask added to the scores of the completion.
    """
    batch, heads, rollouts, _, width = own[0].shape
    q = q_RNQD.reshape(batch, rollouts, -1, heads, q_RNQD.shape[2] // heads, width).permute(0, 3, 1, 2, 4, 5)
    queries, many = q.shape[3:5]
    q = q * width**-0.5
    flat = q.reshape(batch, heads, rollouts * queries * many, width)
    first = torch.matmul(flat, shared[0].transpose(-1, -2)).view(batch, heads, rollouts, queries, many, -1)
    rows = q.reshape(batch, heads, rollouts, queries * many, width)
    second = torch.matmul(rows, own[0].transpose(-1, -2)).view(batch, heads, rollouts, queries, many, -1)
    first = first + before_BL[:, None, None, None, None]
    second = second + after_ST[:, None]
    weights = torch.cat((first, second), dim=-1).softmax(dim=-1)
    of_first, of_second = weights[..., : first.shape[-1]], weights[..., first.shape[-1] :]
    mixed = torch.matmul(of_first.reshape(batch, heads, rollouts * queries * many, -1), shared[1])
    other = torch.matmul(of_second.reshape(batch, heads, rollouts, queries * many, -1), own[1])
    return (mixed.view(q.shape) + other.view(q.shape)).permute(0, 2, 3, 1, 4, 5).reshape(*q_RNQD.shape[:2], -1)
