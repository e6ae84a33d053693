"""One optimizer step of many runs, each held back by its own arm.

What :class:`assay.vhack.delta.ProjectedOptimizer` does to one adapter, done to R of them side by side by the same
functions, which take a dimension per run. The inner optimizer is torch's on the stacked δS; Adam and SGD treat every
number by itself, so stacking changes nothing. Clipping, which concerns a whole run, is done per run. Tests hold every
combination of gate, box and start equal to a ProjectedOptimizer.

Shapes: R runs, N of them with one arm, M modules of a group, K axes, C coordinates of δS.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from assay.vhack.basis.basis import Basis
from assay.vhack.delta.arms import Arm, apply_arm, displace, gate_gradient
from assay.vhack.delta.frames import Frames, measure_displacement, measure_shares
from assay.vhack.delta.groups import Group

_TINY = 1e-6  # of torch.nn.utils.clip_grad_norm_


class StackedOptimizer:
    """Step the δS of R runs.

    Args:
        groups: Modules by shape.
        arms: Arm of each run.
        bases: Axes of each run, along which its arm acts and is measured.
        inner: What makes the optimizer of a list of parameters.
        watched: Axes along which the displacement of every run is measured as well, ``watched_…``.
        max_norm: Largest norm of a run's gradient after its gate; None does not clip.

    Attributes:
        delta: δS per group, [R, M, C] float32.
        measures: Numbers of the last step by name, [R] float64.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        arms: Sequence[Arm],
        bases: Sequence[Basis | None],
        inner: Callable[[list[Tensor]], Optimizer],
        *,
        watched: Basis | None = None,
        max_norm: float | None = 1.0,
    ) -> None:
        self.max_norm = max_norm
        frames = {id(basis): Frames(groups, basis) for basis in bases}
        self._axes = [
            _stack([frames[id(basis)].axes[g] for basis in bases]) for g in range(len(groups))
        ]  # per group, [R, M, K, C]
        self._has = [torch.stack([frames[id(basis)].has_axes[g] for basis in bases]) for g in range(len(groups))]
        self._watched = None if watched is None else Frames(groups, watched)
        device = groups[0].values.device
        # Displacements count from the weights of the model, wherever a run starts.
        self._start = [torch.zeros(len(arms), *group.values.shape, device=device) for group in groups]
        # The distance is rounded to float32, as it was in the published runs.
        start_R11 = torch.tensor([arm.start for arm in arms], device=device).double()[:, None, None]
        moved = [displace(delta, start_R11, axes) for delta, axes in zip(self._start, self._axes, strict=True)]
        self.delta: list[Tensor] = [torch.nn.Parameter(delta, requires_grad=False) for delta in moved]
        self._inner = inner(self.delta)
        self.measures: dict[str, Tensor] = {}
        rows = {arm: [row for row, one in enumerate(arms) if one == arm] for arm in arms if arm.acts}
        self._rows = {arm: torch.tensor(found, device=device) for arm, found in rows.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step in the order of :class:`assay.vhack.delta.ProjectedOptimizer`.

        Args:
            gradients: Gradient of δS per group, [R, M, C] float32; changed in place.
        """
        found = self.measure_shares("cin", gradients)
        for arm, rows in self._rows.items():
            for gradient, axes in zip(gradients, self._axes, strict=True):
                gradient[rows] = gate_gradient(arm, gradient[rows], axes[rows])
        found["gradient_norm"] = self._clip(gradients)
        found |= self.measure_shares("cout", gradients)
        before = [delta.clone() for delta in self.delta]
        for delta, gradient in zip(self.delta, gradients, strict=True):
            delta.grad = gradient
        self._inner.step()
        for arm, rows in self._rows.items():
            for delta, old, start, axes in zip(self.delta, before, self._start, self._axes, strict=True):
                delta[rows] = apply_arm(arm, delta[rows], old[rows], start[rows], axes[rows])
        found |= self.measure_shares("leak", [delta - old for delta, old in zip(self.delta, before, strict=True)], -1)
        moved = [delta - start for delta, start in zip(self.delta, self._start, strict=True)]
        self.measures = found | measure_displacement(zip(moved, self._axes, strict=True))
        if self._watched is not None:
            seen = measure_displacement(zip(moved, self._watched.axes, strict=True))
            self.measures |= {f"watched_{name}": value_R for name, value_R in seen.items()}

    def measure_shares(self, name: str, vectors: Sequence[Tensor], sign: int = 1) -> dict[str, Tensor]:
        """Return the shares of vectors along each run's axes, see :func:`assay.vhack.delta.share`."""
        return measure_shares(name, zip(vectors, self._axes, self._has, strict=True), sign)

    def _clip(self, gradients: Sequence[Tensor]) -> Tensor:
        norm_R = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        if self.max_norm is not None:
            factor_R = (self.max_norm / (norm_R + _TINY)).clamp_max(1.0)
            for gradient in gradients:
                gradient *= factor_R[:, None, None]
        norms: Tensor = norm_R.double()
        return norms


def _stack(axes: list[Tensor]) -> Tensor:
    """Return the axes of all runs, [R, M, K, C]; where a run has fewer axes, the rest are zero."""
    most = max(axes_MKC.shape[1] for axes_MKC in axes)
    padded = [torch.nn.functional.pad(axes_MKC, (0, 0, 0, most - axes_MKC.shape[1])) for axes_MKC in axes]
    return torch.stack(padded)
