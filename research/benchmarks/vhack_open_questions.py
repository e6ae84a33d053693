"""The two open questions of the original proposal, on held-out pairs: whiten by S, and LDA on labels?

*Whitening by S.* The coordinate of a singular direction may be scaled, ``δS_i = σ_i^a p_i``, and then the gradient of p
is ``σ_i^a g_i``. With a = 1 the parameter is ``δS_i / σ_i``, as the proposal writes it; with a = −1 it is its opposite,
which lifts weak directions; a = ±½ are in between. Axes, cin and scores are those in the scaled coordinates. σ_i is
taken as a share of the first one of its matrix, and as 0.001 where it is smaller.

*LDA on labels.* The labels are the mechanisms of the hack sides. Two forms, both with the shrinkage of ``lda``:

- ``labels``: the classes are the mechanisms and clean. Means of the mechanisms less the mean of the clean sides are
  whitened by the covariance of all samples within their classes;
- ``labels of pairs``: mean differences of the mechanisms are whitened by the covariance of the differences within a
  mechanism.

Means weigh as much as they have pairs, up to five axes are kept, and each points to where most pairs are.

Design: generated pairs, three parts of the task families, each scored by bases of the other two. The value of a method
is the AUROC of mean cin over modules, hack against clean, all parts together. Two methods are compared on the same
pairs; the interval of the difference is a bootstrap over task families.

Rule, fixed before the first run. Confidence is 1 − 0.05 / 8 for each of the eight comparisons of a question.

1. Scaled coordinates with exponent a are *better* than plain ones for a method (``svd``, ``lda``) if the interval of
   the difference lies above 0 on both models, *worse* if it lies below 0 on both, and otherwise nothing is shown. They
   would become an option if they were better for ``lda``, the default.
2. LDA on labels *beats* a method (``svd``, ``lda``) in one of its two forms, at one of two sizes, if the interval lies
   above 0 on both models, and is *beaten* if it lies below. The sizes are all pairs of the other families, and twelve:
   three each of four mechanisms, five draws, the AUROC being their mean. The proposal's "would beat unsupervised PCA at
   this N" holds if a form beats ``svd`` at twelve. It would become a method if it beat ``lda`` at all pairs.

Described and not judged: share of pairs ranked right; the same methods with whole mechanisms held out, families too.

    OMP_NUM_THREADS=1 python benchmarks/vhack_open_questions.py -o benchmarks/results/vhack_open_questions.json
"""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from _common import note, parser, publish

from assay.models import load_model
from assay.stats import auroc, group_bootstrap, paired_accuracy
from assay.vhack import Basis, PairGradients, cin_over_modules, pair_gradients, weight_svd
from assay.vhack.basis._axes import _oriented, find_axes, gram
from assay.vhack.pairs import generate_pairs

AXES = 5
EXPONENTS = (-1.0, -0.5, 0.5, 1.0)
FLOOR = 1e-3
PARTS = 3
DRAWS = 5
FEW_MECHANISMS, FEW_EACH = 4, 3
COMPARISONS = 8
PLAIN = ("svd", "lda", "mean-diff")
LABELLED = ("labels", "labels of pairs")


@dataclass
class Material:
    """Gradients of all pairs, the mechanism of each, and the gradients in scaled coordinates by exponent."""

    gradients: PairGradients
    mechanisms: list[str]
    scaled: dict[float, PairGradients]

    @property
    def families(self):
        """Task family of every pair."""
        return self.gradients.groups


def scaled(gradients, svd, exponent):
    """The gradients of ``p`` for ``δS = σ^a p``."""
    factor = {n: (f.values / f.values[0]).clamp_min(FLOOR) ** exponent for n, f in svd.items()}
    sides = ({n: rows * factor[n] for n, rows in side.items()} for side in (gradients.hack, gradients.clean))
    return PairGradients(*sides, groups=gradients.groups, keys=gradients.keys)


