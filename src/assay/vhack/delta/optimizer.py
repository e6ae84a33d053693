"""ProjectedOptimizer: any torch optimizer, kept from learning along the axes.

At level ``"gradient"``, that of the original proposal, the gate acts on the gradient, before clipping. An optimizer
that scales coordinates one by one, as Adam does, turns a gradient without component along v into an update that has
one, and a one-sided gate's noise into a steady drift away from the hack. At level ``"update"`` the gate acts on what
the optimizer did, Δ = δS_new − δS_old, momentum and weight decay included.

Shapes: M modules of a group, K axes, R coordinates of δS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from assay.errors import DataError, UsageError
from assay.vhack.basis.basis import Basis
from assay.vhack.delta.arms import Arm, Box, Gate, apply_arm, displaced, gated_gradient
from assay.vhack.delta.delta import DeltaS, Group
from assay.vhack.gradients.division import local, local_rows, processes

# --------------------------------------------------------------------------------------------------
# The axes of a basis, stacked to fit the groups of an adapter, and what a step did along them.
#
# Axes are float64, because what is asserted about them is exact: ``V Δ = 0`` for an update that is projected. They are
# few numbers, so it costs nothing. Axes that come from a float32 decomposition are orthonormal to 1e-6; here they are
# made so to 1e-12 by Newton's iteration for the nearest orthonormal frame, ``V ← (3/2 − V Vᵀ / 2) V``. It leaves zero
# rows zero: the rows of modules that the basis does not have, and of axes that it has dropped.
#
# What is measured along them in every step:
#
#     cin           ‖relu(V g)‖ / ‖g‖ of the gradient before a gate, cout of the one after it
#     leak          ‖relu(−V Δ)‖ / ‖Δ‖ of the update Δ that the optimizer made in the end: the honest cout
#     displacement  V (δS − δS_0): how far δS went and in which direction; + is away from the hack
#
# The shares are means over the modules that have axes. Two-sided shares have ‖V x‖ instead of ‖relu(V x)‖, and *energy*
# is ``√(Σ‖relu(V g)‖² / Σ‖g‖²)``, in which small modules do not count as much as large ones.
#
# Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, one per run for instance, are kept.

# How far from orthonormal the axes of a file may be; applied twice, Newton's iteration makes 1e-3 into 1e-12.
_SKEW = 1e-3
_ITERATIONS = 3
_SHARE = ("", "_two_sided", "_energy")


def along(axes_MKR: Tensor, vectors_MR: Tensor) -> Tensor:
    """Return ``V x`` of every module, [..., M, K] float64."""
    return torch.einsum("...mkr,...mr->...mk", axes_MKR, vectors_MR.double())


def spread(axes_MKR: Tensor, coordinates_MK: Tensor) -> Tensor:
    """Return ``Vᵀ c`` of every module, [..., M, R] float64."""
    return (coordinates_MK.unsqueeze(-2) @ axes_MKR).squeeze(-2)


class Frames:
    """Axes per group of an adapter.

    Args:
        groups: Groups of the adapter.
        basis: Axes by module name; None stands for no axis at all.

    Attributes:
        axes: Axes per group, [M, K, R] float64; rows that stand for no axis are zero.
        has_axes: Per group, whether each module has an axis, [M] bool.

    Raises:
        UsageError: The basis has modules that the adapter lacks, or more coordinates than the adapter.
        DataError: The rows of the basis are not orthonormal.
    """

    def __init__(self, groups: Sequence[Group], basis: Basis | None) -> None:
        axes = {} if basis is None else basis.axes
        known = {name for group in groups for name in group.names}
        unknown = [name for name in axes if name not in known]
        if unknown:
            raise UsageError(
                f"axes of {unknown[0]}", wanted="a basis of this model", do="extract one with this very model"
            )
        self.axes = tuple(_stack(group, axes) for group in groups)
        self.has_axes = tuple(axes_MKR.any(dim=2).any(dim=1) for axes_MKR in self.axes)

    def __bool__(self) -> bool:
        return any(axes_MKR.shape[1] for axes_MKR in self.axes)


def _stack(group: Group, axes: dict[str, Tensor]) -> Tensor:
    found = {index: axes[name] for index, name in enumerate(group.names) if name in axes and axes[name].any()}
    most = max((len(axes_KR) for axes_KR in found.values()), default=0)
    stacked_MKR = group.left.new_zeros(len(group.names), most, group.rank, dtype=torch.float64)
    for index, axes_KR in found.items():
        if axes_KR.shape[1] > group.rank:
            raise UsageError(
                f"axes of {group.names[index]} with {axes_KR.shape[1]} coordinates",
                wanted=f"at most {group.rank}, those of the adapter",
                do="decompose the weights with the rank of the basis",
            )
        stacked_MKR[index, : len(axes_KR), : axes_KR.shape[1]] = axes_KR
    return _orthonormal(stacked_MKR, group.names)


def _orthonormal(axes_MKR: Tensor, names: Sequence[str]) -> Tensor:
    ones_MK = axes_MKR.any(dim=2).double()
    skew_M = (axes_MKR @ axes_MKR.transpose(1, 2) - torch.diag_embed(ones_MK)).flatten(1).norm(dim=1)
    if not bool((skew_M <= _SKEW).all()):  # NaN is not smaller either
        worst = int(skew_M.nan_to_num(torch.inf).argmax())
        raise DataError(
            f"axes of {names[worst]} that are {float(skew_M[worst]):.2g} away from orthonormal",
            wanted="orthonormal rows, or zero ones",
            do="extract the basis again",
        )
    for _ in range(_ITERATIONS):
        axes_MKR = 1.5 * axes_MKR - 0.5 * (axes_MKR @ axes_MKR.transpose(1, 2)) @ axes_MKR
    return axes_MKR


@dataclass(frozen=True, eq=False)
class Measures:
    """The numbers of one step by name, each a tensor without dimensions, which stays on its device until `as_dict`."""

    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, float]:
        """Return the numbers, copied from the device at once: one wait for it per step, or none."""
        values = torch.stack(list(self.tensors.values())).tolist() if self.tensors else []
        return dict(zip(self.tensors, values, strict=True))


def share(
    name: str,
    vectors: Iterable[tuple[Tensor, Tensor, Tensor]],
    sign: int,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Return the shares of gradients (sign 1) or updates (sign −1) along the axes, by name.

    Args:
        name: Name of the numbers; ``_two_sided`` and ``_energy`` are added to it.
        vectors: Per group, vectors [..., M, R], axes [..., M, K, R] and whether a module has axes, [..., M]. The shares
            have the dimensions before M.
        sign: Direction of the hack along the axes, see :class:`assay.vhack.delta.Gate`.
        process_group: Processes that the modules are spread over, if they are.
    """
    # Sums over modules: one-sided share, two-sided share, ‖relu(c)‖², ‖x‖², 1.
    sums = []
    for vectors_MR, axes_MKR, has_M in vectors:
        hackward_MK = sign * along(axes_MKR, vectors_MR)
        size_M = vectors_MR.double().norm(dim=-1)
        one_M, two_M = hackward_MK.relu().norm(dim=-1), hackward_MK.norm(dim=-1)
        divisor_M = torch.where(size_M > 0, size_M, 1.0)
        parts_5M = torch.stack([one_M / divisor_M, two_M / divisor_M, one_M**2, size_M**2, torch.ones_like(size_M)])
        sums.append((parts_5M * has_M).sum(dim=-1))
    total = torch.stack(sums).sum(dim=0) if sums else torch.zeros(5, dtype=torch.float64)
    if process_group is not None and sums:
        dist.all_reduce(total, group=process_group)
    one, two, along2, size2, count = total
    energy = (along2 / torch.where(size2 > 0, size2, 1.0)).sqrt()
    values = (one / count.clamp_min(1), two / count.clamp_min(1), energy)
    return {name + suffix: value for suffix, value in zip(_SHARE, values, strict=True)}


