"""Does a wider law of few distances of a mixture keep its promise, on mixtures that it was not chosen on?

Fixed before anything was measured. Laws of 256 distances of one block of a mixture are too narrow (mixture_laws.py).
Three wider ones are fitted with what all blocks of the small Qwen3-MoE show, and nothing else:

- T: at most as many degrees of freedom as the pooled distances of the Qwen3-MoE choose, each block over its median.
- S: T, with a spread between blocks of what ln median has beyond chance on the Qwen3-MoE, where that is more.
- W: the shape of that pooled law as it is, with the scale that the median of the block gives, and the spread of S.

Judged are Mixtral and a third mixture that was never measured before: a Qwen3-MoE with six layers and sixteen experts
of which two are asked. Wanted for both, of laws of 256 nonces of one block judging 256 nonces of the
others: at most .1 % of honest audits accused, at most .5 % by the worst law; 10 % of nonces at 5 times the noise caught
within 150 nonces at most 10 points less than by the laws of today; and no cheat that falls from .99 caught to less. The
first candidate that passes is adopted for mixtures with fewer than 1024 distances; otherwise none is. Laws of 1024
nonces as of today stand beside them. The Qwen3-MoE itself is shown and does not count.

    OMP_NUM_THREADS=1 python benchmarks/mixture_wider.py -o benchmarks/results/mixture_wider.json
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from mixture_laws import AUDITED, AUDITS, BLOCKS, LAWS, measured
from shares import CHEATS, WITHIN, cheating

sys.path.insert(0, str(Path(__file__).parents[1]))

from assay import stats
from assay.poc import get_pipeline
from assay.poc.verdict import fit_machines, fit_noise, sequential_test
from assay.poc.verdict._calibrate import SCALED_SPREAD
from assay.poc.verdict._noise import Noise
from tests.models.storing import make_mixture

PRESET, ALPHA, FEW = "poc-2.0", 1e-3, 256
WANTED = {"accused": 0.001, "worst_law": 0.005, "fewer_cheats": 0.10}
FRESH = {"num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 6, "head_dim": 64}


def median(errors_N):
    return float(np.median(np.abs(errors_N)))


def learnt(blocks):
    """What the blocks of one mixture show: the pooled law over the median, and the spread of ln median."""
    some = [errors_N[:FEW] / median(errors_N[:FEW]) for errors_N in blocks]
    pooled = stats.fit_scale_noise(np.concatenate(some))
    logs = np.log([median(errors_N[:FEW]) for errors_N in blocks])
    rng = np.random.default_rng(0)
    drawn = [np.log(median(rng.choice(errors_N, FEW))) for errors_N in some for _ in range(50)]
    chance = np.mean([np.var(drawn[i : i + 50]) for i in range(0, len(drawn), 50)])
    excess = float(np.sqrt(max(np.var(logs, ddof=1) - chance, 0.0)))
    return {
        "dof": pooled.reached.dof,
        "sigma": pooled.reached.sigma,
        "excess": excess,
        "chance": float(np.sqrt(chance)),
    }


def with_tail(most, errors_N):
    """The fit of today, with at most so many degrees of freedom."""
    found = stats.fit_scale_noise(errors_N)
    return found if found.reached.dof <= most else stats.fit_scale_noise(errors_N, dof=most)


def noise_of(rule, shown, errors_N):
    """The noise of a calibration on one block by a rule."""
    fit = partial(fit_noise, get_pipeline(PRESET)) if rule == "today" else partial(with_tail, shown["dof"])
    between = max(SCALED_SPREAD, shown["excess"]) if rule in "SW" else SCALED_SPREAD
    found = fit_machines({(0, 1): errors_N}, ("", ""), fit, between_blocks=between)
    law = stats.ScaleNoise(shown["sigma"] * median(errors_N), shown["dof"]) if rule == "W" else found.law
    return Noise(law, "one block", found.known)


def judged(rule, shown, blocks, size):
    """What laws of so many nonces of one block accuse and catch in the others."""
    rng, accused = np.random.default_rng(0), np.full((LAWS[size], BLOCKS), np.nan)
    caught = {cheat: [] for cheat in CHEATS}
    for law in range(LAWS[size]):
        test = sequential_test(noise_of(rule, shown, blocks[law][:size]), alpha=ALPHA)
        others = [block for block in range(BLOCKS) if block != law]
        for block in others:
            audits_RC = np.stack([rng.permutation(blocks[block][:AUDITED]) for _ in range(AUDITS)])
            accused[law, block] = test.accusations(audits_RC)[:, -1].mean()
        for block in rng.permutation(others)[:4]:
            for cheat in CHEATS:
                nodes_RC = cheating(blocks[block][:AUDITED], *cheat, AUDITS, WITHIN, rng)
                caught[cheat].append(test.accusations(nodes_RC)[:, -1].mean())
    by_law = np.nanmean(accused, axis=1)
    figures = {"laws": LAWS[size], "accused": float(by_law.mean()), "worst_law": float(by_law.max())}
    cheats = [{"share": s, "multiple": m, "caught": float(np.mean(caught[s, m]))} for s, m in CHEATS]
    return {"rule": rule, "law_from": size, **figures, "worst_pair": float(np.nanmax(accused)), "cheats": cheats}


def passes(row, today):
    """Whether a candidate keeps what was fixed above, beside the laws of today from as many nonces."""
    pairs = [(mine["caught"], theirs["caught"]) for mine, theirs in zip(row["cheats"], today["cheats"], strict=True)]
    enough = pairs[0][1] - pairs[0][0] <= WANTED["fewer_cheats"] and not any(a < 0.99 <= b for a, b in pairs)
    return enough and row["accused"] <= WANTED["accused"] and row["worst_law"] <= WANTED["worst_law"]


def main():
    arguments, rows, shown = parser(__doc__).parse_args(), [], None
    mixtures = {"qwen3-moe": {"head_dim": 64}, "mixtral": {"head_dim": 64}, "fresh": FRESH}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in mixtures.items():
            kind = "mixtral" if name == "mixtral" else "qwen3-moe"
            blocks = measured(make_mixture(kind, Path(folder) / name, **sizes), PRESET)
            shown = shown or learnt(blocks)
            now = judged("today", shown, blocks, FEW)
            rows += [{"model": name, **now}, {"model": name, **judged("today", shown, blocks, max(LAWS))}]
            for rule in "TSW":
                row = judged(rule, shown, blocks, FEW)
                rows.append({"model": name, **row, "passes": bool(passes(row, now))})
            note(f"{name} judged")
    publish("mixture_wider", {"wanted": WANTED, "shown_by_qwen3_moe": shown, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