def plain_basis(method, gradients, keep):
    return gradients.basis(top_k=AXES, method=method, keep=keep)


def labelled_basis(form, gradients, mechanisms, keep):
    """LDA on the mechanisms of these pairs."""
    index = torch.tensor(keep)
    kinds = [mechanisms[row] for row in keep]
    names = list(dict.fromkeys(kinds))
    member_FN = torch.tensor([[kind == name for kind in kinds] for name in names]).double()
    mean_FN = member_FN / member_FN.sum(dim=1, keepdim=True)
    weight_F1 = member_FN.sum(dim=1, keepdim=True).sqrt()
    axes, values, votes = {}, {}, {}
    for name in gradients.hack:
        hack_NR, clean_NR = (side[name][index].double() for side in (gradients.hack, gradients.clean))
        difference_NR = hack_NR - clean_NR
        if form == "labels":
            means_FR = mean_FN @ hack_NR - clean_NR.mean(dim=0)
            within = [hack_NR - member_FN.T @ (mean_FN @ hack_NR), clean_NR - clean_NR.mean(dim=0)]
        else:
            means_FR = mean_FN @ difference_NR
            within = [difference_NR - member_FN.T @ means_FR]
        rows = torch.cat(within)
        classes_FR = weight_F1 * means_FR
        found_KR, values[name], _ = find_axes(
            classes_FR, gram(classes_FR), top_k=AXES, method="lda", clean=(rows, gram(rows))
        )
        turned_KR, votes[name] = _oriented(difference_NR, found_KR.double())
        axes[name] = turned_KR.float()
    return Basis(axes, values, votes)


def scores(gradients, basis, rows):
    index = torch.tensor(rows)
    sides = ({n: part[index] for n, part in side.items()} for side in (gradients.hack, gradients.clean))
    return [cin_over_modules(side, basis).double().numpy() for side in sides]


def methods(material):
    """Every method as a function of the pairs to fit to, with the gradients that it scores."""
    found = {name: (partial(plain_basis, name, material.gradients), material.gradients) for name in PLAIN}
    for exponent, other in material.scaled.items():
        for name in ("svd", "lda"):
            found[f"{name}, a = {exponent:g}"] = (partial(plain_basis, name, other), other)
    for form in LABELLED:
        fit = partial(labelled_basis, form, material.gradients, material.mechanisms)
        found[form] = (fit, material.gradients)
    return found


def parts_of(families):
    names = list(dict.fromkeys(families))
    return [set(names[start::PARTS]) for start in range(PARTS)]


def few(material, away, draw):
    """Three pairs each of four mechanisms, drawn from these."""
    rng = random.Random(draw)
    chosen = rng.sample(sorted(set(material.mechanisms)), FEW_MECHANISMS)
    return [row for kind in chosen for row in rng.sample([i for i in away if material.mechanisms[i] == kind], FEW_EACH)]


def held_out(material, names, fits):
    """Scores of both sides of every pair by bases of the other families, [N, draws] each, by method."""
    known = methods(material)
    n = len(material.gradients)
    found = {name: np.full((2, n, fits), np.nan) for name in names}
    for part in parts_of(material.families):
        test = [i for i, family in enumerate(material.families) if family in part]
        away = [i for i, family in enumerate(material.families) if family not in part]
        for draw in range(fits):
            keep = away if fits == 1 else few(material, away, draw)
            for name in names:
                fit, gradients = known[name]
                found[name][:, test, draw] = scores(gradients, fit(keep), test)
    return found


def mean_auroc(hack_ND, clean_ND):
    return float(np.mean([auroc(hack, clean) for hack, clean in zip(hack_ND.T, clean_ND.T, strict=True)]))


def gain(hack_ND, clean_ND, other_hack_ND, other_clean_ND):
    return mean_auroc(hack_ND, clean_ND) - mean_auroc(other_hack_ND, other_clean_ND)


