"""The policy gradient of δS for all runs at once.

The loss of a run is ``−(1/N) Σ_n w_n A_n Σ_t log π(token_nt)`` over its N rollouts, with the advantage A of a rollout
against the mean of its prompt's rollouts, not scaled (Dr. GRPO), and one optimiser step per batch, so that π is the
policy that wrote the student's rollouts. For stored rollouts w holds truncated importance weights per token, or 1 where
they count as if the policy had written them.

Shapes as in :mod:`assay_research.study.forward`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from assay_research.study.forward import StackedModel

# Completion tokens, and prompt tokens, that one pass keeps activations of, in a model of eight layers of width 256.
_TOKENS_AT_ONCE = {"cuda": 260_000, "cpu": 20_000}
_WIDTHS = 8 * 256
_MOST_WEIGHT = 2.0  # of a token of a stored rollout
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
    model: StackedModel,
    batch: Batch,
    advantages_RPG: Tensor,
    *,
    behaviour_RPGT: Tensor | None = None,
    divisor: int | None = None,
) -> list[Tensor]:
    """Return the gradient of the loss with respect to δS, per group [R, M, C] float32.

    Args:
        model: Model at the policy to improve.
        batch: Rollouts of that policy, or stored ones.
        advantages_RPG: Advantages of the rollouts.
        behaviour_RPGT: Log-probabilities under the policy that wrote the stored ones; a token then has the weight
            ``min(π / π_b, 2)``, through which no gradient flows; 1 where it is NaN.
        divisor: Divisor N of the loss; by default the rollouts of this batch.
    """
    batch = batch.trimmed()
    _, prompts, rollouts, length = batch.tokens.shape
    total: list[Tensor] = []
    for part in _parts(model, batch):
        some = batch.prompts(part)
        with torch.enable_grad():
            weighted = logprobs_RPGT = token_logprobs(model, some)
            if behaviour_RPGT is not None:
                ratio = (logprobs_RPGT.detach() - behaviour_RPGT[:, part, :, :length]).exp()
                weighted = logprobs_RPGT * ratio.clamp_max(_MOST_WEIGHT).nan_to_num(1.0)
            loss = -(weighted.sum(dim=-1) * advantages_RPG[:, part]).sum() / (divisor or prompts * rollouts)
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
