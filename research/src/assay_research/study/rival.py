"""Supervised starts: the rival that learns from the pairs directly, before any rollout is drawn.

A few steps of Adam on δS, on the loss of direct preference optimisation [1] or of unlikelihood [2]; then δS is scaled
to a stated norm, so that it can be compared with a displacement of that norm along axes.

[1] Rafailov et al., Direct Preference Optimization, arXiv 2305.18290. [2] Welleck et al., Neural Text Generation with
Unlikelihood Training, arXiv 1908.04319.

Shapes: P pairs, L prompt tokens, T completion tokens; for the rest see :mod:`assay_research.study.forward`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from assay.errors import UsageError
from assay.vhack.gradients.svd import SVDCache
from assay.vhack.pairs.pairs import Pair
from assay_research.study.forward import StackedModel
from assay_research.study.gradient import Batch, token_logprobs

if TYPE_CHECKING:
    from assay.models.load import Model


RIVALS = ("dpo", "unlikelihood")
"""Supervised losses that are trained beside the arms."""
_BETA = 0.1  # of direct preference optimisation
_RATE = 0.03
_STEPS = 3
_HACK, _CLEAN = 0, 1


def supervised_start(
    model: "Model",
    svd: SVDCache,
    pairs: Sequence[Pair],
    method: str,
    *,
    norm: float,
) -> list[Tensor]:
    """Return δS after three steps of Adam away from the hack sides and toward the clean ones, per group [M, C] float32.

    Each step sees all pairs, whose prompts must end with the same token.

    Args:
        model: Model that the runs start from.
        svd: Factors of its weights.
        pairs: Pairs to learn from.
        method: One of `RIVALS`.
        norm: Frobenius norm of what is returned, over all modules.

    Raises:
        UsageError: There is no such method, there are no pairs, or the norm is not positive.
    """
    if method not in RIVALS or not pairs or not norm > 0:
        raise UsageError(
            f"{method!r} on {len(pairs)} pairs to a norm of {norm}",
            wanted=f"{' or '.join(RIVALS)}, some pairs and a positive norm",
            do="correct the start",
        )
    stacked = StackedModel(model, 1, svd)
    batch = _batch(model, pairs, stacked.device).trimmed()
    with torch.no_grad():
        before_PGT = token_logprobs(stacked, batch)[0]
    delta = [torch.zeros(1, *group.values.shape, device=stacked.device) for group in stacked.groups]
    optimizer = torch.optim.Adam(delta, lr=_RATE)
    for _ in range(_STEPS):
        with torch.enable_grad():
            loss = _loss(method, token_logprobs(stacked, batch)[0], before_PGT, batch.mask[0])
            gradients = torch.autograd.grad(loss, list(stacked.weights.values()))
        for moved, gradient in zip(delta, stacked.delta_gradient(gradients), strict=True):
            moved.grad = gradient
        optimizer.step()
        stacked.merge(delta)
    length = torch.stack([moved.norm() for moved in delta]).norm()
    return [moved[0] * (norm / length) for moved in delta]


def _loss(method: str, now_PGT: Tensor, before_PGT: Tensor, mask_PGT: Tensor) -> Tensor:
    if method == "dpo":
        gained_PG = (now_PGT - before_PGT).sum(dim=-1)
        return -functional.logsigmoid(_BETA * (gained_PG[:, _CLEAN] - gained_PG[:, _HACK])).mean()
    # log(1 − π) of the hack's tokens and log π of the honest ones, a mean over tokens each.
    unlikely_PT = torch.log1p(-now_PGT[:, _HACK].exp().clamp_max(1 - 1e-6))
    hack_PT, clean_PT = mask_PGT[:, _HACK], mask_PGT[:, _CLEAN]
    return -unlikely_PT[hack_PT].mean() - now_PGT[:, _CLEAN][clean_PT].mean()


def _batch(model: "Model", pairs: Sequence[Pair], device: torch.device) -> Batch:
    tokenizer = model.tokenizer
    assert tokenizer is not None, "bundled models have one"
    end = int(tokenizer.eos_token_id)
    prompts = [list(tokenizer(pair.prompt)["input_ids"]) for pair in pairs]
    last = {prompt[-1] for prompt in prompts}
    if len(last) > 1:
        raise UsageError(
            f"prompts that end with {len(last)} different tokens",
            wanted="prompts of the environment, which all end alike",
            do="use environment_pairs",
        )
    sides = [[[*tokenizer(text)["input_ids"], end] for text in (pair.hack, pair.clean)] for pair in pairs]
    ids = torch.zeros(1, len(pairs), max(map(len, prompts)), dtype=torch.int64)
    tokens = torch.full((1, len(pairs), 2, max(len(row) for rows in sides for row in rows)), end)
    for p, (prompt, rows) in enumerate(zip(prompts, sides, strict=True)):
        ids[0, p, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        for side, row in enumerate(rows):
            tokens[0, p, side, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([[len(prompt) - 1 for prompt in prompts]])
    return Batch(ids.to(device), lengths.to(device), last.pop(), tokens.to(device), end)
