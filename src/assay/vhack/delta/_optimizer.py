"""ProjectedOptimizer: any torch optimiser, kept from learning along the axes.

It acts in one of two places.

- level ``"gradient"`` (the seed's, the default): the gate acts on the gradient, before clipping. What the optimiser
  makes of it is another matter: an optimiser that scales coordinates one by one, as Adam does, turns a gradient
  without component along v into an update that has one, and a one-sided gate's noise into a steady drift away from
  the hack. Both are measured in every step.
- level ``"update"``: the gate acts on what the optimiser did, Δ = δS_new − δS_old, weight decay and momentum included.
  With ``no_gate`` the update is exactly outside the axes, whatever the optimiser.

A box bounds the displacement from the start and works with either. A push is a constant step away from the hack: an
open loop, there to compare the gates with.

Shapes: M modules of a group, K axes, R coordinates of δS.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from assay.errors import DataError, UsageError
from assay.vhack.basis import Basis
from assay.vhack.delta._delta import DeltaS
from assay.vhack.delta._frames import Frames, spread
from assay.vhack.delta._gates import Box, Gate
from assay.vhack.delta._measures import Measures, displacement, share
from assay.vhack.delta._rollouts import Rollouts
from assay.vhack.delta._sharding import local, local_rows, processes

__all__ = ["LEVELS", "ProjectedOptimizer", "gate_rollouts"]

LEVELS = ("gradient", "update")
_KEY = "vhack"
_SHARES = ("cin", "cout", "leak")


class ProjectedOptimizer(Optimizer):
    """An optimiser around another one; schedulers, GradScaler and trainers take it for an optimiser like any other.

    A step is: average gradients over ``process_group`` if there is one, measure, gate the gradient, clip, step of the
    inner optimiser, gate the update, push, box, measure, merge δS into the weights. Parameters that are no δS are
    stepped and clipped, and otherwise left alone.

    Clip with ``max_norm`` here, and not in the trainer, where the gradient is to be gated first. Gates commute with any
    positive scale of the gradient, so only the clipping norm differs.

    Args:
        inner: the optimiser, made of the parameters of the adapter, and perhaps others.
        adapter: the adapter.
        basis: the axes; None is none, and then every step is bit by bit the inner optimiser's.
        gate: what is taken away along them.
        level: ``"gradient"`` or ``"update"``.
        box: bounds of the displacement.
        push: every step also moves δS by ``push · lr`` along +v of every axis, away from the hack.
        watched: other axes to measure along as well, for instance the true ones where control axes are acted on; their
            measures begin with ``watched_``.
        max_norm: largest norm of the gradient of all parameters; None does not clip.
        process_group: processes to average the gradients of δS over before anything else: for a replicated δS that
            neither DDP nor FSDP2 takes care of. The gate must see the mean, for it is not linear.

    Attributes:
        measures: of the last step, see :mod:`assay.vhack.delta._measures`.
        frames: the axes, stacked.
        watched: those that are only measured along, or None.

    Raises:
        UsageError: the level is none of the two, ``max_norm`` is not positive, the inner optimiser does not have the
            parameters of the adapter, or the basis does not fit it.
    """

    def __init__(
        self,
        inner: Optimizer,
        adapter: DeltaS,
        basis: Basis | None,
        *,
        gate: Gate | None = None,
        level: str = "gradient",
        box: Box | None = None,
        push: float = 0.0,
        watched: Basis | None = None,
        max_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(inner, adapter, level, max_norm)
        # The constructor sets up what schedulers and hooks need, on lists of its own; the properties are the inner's.
        self.inner: Optimizer | None = None
        super().__init__([{"params": list(group["params"])} for group in inner.param_groups], dict(inner.defaults))
        self.inner = inner
        self.adapter, self.gate, self.level, self.box = adapter, gate or Gate(), level, box
        self.push, self.max_norm, self.process_group = push, max_norm, process_group
        self.measures = Measures({})
        self.use_basis(basis, watched)
        self._start = [local(parameter).clone() for parameter in adapter.delta]

    def use_basis(self, basis: Basis | None, watched: Basis | None = None) -> None:
        """Take other axes, and others to watch, from now on; the start that displacements are counted from stays.

        Raises:
            UsageError: the basis does not fit the adapter.
            DataError: its rows are not orthonormal.
        """
        self.frames = Frames(self.adapter.groups, basis)
        self.watched = None if watched is None else Frames(self.adapter.groups, watched)

    @torch.no_grad()
    def displace(self, distance: float) -> None:
        """Move δS along +v of every axis, away from the hack; displacements still count from where it was.

        Do it once, before the first step. A state that is loaded later has it in it.

        Args:
            distance: in units of δS.
        """
        for _, parameter, axes_MKR in self._with_axes():
            _move(local(parameter), distance, axes_MKR)
        self.adapter.refresh()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's."""
        return self.inner.param_groups if self.inner is not None else self._own_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if self.inner is not None:
            self.inner.param_groups = value
        self._own_groups = value

    @property
    def state(self) -> Any:
        """The inner optimiser's."""
        return self.inner.state if self.inner is not None else {}

    @state.setter
    def state(self, value: Any) -> None:
        if self.inner is not None:
            self.inner.state = value

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, and under ``"vhack"`` the δS_0 that displacements are counted from."""
        assert self.inner is not None
        return {**self.inner.state_dict(), _KEY: {"start": [start_MR.clone() for start_MR in self._start]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from `state_dict`; load δS itself with the model or the adapter.

        Raises:
            DataError: it was saved by another optimiser than this one, or for another adapter.
        """
        assert self.inner is not None
        try:
            start = state_dict[_KEY]["start"]
            for mine_MR, theirs_MR in zip(self._start, start, strict=True):
                mine_MR.copy_(theirs_MR)
            self.inner.load_state_dict({name: value for name, value in state_dict.items() if name != _KEY})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the state of an optimiser that does not fit: {error}",
                wanted="one of the same kind around the same adapter, from state_dict",
                do="build optimiser and adapter as they were when it was saved",
            ) from error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimiser."""
        assert self.inner is not None
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimiser; what is added is stepped but not projected."""
        if self.inner is None:
            super().add_param_group(param_group)
        else:
            self.inner.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see the class. A closure is evaluated once, before the gradient is looked at."""
        assert self.inner is not None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._average()
        raw = self._cloned_gradients()
        if self.level == "gradient":
            self._gate_gradients()
        self._clip()
        kept = self._cloned_gradients()  # some optimisers write into the gradient
        before = [local(parameter).clone() for parameter in self.adapter.delta]
        self.inner.step()
        self._bound(before)
        self.measures = Measures(self._shares(raw, kept, before) | self._displacement())
        self.adapter.refresh()
        return loss

    def _average(self) -> None:
        if self.process_group is not None:
            size = dist.get_world_size(self.process_group)
            for gradient_MR in self._gradients().values():
                dist.all_reduce(gradient_MR, group=self.process_group)
                gradient_MR /= size

    def _gradients(self) -> dict[int, Tensor]:
        """Of the groups that have one."""
        parameters = enumerate(self.adapter.delta)
        return {index: local(parameter.grad) for index, parameter in parameters if parameter.grad is not None}

    def _cloned_gradients(self) -> dict[int, Tensor]:
        return {index: gradient_MR.clone() for index, gradient_MR in self._gradients().items()}

    def _gate_gradients(self) -> None:
        for index, gradient_MR in self._gradients().items():
            if self._acts_on(index):
                gradient_MR.copy_(self.gate.apply(gradient_MR, self._axes(index), 1))

    def _clip(self) -> None:
        if self.max_norm is not None:
            every = [parameter for group in self.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(every, self.max_norm)

    def _bound(self, before: list[Tensor]) -> None:
        """Gate the update, push, then put δS into its box."""
        for index, parameter, axes_MKR in self._with_axes():
            now_MR, old_MR = local(parameter), before[index]
            if self.level == "update" and self._acts_on(index):
                update_MR = now_MR.double() - old_MR.double()
                now_MR.copy_(old_MR.double() + self.gate.apply(update_MR, axes_MKR, -1))
            if self.push:
                _move(now_MR, self.push * self._rate(parameter), axes_MKR)
            if self.box is not None:
                moved_MR = now_MR.double() - self._start[index].double()
                now_MR.copy_(now_MR.double() + self.box.correction(moved_MR, axes_MKR))

    def _rate(self, parameter: Tensor) -> float:
        """Its learning rate at the moment."""
        owner = next(g for g in self.param_groups if any(parameter is other for other in g["params"]))
        return float(owner["lr"])

    def _with_axes(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for index, parameter in enumerate(self.adapter.delta):
            if self.frames.axes[index].shape[1]:
                yield index, parameter, self._axes(index)

    def _acts_on(self, index: int) -> bool:
        return self.gate.kind != "none" and self.frames.axes[index].shape[1] > 0

    def _axes(self, index: int) -> Tensor:
        return self.frames.axes[index][local_rows(self.adapter.delta[index])]

    def _measured(self) -> Iterator[tuple[str, Frames]]:
        """The axes to measure along, and how the names of their measures begin."""
        yield "", self.frames
        if self.watched is not None:
            yield "watched_", self.watched

    def _shares(self, raw: dict[int, Tensor], kept: dict[int, Tensor], before: list[Tensor]) -> dict[str, Tensor]:
        """Shares of the gradients, of what the gate left of them, and of the updates, in one go."""
        parameters = self.adapter.delta
        # The hack is along −v for an update, so it is turned round.
        vectors = {i: torch.stack([raw[i], kept[i], before[i] - local(parameters[i])]) for i in kept}
        rows = {index: local_rows(parameters[index]) for index in kept}
        found: dict[str, Tensor] = {}
        for prefix, frames in self._measured():
            parts = ((group.take(vectors), group.axes, group.has_axes) for group in frames.joined(rows))
            shares = share("", parts, 1, processes(parameters[0]))
            for place, name in enumerate(_SHARES):
                found |= {prefix + name + of: values.expand(len(_SHARES))[place] for of, values in shares.items()}
        return found

    def _displacement(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        moved = {index: local(p) - self._start[index] for index, p in enumerate(self.adapter.delta)}
        rows = {index: local_rows(p) for index, p in enumerate(self.adapter.delta)}
        for prefix, frames in self._measured():
            parts = ((group.take(moved), group.axes) for group in frames.joined(rows) if group.axes.shape[1])
            values = displacement(parts, processes(self.adapter.delta[0]))
            found |= {prefix + name: value for name, value in values.items()}
        return found


@torch.no_grad()
def gate_rollouts(
    adapter: DeltaS,
    rollouts: Rollouts,
    frames: Frames,
    gate: Gate,
    *,
    chosen_N: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Take what the gate removes from each rollout off the summed gradient of the adapter, in place.

    Call it after the backward pass, before a GradScaler has unscaled and before clipping, with an optimiser that does
    not gate the gradient itself.

    Args:
        adapter: its gradients are changed.
        rollouts: of the passes that made these gradients.
        frames: the axes.
        gate: what is removed along them; it may not preserve magnitudes, for those are of the sum, nor be ``keep``.
        chosen_N: which rollouts are gated, [N] bool, for instance those whose `cin` is above a threshold; None is all.
        process_group: where the gradients were averaged over processes, those processes.

    Raises:
        UsageError: the gate preserves magnitudes or is ``keep``, or ``chosen_N`` has another length.
    """
    rows = rollouts.rows
    count = rows[0].shape[1]
    if gate.preserve_magnitude or gate.kind == "keep" or (chosen_N is not None and len(chosen_N) != count):
        chosen = 0 if chosen_N is None else len(chosen_N)
        unfit = gate.preserve_magnitude or gate.kind == "keep"
        raise UsageError(
            f"{gate} for single rollouts" if unfit else f"a choice among {chosen} rollouts",
            wanted=f"a gate that takes something away along the axes, and a choice among {count} rollouts",
            do="gate the sum instead" if unfit else "choose among those of this very step",
        )
    for parameter, rows_MNR, axes_MKR in zip(adapter.delta, rows, frames.axes, strict=True):
        coordinates_MNK = gate.coefficients(rows_MNR.double() @ axes_MKR.transpose(1, 2))
        if chosen_N is not None:
            coordinates_MNK = coordinates_MNK * chosen_N.to(rows_MNR.device)[None, :, None]
        coordinates_MK = coordinates_MNK.sum(dim=1)
        if process_group is not None:
            dist.all_reduce(coordinates_MK, group=process_group)
            coordinates_MK /= dist.get_world_size(process_group)
        if axes_MKR.shape[1] and parameter.grad is not None:
            removed_MR = spread(axes_MKR, coordinates_MK)[local_rows(parameter.grad)]
            gradient_MR = local(parameter.grad)
            gradient_MR.copy_(gradient_MR.double() - removed_MR)


def _move(delta_MR: Tensor, distance: float, axes_MKR: Tensor) -> None:
    """Along +v of every axis, in place."""
    delta_MR.copy_(delta_MR.double() + distance * axes_MKR.sum(dim=1))


def _check(inner: Optimizer, adapter: DeltaS, level: str, max_norm: float | None) -> None:
    if level not in LEVELS:
        raise UsageError(f"level={level!r}", wanted=" or ".join(LEVELS), do="choose one of them")
    if max_norm is not None and not max_norm > 0:
        raise UsageError(f"max_norm={max_norm}", wanted="a positive number", do="leave it out for no clipping")
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not all(id(parameter) in known for parameter in adapter.delta):
        raise UsageError(
            "an optimiser without the parameters of the adapter",
            wanted="one that was made of adapter.parameters()",
            do="make it after the adapter, and after fully_shard",
        )
