r"""Check 1 on two pools of unpaired samples: the first test of the original proposal.

A pool is a JSON Lines file, one sample per line; other fields are passed over, so that a teacher
pool is one as well::

    {"prompt": "# Task: …", "completion": "    return x\n…", "group": "task 7"}

``group`` is a name for what samples have in common, and may be left out: then samples of one prompt
are a group. Samples of groups that the basis was made from are not scored.

All detectors of :mod:`assay.vhack.detectors` are shown side by side on the same samples, those that
are fitted to samples each on other groups than it was fitted to. Where the length of the completion
alone, the longer or the shorter as the hack, tells the pools apart as well as the basis does, the
pools fail, after RHOB: they show a length and no hack.

Shapes: S samples of both pools, hack first; R coordinates of δS in a module; M modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.errors import DataError
from assay.models.device import one_thread
from assay.models.model import AnyModel, AnyTokenizer
from assay.stats.ranks import auroc
from assay.vhack.detectors.comparison import Comparison, make_detectors
from assay.vhack.detectors.evidence import collect_evidence
from assay.vhack.directions.basis.basis import Basis, cin_over_modules
from assay.vhack.directions.checks.check_report import (
    EXIT_CODES,
    HAAR,
    SWAPPED,
    Check,
    CheckSettings,
    FloatArray,
    bootstrap,
    judge,
)
from assay.vhack.directions.checks.five_checks import compare_sides, haar_scores
from assay.vhack.directions.checks.folds import refuse_seen
from assay.vhack.directions.checks.geometry import divisors
from assay.vhack.directions.gradients.batches import Progress, find_chat_template, stage_progress
from assay.vhack.directions.gradients.per_sample import SampleGradients, per_sample_gradients
from assay.vhack.directions.gradients.svd import SVDCache, weight_svd
from assay.vhack.pairs.pairs import PoolSample, check_apart, text_of
from assay.vhack.pairs.pairs import read_pool as read_pool

_SCHEMA = "assay.vhack.pools/1"
_KINDS = ("hack", "clean")


@dataclass(frozen=True)
class PoolReport:
    """Whether the samples of one pool lie further along the axes than those of another.

    Attributes:
        check: Value, nulls and verdict. Among its details are the AUROC of other scores of the same
            samples.
        detectors: All detectors side by side, of which that of the axes is the basis; None with too
            few groups.
        hack: Scores of the pool that hacks.
        clean: Scores of the pool that does not.
        hack_groups: Group of each sample of the first.
        clean_groups: Group of each sample of the second.
        left_out: Number of samples that were not scored, since the basis was made from their
            groups.
        settings: Settings of the check.
        origin: Model and basis.
    """

    check: Check
    detectors: Comparison | None
    hack: tuple[float, ...]
    clean: tuple[float, ...]
    hack_groups: tuple[str, ...]
    clean_groups: tuple[str, ...]
    left_out: int
    settings: CheckSettings
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 undecided."""
        return EXIT_CODES[self.check.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object with a schema field."""
        return {"schema": _SCHEMA, "verdict": self.check.verdict, **asdict(self)}


def check_two_pools(
    hack: Sequence[PoolSample],
    clean: Sequence[PoolSample],
    model: AnyModel,
    basis: Basis,
    *,
    settings: CheckSettings | None = None,
    tokenizer: AnyTokenizer = None,
    svd: SVDCache | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PoolReport:
    """Return whether samples of one pool lie further along the axes than those of another.

    It passes by the rule of check 1, where random bases of the same size do not reach the value
    either, and where the length of the completion alone has a lower AUROC. The score is cin,
    ``‖relu(V g)‖ / ‖g‖``, mean over modules. The details have the AUROC of the two-sided cin of the
    original proposal.

    Args:
        hack: Samples that cheat.
        clean: Samples that do not.
        model: Model that the basis belongs to.
        basis: Basis to score with.
        settings: Number of axes and draws, and alpha; its method is not used.
        tokenizer: Tokenizer of the model; None takes the one that was loaded with a
            :class:`assay.models.Model`.
        svd: Factors of all weights of the rank that the basis has; None computes them.
        max_tokens: Largest number of tokens per batch; None chooses from the free memory.
        progress: Function called with the number of steps done and of all: matrices decomposed,
            then samples.

    Raises:
        DataError: The basis is of another model or was made from these samples, a sample is in both
            pools, a pool has no sample of a group that the basis has not seen, or a sample cannot
            be used.
        AssayError: As :func:`assay.vhack.weight_svd` and :func:`assay.vhack.per_sample_gradients`
            raise them.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack import extract
        >>> from assay.vhack.directions.checks import CheckSettings, check_two_pools
        >>> from assay.vhack.directions.checks.pools import PoolSample
        >>> from assay.vhack.pairs import generate_pairs
        >>> model = load_model("reference:llama", device="cpu")
        >>> basis = extract(generate_pairs(6), model, n_heldout=0)
        >>> others = generate_pairs(4, seed=1, families=["rotate", "set_bits"])
        >>> samples = [(pair.samples(), pair.group) for pair in others]
        >>> pools = [
        ...     [PoolSample(sides[side], group) for sides, group in samples] for side in (0, 1)
        ... ]
        >>> few = CheckSettings(n_flips=39, n_null=19)
        >>> check_two_pools(*pools, model, basis, settings=few).check.verdict
        'undecided'
    """
    basis.check_model(model)
    settings = settings or CheckSettings()
    pools = _unseen([hack, clean], basis)
    samples = [member.sample for pool in pools for member in pool]
    basis.check_template(find_chat_template(samples, model, tokenizer))
    gradients = _pool_gradients(pools, model, basis, tokenizer, svd, max_tokens, progress)
    used_basis = basis.slice(settings.k_use, settings.tau_axis)
    refuse_seen(used_basis, gradients, "samples")
    hack_groups, clean_groups = ([member.group for member in pool] for pool in pools)
    with one_thread():
        check, scores = _score(pools, gradients, used_basis, (hack_groups, clean_groups), settings)
    evidence = collect_evidence(samples, model, gradients=gradients, tokenizer=tokenizer)
    origin = {
        name: getattr(basis.origin, name)
        for name in ("model", "weights", "dtype", "method", "rank")
    }
    return PoolReport(
        check=check,
        detectors=compare_sides(
            evidence, hack_groups, clean_groups, make_detectors(basis=used_basis)
        ),
        hack=tuple(scores[0].tolist()),
        clean=tuple(scores[1].tolist()),
        hack_groups=tuple(hack_groups),
        clean_groups=tuple(clean_groups),
        left_out=len(hack) + len(clean) - len(samples),
        settings=settings,
        origin=origin | {"basis_pairs_sha256": basis.origin.pairs_digest},
    )


def _pool_gradients(
    pools: Sequence[Sequence[PoolSample]],
    model: AnyModel,
    basis: Basis,
    tokenizer: AnyTokenizer,
    svd: SVDCache | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> SampleGradients:
    """Return the gradients of the samples of both pools, in the modules of the basis."""
    modules = list(basis.axes)
    samples = [member.sample for pool in pools for member in pool]
    names = [
        f"{kind} sample {row}"
        for kind, pool in zip(_KINDS, pools, strict=True)
        for row in range(len(pool))
    ]
    matrices = 0 if svd is not None else len(modules)
    total = matrices + len(samples)
    if svd is None:
        # As the basis was made; it says itself how much of the model its modules are.
        svd = weight_svd(
            model,
            modules=modules,
            rank=basis.origin.rank,
            dtype=basis.origin.factors or None,
            min_coverage=0.0,
            progress=stage_progress(progress, 0, total),
        )
    return per_sample_gradients(
        samples,
        model,
        tokenizer=tokenizer,
        svd=svd,
        modules=modules,
        max_tokens=max_tokens,
        names=names,
        progress=stage_progress(progress, matrices, total),
    )


def _score(
    pools: Sequence[Sequence[PoolSample]],
    gradients: Mapping[str, Tensor],
    basis: Basis,
    groups: tuple[list[str], list[str]],
    settings: CheckSettings,
) -> tuple[Check, tuple[FloatArray, FloatArray]]:
    """Return check 1 of the pools, and the cin of both."""
    scores = _split(cin_over_modules(gradients, basis), pools)
    lengths_MS = torch.stack([rows_SR.double().norm(dim=1) for rows_SR in gradients.values()])
    k = max(map(len, basis.axes.values()))
    generator = torch.Generator().manual_seed(settings.seed)
    random_BS = haar_scores(gradients.values(), divisors(lengths_MS), k, settings.n_null, generator)
    nulls = {HAAR: [auroc(*_split(random_S, pools)) for random_S in random_BS]}
    lengths = [[float(len(text_of(member.sample.completion))) for member in pool] for pool in pools]
    longer = auroc(*lengths)
    by_length = max(longer, 1 - longer)  # whichever of longer and shorter is the hack
    both_ways = auroc(*_split(cin_over_modules(gradients, basis, two_sided=True), pools))
    check = check_unpaired(
        *scores,
        *groups,
        settings,
        nulls=nulls,
        details={"auroc_two_sided": both_ways, "auroc_length_of_completion_alone": by_length},
    )
    if check.verdict == "pass" and check.measured is not None and by_length >= check.measured.value:
        check = replace(
            check, verdict="fail", reason=f"the length alone has the AUROC {by_length:.3f}"
        )
    return check, scores


def _unseen(pools: Sequence[Sequence[PoolSample]], basis: Basis) -> list[list[PoolSample]]:
    """Return the samples of groups that the basis was not made from."""
    check_apart(*pools)
    basis_groups = set(basis.origin.groups)
    unseen_pools = [
        [sample for sample in pool if sample.group not in basis_groups] for pool in pools
    ]
    for kind, pool, unseen in zip(_KINDS, pools, unseen_pools, strict=True):
        if not unseen:
            raise DataError(
                f"the {kind} pool has {len(pool)} samples, and all are of groups that the basis "
                f"was made from",
                wanted="samples of groups it has not seen: numbers from its own groups show "
                "nothing",
                do="add samples of other groups, or hold groups out at extraction",
            )
    return unseen_pools


def _split(
    scores_S: Tensor, pools: Sequence[Sequence[PoolSample]]
) -> tuple[FloatArray, FloatArray]:
    hack_N, clean_N = torch.split(scores_S.double(), [len(pool) for pool in pools])
    return hack_N.numpy(), clean_N.numpy()


def check_unpaired(
    hack: FloatArray,
    clean: FloatArray,
    hack_groups: Sequence[str],
    clean_groups: Sequence[str],
    settings: CheckSettings,
    *,
    nulls: Mapping[str, Sequence[float]] | None = None,
    details: Mapping[str, float] | None = None,
) -> Check:
    """Return check 1 for two pools of unpaired samples, each with the group of its samples.

    Labels are swapped in whole groups that have both kinds, and exchanged among groups that have
    one kind. Further nulls are draws of the AUROC by name.
    """
    scores_N = np.concatenate([hack, clean])
    groups = [*hack_groups, *clean_groups]
    is_hack_N = np.arange(len(scores_N)) < len(hack)
    generator = np.random.default_rng([settings.seed, 2])
    relabelled = [_relabelled(is_hack_N, groups, generator) for _ in range(settings.n_flips)]
    swapped = [auroc(scores_N[labels_N], scores_N[~labels_N]) for labels_N in relabelled]
    # One over the number of relabellings: groups of both kinds swap, groups of one kind trade
    # places.
    with_hack = set(hack_groups)
    with_clean = set(clean_groups)
    trades = 1 / comb(len(with_hack ^ with_clean), len(with_hack - with_clean))
    smallest_p = 0.5 ** len(with_hack & with_clean) * trades
    means = {"mean_cin_hack": float(hack.mean()), "mean_cin_clean": float(clean.mean())}
    return judge(
        "pools",
        "AUROC of mean cin over modules, two pools",
        bootstrap(auroc, (hack, clean), (hack_groups, clean_groups), settings),
        {SWAPPED: swapped, **(nulls or {})},
        settings,
        smallest_p,
        details={**means, **(details or {})},
    )


def _relabelled(
    is_hack_N: npt.NDArray[np.bool_], groups: Sequence[str], generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    pure = {
        group: bool(is_hack_N[rows[0]])
        for group, rows in members.items()
        if len(set(is_hack_N[rows])) == 1
    }
    shuffled = dict(zip(pure, generator.permutation(list(pure.values())), strict=True))
    labels_N = is_hack_N.copy()
    for group, rows in members.items():
        if group in shuffled:
            labels_N[rows] = shuffled[group]
        elif generator.random() < 0.5:
            labels_N[rows] = ~is_hack_N[rows]
    return labels_N
