"""LoRA in two blocks: one is kept, and one learns from flagged rollouts and is deleted.

Of a LoRA of rank 2r the first r rows are the kept block. Both begin exactly at zero. A rollout
trains the blocks of its kind: clean ones the kept block, flagged ones the other, and doubtful ones
both, whose common part is learnt by the block that is ahead and goes with it (vGROUT's routeA,
2026). Gradients of activations flow through both blocks for all. As with δS, in every second batch
of rollouts the kept block writes alone.

Shapes: B rollouts, T tokens, I inputs, O outputs, R rank of both blocks together.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import UsageError

CLEAN, FLAGGED, DOUBTFUL = range(3)
"""Kinds of rollouts."""


class LoraBlocks:
    """The two blocks of every LoRA of a model of PEFT, which still saves and loads it as one.

    Args:
        model: Model with one LoRA of even rank, before training.

    Raises:
        UsageError: The model has no LoRA, one of odd rank, or several, or trains other weights, or
            the half that is deleted does not begin at zero.

    Attributes:
        kinds: Kind of each rollout of the next passes, [B]; None outside of training.
        scale: Factor with which the block that is deleted writes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kinds: Tensor | None = None
        self.scale = 1.0
        self.pairs: list[tuple[nn.Linear, nn.Linear]] = []
        for part in model.modules():
            downs: Any = getattr(part, "lora_A", {})
            ups: Any = getattr(part, "lora_B", {})
            self.pairs += [(downs[name], ups[name]) for name in downs if len(downs) == 1]
        ranks = {down.out_features for down, _ in self.pairs}
        of_blocks = {linear.weight for pair in self.pairs for linear in pair}
        # Flagged rollouts would train them, and they would stay.
        others = [
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad and weight not in of_blocks
        ]
        # It would change the model when it is deleted.
        if any(up.weight[:, up.in_features // 2 :].any() for _, up in self.pairs):
            raise UsageError(
                "LoRA whose second half does not begin at zero",
                wanted="one that writes nothing before training",
                do="leave init_lora_weights of LoraConfig at its default",
            )
        if not ranks or others or any(rank % 2 for rank in ranks):
            raise UsageError(
                f"LoRA of rank {sorted(ranks)}; trained beside it: {', '.join(others[:1]) or None}",
                wanted="one LoRA of even rank, of which half is deleted in the end, and no more",
                do="pass peft_config=LoraConfig(r=...) with twice the rank that is to be kept, "
                "without DoRA, biases, embeddings and modules_to_save",
            )
        for down, up in self.pairs:
            vars(down)["forward"] = partial(_down, self, down)
            vars(up)["forward"] = partial(_up, self, up)

    def trained(self, rank: int) -> Tensor | None:
        """Return where a rollout trains a row of the blocks, [B, 1, R]; None stands for all."""
        # Passes without gradients may be of other rollouts.
        if self.kinds is None or not torch.is_grad_enabled():
            return None
        is_added_R = torch.arange(rank, device=self.kinds.device) >= rank // 2
        kinds_B11 = self.kinds[:, None, None]
        return torch.where(is_added_R, kinds_B11 != CLEAN, kinds_B11 != FLAGGED)

    @torch.no_grad()
    def delete(self) -> None:
        """Set the second block to zero: what is left is the kept block."""
        for down, up in self.pairs:
            half = down.out_features // 2
            down.weight[half:].zero_()
            up.weight[:, half:].zero_()

    def detach(self) -> None:
        """Let the LoRA compute as PEFT's own again."""
        for pair in self.pairs:
            for linear in pair:
                vars(linear).pop("forward", None)


def _down(blocks: LoraBlocks, linear: nn.Linear, inputs_BTI: Tensor) -> Tensor:
    """Compute ``lora_A``: the hidden rows of both blocks."""
    weight_RI = linear.weight
    hidden_BTR = functional.linear(inputs_BTI, weight_RI)
    if (trained_B1R := blocks.trained(len(weight_RI))) is not None:
        frozen_BTR = functional.linear(inputs_BTI, weight_RI.detach())
        hidden_BTR = torch.where(trained_B1R, hidden_BTR, frozen_BTR)
    factors_R = torch.ones(len(weight_RI), dtype=hidden_BTR.dtype, device=hidden_BTR.device)
    factors_R[len(weight_RI) // 2 :] = blocks.scale
    return hidden_BTR * factors_R


def _up(blocks: LoraBlocks, linear: nn.Linear, hidden_BTR: Tensor) -> Tensor:
    """Compute ``lora_B``: what both blocks write."""
    weight_OR = linear.weight
    trained_B1R = blocks.trained(weight_OR.shape[1])
    if trained_B1R is None:
        return functional.linear(hidden_BTR, weight_OR)
    learnt_BTO = functional.linear(hidden_BTR * trained_B1R, weight_OR)
    return learnt_BTO + functional.linear(hidden_BTR * ~trained_B1R, weight_OR.detach())
