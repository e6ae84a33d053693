"""Check 3: do other bases of the same size do as well on the same held-out samples?

Four nulls, from the weakest to the strongest:

- *Haar*: axes uniform among all orthonormal ones;
- *covariance-matched*: random sums of clean gradients, so axes prefer the directions in which gradients vary anyway;
- *clean-clean*: the extraction itself, by the same method, on differences between clean sides of different pairs;
- *labels swapped*: the extraction itself, on the same pairs with the labels of whole groups swapped.

Shapes as in :mod:`assay.vhack.checks._geometry`; N' scored pairs.
"""

import numpy as np
import torch
from torch import Tensor

from assay.stats import auroc
from assay.vhack.checks._folds import Design, Fold
from assay.vhack.checks._geometry import Geometry, shares
from assay.vhack.checks._judge import SWAPPED, judge
from assay.vhack.checks._types import Check, Interval

_DRAWS = 25  # random frames of one module that are held at a time


def check_random_null(design: Design, measured: Interval) -> Check:
    """Return check 3: do random bases of this size rank the same samples as well?

    Args:
        design: Folds and the pairs they score.
        measured: AUROC of the basis with its interval, from check 1.
    """
    settings = design.settings
    generator = torch.Generator().manual_seed(settings.seed)
    swapped = list(zip(*(side_BN[1:] for side_BN in design.held_out), strict=True))[: settings.n_null]
    nulls = {
        "Haar": _aurocs(design, _haar(design, generator)),
        "covariance-matched": _aurocs(design, _matched(design, generator)),
        "clean-clean": _aurocs(design, _clean_clean(design)),
        SWAPPED: [auroc(hack_N, clean_N) for hack_N, clean_N in swapped],
    }
    return judge(
        name="random_null",
        title="Against random bases",
        statistic="AUROC of mean cin over modules",
        rule=(
            f"Passes if of each null at most a share {settings.alpha:g} reaches the AUROC, and the lower end of its "
            f"{settings.confidence:.0%} group-bootstrap interval is above the 1 − {settings.alpha:g} quantile of "
            "every null."
        ),
        measured=measured,
        nulls=nulls,
        above=0.5,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "z_scores": {
                name: (measured.value - float(np.mean(draws))) / float(np.std(draws) or 1.0)
                for name, draws in nulls.items()
            }
        },
    )


def _aurocs(design: Design, scores_BS: Tensor) -> list[float]:
    tested, n = design.tested, design.geometry.n
    hack_BN, clean_BN = scores_BS[:, tested].numpy(), scores_BS[:, tested + n].numpy()
    return [auroc(hack_N, clean_N) for hack_N, clean_N in zip(hack_BN, clean_BN, strict=True)]


def _haar(design: Design, generator: torch.Generator) -> Tensor:
    """Return mean cin of every sample under random frames, [B, S]; all folds share the frames."""
    geometry, count = design.geometry, design.settings.n_null
    total_BS = torch.zeros(count, 2 * geometry.n, dtype=torch.float64)
    for module, name in enumerate(geometry.names):
        samples_SR = geometry.samples(name)
        r = samples_SR.shape[1]
        for draws in torch.split(torch.arange(count), _DRAWS):
            gaussian_BRK = torch.randn(len(draws), r, min(design.settings.axes, r), generator=generator)
            along_BSK = samples_SR.float() @ torch.linalg.qr(gaussian_BRK)[0]
            ahead_BS = along_BSK.clamp_min(0).norm(dim=2).double()
            total_BS[draws] += ahead_BS / geometry.lengths_MS[module]
    return total_BS / len(geometry.names)


def _matched(design: Design, generator: torch.Generator) -> Tensor:
    """Return mean cin of every sample under bases of random sums of clean training gradients, [B, S]."""
    geometry, settings = design.geometry, design.settings
    draws_BKN = torch.randn(settings.n_null, settings.axes, geometry.n, generator=generator, dtype=torch.float64)
    scores_BS = torch.zeros(settings.n_null, 2 * geometry.n, dtype=torch.float64)
    for fold in design.folds:
        rows = _clean_rows(fold)
        clean, samples = rows + geometry.n, torch.cat([fold.test, fold.test + geometry.n])
        weights_BKT = draws_BKN[:, :, rows]
        weights_BKT = weights_BKT - weights_BKT.mean(dim=2, keepdim=True)
        total_BS = torch.zeros(settings.n_null, len(samples), dtype=torch.float64)
        for gram_SS, lengths_S in zip(geometry.gram_MSS, geometry.lengths_MS, strict=True):
            gram_BKK = weights_BKT @ gram_SS[clean][:, clean] @ weights_BKT.transpose(1, 2)
            along_BKS = _inverse_root(gram_BKK) @ weights_BKT @ gram_SS[clean][:, samples]
            total_BS += along_BKS.clamp_min(0).norm(dim=1) / lengths_S[samples]
        scores_BS[:, samples] = total_BS / len(geometry.names)
    return scores_BS


def _inverse_root(gram_BKK: Tensor) -> Tensor:
    values_BK, vectors_BKK = torch.linalg.eigh(gram_BKK)
    kept_BK = values_BK > values_BK[:, -1:] * 1e-10
    scale_BK = torch.where(kept_BK, values_BK, torch.inf).rsqrt()
    root_BKK: Tensor = (vectors_BKK * scale_BK[:, None]) @ vectors_BKK.transpose(1, 2)
    return root_BKK


def _clean_clean(design: Design) -> Tensor:
    """Return mean cin of every sample under bases of differences between clean sides, [B, S]."""
    geometry, settings = design.geometry, design.settings
    generator = np.random.default_rng([settings.seed, 3])
    scores_BS = torch.zeros(settings.n_null, 2 * geometry.n, dtype=torch.float64)
    for fold in design.folds:
        rows = _clean_rows(fold)
        samples = torch.cat([fold.test, fold.test + geometry.n])
        for draw in range(settings.n_null):
            frame = geometry.fit(*clean_differences(geometry, rows, generator), settings)
            scores_BS[draw, samples] = shares(frame.along[:, :, samples], geometry.lengths_MS[:, samples]).mean(dim=0)
    return scores_BS


def _clean_rows(fold: Fold) -> Tensor:
    """Return the pairs whose clean sides make a null basis: training pairs, or the scored ones if those are missing.

    A basis from a file may come without its pairs. Then the clean sides of the scored pairs are used; they make the
    null harder to beat, because it has seen the samples.
    """
    return fold.train if len(fold.train) > 1 else fold.test


def clean_differences(geometry: Geometry, pairs: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return clean sides two by two, each used once, of the same group as far as possible.

    Args:
        geometry: Scalar products.
        pairs: Indices of the pairs whose clean sides are used.
        generator: Random generator that decides which sides form a pair, and in which order.
    """
    # Sorted by group after shuffling: neighbours share a group, but for the odd one out.
    shuffled = generator.permutation(pairs.numpy())
    ordered = sorted(shuffled.tolist(), key=lambda index: geometry.gradients.groups[index])
    first, second = ordered[0 : 2 * (len(ordered) // 2) : 2], ordered[1::2]
    return torch.tensor(first) + geometry.n, torch.tensor(second) + geometry.n
