"""Are hack directions of the reference models real? The five checks on our pairs.

- *Generated pairs*, whole task families held out, with each of the three methods.
- *Mechanisms held out*: a basis of the other mechanisms and other families, against one of the same mechanism.

    python research/benchmarks/vhack_checks.py --pairs 192 -o research/results/vhack_checks_models.json
"""

import numpy as np
import torch
from _common import note, parser, publish

from assay.models import load_model
from assay.stats import auroc, group_bootstrap
from assay.stats.rates import paired_accuracy
from assay.vhack import cin_over_modules, pair_gradients, weight_svd
from assay.vhack.checks import CheckSettings, check_gradients
from assay.vhack.pairs import generate_pairs

SETTINGS = (
    CheckSettings(n_null=59, method="svd"),
    CheckSettings(n_null=59, method="mean-diff", k_use=1),
    CheckSettings(n_null=59, method="lda"),
)
PARTS = 3


def summary(report):
    """What the tables show of a report."""
    checks = {}
    for check in report.checks:
        alpha = report.settings.alpha
        checks[check.name] = {
            "verdict": check.verdict,
            "value": check.measured and check.measured.value,
            "low": check.measured and check.measured.low,
            "high": check.measured and check.measured.high,
            "null_quantiles": {name: float(np.quantile(draws, 1 - alpha)) for name, draws in check.nulls.items()},
            "p_values": dict(check.p_values),
            "reason": check.reason,
        }
    return {"verdict": report.verdict, "design": report.design, "checks": checks}


def checked(name, gradients, settings):
    report = check_gradients(gradients, settings=settings)
    shown = {c.name: (round(c.measured.value, 3) if c.measured else None, c.verdict) for c in report.checks}
    note(f"{name}: {shown}")
    return summary(report)


def label(settings):
    return f"{settings.method}, {settings.k_use} axes"


def mechanisms(gradients, kinds, method, k_use):
    """Per mechanism, held out by task family: a basis of the other mechanisms, and one of the same."""
    families = list(dict.fromkeys(gradients.groups))
    parts = [set(families[start::PARTS]) for start in range(PARTS)]
    found = {}
    for mechanism in dict.fromkeys(kinds):
        scores = {"other mechanisms": ([], [], []), "same mechanism": ([], [], [])}
        for part in parts:
            test = [i for i, g in enumerate(gradients.groups) if g in part and kinds[i] == mechanism]
            away = [i for i, g in enumerate(gradients.groups) if g not in part]
            for name, same in (("other mechanisms", False), ("same mechanism", True)):
                keep = [i for i in away if (kinds[i] == mechanism) == same]
                basis = gradients.basis(top_k=k_use, method=method, keep=keep)
                for side, rows in enumerate((gradients.hack, gradients.clean)):
                    chosen = {n: part_rows[torch.tensor(test)] for n, part_rows in rows.items()}
                    scores[name][side].extend(cin_over_modules(chosen, basis).tolist())
                scores[name][2].extend(gradients.groups[i] for i in test)
        found[mechanism] = {name: ranked(*values) for name, values in scores.items()}
        note(f"{mechanism}: { {name: round(value['auroc'], 3) for name, value in found[mechanism].items()} }")
    return found


def ranked(hack, clean, groups):
    interval = group_bootstrap(auroc, (hack, clean), (groups, groups))
    return {
        "pairs": len(hack),
        "auroc": interval.value,
        "low": interval.low,
        "high": interval.high,
        "paired_accuracy": paired_accuracy(hack, clean),
    }


def by_mechanism(pairs, gradients):
    kinds = [tag.removeprefix("mechanism:") for pair in pairs for tag in pair.tags if tag.startswith("mechanism:")]
    return {f"{method}, 5 axes": mechanisms(gradients, kinds, method, 5) for method in ("svd", "lda")}


def measure(reference, count):
    model = load_model(reference, device="cpu", dtype="float32")
    pairs = generate_pairs(count)
    note(f"{reference}: gradients of {count} generated pairs")
    gradients = pair_gradients(pairs, model, svd=weight_svd(model), max_tokens=512)
    generated = {label(s): checked(f"generated, {label(s)}", gradients, s) for s in SETTINGS}
    return {"generated": generated, "mechanisms": by_mechanism(pairs, gradients)}


def main():
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=240, help="how many generated pairs")
    options.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    chosen = options.parse_args()
    results = {reference: measure(reference, chosen.pairs) for reference in chosen.models}
    publish("vhack_checks", {"pairs": chosen.pairs, "models": results}, chosen.output)


if __name__ == "__main__":
    main()
