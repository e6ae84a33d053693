"""Check 3: do other bases of the same size rank held-out hack samples as high?

There are three nulls, from the weakest to the strongest:

- *Haar*: axes uniform among all orthonormal ones;
- *clean-clean*: the extraction itself, by the same method, on differences between clean sides of
  different pairs;
- *labels swapped*: the extraction itself, on the same pairs with the labels of whole groups
  swapped.

Shapes as in :mod:`assay.vhack.directions.checks.geometry`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from assay.stats.bootstrap import BootstrapInterval
from assay.stats.ranks import auroc
from assay.vhack.directions.checks.check_report import CLEAN_CLEAN, HAAR, SWAPPED, Check
from assay.vhack.directions.checks.check_rules import judge
from assay.vhack.directions.checks.folds import Design
from assay.vhack.directions.checks.geometry import cin_per_module

if TYPE_CHECKING:
    pass

_DRAWS = 25  # random frames of one module that are held at a time


def check_random_null(design: Design, measured: BootstrapInterval) -> Check:
    """Return check 3 of the AUROC that check 1 measured."""
    settings = design.settings
    generator = torch.Generator().manual_seed(settings.seed)
    hack_BN, clean_BN = design.held_out
    swapped = slice(1, 1 + settings.n_null)
    geometry = design.geometry
    gradients = map(geometry.samples, geometry.names)  # all folds share the frames
    haar_BS = haar_scores(
        gradients, geometry.lengths_MS, settings.k_use, settings.n_null, generator
    )
    nulls = {
        HAAR: _aurocs(design, haar_BS),
        CLEAN_CLEAN: _aurocs(design, _clean_clean(design)),
        SWAPPED: list(map(auroc, hack_BN[swapped], clean_BN[swapped])),
    }
    return judge(
        "random_null",
        "AUROC of mean cin over modules",
        measured,
        nulls,
        settings,
        design.smallest_p,
    )


def _aurocs(design: Design, scores_BS: Tensor) -> list[float]:
    tested = design.tested
    n = design.geometry.n
    return list(map(auroc, scores_BS[:, tested].numpy(), scores_BS[:, tested + n].numpy()))


def haar_scores(
    gradients: Iterable[Tensor], lengths_MS: Tensor, k: int, count: int, generator: torch.Generator
) -> Tensor:
    """Return mean cin over modules of samples under ``count`` random frames of k axes, [B, S].

    Gradients are [S, R] per module and lengths infinite instead of 0; a module with fewer
    coordinates has fewer axes.
    """
    total_BS = torch.zeros(count, lengths_MS.shape[1], dtype=torch.float64)
    for lengths_S, samples_SR in zip(lengths_MS, gradients, strict=True):
        r = samples_SR.shape[1]
        for draws in torch.split(torch.arange(count), _DRAWS):
            frames_BRK = torch.linalg.qr(
                torch.randn(len(draws), r, min(k, r), generator=generator)
            )[0]
            along_BSK = samples_SR.float() @ frames_BRK
            ahead_BS = along_BSK.clamp_min(0).norm(dim=2).double()
            total_BS[draws] += ahead_BS / lengths_S
    return total_BS / len(lengths_MS)


def _clean_clean(design: Design) -> Tensor:
    """Return mean cin of every sample under bases of differences between clean sides, [B, S]."""
    geometry = design.geometry
    settings = design.settings
    generator = np.random.default_rng([settings.seed, 3])
    scores_BS = torch.zeros(settings.n_null, 2 * geometry.n, dtype=torch.float64)
    for fold in design.folds:
        # A basis from a file may come without its pairs. A null that has seen the samples is harder
        # to beat.
        rows = fold.train if len(fold.train) > 1 else torch.cat([fold.train, fold.test])
        samples = torch.cat([fold.test, fold.test + geometry.n])
        for draw in range(settings.n_null):
            frame = geometry.fit(*geometry.clean_differences(rows, generator), settings)
            along_MKS = frame.along[:, :, samples]
            scores_BS[draw, samples] = cin_per_module(
                along_MKS, geometry.lengths_MS[:, samples]
            ).mean(dim=0)
    return scores_BS
