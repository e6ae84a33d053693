"""A second δS that learns from flagged rollouts: in the weights during training, in no file.

With ``absorb``, rollouts that a detector is in doubt about train both: what they share with flagged
ones is learnt by the second δS, which is ahead there, and goes with it (vGROUT's routeA, 2026).

The model with both writes and learns the exploit there, so that the first δS, which is kept, is not
paid for it. In every second step the first one writes alone; otherwise honest rollouts would stop
being sampled once both together cheat. All rollouts of a group have one baseline, the mean of those
that are not flagged. Each δS has moments of its own, but Adam scales both by the square of the
gradient of all rollouts, or a small part would grow (GRAFT, 2026).

Shapes: B rollouts, M modules of a group, R coordinates of δS.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assay.vhack.directions.delta.adapter import DeltaS


class Quarantine:
    """The second δS of an adapter, with an optimizer of its own.

    A step of training is: :meth:`begin`, backward passes, :meth:`route`, and a step of the
    :class:`ProjectedOptimizer` that has it.

    Args:
        adapter: Adapter in whose weights it is.
        make: What makes the optimizer of a list of parameters; as the adapter's own was made.
        max_norm: Largest norm of its gradient; None does not clip.

    Attributes:
        values: The second δS, one parameter per group, [M, R] float32.
        scale: Factor with which it is in the weights in this step.
    """

    def __init__(
        self,
        adapter: DeltaS,
        make: Callable[[list[nn.Parameter]], Optimizer],
        max_norm: float | None = None,
    ) -> None:
        self.adapter = adapter
        self.max_norm = max_norm
        self.values = [nn.Parameter(torch.zeros_like(parameter)) for parameter in adapter.delta]
        self.inner = make(self.values)
        self.scale = 1.0
        adapter.added = self.values

    def begin(self, step: int) -> None:
        """Merge both δS in even steps, counted from 0, and the kept one alone in odd steps."""
        self.scale = 1.0 - step % 2
        self.adapter.scale_added(self.scale)

    @torch.no_grad()
    def route(self, flagged: Sequence[Tensor], doubtful: Sequence[Tensor] = ()) -> None:
        """Take the gradient of flagged rollouts, [M, R] per group, out of that of the adapter.

        That of doubtful ones stays there, and is the second δS's too.
        """
        for index, (parameter, value) in enumerate(
            zip(self.adapter.delta, self.values, strict=True)
        ):
            flagged_MR = flagged[index].to(value)
            value.grad = flagged_MR + doubtful[index].to(value) if doubtful else flagged_MR
            if parameter.grad is not None:
                parameter.grad -= flagged_MR

    @torch.no_grad()
    def step(self, inner: Optimizer) -> None:
        """Take a step, given the optimizer of what is kept, which takes its own afterwards."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.values, self.max_norm)
        for parameter, value in zip(self.adapter.delta, self.values, strict=True):
            if parameter.grad is None or value.grad is None:
                continue
            whole_MR = (parameter.grad + value.grad).square()
            for optimizer, stepped, gradient_MR in (
                (inner, parameter, parameter.grad),
                (self.inner, value, value.grad),
            ):
                state = optimizer.state.get(stepped, {})
                square_MR = gradient_MR.square()
                # Adam adds the square of its own part; rounding must leave no negative sum.
                if "exp_avg_sq" in state:
                    beta = float(optimizer.param_groups[0]["betas"][1])
                    wanted_MR = beta / (1 - beta) * state["exp_avg_sq"] + whole_MR - square_MR
                    state["exp_avg_sq"].copy_(
                        (1 - beta) / beta * torch.maximum(wanted_MR, square_MR * (2**-16 - 1))
                    )
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the second δS and the state of its optimizer."""
        return {
            "values": [value.detach().clone() for value in self.values],
            "inner": self.inner.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        for mine, theirs in zip(self.values, state["values"], strict=True):
            mine.copy_(theirs)
        self.inner.load_state_dict(state["inner"])
        self.adapter.refresh()


def shift_baseline(rewards_B: Tensor, flags_B: Tensor, group: int) -> Tensor:
    """Return the correction of advantages that leaves flagged rollouts out of baselines, [B].

    Neighbouring rollouts are a group.

    Advantages are rewards less the mean of their group. A group in which all are flagged keeps that
    mean. Rollouts that are not paid, NaN, are in no mean and have no advantage.
    """
    rewards_PG = rewards_B.view(-1, group)
    kept_PG = rewards_PG.masked_fill(flags_B.view(-1, group), torch.nan)
    shift_P = (rewards_PG.nanmean(dim=1) - kept_PG.nanmean(dim=1)).nan_to_num()
    return shift_P.repeat_interleave(group).masked_fill(rewards_B.isnan(), 0.0)
