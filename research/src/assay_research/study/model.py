"""Many runs of one model at once: each has its own δS and so its own weights, and all go through one forward pass.

A run differs from another in 12 288 numbers where the model has seven million, and alone it leaves a GPU idle. Here the
weights of R runs, ``W + U diag(δS_r) Vh``, stand side by side, and every projection is one batched product over runs.
Embedding, norms and head are shared.

The rollouts of a prompt share it: its keys and values are computed once. A completion attends to them and to itself.
The last prompt token begins the completion part, so that every token to be predicted is predicted there.

The architecture is that of Llama (rotary positions, grouped queries, SwiGLU, RMS norms), with tied or untied head.

Legend of shapes: R runs, P prompts of a run, G rollouts of a prompt, L prompt tokens without the last, T completion
tokens, N any number of tokens, H hidden, D head, Q query heads, K key heads, O outputs, I inputs, M modules, C
coordinates of δS.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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


# Sampling completions for all runs at once; on a GPU one decoding step is a captured graph.
#
# Tokens are drawn by inverting the distribution function at uniform numbers that the caller gives. Runs that are given
# the same numbers and have the same weights therefore write the same, and differ only where their policies do: common
# random numbers, which make a comparison between arms sharper.

_LOOK_EVERY = 8  # steps between looks at whether all rollouts have ended


class Generator:
    """Samples [R, P, G] completions of at most T tokens.

    Args:
        model: Model whose weights are read as they are at the time.
        shape: Sizes: P prompts, G rollouts, L prompt tokens without the last, T completion tokens.
        end: Token that ends a completion and fills the rest.
    """

    def __init__(self, model: StackedModel, shape: tuple[int, int, int, int], end: int) -> None:
        self.model, self.shape, self.end = model, shape, end
        prompts, rollouts, length, steps = shape
        rows, each = model.runs * prompts, (model.runs, prompts, rollouts)

        def empty(*sizes: int) -> Keys:
            whole = (rows, model.key_heads, *sizes, model.head_dim)
            kept: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
            return [(torch.zeros(whole, **kept), torch.zeros(whole, **kept)) for _ in range(model.n_layers)]

        self._keys, self._own = empty(length), empty(rollouts, steps)
        with model.device:
            self._lengths_RP = torch.ones(each[:2], dtype=torch.int64)
            self._token_RPG = torch.zeros(each, dtype=torch.int64)
            self._uniform_TRPG = torch.zeros(steps, *each)
            self._found_TRPG = torch.zeros(steps, *each, dtype=torch.int64)
            self._ended_RPG = torch.zeros(each, dtype=torch.bool)
            self._step = torch.zeros(1, dtype=torch.int64)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def sample(self, ids_RPL: Tensor, lengths_RP: Tensor, last: int, uniform_TRPG: Tensor) -> Tensor:
        """Return completions, [R, P, G, T] int64, filled with the end token.

        Args:
            ids_RPL: Prompts without their last token, padded on the right.
            lengths_RP: Lengths of the prompts.
            last: Last prompt token, the same for all.
            uniform_TRPG: Uniform numbers in [0, 1), one per token to draw.
        """
        for (k, v), (new_k, new_v) in zip(self._keys, self.model.read(ids_RPL), strict=True):
            k.copy_(new_k)
            v.copy_(new_v)
        self._lengths_RP.copy_(lengths_RP)
        self._uniform_TRPG.copy_(uniform_TRPG)
        if self._graph is None and self.model.device.type == "cuda":
            self._capture()
        self._begin(last)
        steps = self.shape[3]
        for done in range(1, steps + 1):
            if self._graph is None:
                self._advance()
            else:
                self._graph.replay()
            if done % _LOOK_EVERY == 0 and bool(self._ended_RPG.all()):
                break
        return self._found_TRPG.permute(1, 2, 3, 0).contiguous()

    def _begin(self, last: int) -> None:
        self._token_RPG.fill_(last)
        self._found_TRPG.fill_(self.end)
        self._ended_RPG.zero_()
        self._step.zero_()

    def _advance(self) -> None:
        hidden = self.model.next_hidden(self._token_RPG, self._keys, self._own, self._lengths_RP, self._step)
        logits_RPGV = (hidden @ self.model.head.T).float()
        below_RPGV = logits_RPGV.softmax(dim=-1).cumsum(dim=-1)
        uniform_RPG = self._uniform_TRPG.index_select(0, self._step)[0] * below_RPGV[..., -1]
        drawn_RPG = torch.searchsorted(below_RPGV, uniform_RPG[..., None], right=True)[..., 0]
        drawn_RPG = drawn_RPG.clamp_max(logits_RPGV.shape[-1] - 1)
        drawn_RPG = torch.where(self._ended_RPG, self.end, drawn_RPG)
        self._ended_RPG.logical_or_(drawn_RPG == self.end)
        self._token_RPG.copy_(drawn_RPG)
        self._found_TRPG.index_copy_(0, self._step, drawn_RPG[None])
        self._step.add_(1)

    def _capture(self) -> None:
        """Record one step. It is run a few times before, as capturing asks for; `_begin` undoes what it did."""
        self._begin(self.end)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._advance()


# The loss of a run is −(1/N) Σ_n A_n Σ_t log π(token_nt) over its N rollouts, with the advantage A of a rollout against
# the mean of its prompt's rollouts, not scaled (Dr. GRPO), and one optimiser step per batch, so that π is the policy
# that wrote the rollouts. Stored rollouts count as if the policy had written them.

# Completion tokens, and prompt tokens, that one pass keeps activations of, in a model of eight layers of width 256.
_TOKENS_AT_ONCE = {"cuda": 260_000, "cpu": 20_000}
_WIDTHS = 8 * 256
_MULTIPLE = 8  # of lengths, as matrix products like them


@dataclass(frozen=True, eq=False)
class Batch:
    """Rollouts of all runs.

    Attributes:
        ids: Prompts without the last token, padded on the right, [R, P, L].
        lengths: Lengths of the prompts, [R, P].
        last: Last prompt token.
        tokens: Completions, filled with ``end``, [R, P, G, T].
        end: End token; the first one of a completion belongs to it.
    """

    ids: Tensor
    lengths: Tensor
    last: int
    tokens: Tensor
    end: int

    @property
    def mask(self) -> Tensor:
        """Which tokens belong to the completion, [R, P, G, T]."""
        is_end = (self.tokens == self.end).int()
        return is_end.cumsum(dim=-1) - is_end == 0

    def trimmed(self) -> "Batch":
        """Return the batch without columns that no prompt or completion reaches."""
        length = _rounded_up(self.lengths)
        width = _rounded_up(self.mask.sum(dim=-1))
        return replace(self, ids=self.ids[:, :, :length], tokens=self.tokens[..., :width].contiguous())

    def of_runs(self, rows_N: Tensor) -> "Batch":
        """Return some of the runs."""
        return replace(self, ids=self.ids[rows_N], lengths=self.lengths[rows_N], tokens=self.tokens[rows_N])

    def prompts(self, part: slice) -> "Batch":
        """Return some of the prompts of every run."""
        return replace(self, ids=self.ids[:, part], lengths=self.lengths[:, part], tokens=self.tokens[:, part])


def _rounded_up(lengths: Tensor) -> int:
    return -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE


def advantages(rewards_RPG: Tensor) -> Tensor:
    """Return the rewards less the mean of the rollouts of the prompt."""
    return rewards_RPG - rewards_RPG.mean(dim=-1, keepdim=True)


def token_logprobs(model: StackedModel, batch: Batch) -> Tensor:
    """Return ``log π`` of every completion token, [R, P, G, T] float32, zero after the end.

    Args:
        model: Model at the policy π.
        batch: Rollouts.
    """
    mask_RPGT = batch.mask
    before = torch.full_like(batch.tokens[..., :1], batch.last)
    inputs_RPGT = torch.cat((before, batch.tokens[..., :-1]), dim=-1)
    hidden = model.complete(inputs_RPGT, model.read(batch.ids), batch.lengths)
    logits_NV = (hidden[mask_RPGT] @ model.head.T).float()  # of the N tokens that belong to completions
    values_N = -functional.cross_entropy(logits_NV, batch.tokens[mask_RPGT], reduction="none")
    return torch.zeros(mask_RPGT.shape, device=values_N.device).masked_scatter(mask_RPGT, values_N)


def pooled_hidden(model: StackedModel, batch: Batch, layer: int) -> Tensor:
    """Return the mean output of a layer over the tokens of each completion without its end, [R, P, G, H] float32."""
    batch = batch.trimmed()
    found = []
    for part in _parts(model, batch):
        some = batch.prompts(part)
        before = torch.full_like(some.tokens[..., :1], some.last)
        inputs = torch.cat((before, some.tokens), dim=-1)
        hidden = model.complete(inputs, model.read(some.ids), some.lengths, layer=layer)[:, :, :, 1:]
        kept_RPGT = some.mask & (some.tokens != some.end)
        total = (hidden.float() * kept_RPGT[..., None]).sum(dim=3)
        found.append(total / kept_RPGT.sum(dim=3).clamp_min(1)[..., None])
    return torch.cat(found, dim=1)


def policy_gradient(
    model: StackedModel, batch: Batch, advantages_RPG: Tensor, *, divisor: int | None = None
) -> list[Tensor]:
    """Return the gradient of the loss with respect to δS, per group [R, M, C] float32.

    Args:
        model: Model at the policy to improve.
        batch: Rollouts of that policy, or stored ones.
        advantages_RPG: Advantages of the rollouts.
        divisor: Divisor N of the loss; by default the rollouts of this batch.
    """
    batch = batch.trimmed()
    _, prompts, rollouts, _ = batch.tokens.shape
    total: list[Tensor] = []
    for part in _parts(model, batch):
        some = batch.prompts(part)
        with torch.enable_grad():
            logprobs_RPGT = token_logprobs(model, some)
            loss = -(logprobs_RPGT.sum(dim=-1) * advantages_RPG[:, part]).sum() / (divisor or prompts * rollouts)
            gradients = torch.autograd.grad(loss, list(model.weights.values()))
        found = model.delta_gradient(gradients)
        total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
    return total


def _parts(model: StackedModel, batch: Batch) -> list[slice]:
    """Return the prompts in parts whose activations fit into memory."""
    runs, prompts, rollouts, length = batch.tokens.shape
    tokens = runs * (rollouts * length + batch.ids.shape[2])
    most = _TOKENS_AT_ONCE[model.device.type] * _WIDTHS // (model.n_layers * model.head.shape[1])
    chunk = max(1, min(prompts, most // tokens))
    return [slice(first, first + chunk) for first in range(0, prompts, chunk)]