def displacement(
    moved: Iterable[tuple[Tensor, Tensor]], process_group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Return where δS is along the axes: the sum over all of them, the norm, and the farthest toward the hack.

    Args:
        moved: Per group, δS − δS_0 [..., M, R] and axes [..., M, K, R]. The numbers have the dimensions before M.
        process_group: Processes that the modules are spread over, if they are.
    """
    found = [along(axes_MKR, moved_MR).flatten(-2) for moved_MR, axes_MKR in moved]
    at = torch.cat(found, dim=-1) if found else torch.zeros(0, dtype=torch.float64)
    sums = torch.stack([at.sum(dim=-1), (at**2).sum(dim=-1)])
    farthest = (-at).amax(dim=-1).clamp_min(0) if at.shape[-1] else torch.zeros_like(sums[0])
    if process_group is not None and found:
        dist.all_reduce(sums, group=process_group)
        dist.all_reduce(farthest, op=dist.ReduceOp.MAX, group=process_group)
    return {"displacement": sums[0], "displacement_norm": sums[1].sqrt(), "displacement_hackward": farthest}


_KEY = "vhack"
_SHARES = ("cin", "cout", "leak")


class ProjectedOptimizer(Optimizer):
    """An optimizer around another one; schedulers, GradScaler and trainers treat it like any other optimizer.

    A step is: average gradients over ``process_group`` if there is one, measure, gate the gradient, clip, step of the
    inner optimizer, gate the update, push, box, measure, merge δS into the weights. Parameters that do not belong to
    the adapter are stepped and clipped, and otherwise left alone.

    Clip with ``max_norm`` here, and not in the trainer, where the gradient is to be gated first. Gates commute with any
    positive scale of the gradient, so only the clipping norm differs.

    Args:
        inner: Optimizer made of the parameters of the adapter, and perhaps others.
        adapter: Adapter whose δS is held back.
        basis: Axes to act along; without any, every step is bit by bit the inner optimizer's.
        arm: A whole arm, which says gate, level, box and push; δS is displaced here if the arm starts elsewhere.
        gate: What is removed along the axes; one-sided by default.
        level: Place where the gate acts: ``"gradient"`` or ``"update"``.
        box: Bounds of the displacement.
        push: Every step also moves δS by ``push · lr`` along +v of every axis, away from the hack.
        watched: Other axes to measure along as well, for instance the true ones where control axes are acted on; their
            measures begin with ``watched_``.
        max_norm: Largest norm of the gradient of all parameters; None does not clip.
        process_group: Processes to average the gradients of δS over before anything else: for a replicated δS that
            neither DDP nor FSDP2 averages. The gate must see the mean, because it is not linear.

    Attributes:
        arm: Arm that acts.
        measures: Numbers of the last step: ``cin``, ``cout``, ``leak``, ``displacement`` and their variants.
        frames: Axes, stacked.
        watched: Axes that are only measured along, or None.

    Raises:
        UsageError: The level is unknown, ``max_norm`` is not positive, the inner optimizer lacks the parameters of the
            adapter, they are frozen, the basis does not fit it, or both a whole arm and a part of one are given.

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
        arm: Arm | None = None,
        gate: Gate | None = None,
        level: str = "gradient",
        box: Box | None = None,
        push: float = 0.0,
        watched: Basis | None = None,
        max_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if arm and (gate or box or push or level != "gradient"):
            raise UsageError(
                f"the arm {arm.name} and a gate, level, box or push beside it",
                wanted="a whole arm, or its parts",
                do="leave the parts out, or change the arm with dataclasses.replace",
            )
        self.arm = arm or Arm("own", "gate, box and push of the caller", gate or Gate(), level, box=box, push=push)
        _check(inner, adapter, max_norm)
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._share_with_inner()
        self.adapter, self.max_norm, self.process_group = adapter, max_norm, process_group
        self.measures = Measures({})
        self.use_basis(basis, watched)
        self._start = [local(parameter).clone() for parameter in adapter.delta]
        if self.arm.start:
            self.displace(self.arm.start)

    def use_basis(self, basis: Basis | None, watched: Basis | None = None) -> None:
        """Take other axes, and others to watch, from now on; the start that displacements are counted from stays.

        Raises:
            UsageError: The basis does not fit the adapter.
            DataError: The rows of the basis are not orthonormal.
        """
        self.frames = Frames(self.adapter.groups, basis)
        self.watched = None if watched is None else Frames(self.adapter.groups, watched)

    @torch.no_grad()
    def displace(self, distance: float) -> None:
        """Move δS along +v of every axis, away from the hack; displacements still count from where it was.

        Do it once, before the first step. A state that is loaded later includes it.

        Args:
            distance: Length in units of δS.
        """
        for index, parameter in enumerate(self.adapter.delta):
            delta_MR = local(parameter)
            delta_MR.copy_(displaced(delta_MR, distance, self._axes(index)))
        self.adapter.refresh()

    def _share_with_inner(self) -> None:
        """Have the lists of the inner optimizer for one's own, so that what schedulers and trainers change is its."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, and under ``"vhack"`` the δS_0 that displacements are counted from."""
        return {**self.inner.state_dict(), _KEY: {"start": [start_MR.clone() for start_MR in self._start]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from `state_dict`; load δS itself with the model or the adapter.

        Raises:
            DataError: The state was saved by another optimizer, or for another adapter.
        """
        try:
            start = state_dict[_KEY]["start"]
            if [theirs_MR.shape for theirs_MR in start] != [mine_MR.shape for mine_MR in self._start]:
                raise ValueError("δS of other shapes")
            self.inner.load_state_dict({name: value for name, value in state_dict.items() if name != _KEY})
            self._share_with_inner()
            for mine_MR, theirs_MR in zip(self._start, start, strict=True):
                mine_MR.copy_(theirs_MR)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the state of an optimizer that does not fit: {error}",
                wanted="one of the same kind around the same adapter, from state_dict",
                do="build optimizer and adapter as they were when it was saved",
            ) from error

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step in the order that the class describes.

        Args:
            closure: Computes loss and gradients; it is evaluated once, before the gradient is looked at.

        Returns:
            The loss of the closure, if there is one.

        Raises:
            UsageError: The δS of the adapter is frozen, as `peft.get_peft_model` leaves it.
        """
        _check_trainable(self.adapter)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.process_group is not None:
            for gradient_MR in self._gradients().values():
                dist.all_reduce(gradient_MR, group=self.process_group)
                gradient_MR /= dist.get_world_size(self.process_group)
        raw = {index: gradient_MR.clone() for index, gradient_MR in self._gradients().items()}
        for index, gradient_MR in self._gradients().items():
            gradient_MR.copy_(gated_gradient(self.arm, gradient_MR, self._axes(index)))
        if self.max_norm is not None:
            every = [parameter for group in self.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(every, self.max_norm)
        # Some optimizers write into the gradient.
        kept = {index: gradient_MR.clone() for index, gradient_MR in self._gradients().items()}
        before = [local(parameter).clone() for parameter in self.adapter.delta]
        self.inner.step()
        for index, parameter in enumerate(self.adapter.delta):
            now_MR, rate = local(parameter), self._rate(parameter) if self.arm.push else 0.0
            held_MR = apply_arm(self.arm, now_MR, before[index], self._start[index], self._axes(index), rate)
            now_MR.copy_(held_MR)
        self.measures = self._measured(raw, kept, before)
        self.adapter.refresh()
        return loss

    def _gradients(self) -> dict[int, Tensor]:
        """Return the gradients of the groups that have one."""
        parameters = enumerate(self.adapter.delta)
        return {index: local(parameter.grad) for index, parameter in parameters if parameter.grad is not None}

    def _rate(self, parameter: Tensor) -> float:
        """Return the present learning rate of a parameter."""
        owner = next(g for g in self.param_groups if any(parameter is other for other in g["params"]))
        return float(owner["lr"])

    def _axes(self, index: int) -> Tensor:
        """Return the axes of the modules of a group that this process has."""
        return self.frames.axes[index][local_rows(self.adapter.delta[index])]

    def _measured(self, raw: Mapping[int, Tensor], kept: Mapping[int, Tensor], before: list[Tensor]) -> Measures:
        """Return the shares of the gradients, of what the gate left of them and of the updates, and where δS is."""
        deltas = [local(parameter) for parameter in self.adapter.delta]
        rows, spread_over = [local_rows(one) for one in self.adapter.delta], processes(self.adapter.delta[0])
        # The hack is along −v for an update, so its sign is turned.
        vectors = {index: torch.stack([raw[index], kept[index], before[index] - deltas[index]]) for index in kept}
        found: dict[str, Tensor] = {}
        for prefix, frames in (("", self.frames), ("watched_", self.watched)):
            if frames is None:
                continue
            axes = [axes_MKR[part] for axes_MKR, part in zip(frames.axes, rows, strict=True)]
            parts = ((vectors[index], axes[index], frames.has_axes[index][rows[index]]) for index in kept)
            for suffix, values in share("", parts, 1, spread_over).items():
                shares = zip(_SHARES, values.expand(len(_SHARES)), strict=True)
                found |= {prefix + name + suffix: value for name, value in shares}
            moved = (now_MR - start_MR for now_MR, start_MR in zip(deltas, self._start, strict=True))
            where = displacement(zip(moved, axes, strict=True), spread_over)
            found |= {prefix + name: value for name, value in where.items()}
        return Measures(found)


def _check(inner: Optimizer, adapter: DeltaS, max_norm: float | None) -> None:
    if max_norm is not None and not max_norm > 0:
        raise UsageError(f"max_norm={max_norm}", wanted="a positive number", do="leave it out for no clipping")
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not all(id(parameter) in known for parameter in adapter.delta):
        raise UsageError(
            "an optimizer without the parameters of the adapter",
            wanted="one that was made of adapter.parameters()",
            do="make it after the adapter, and after fully_shard",
        )
    _check_trainable(adapter)


def _check_trainable(adapter: DeltaS) -> None:
    """Refuse a δS that something has frozen: its gradient would be missing, and nothing would be trained."""
    frozen = sum(not parameter.requires_grad for parameter in adapter.delta)
    if frozen:
        raise UsageError(
            f"{frozen} of the {len(adapter.delta)} parameters of δS are frozen (get_peft_model freezes all it finds)",
            wanted="a δS that is trained",
            do="call adapter.delta.requires_grad_(True) after get_peft_model, and give the optimizer the parameters of "
            "LoRA too if they shall be trained",
        )