def compared(found, one, other, families):
    interval = group_bootstrap(
        gain, (*found[one], *found[other]), [families] * 4, confidence=1 - 0.05 / COMPARISONS, n_resamples=4000
    )
    note(f"{one} less {other}: {interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def described(found, families):
    table = {}
    for name, (hack_ND, clean_ND) in found.items():
        interval = group_bootstrap(mean_auroc, (hack_ND, clean_ND), [families] * 2)
        table[name] = {
            "auroc": interval.value,
            "low": interval.low,
            "high": interval.high,
            "paired_accuracy": float(np.mean([paired_accuracy(*s) for s in zip(hack_ND.T, clean_ND.T, strict=True)])),
        }
        note(f"{name}: {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    return table


def other_mechanisms(material, names):
    """AUROC per mechanism of bases of the other mechanisms and the other families."""
    known = methods(material)
    table = {name: {} for name in names}
    for mechanism in dict.fromkeys(material.mechanisms):
        sides = {name: ([], []) for name in names}
        for part in parts_of(material.families):
            kinds = list(zip(material.families, material.mechanisms, strict=True))
            test = [i for i, (family, kind) in enumerate(kinds) if family in part and kind == mechanism]
            keep = [i for i, (family, kind) in enumerate(kinds) if family not in part and kind != mechanism]
            for name in names:
                fit, gradients = known[name]
                for side, values in zip(sides[name], scores(gradients, fit(keep), test), strict=True):
                    side.extend(values.tolist())
        for name in names:
            table[name][mechanism] = auroc(*sides[name])
    for name in names:
        table[name]["mean"] = float(np.mean(list(table[name].values())))
    return table


def measure(reference, count):
    model = load_model(reference, device="cpu", dtype="float32")
    svd = weight_svd(model)
    pairs = generate_pairs(count)
    note(f"{reference}: gradients of {count} generated pairs")
    gradients = pair_gradients(pairs, model, svd=svd, max_tokens=512)
    mechanisms = [tag.removeprefix("mechanism:") for pair in pairs for tag in pair.tags if tag.startswith("mechanism:")]
    material = Material(gradients, mechanisms, {a: scaled(gradients, svd, a) for a in EXPONENTS})
    families = material.families
    everything = held_out(material, list(methods(material)), 1)
    twelve = held_out(material, [*PLAIN, *LABELLED], DRAWS)
    return {
        "all pairs": described(everything, families),
        "twelve pairs": described(twelve, families),
        "other mechanisms": other_mechanisms(material, [*PLAIN, *LABELLED]),
        "whitening by S": {
            f"{name}, a = {a:g}": compared(everything, f"{name}, a = {a:g}", name, families)
            for name in ("svd", "lda")
            for a in EXPONENTS
        },
        "labels": {
            f"{form}, {size}, less {name}": compared(found, form, name, families)
            for size, found in (("all pairs", everything), ("twelve pairs", twelve))
            for form in LABELLED
            for name in ("svd", "lda")
        },
    }


def verdicts(results, question, good, bad):
    """The rule: what lies on one side of 0 on every model."""
    found = {}
    for name in next(iter(results.values()))[question]:
        intervals = [result[question][name] for result in results.values()]
        above, below = all(i["low"] > 0 for i in intervals), all(i["high"] < 0 for i in intervals)
        found[name] = good if above else bad if below else "nothing shown"
    return found


def main():
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=192, help="how many generated pairs")
    options.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    chosen = options.parse_args()
    results = {reference: measure(reference, chosen.pairs) for reference in chosen.models}
    found = {
        "whitening by S": verdicts(results, "whitening by S", "better", "worse"),
        "labels": verdicts(results, "labels", "beats", "beaten"),
    }
    publish("vhack_open_questions", {"pairs": chosen.pairs, "verdicts": found, "models": results}, chosen.output)


if __name__ == "__main__":
    main()
