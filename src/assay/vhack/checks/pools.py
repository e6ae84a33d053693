r"""Check 1 on two pools of samples that are not paired: the first test of the original proposal.

A pool is a JSON Lines file, one sample per line; other fields are passed over, so that a teacher pool is one as well::

    {"prompt": "# Task: …", "completion": "    return x\n…", "group": "task 7"}

``group`` is a name for what samples have in common, and may be left out: then samples of one prompt are a group.
Samples of groups that the basis was made from are not scored.

A guard against degenerate detectors, after RHOB, asks what a high AUROC can come from that is no sign of a hack. Three
questions to the scores, each with the verdict ``pass``, ``fail`` or ``undecided``:

- *constant*: do the scores tell samples apart at all? At most half of all pairs of a hack and a clean sample may tie.
- *halves*: is the AUROC that of both halves of the groups? Two one-sided tests: the 1 − 2α interval of the difference
  between two random halves must lie within ±0.1. It fails where the interval lies wholly outside.
- *length*: is there more in it than the length of the completion? The interval of the difference between the AUROC and
  that of the length, the longer or the shorter one as the hack, whichever is higher, must lie above 0. It fails where
  the difference itself is not above 0.

Shapes: S samples of both pools, hack first; R coordinates of δS in a module; M modules.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.errors import DataError
from assay.files.jsonl import read_jsonl
from assay.models.chat import Chat
from assay.models.device import one_thread
from assay.stats.rates import BootstrapInterval, auroc
from assay.vhack.basis.basis import Basis, cin_over_modules
from assay.vhack.checks.five_checks import check_unpaired, haar_scores
from assay.vhack.checks.folds import refuse_seen
from assay.vhack.checks.judge import (
    EXIT_CODES,
    HAAR,
    Check,
    CheckSettings,
    CheckVerdict,
    FloatArray,
    bootstrap,
)
from assay.vhack.gradients.batches import Progress, find_chat_template, stage_progress
from assay.vhack.gradients.per_sample import per_sample_gradients
from assay.vhack.gradients.svd import SVDCache, weight_svd
from assay.vhack.pairs.pairs import Sample, chat_columns, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from assay.models.load import Model


_EQUIVALENCE = 0.1  # largest difference of two AUROC that counts as none
_TIES = 0.5
_SCHEMA = "assay.vhack.pools/1"
_KINDS = ("hack", "clean")


@dataclass(frozen=True, slots=True)
class GuardItem:
    """One question of the guard."""

    name: str  # ``constant``, ``halves`` or ``length``
    measured: BootstrapInterval | None  # share of ties, or difference of two AUROC; None where it could not be measured
    verdict: CheckVerdict
    reason: str


def guard_scores(
    hack: npt.ArrayLike,
    clean: npt.ArrayLike,
    groups: tuple[Sequence[str], Sequence[str]],
    lengths: tuple[npt.ArrayLike, npt.ArrayLike],
    settings: CheckSettings | None = None,
) -> tuple[GuardItem, ...]:
    """Return what a guard against degenerate detectors says of the scores of one, higher for what looks like a hack.

    Groups, such as problems, and lengths in any unit are those of each hack sample and of each clean one.

    Example:
        >>> groups = [str(n) for n in range(40)]
        >>> scores = [float(n) for n in range(40)]
        >>> items = guard_scores(scores, [-1 - s for s in scores], (groups, groups), ([9] * 40, [9] * 40))
        >>> [item.verdict for item in items]
        ['pass', 'pass', 'pass']
    """
    settings = settings or CheckSettings()
    scores, sizes = ([np.asarray(side, dtype=float) for side in both] for both in ((hack, clean), lengths))
    of_length = bootstrap(_beyond_length, [*scores, *sizes], [*groups, *groups], settings)
    verdict: CheckVerdict = "pass" if of_length.low > 0 else "fail" if of_length.value <= 0 else "undecided"
    interval = f"{of_length.value:+.3f} ({of_length.low:+.3f} to {of_length.high:+.3f})"
    length = GuardItem("length", of_length, verdict, f"the AUROC is {interval} above that of the length")
    return _constant(*scores), _halves(scores, groups, settings), length


def _constant(hack_N: FloatArray, clean_N: FloatArray) -> GuardItem:
    values, counts_H = np.unique(hack_N, return_counts=True)
    others, counts_C = np.unique(clean_N, return_counts=True)
    _, of_hack, of_clean = np.intersect1d(values, others, return_indices=True)
    share = float(counts_H[of_hack] @ counts_C[of_clean]) / (len(hack_N) * len(clean_N))
    reason = f"{share:.0%} of all pairs of a hack and a clean sample tie"
    return GuardItem("constant", BootstrapInterval(share, share, share), "fail" if share > _TIES else "pass", reason)


def _halves(
    scores: Sequence[FloatArray], groups: tuple[Sequence[str], Sequence[str]], settings: CheckSettings
) -> GuardItem:
    names = list(dict.fromkeys([*groups[0], *groups[1]]))
    order = np.random.default_rng([settings.seed, 21]).permutation(len(names))
    first = {names[i] for i in order[: len(names) // 2]}
    parts, of_groups = [], []
    for inside in (True, False):
        for values_N, labels in zip(scores, groups, strict=True):
            rows = [row for row, label in enumerate(labels) if (label in first) == inside]
            parts.append(values_N[rows])
            of_groups.append([labels[row] for row in rows])
    if min(map(len, parts)) == 0:
        return GuardItem("halves", None, "undecided", "a half has samples of one kind only")
    found = bootstrap(
        lambda *four: auroc(*four[:2]) - auroc(*four[2:]), parts, of_groups, settings, confidence=1 - 2 * settings.alpha
    )
    ends = f"({found.low:.3f} to {found.high:.3f}), {-_EQUIVALENCE:g} to {_EQUIVALENCE:g} counts as none"
    is_equal = found.low > -_EQUIVALENCE and found.high < _EQUIVALENCE
    is_other = found.low >= _EQUIVALENCE or found.high <= -_EQUIVALENCE
    verdict: CheckVerdict = "pass" if is_equal else "fail" if is_other else "undecided"
    return GuardItem("halves", found, verdict, f"the two halves differ by {found.value:.3f} {ends}")


def _beyond_length(hack: FloatArray, clean: FloatArray, hack_length: FloatArray, clean_length: FloatArray) -> float:
    by_length = auroc(hack_length, clean_length)
    return auroc(hack, clean) - max(by_length, 1 - by_length)


@dataclass(frozen=True, slots=True)
class PoolSample:
    """A sample of a pool and its group."""

    sample: Sample
    group: str


@dataclass(frozen=True)
class PoolReport:
    """Whether the samples of one pool lie further along the axes than those of another.

    Attributes:
        check: Value, nulls and verdict. Among its details are the AUROC of other scores of the same samples.
        guard: What the guard against degenerate detectors says, see :func:`guard_scores`.
        hack: Scores of the pool that hacks.
        clean: Scores of the pool that does not.
        hack_groups: Group of each sample of the first.
        clean_groups: Group of each sample of the second.
        left_out: Number of samples that were not scored, since the basis was made from their groups.
        settings: Settings of the check.
        origin: Model and basis.
    """

    check: Check
    guard: tuple[GuardItem, ...]
    hack: tuple[float, ...]
    clean: tuple[float, ...]
    hack_groups: tuple[str, ...]
    clean_groups: tuple[str, ...]
    left_out: int
    settings: CheckSettings
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> CheckVerdict:
        """Verdict of the check, and ``fail`` where it passes and a part of the guard fails."""
        return "fail" if self.check.verdict == "pass" and self._failed else self.check.verdict

    @property
    def reason(self) -> str:
        """What decided: the reason of the check, or the parts of the guard that failed."""
        return "; ".join(self._failed) if self.check.verdict == "pass" and self._failed else self.check.reason

    @property
    def _failed(self) -> list[str]:
        return [f"{item.name}: {item.reason}" for item in self.guard if item.verdict == "fail"]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 undecided."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object with a schema field."""
        return {"schema": _SCHEMA, "verdict": self.verdict, **asdict(self)}


