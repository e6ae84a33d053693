"""One optimiser step of many runs, each held back in its own way.

What :class:`assay.vhack.delta.ProjectedOptimizer` does to one adapter, done to R of them side by side, with the same
gates, boxes and measures: those act on every module by itself, so modules of several runs are just more modules. The
inner optimisers are torch's on the stacked δS of the runs that have them; Adam and SGD treat every number by itself, so
stacking changes nothing. Clipping, which is a matter of a whole run, is done per run. Tests hold every arm equal to a
ProjectedOptimizer.

Shapes: R runs, M modules of a group, K axes, C coordinates of δS.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from assay.vhack.basis import Basis
from assay.vhack.delta import Arm, Frames, Group, displacement, share, spread

__all__ = ["StackedOptimizer"]

_TINY = 1e-6  # of torch.nn.utils.clip_grad_norm_


class StackedOptimizer:
    """Steps δS of R runs.

    Args:
        groups: the modules by shape.
        arms: of each run.
        bases: of each run, the axes that its arm acts along and that are measured.
        kinds: of each run, the name of its optimiser.
        inner: by that name, what makes the optimiser of a list of parameters.
        watched: axes along which the displacement of every run is measured as well, ``watched_…``.
        max_norm: largest norm of a run's gradient after its gate.

    Attributes:
        delta: per group, [R, M, C] float32.
        measures: of the last step, by name, [R] float64.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        arms: Sequence[Arm],
        bases: Sequence[Basis | None],
        kinds: Sequence[str],
        inner: Mapping[str, Callable[[list[Tensor]], Optimizer]],
        *,
        watched: Basis | None = None,
        max_norm: float | None = 1.0,
    ) -> None:
        self.arms, self.max_norm = list(arms), max_norm
        self.delta = [torch.zeros(len(arms), *group.values.shape, device=group.values.device) for group in groups]
        self._kinds = list(kinds)
        self._inner: dict[str, tuple[Tensor, list[Tensor], Optimizer]] = {}
        for kind in dict.fromkeys(kinds):
            rows = torch.tensor([row for row, one in enumerate(kinds) if one == kind], device=self.delta[0].device)
            parameters: list[Tensor] = [torch.nn.Parameter(delta[rows]) for delta in self.delta]
            self._inner[kind] = (rows, parameters, inner[kind](parameters))
        frames = {id(basis): Frames(groups, basis) for basis in bases}
        self._axes = [
            _stack([frames[id(basis)].axes[g] for basis in bases]) for g in range(len(groups))
        ]  # per group, [R, M, K, C]
        self._has = [torch.stack([frames[id(basis)].has_axes[g] for basis in bases]) for g in range(len(groups))]
        self._watched = None if watched is None else Frames(groups, watched)
        # Displacements count from the weights of the model, wherever a run starts.
        self._start = [delta.clone() for delta in self.delta]
        start_R11 = torch.tensor([arm.start for arm in arms], device=self.delta[0].device).double()[:, None, None]
        for delta, axes in zip(self.delta, self._axes, strict=True):
            delta += (start_R11 * axes.sum(dim=2)).to(delta.dtype)
        self.measures: dict[str, Tensor] = {}
        self._alike = [(arm, rows.to(self.delta[0].device)) for arm, rows in _alike(arms, kinds)]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Gate, clip, step, gate, box, push, measure.

        Args:
            gradients: per group, [R, M, C] float32; changed in place.
        """
        found = self.share("cin", gradients)
        for arm, rows in self._alike:
            if arm.level == "gradient" and arm.gate.kind != "none":
                self._on(rows, gradients, lambda x, axes, arm=arm: arm.gate.apply(x, axes, 1))
        found["gradient_norm"] = self._clip(gradients)
        found |= self.share("cout", gradients)
        before = [delta.clone() for delta in self.delta]
        for rows, parameters, optimizer in self._inner.values():
            for parameter, delta, gradient in zip(parameters, self.delta, gradients, strict=True):
                parameter.copy_(delta[rows])
                parameter.grad = gradient[rows]
            optimizer.step()
            for parameter, delta in zip(parameters, self.delta, strict=True):
                delta[rows] = parameter.detach()
        for arm, rows in self._alike:
            self._bound(arm, rows, before)
        moved = [delta - old for delta, old in zip(self.delta, before, strict=True)]
        found |= self.share("leak", moved, -1)
        self.measures = found | self._displacement(self._axes)
        if self._watched is not None:
            axes = [axes_MKC.expand(len(self.arms), -1, -1, -1) for axes_MKC in self._watched.axes]
            seen = self._displacement(axes)
            self.measures |= {f"watched_{name}": value_R for name, value_R in seen.items()}

    def state_dict(self) -> dict[str, Any]:
        """δS, and the states of the inner optimisers."""
        inner = {kind: optimizer.state_dict() for kind, (_, _, optimizer) in self._inner.items()}
        return {"delta": [delta.cpu() for delta in self.delta], "inner": inner}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of the same runs."""
        for delta, stored in zip(self.delta, state["delta"], strict=True):
            delta.copy_(stored)
        for kind, (_, _, optimizer) in self._inner.items():
            optimizer.load_state_dict(state["inner"][kind])

    def share(self, name: str, vectors: Sequence[Tensor], sign: int = 1) -> dict[str, Tensor]:
        """Shares of vectors along each run's axes, see :func:`assay.vhack.delta._measures.share`."""

        def one(*parts: Tensor) -> dict[str, Tensor]:
            n = len(vectors)
            return share(name, zip(parts[:n], parts[n : 2 * n], parts[2 * n :], strict=True), sign)

        found: dict[str, Tensor] = torch.func.vmap(one)(*vectors, *self._axes, *self._has)
        return found

    def _displacement(self, axes: Sequence[Tensor]) -> dict[str, Tensor]:
        def one(*parts: Tensor) -> dict[str, Tensor]:
            n = len(self.delta)
            return displacement(zip(parts[:n], parts[n:], strict=True))

        moved = [delta - start for delta, start in zip(self.delta, self._start, strict=True)]
        found: dict[str, Tensor] = torch.func.vmap(one)(*moved, *axes)
        return found

    def _clip(self, gradients: Sequence[Tensor]) -> Tensor:
        norm_R = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        if self.max_norm is not None:
            factor_R = (self.max_norm / (norm_R + _TINY)).clamp_max(1.0)
            for gradient in gradients:
                gradient *= factor_R[:, None, None]
        norms: Tensor = norm_R.double()
        return norms

    def _bound(self, arm: Arm, rows: Tensor, before: Sequence[Tensor]) -> None:
        """What an arm does to δS after the inner optimiser's step."""
        if arm.push:
            rate = float(self._inner[self._kinds[int(rows[0])]][2].param_groups[0]["lr"])
            self._on(
                rows,
                self.delta,
                lambda x, axes: x.double() + arm.push * rate * spread(axes, axes.new_ones(axes.shape[:2])),
            )
        if arm.level == "update" and arm.gate.kind != "none":
            self._on(
                rows,
                self.delta,
                lambda x, axes, old: old.double() + arm.gate.apply(x.double() - old.double(), axes, -1),
                before,
            )
        if arm.box is not None:
            box = arm.box
            self._on(
                rows,
                self.delta,
                lambda x, axes, start: x.double() + box.correction(x.double() - start.double(), axes),
                self._start,
            )

    def _on(
        self,
        rows: Tensor,
        vectors: Sequence[Tensor],
        change: Callable[..., Tensor],
        beside: Sequence[Tensor] | None = None,
    ) -> None:
        """Change vectors of some runs, with the modules of all of them in one list."""
        for g, vectors_RMC in enumerate(vectors):
            axes_NKC = self._axes[g][rows].flatten(0, 1)
            if not axes_NKC.shape[1]:
                continue
            others = [] if beside is None else [beside[g][rows].flatten(0, 1)]
            changed_NC = change(vectors_RMC[rows].flatten(0, 1), axes_NKC, *others)
            vectors_RMC[rows] = changed_NC.view(len(rows), *vectors_RMC.shape[1:]).to(vectors_RMC.dtype)


def _stack(axes: list[Tensor]) -> Tensor:
    """[R, M, K, C]; where a run has fewer axes, the rest are zero."""
    most = max(axes_MKC.shape[1] for axes_MKC in axes)
    padded = [torch.nn.functional.pad(axes_MKC, (0, 0, 0, most - axes_MKC.shape[1])) for axes_MKC in axes]
    return torch.stack(padded)


def _alike(arms: Sequence[Arm], kinds: Sequence[str]) -> list[tuple[Arm, Tensor]]:
    """Arms that act in the same way, and the runs that have them."""
    found: dict[tuple[str, str], list[int]] = {}
    for index, (arm, kind) in enumerate(zip(arms, kinds, strict=True)):
        found.setdefault((arm.name, kind), []).append(index)
    return [(arms[rows[0]], torch.tensor(rows)) for rows in found.values() if arms[rows[0]].acts]
