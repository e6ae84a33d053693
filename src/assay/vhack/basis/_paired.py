"""The gradients of pairs, kept together with their Gram matrices, so that a basis of any subset costs no new pass.

Shapes: N pairs, R coordinates of δS in a module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.vhack.basis._axes import METHODS, energy_along, find_axes, gram
from assay.vhack.basis._basis import Basis, Origin, check_axis_settings, zero_weak_axes


class PairGradients:
    """Gradients of the hack and the clean side of N pairs, per module.

    Args:
        hack: Gradients of the hack sides, [N, R] per module name.
        clean: Gradients of the clean sides, likewise.
        groups: Group of each pair; None puts every pair into a group of its own.
        keys: Name of each pair; None numbers them.
        tokens: Number of tokens of both sides of each pair that came to each expert, [N, E] per module of experts.
        origin: Model and settings they come from; its pairs and groups are replaced by these.

    Raises:
        UsageError: The two sides differ in modules or shapes, or a list has another length.
        DataError: A gradient is not finite; the message names module and pair.
    """

    def __init__(
        self,
        hack: Mapping[str, Tensor],
        clean: Mapping[str, Tensor],
        *,
        groups: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        origin: Origin | None = None,
    ) -> None:
        n = _check_shapes(hack, clean)
        self.hack = dict(hack)
        self.clean = dict(clean)
        self.tokens = dict(tokens or {})
        self.keys = tuple(str(index) for index in range(n)) if keys is None else tuple(keys)
        self.groups = self.keys if groups is None else tuple(groups)
        if not len(self.keys) == len(self.groups) == n:
            raise UsageError(
                f"{len(self.keys)} keys and {len(self.groups)} groups for {n} pairs",
                wanted="one of each per pair",
                do="pass lists as long as the gradients",
            )
        self.origin = replace(origin or Origin(), pairs=self.keys, groups=self.groups)
        _check_finite(self.hack, "hack", self.keys)
        _check_finite(self.clean, "clean", self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def differences(self, module: str) -> Tensor:
        """Return hack minus clean of one module, [N, R]."""
        return self.hack[module] - self.clean[module]

    @cached_property
    def _grams(self) -> dict[str, Tensor]:
        return {name: gram(self.differences(name)) for name in self.hack}

    @cached_property
    def _clean_grams(self) -> dict[str, Tensor]:
        return {name: gram(rows_NR) for name, rows_NR in self.clean.items()}

    def basis(
        self, *, top_k: int = 12, tau_axis: float = 0.0, method: str = "lda", keep: Sequence[int] | None = None
    ) -> Basis:
        """Return the basis of these pairs, or of some of them.

        Args:
            top_k: Number of axes per module; fewer where there are fewer pairs, and one for ``"mean-diff"``.
            tau_axis: Share of the first singular value below which an axis becomes zero.
            method: Name of the method. ``"svd"`` takes the right singular vectors of the differences, ``"mean-diff"``
                their mean, ``"lda"`` the singular vectors after whitening by the covariance of the clean gradients.
            keep: Indices of the pairs to use; None uses all.

        Raises:
            UsageError: A setting is out of range, or there are too few pairs.
            DataError: The two sides do not differ in any module.
        """
        check_axis_settings(top_k, tau_axis)
        rows = list(range(len(self))) if keep is None else list(keep)
        check_method(method, len(rows))
        index = torch.tensor(rows)
        square = (index[:, None], index[None, :])
        axes, values, votes, energy = {}, {}, {}, {}
        for name, gram_NN in self._grams.items():
            rows_NR = self.differences(name)[index]
            clean = (self.clean[name][index], self._clean_grams[name][square]) if method == "lda" else None
            axes_KR, values[name], votes[name] = find_axes(
                rows_NR, gram_NN[square], top_k=top_k, method=method, clean=clean
            )
            axes[name] = zero_weak_axes(axes_KR, values[name], tau_axis)
            energy[name] = energy_along(rows_NR, axes[name])
        if not any(values_K.any() for values_K in values.values()):
            raise DataError(
                "hack and clean have the same gradients in every module",
                wanted="pairs whose two sides differ",
                do="check the pairs: the two completions must not be the same",
            )
        origin = replace(
            self.origin,
            top_k=top_k,
            tau_axis=tau_axis,
            method=method,
            pairs=tuple(self.keys[row] for row in rows),
            groups=tuple(self.groups[row] for row in rows),
            tokens={name: tuple(tokens_NE[index].sum(dim=0).tolist()) for name, tokens_NE in self.tokens.items()},
        )
        return Basis(axes, values, votes, origin, energy)


def _check_shapes(hack: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> int:
    shapes = {name: tuple(rows.shape) for name, rows in hack.items()}
    counts = {shape[0] for shape in shapes.values()}
    same = shapes == {name: tuple(rows.shape) for name, rows in clean.items()}
    if not same or len(counts) != 1 or any(len(shape) != 2 for shape in shapes.values()) or 0 in counts:
        raise UsageError(
            "hack and clean gradients of different modules, numbers or shapes",
            wanted="the same modules on both sides, each [N, R] with one N of at least 1",
            do="compute both sides from the same pairs with the same model",
        )
    return counts.pop()


def _check_finite(gradients: Mapping[str, Tensor], side: str, keys: Sequence[str]) -> None:
    for name, rows_NR in gradients.items():
        bad_N = ~torch.isfinite(rows_NR).all(dim=1)
        if bad_N.any():
            raise DataError(
                f"the gradient of pair {keys[int(bad_N.nonzero()[0])]}, {side} side, is not finite in {name}",
                wanted="finite gradients",
                do="leave the pair out, or run the model in float32",
            )


def check_method(method: str, n: int) -> None:
    """Raise UsageError unless ``method`` exists and ``n`` pairs are enough for it."""
    if method not in METHODS:
        raise UsageError(f"method={method!r}", wanted=" or ".join(METHODS), do="choose one of them")
    least = 3 if method == "lda" else 1
    if n < least:
        raise UsageError(f"{n} pairs for {method}", wanted=f"at least {least}", do="use more pairs or another method")