def read_pool(path: str | Path, *, most: int | None = None, seed: int = 0) -> list[PoolSample]:
    """Return the samples of a pool file, or at most so many of them, drawn by the seed.

    Raises:
        DataError: The file cannot be read, holds no sample, or a line is not a sample; the message names the line.
    """
    found = []
    for number, line in read_jsonl(path):
        try:
            record, why = chat_columns(line, ("completion",)), "not a sample"
        except ValueError as error:
            record, why = {}, str(error)
        prompt, completion, group = record.get("prompt", ""), record.get("completion", ""), record.get("group")
        texts = (prompt, completion) if group is None else (prompt, completion, group)
        if not all(isinstance(text, str | Chat) and text_of(text).strip() for text in texts):
            raise DataError(
                f"{path}, line {number}: {why}",
                wanted='{"prompt": "…", "completion": "…"}, text or messages, none empty, and perhaps "group", a name',
                do="correct or remove the line",
            )
        said = prompt.json if isinstance(prompt, Chat) else prompt
        known = group if group is not None else "prompt " + hashlib.sha256(said.encode()).hexdigest()[:12]
        found.append(PoolSample(Sample(prompt, completion), known))
    if not found:
        raise DataError(f"{path}: no sample", wanted="at least one line", do="check the path")
    if most is None or most >= len(found):
        return found
    return [found[row] for row in sorted(random.Random(seed).sample(range(len(found)), most))]


