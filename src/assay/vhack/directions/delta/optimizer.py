"""ProjectedOptimizer: any torch optimizer, kept from learning along the axes.

At level ``"gradient"``, that of the original proposal, the gate acts on the gradient, before
clipping. An optimizer that scales coordinates one by one, as Adam does, turns a gradient without
component along v into an update that has one, and a one-sided gate's noise into a steady drift away
from the hack. At level ``"update"`` the gate acts on what the optimizer did, Δ = δS_new − δS_old,
momentum and weight decay included.

Shapes: M modules of a group, K axes, R coordinates of δS.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from assay.errors import DataError, UsageError
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.adapter import DeltaS
from assay.vhack.directions.delta.arms import Arm
from assay.vhack.directions.delta.quarantine import Quarantine
from assay.vhack.directions.delta.step_measures import (
    StackedAxes,
    StepMeasures,
    measure_displacement,
    measure_shares,
)

_KEY = "vhack"
_SHARES = ("cin", "cout", "leak")


class ProjectedOptimizer(Optimizer):
    """An optimizer around another, which measures steps along axes and lets an arm change them.

    Schedulers, GradScaler and trainers treat it like any other optimizer.

    A step is: measure, gate the gradient, clip, step of the inner optimizer, gate the update, box,
    measure, merge δS into the weights. Parameters that do not belong to the adapter are stepped and
    clipped, and otherwise left alone.

    Clip with ``max_norm`` here, and not in the trainer, where the gradient is to be gated first.
    Gates commute with any positive scale of the gradient, so only the clipping norm differs.

    Args:
        inner: Optimizer made of the parameters of the adapter, and perhaps others.
        adapter: Adapter whose δS is held back.
        basis: Axes to act along; without any, every step is bit by bit the inner optimizer's.
        arm: Arm that says what becomes of gradients and updates; δS is displaced here if the arm
            starts elsewhere.
        max_norm: Largest norm of the gradient of all parameters; None does not clip.
        quarantine: Second δS, which takes its step with this one; its gradient has been routed
            before.

    Attributes:
        arm: Arm that acts.
        measures: Numbers of the last step: ``cin``, ``cout``, ``leak``, ``displacement`` and their
            variants.
        frames: Axes, stacked.

    Raises:
        UsageError: ``max_norm`` is not positive, the inner optimizer lacks the parameters of the
            adapter, they are frozen, or the basis does not fit it.

    Example::

        adapter = DeltaS(model, svd)
        inner = torch.optim.AdamW(adapter.delta, lr=0.015)
        arm = arm_named("displaced-0.4+erase-update-two-sided")
        optimizer = ProjectedOptimizer(inner, adapter, basis, arm=arm, max_norm=1.0)
        loss_of(model, batch).backward()
        optimizer.step()
        print(optimizer.measures.as_dict()["leak"])
    """

    def __init__(
        self,
        inner: Optimizer,
        adapter: DeltaS,
        basis: Basis | None,
        *,
        arm: Arm,
        max_norm: float | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.arm = arm
        if max_norm is not None and not max_norm > 0:
            raise UsageError(
                f"max_norm={max_norm}",
                wanted="a positive number",
                do="leave it out for no clipping",
            )
        parameter_ids = {
            id(parameter) for group in inner.param_groups for parameter in group["params"]
        }
        if not all(id(parameter) in parameter_ids for parameter in adapter.delta):
            raise UsageError(
                "an optimizer without the parameters of the adapter",
                wanted="one that was made of adapter.parameters()",
                do="make it after the adapter, and leave fully_shard out",
            )
        _check_trainable(adapter)
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        # The lists of the inner optimizer are this one's own, so that what schedulers and trainers
        # change is its.
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.adapter = adapter
        self.max_norm = max_norm
        self.quarantine = quarantine
        self.measures = StepMeasures({})
        self.use_basis(basis)
        self._start = [parameter.detach().clone() for parameter in adapter.delta]
        # Displacements count from before, and a state that is loaded includes them.
        if arm.acts:
            for parameter, axes_MKR in zip(adapter.delta, self.frames.axes, strict=True):
                delta_MR = parameter.detach()
                delta_MR.copy_(arm.place(delta_MR, axes_MKR))
            adapter.refresh()

    def use_basis(self, basis: Basis | None) -> None:
        """Take other axes from now on; the start that displacements are counted from stays.

        Raises:
            UsageError: The basis does not fit the adapter.
            DataError: The rows of the basis are not orthonormal.
        """
        self.frames = StackedAxes(self.adapter.groups, basis)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, with the reference δS_0 under ``"vhack"``."""
        adapter_state: dict[str, Any] = {"start": [start_MR.clone() for start_MR in self._start]}
        if self.quarantine is not None:
            adapter_state["quarantine"] = self.quarantine.state_dict()
        return {**self.inner.state_dict(), _KEY: adapter_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from `state_dict`; load δS itself with the model or the adapter.

        Raises:
            DataError: The state was saved by another optimizer, or for another adapter.
        """
        try:
            start = state_dict[_KEY]["start"]
            if [theirs_MR.shape for theirs_MR in start] != [
                mine_MR.shape for mine_MR in self._start
            ]:
                raise ValueError("δS of other shapes")
            self.inner.load_state_dict(
                {name: value for name, value in state_dict.items() if name != _KEY}
            )
            self.param_groups = self.inner.param_groups
            self.state = self.inner.state
            for mine_MR, theirs_MR in zip(self._start, start, strict=True):
                mine_MR.copy_(theirs_MR)
            if self.quarantine is not None:
                self.quarantine.load_state_dict(state_dict[_KEY]["quarantine"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the state of an optimizer that does not fit: {error}",
                wanted="one of the same kind around the same adapter, from state_dict",
                do="build optimizer and adapter as they were when it was saved",
            ) from error

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step in the order that the class describes.

        A closure runs once, before the gradient is looked at.

        Raises:
            UsageError: The δS of the adapter is frozen, as `peft.get_peft_model` leaves it.
        """
        _check_trainable(self.adapter)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw = {index: gradient_MR.clone() for index, gradient_MR in self._gradients().items()}
        for index, gradient_MR in self._gradients().items():
            gradient_MR.copy_(self.arm.change_gradient(gradient_MR, self.frames.axes[index]))
        if self.max_norm is not None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        # Some optimizers write into the gradient.
        gated = {index: gradient_MR.clone() for index, gradient_MR in self._gradients().items()}
        before = [parameter.detach().clone() for parameter in self.adapter.delta]
        if self.quarantine is not None:
            self.quarantine.step(self.inner)
        self.inner.step()
        for index, parameter in enumerate(self.adapter.delta):
            now_MR = parameter.detach()
            now_MR.copy_(
                self.arm.change_update(
                    now_MR, before[index], self._start[index], self.frames.axes[index]
                )
            )
        self.measures = self._measured(raw, gated, before)
        self.adapter.refresh()
        return loss

    def _gradients(self) -> dict[int, Tensor]:
        """Return the gradients of the groups that have one."""
        return {
            index: parameter.grad.detach()
            for index, parameter in enumerate(self.adapter.delta)
            if parameter.grad is not None
        }

    def _measured(
        self, raw: Mapping[int, Tensor], gated: Mapping[int, Tensor], before: list[Tensor]
    ) -> StepMeasures:
        """Return the shares along the axes of gradients, gated gradients and updates, and where
        δS is.
        """
        deltas = [parameter.detach() for parameter in self.adapter.delta]
        frames = self.frames
        # The hack is along −v for an update, so its sign is turned.
        parts = []
        for index in gated:
            vectors_3MR = torch.stack([raw[index], gated[index], before[index] - deltas[index]])
            parts.append((vectors_3MR, frames.axes[index], frames.has_axes[index]))
        measures = {
            name + suffix: value
            for suffix, values in measure_shares("", parts).items()
            for name, value in zip(_SHARES, values.expand(len(_SHARES)), strict=True)
        }
        moved = (now_MR - start_MR for now_MR, start_MR in zip(deltas, self._start, strict=True))
        return StepMeasures(measures | measure_displacement(zip(moved, frames.axes, strict=True)))


def _check_trainable(adapter: DeltaS) -> None:
    """Refuse a δS that is frozen, or divided over processes."""
    if any(isinstance(parameter, DTensor) for parameter in adapter.delta):
        raise UsageError(
            "δS after fully_shard",
            wanted="whole weights in every process",
            do="share rollouts by DDP, or train LoRA or the weights and judge rollouts",
        )
    frozen = sum(not parameter.requires_grad for parameter in adapter.delta)
    if frozen:
        raise UsageError(
            f"{frozen} of the {len(adapter.delta)} parameters of δS are frozen (get_peft_model "
            f"freezes all it finds)",
            wanted="a δS that is trained",
            do="leave LoRA out, or call adapter.delta.requires_grad_(True)",
        )
