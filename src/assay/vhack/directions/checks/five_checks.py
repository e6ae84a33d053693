"""The five checks, each a value, its interval, its nulls and a verdict.

Checks 1 to 3: does cin rank held-out hack samples above clean ones, and do other bases of the same
size do as well? Check 1 ranks over all samples and check 2 within each pair. Check 3
(:mod:`~assay.vhack.directions.checks.random_null`) compares with three nulls.

Check 4: is the gradient of a batch that cheats further along the axes than that of one that does
not? cin here is that of a whole batch: the components and the length of the *summed* gradient of
one side of a held-out group, as if they came from a teacher that cheats and a student that does
not.

Check 5: would other pairs have given the same axes?
:mod:`~assay.vhack.directions.checks.stability` says how it is asked.

Shapes as in :mod:`assay.vhack.directions.checks.geometry`; N' scored pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from assay.errors import UsageError
from assay.models.device import one_thread
from assay.models.model import Model
from assay.stats.ranks import auroc
from assay.vhack.detectors.comparison import compare_detectors
from assay.vhack.detectors.evidence import LabelledEvidence, collect_evidence
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import GradientOptions, PairGradients, pair_gradients
from assay.vhack.directions.checks.check_report import (
    SWAPPED,
    Check,
    CheckReport,
    CheckSettings,
)
from assay.vhack.directions.checks.check_rules import bootstrap, judge
from assay.vhack.directions.checks.folds import Design, cross_fit, design_for_basis, draw_swaps
from assay.vhack.directions.gradients.batches import find_chat_template
from assay.vhack.pairs.pairs import Pair
from assay.vhack.pairs.selection import check_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from assay.vhack.directions.checks.random_null import check_random_null
from assay.vhack.directions.checks.stability import check_stability


def check(
    pairs: Sequence[Pair],
    model: "Model | PreTrainedModel",
    *,
    basis: Basis | None = None,
    settings: CheckSettings | None = None,
    **options: Unpack[GradientOptions],
) -> CheckReport:
    """Return five checks of hack directions, on held-out data and each against its nulls.

    With a basis, only pairs of groups that it was not made from are scored, and check 5 uses those
    it was made from. Without one, groups are scored by bases of other groups.

    Args:
        pairs: Pairs to score and, without a basis, to fit bases to.
        model: Model that the basis belongs to.
        basis: Basis to check; None fits bases itself.
        settings: Amount of evidence and strictness of the rules.
        options: Keywords of :class:`assay.vhack.directions.basis.extract.GradientOptions`; a given
            basis says itself rank and factors, and what it covers.

    Raises:
        DataError: A prompt occurs in two groups, the basis was made from pairs that would be scored
            or for another model, or a pair cannot be used.
        UsageError: Too few groups, or no pair of a group that the basis has not seen.
        AssayError: A gradient cannot be computed; :func:`assay.vhack.pair_gradients` lists the
            cases.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack.directions.checks import CheckSettings, check
        >>> from assay.vhack.pairs import generate_pairs
        >>> model = load_model("reference:llama", device="cpu")
        >>> settings = CheckSettings(method="svd", n_flips=39, n_null=19, n_splits=4)
        >>> report = check(generate_pairs(6), model, settings=settings)
        >>> [made.name for made in report.checks]
        ['pools', 'heldout', 'random_null', 'sources', 'stability']
    """
    check_prompts(pairs)
    if basis is not None:
        if basis.origin.weights:
            basis.check_model(model)
        basis.check_template(find_chat_template(pairs, model, options.get("tokenizer")))
        # In its coordinates, and of as much of the model as it was made of.
        options |= {
            "rank": basis.origin.rank,
            "factors": basis.origin.factors or None,
            "min_coverage": 0.0,
        }
    gradients = pair_gradients(pairs, model, **options)
    report = check_gradients(gradients, basis=basis, settings=settings)
    sides = {pair.key: pair.samples() for pair in pairs}
    samples = [sides[key][side] for side in (0, 1) for key in gradients.keys]
    gradients_of_sides = {
        name: torch.cat([rows_NR, gradients.clean[name]])
        for name, rows_NR in gradients.hack.items()
    }
    evidence = collect_evidence(
        samples, model, gradients=gradients_of_sides, tokenizer=options.get("tokenizer")
    )
    n = len(gradients)
    with suppress(UsageError), one_thread():  # too few groups
        hack = evidence.take(range(n))
        clean = evidence.take(range(n, 2 * n))
        labelled = LabelledEvidence(hack, clean, gradients.groups, gradients.groups)
        report = replace(report, detectors=compare_detectors(labelled))
    return report


def check_gradients(
    gradients: PairGradients, *, basis: Basis | None = None, settings: CheckSettings | None = None
) -> CheckReport:
    """Return the five checks of gradients that were computed before.

    :func:`check` describes the arguments and errors.
    """
    settings = settings or CheckSettings()
    # Checked by its own method, and with no more axes than it has.
    if basis is not None:
        most = max((len(axes_KR) for axes_KR in basis.axes.values()), default=1)
        settings = replace(settings, method=basis.origin.method, k_use=min(settings.k_use, most))
    with one_thread():
        design = (
            cross_fit(gradients, settings)
            if basis is None
            else design_for_basis(basis, gradients, settings)
        )
        pools = check_pools(design)
        assert pools.measured is not None
        checks = (
            pools,
            check_heldout(design),
            check_random_null(design, pools.measured),
            check_sources(design),
            check_stability(design),
        )
    hack_BN, clean_BN = design.held_out
    source = gradients.origin
    origin = {
        **{name: getattr(source, name) for name in ("model", "weights", "dtype")},
        "pairs": len(gradients),
        "groups": len(set(gradients.groups)),
        "pairs_sha256": source.pairs_digest,
        "basis_pairs_sha256": None if basis is None else basis.origin.pairs_digest,
        "skipped": len(source.skipped),
    }
    hack, clean = (tuple(side_BN[0].tolist()) for side_BN in (hack_BN, clean_BN))
    return CheckReport(
        checks, hack, clean, tuple(design.tested_groups), design.text, settings, origin
    )


def check_pools(design: Design) -> Check:
    """Return check 1, from the two sides of held-out pairs taken as two pools."""
    hack_BN, clean_BN = design.held_out
    details = {
        "mean_cin_hack": float(hack_BN[0].mean()),
        "mean_cin_clean": float(clean_BN[0].mean()),
    }
    return _judge_held_out(design, "pools", "AUROC of mean cin over modules", auroc, details)


def _judge_held_out(
    design: Design,
    name: str,
    statistic: str,
    score: Callable[..., float],
    details: Mapping[str, Any],
) -> Check:
    """Return a check of the cin of both sides of held-out pairs, by swaps of whole groups."""
    hack_BN, clean_BN = design.held_out
    measured = bootstrap(
        score, (hack_BN[0], clean_BN[0]), [design.tested_groups] * 2, design.settings
    )
    nulls = {SWAPPED: list(map(score, hack_BN[1:], clean_BN[1:]))}
    return judge(
        name, statistic, measured, nulls, design.settings, design.smallest_p, details=details
    )


def check_heldout(design: Design) -> Check:
    """Return check 2: within a held-out pair the hack side scores higher."""
    details = {"pairs": len(design.tested)}
    return _judge_held_out(
        design,
        "heldout",
        "share of pairs whose hack side has the larger cin",
        lambda hack, clean: auroc(hack - clean, [0.0]),
        details,
    )


def check_sources(design: Design) -> Check:
    """Return check 4 with the sides of every held-out group as two batches."""
    geometry = design.geometry
    settings = design.settings
    signs_BN = draw_swaps(
        design.groups, settings.n_flips, np.random.default_rng([settings.seed, 4])
    )
    hack = {}
    clean = {}
    for fold in design.folds:
        for group in dict.fromkeys(design.groups[index] for index in fold.test.tolist()):
            inside = [design.groups[index] == group for index in fold.test.tolist()]
            pairs = fold.test[torch.tensor(inside)]
            weights_S2 = torch.zeros(2 * geometry.n, 2, dtype=torch.float64)
            weights_S2[pairs, 0] = 1.0
            weights_S2[pairs + geometry.n, 1] = 1.0
            along_MK2, lengths_M2 = geometry.batch(fold.along, weights_S2)
            first_B, second_B = fold.cin(along_MK2, lengths_M2, signs_BN).unbind(dim=1)
            swapped_B = signs_BN[:, pairs[0]] < 0
            hack[group] = torch.where(swapped_B, second_B, first_B).numpy()
            clean[group] = torch.where(swapped_B, first_B, second_B).numpy()
    hack_BG, clean_BG = (np.column_stack(list(side.values())) for side in (hack, clean))
    differences_BG = hack_BG - clean_BG
    return judge(
        "sources",
        "cin of the summed hack gradient of a group minus that of its clean gradient, mean over "
        "groups",
        bootstrap(np.mean, [differences_BG[0]], [list(hack)], settings),
        {SWAPPED: differences_BG[1:].mean(axis=1).tolist()},
        settings,
        design.smallest_p,
        details={
            "mean_cin_hack": float(hack_BG[0].mean()),
            "mean_cin_clean": float(clean_BG[0].mean()),
        },
    )