def check_two_pools(
    hack: Sequence[PoolSample],
    clean: Sequence[PoolSample],
    model: "Model | PreTrainedModel",
    basis: Basis,
    *,
    settings: CheckSettings | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    svd: SVDCache | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PoolReport:
    """Return whether the samples of one pool lie further along the axes of a basis than those of another.

    It passes by the rule of check 1, where random bases of the same size do not reach the value either, and where no
    part of the guard against degenerate detectors fails. The score is cin, ``‖relu(V g)‖ / ‖g‖``, mean over modules.
    The details have the AUROC of the two-sided cin of the original proposal, and of two things that are no sign of a
    hack: the length of the gradient and that of the completion.

    Args:
        hack: Samples that cheat.
        clean: Samples that do not.
        model: Model that the basis belongs to.
        basis: Basis to score with.
        settings: Number of axes and draws, and alpha; its method is not used.
        tokenizer: Tokenizer of the model; None takes the one that was loaded with a :class:`assay.models.Model`.
        svd: Factors of all weights of the rank that the basis has; None computes them.
        max_tokens: Largest number of tokens per batch; None chooses from the free memory.
        progress: Function called with the number of steps done and of all: matrices decomposed, then samples.

    Raises:
        DataError: The basis is of another model or was made from these samples, a sample is in both pools, a pool has
            no sample of a group that the basis has not seen, or a sample cannot be used.
        AssayError: As :func:`assay.vhack.weight_svd` and :func:`assay.vhack.per_sample_gradients` raise them.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack import extract
        >>> from assay.vhack.checks import CheckSettings, check_two_pools
        >>> from assay.vhack.checks.pools import PoolSample
        >>> from assay.vhack.pairs import generate_pairs
        >>> model = load_model("reference:llama", device="cpu")
        >>> basis = extract(generate_pairs(6), model, n_heldout=0)
        >>> others = generate_pairs(4, seed=1, families=["rotate", "set_bits"])
        >>> samples = [(pair.samples(), pair.group) for pair in others]
        >>> pools = [[PoolSample(sides[side], group) for sides, group in samples] for side in (0, 1)]
        >>> check_two_pools(*pools, model, basis, settings=CheckSettings(n_flips=39, n_null=19)).verdict
        'undecided'
    """
    basis.check_model(model)
    settings = settings or CheckSettings()
    pools, left_out = _unseen([hack, clean], basis)
    modules = list(basis.axes)
    samples = [one.sample for pool in pools for one in pool]
    basis.check_template(find_chat_template(samples, model, tokenizer))
    names = [f"{kind} sample {row}" for kind, pool in zip(_KINDS, pools, strict=True) for row in range(len(pool))]
    matrices = 0 if svd is not None else len(modules)
    stages = [stage_progress(progress, before, matrices + len(samples)) for before in (0, matrices)]
    if svd is None:  # those that the basis was made with; it says itself how much of the model its modules are
        rank, dtype = basis.origin.rank, basis.origin.factors or None
        svd = weight_svd(model, modules=modules, rank=rank, dtype=dtype, min_coverage=0.0, progress=stages[0])
    gradients = per_sample_gradients(
        samples,
        model,
        tokenizer=tokenizer,
        svd=svd,
        modules=modules,
        max_tokens=max_tokens,
        names=names,
        progress=stages[1],
    )
    used = basis.slice(settings.k_use, settings.tau_axis)
    refuse_seen(used, gradients, "samples")
    groups = [[one.group for one in pool] for pool in pools]
    sizes = [np.array([float(len(text_of(one.sample.completion))) for one in pool]) for pool in pools]
    with one_thread():
        scores = _split(cin_over_modules(gradients, used), pools)
        lengths_MS = torch.stack([rows_SR.double().norm(dim=1) for rows_SR in gradients.values()])
        lengths_MS = torch.where(lengths_MS > 0, lengths_MS, torch.inf)
        k, generator = max(map(len, used.axes.values())), torch.Generator().manual_seed(settings.seed)
        random_BS = haar_scores(gradients.values(), lengths_MS, k, settings.n_null, generator)
        nulls = {HAAR: [auroc(*_split(random_S, pools)) for random_S in random_BS]}
        details = _other_scores(pools, used, gradients) | {"auroc_length_of_completion_alone": auroc(*sizes)}
        check = check_unpaired(*scores, groups[0], groups[1], settings, nulls=nulls, details=details)
    origin = {name: getattr(basis.origin, name) for name in ("model", "weights", "dtype", "method", "rank")}
    return PoolReport(
        check=check,
        guard=guard_scores(*scores, (groups[0], groups[1]), (sizes[0], sizes[1]), settings),
        hack=tuple(scores[0].tolist()),
        clean=tuple(scores[1].tolist()),
        hack_groups=tuple(groups[0]),
        clean_groups=tuple(groups[1]),
        left_out=left_out,
        settings=settings,
        origin=origin | {"basis_pairs_sha256": basis.origin.pairs_digest},
    )


def _unseen(pools: Sequence[Sequence[PoolSample]], basis: Basis) -> tuple[list[list[PoolSample]], int]:
    """Return the samples of groups that the basis was not made from, and how many others there are."""
    hack, clean = pools
    if both := {one.sample for one in hack} & {one.sample for one in clean}:
        prompt = min(text_of(one.prompt) for one in both)
        raise DataError(
            f"{len(both)} samples are in both pools, one of them of the prompt {prompt!r:.60}",
            wanted="samples that cheat in one, and samples that do not in the other",
            do="remove them from the pool to which they do not belong",
        )
    known = set(basis.origin.groups)
    kept = [[one for one in pool if one.group not in known] for pool in pools]
    for kind, pool, left in zip(_KINDS, pools, kept, strict=True):
        if not left:
            raise DataError(
                f"the {kind} pool has {len(pool)} samples, and all are of groups that the basis was made from",
                wanted="samples of groups it has not seen: numbers from its own groups show nothing",
                do="add samples of other groups, or hold groups out at extraction",
            )
    return kept, sum(map(len, pools)) - sum(map(len, kept))


def _split(scores_S: Tensor, pools: Sequence[Sequence[PoolSample]]) -> tuple[FloatArray, FloatArray]:
    hack_N, clean_N = torch.split(scores_S.double(), [len(pool) for pool in pools])
    return hack_N.numpy(), clean_N.numpy()


def _other_scores(
    pools: Sequence[Sequence[PoolSample]], basis: Basis, gradients: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the AUROC of other scores of the same samples, which the verdict does not depend on."""
    both = _split(cin_over_modules(gradients, basis, two_sided=True), pools)
    energy = _split(cin_over_modules(gradients, basis, weighting="energy"), pools)
    norms_S = torch.stack([rows_SR.double().square().sum(dim=1) for rows_SR in gradients.values()]).sum(dim=0)
    return {
        "mean_cin_two_sided_hack": float(both[0].mean()),
        "mean_cin_two_sided_clean": float(both[1].mean()),
        "auroc_two_sided": auroc(*both),
        "auroc_energy_weighted": auroc(*energy),
        "auroc_gradient_norm_alone": auroc(*_split(norms_S, pools)),
    }
