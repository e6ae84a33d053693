"""What the arms that a study compares with need beside the library: control axes, and advantage
modification.

*Control axes* are what hack directions are compared with, from the same pairs.

*Advantage modification*: less reward for rollouts whose activations look like those of the hack
sides. The rival that holds training back without looking at a gradient (Wu and Tang, arXiv
2604.01476). Here the direction d is the difference of the mean activations of the hack and the
clean sides of the pairs, after the layer at two thirds of the depth, each the mean over the
completion tokens. With m halfway between the two means along d, and s the pooled standard deviation
of the two sides::

    z = (d·a − m) / s        r' = r · (1 − α σ(z) [z > 0])

The advantage is then computed from r' as it would be from r. The direction is taken from the model
as it is at the start, and kept.

Shapes: N pairs or samples, R coordinates of δS, K axes, H width of the hidden state.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.models.decoder import decoder_layers
from assay.vhack.detect import forward_samples
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import PairGradients
from assay.vhack.directions.delta.arms import BASIS_KINDS
from assay.vhack.directions.gradients.batches import Encoded, context_length, encode
from assay.vhack.directions.gradients.targets import module_of
from assay.vhack.pairs.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from assay.models.load import Model


def make_basis(
    kind: str, gradients: PairGradients, *, top_k: int = 5, method: str = "lda", seed: int = 0
) -> Basis:
    """Return ``top_k`` axes per module of one kind:

    - ``true``: the hack directions of the pairs;
    - ``random``: as many orthonormal axes, uniform among all of them;
    - ``shuffled``: extracted from the same pairs with hack and clean exchanged in a random half of
      them. The direction of the hack is lost. By ``svd`` the plane stays, because a difference and
      its negative span the same line; by ``lda`` it is lost too, because half of what it whitens by
      are hacks;
    - ``clean-clean``: extracted from differences between clean sides of different pairs.

    Raises:
        UsageError: There is no such kind, or there are too few pairs for it.
        DataError: The gradients do not differ.
    """
    if kind == "true":
        return gradients.basis(top_k=top_k, method=method)
    if kind == "random":
        return _random(gradients, top_k, seed)
    if kind in _PAIRED:
        return _PAIRED[kind](gradients, seed).basis(top_k=top_k, method=method)
    raise UsageError(f"{kind} axes", wanted=", ".join(BASIS_KINDS), do="choose one of them")


def _random(gradients: PairGradients, top_k: int, seed: int) -> Basis:
    """Return as many axes per module as the true ones have, uniform among all orthonormal ones."""
    generator = torch.Generator().manual_seed(seed)
    axes = {}
    k = min(top_k, len(gradients))
    for name, rows_NR in gradients.clean.items():
        rank = rows_NR.shape[1]
        drawn_RK = torch.randn(rank, min(k, rank), generator=generator, dtype=torch.float64)
        axes[name] = torch.linalg.qr(drawn_RK)[0].T.float().contiguous()
    return Basis(
        axes,
        {name: torch.ones(len(axes_KR)) for name, axes_KR in axes.items()},
        {name: torch.zeros(len(axes_KR), 2, dtype=torch.int64) for name, axes_KR in axes.items()},
        replace(gradients.origin, top_k=top_k),
    )


def _shuffled(gradients: PairGradients, seed: int) -> PairGradients:
    """Exchange the two sides of half of the pairs, chosen at random."""
    n = len(gradients)
    swapped_N1 = torch.zeros(n, 1, dtype=torch.bool)
    swapped_N1[random.Random(f"shuffled {seed}").sample(range(n), n // 2)] = True

    def chosen(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where(swapped_N1.to(first[name].device), second[name], first[name])
            for name in first
        }

    hack = gradients.hack
    clean = gradients.clean
    return PairGradients(
        chosen(hack, clean), chosen(clean, hack), groups=gradients.groups, origin=gradients.origin
    )


def _clean_clean(gradients: PairGradients, seed: int) -> PairGradients:
    """Return clean sides two by two, each used once, of one group as far as possible."""
    shuffled = random.Random(f"clean-clean {seed}").sample(range(len(gradients)), len(gradients))
    ordered = sorted(
        shuffled, key=lambda index: gradients.groups[index]
    )  # stable, so random within a group
    first = ordered[0 : 2 * (len(ordered) // 2) : 2]
    second = ordered[1::2]
    if not second:
        raise UsageError("1 pair for clean-clean axes", wanted="at least two", do="use more pairs")
    clean = gradients.clean
    return PairGradients(
        {name: rows_NR[first] for name, rows_NR in clean.items()},
        {name: rows_NR[second] for name, rows_NR in clean.items()},
        groups=[gradients.groups[index] for index in first],
        origin=gradients.origin,
    )


_PAIRED = {"shuffled": _shuffled, "clean-clean": _clean_clean}


_DEPTH = 2 / 3


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The direction, and the scale on which activations along it are judged.

    Attributes:
        layer: Index of the decoder layer whose output is looked at, from 0.
        direction: Direction d, [H] float32, of length 1.
        middle: Middle m between the two sides along d.
        spread: Pooled standard deviation s along d.
    """

    layer: int
    direction: Tensor
    middle: float
    spread: float

    @classmethod
    def fit(
        cls,
        model: "Model | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        pairs: Sequence[Pair],
    ) -> "Shortcut":
        """Return the direction of pairs of a hack and a clean completion, for the model at the
        start of training.

        Raises:
            DataError: There are fewer than two pairs, or both sides have the same activations.
            UsageError: There is no tokenizer.
        """
        module = module_of(model)
        if len(pairs) < 2:
            raise DataError(
                f"{len(pairs)} pairs for a direction of activations",
                wanted="at least two",
                do="add some",
            )
        samples = [pair.samples()[side] for side in (0, 1) for pair in pairs]
        names = [f"pair {i}, {side} side" for side in ("hack", "clean") for i in range(len(pairs))]
        encoded = encode(tokenizer, samples, names, context_length(module))
        layer = max(0, math.ceil(_DEPTH * len(decoder_layers(module))) - 1)
        hack_NH, clean_NH = forward_samples(module, encoded, [layer])[0][0].chunk(2)
        difference_H = hack_NH.mean(dim=0) - clean_NH.mean(dim=0)
        length = float(difference_H.norm())
        if not length > 0:
            raise DataError(
                "pairs whose sides have the same activations",
                wanted="sides that differ",
                do="check them",
            )
        direction_H = difference_H / length
        hack_N = hack_NH @ direction_H
        clean_N = clean_NH @ direction_H
        spread = float(((hack_N.var() + clean_N.var()) / 2).sqrt())
        return cls(
            layer,
            direction_H,
            float((hack_N.mean() + clean_N.mean()) / 2),
            max(spread, 1e-6 * length),
        )

    def z(
        self, model: "Model | PreTrainedModel", rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Tensor:
        """Return how far each row, token ids of prompt and completion, is on the hack's side for
        the model of now.

        The result is [N] float32 in units of ``spread``, on the model's device.
        """
        encoded = [
            Encoded(index, f"rollout {index}", [*prompt, *completion], len(prompt))
            for index, (prompt, completion) in enumerate(rows)
        ]
        activations_LNH, _ = forward_samples(module_of(model), encoded, [self.layer])
        return (activations_LNH[0] @ self.direction - self.middle) / self.spread

    @staticmethod
    def modify(rewards: Tensor, z: Tensor, alpha: float) -> Tensor:
        """Return the rewards r' of rewards r and distances z, in the shape of r, with the strength
        α.
        """
        return rewards * (1 - alpha * torch.sigmoid(z) * (z > 0))
