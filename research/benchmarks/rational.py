"""The best rational cheat: which strategy is paid the largest share of cheap nonces in 100 audits.

An account is audited 100 times, 16 nonces of a block each. A cheat chooses a share of nonces that
it computes with m times honest noise, where they stand, and when. It is paid for all nonces of its
life unless that is fraud, but for those at places that a pool calls faulty; of a key that it gives
up at the first suspicion, if the life was honest before. Copies are of honest messages, restarts
begin its sequence of places anew, and of two kinds of machines, whose residuals count in units of
their law, one lies alone. Laws are those of three models under `tokens-1` and of one under
`poc-2.0`, with the 99 % quantile over the median of research/results/lives.json: fitted to 1024
honest nonces, whose bets are priced by these.

The search takes random settings of a strategy and goes on with those that are paid most; the one
with the largest mean is then run on lives of other seeds, which give the figure. Its interval is
that of the mean part that is paid of the cheap nonces of a life (Gaffke, 95 %), times their share.
Rule, fixed before: the upper end of each strategy at five times the noise or more is at most .1, or
a page names it. Smaller multiples (`--multiples small`), about the effect of the law, are shown and
are in no rule: weights of 8 bits beside bfloat16 are among them.

    python research/benchmarks/rational.py -o research/results/rational.json
"""

import itertools
import math

import numpy as np
from _common import parser, publish
from assay_research.rational import Strategy, draw_sizes, live, paid_share
from scipy.optimize import brentq

from assay import stats
from assay.poc import Noise, get_pipeline
from assay.poc.verdict.honest_noise import fit_noise, pack_scores
from assay.stats.noise_laws import Spread

QUANTILES = {"qwen3": 1.64, "llama": 1.63, "smollm2": 2.88}  # 99 % over median, bfloat16/float32
MEDIAN = math.log(0.04)
SHARES = (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.4, 1.0)
# of honest noise in a cheap nonce; the effect of a law of vectors is 2
MULTIPLES = {"large": (5.0, 8.0, 30.0), "small": (1.5, 2.0, 3.0)}
WAYS = {
    "anywhere": ((),),
    "few far off": ((),),
    "blocks": ((1,), (4,), (10,)),
    "one block": ((1,), (4,), (10,)),
    "late": ((32,), (64,), (80,), (90,)),
    "early": ((6,), (10,), (20,)),
    "bursts": ((1, 4), (8, 64), (20, 64), (32, 64)),
    "places": ((1, 16), (2, 16), (8, 16), (16, 32), (1, 32)),
    "places for a time": ((4, 16), (8, 16), (16, 32)),
    "places that move": ((4, 16, 4), (8, 16, 64), (4, 16, 64), (4, 16, 32)),
    "scattered places": ((16, 0), (16, 1), (32, 0), (64, 0)),
    "behind places": ((1, 2, 2, 0), (1, 2, 4, 0), (8, 16, 4, 0), (1, 2, 4, 32), (1, 2, 2, 64)),
    "copies": ((9,), (99,)),
    "restarts": ((1, 4), (1, 16), (4, 64)),
    "kinds": ((1, 2), (1, 4)),
    "keys": ((),),
}
KEEP = 3
LOOKS = 4


def laws():
    """Return the laws by name: what honest nonces have, and the noise that is fitted to it."""
    by_model = {}
    for model, quantile in QUANTILES.items():

        def gap(sd, quantile=quantile):
            law = stats.LogNoise(MEDIAN, sd)
            return float(law.survival(np.array([law.size * quantile]))[0]) - 0.01

        by_model[f"{model}, tokens-1"] = stats.LogNoise(MEDIAN, float(brentq(gap, 0.01, 2.0)))
    by_model["qwen3, poc-2.0"] = stats.ScaleNoise(1.8e-4, 4.0)
    rng = np.random.default_rng(0)
    noises = {}
    for name, law in by_model.items():
        honest = draw_sizes(law, 1024, rng)
        fitted, error = fit_noise(get_pipeline("poc-2.0" if "poc" in name else "tokens-1"), honest)
        spread = Spread(math.hypot(error, 0.036))
        noises[name] = law, Noise(fitted, name, spread, None, pack_scores(honest, fitted))
    return noises


def search(way, noise, truth, multiples, rng, *, tries, lives):
    """Return the best setting of a way, and its paid shares on fresh lives."""
    settings = [
        Strategy(way, share, multiple, more)
        for share, multiple, more in itertools.product(SHARES, multiples, WAYS[way])
    ]
    chosen = [settings[at] for at in rng.permutation(len(settings))[:tries]]

    def paid(strategy, count):
        results = [live(strategy, noise, rng, truth=truth, looks=LOOKS) for _ in range(count)]
        return paid_share(strategy, results), results

    means = [float(paid(candidate, 2)[0].mean()) for candidate in chosen]
    # Where nothing is paid, small shares come first: they are the next ones to be.
    order = sorted(range(len(chosen)), key=lambda at: (-means[at], chosen[at].share))
    best = [chosen[at] for at in order[:KEEP]]
    means = [float(paid(candidate, lives // 4)[0].mean()) for candidate in best]
    strategy = best[int(np.argmax(means))]
    shares, results = paid(strategy, lives)
    cheap = np.array([candidate.cheap / candidate.nonces for candidate in results])
    is_cheap = cheap > 0
    parts = np.clip(shares[is_cheap] / cheap[is_cheap], 0.0, 1.0)
    ends = stats.grouped_share_interval(parts, range(len(parts)))
    low, high = (end * float(cheap.mean()) for end in ends)
    return {
        "share": strategy.share,
        "multiple": strategy.multiple,
        "more": strategy.more,
        "lives": lives,
        "cheap": float(cheap.mean()),
        "paid_cheap": float(shares.mean()),
        "interval": [low, high],
        "convicted": sum(candidate.convicted < math.inf for candidate in results),
        "faulty_at_end": sum(candidate.faulty for candidate in results),
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--tries", type=int, default=8)
    arguments.add_argument("--lives", type=int, default=16)
    arguments.add_argument("--ways", nargs="*", default=[*WAYS])
    arguments.add_argument("--laws", nargs="*")
    arguments.add_argument("--multiples", nargs="*", choices=MULTIPLES, default=["large"])
    options = arguments.parse_args()
    rows = []
    for name, (truth, noise) in laws().items():
        if options.laws and name not in options.laws:
            continue
        for method in options.ways:
            rng = np.random.default_rng(len(rows))
            of = {"tries": options.tries, "lives": options.lives}
            for kind in options.multiples:
                row = {"law": name, "way": method, "multiples": kind}
                row |= search(method, noise, truth, MULTIPLES[kind], rng, **of)
                rows.append(row)
                print(row, flush=True)
        worst = max(row["interval"][1] for row in rows)
        holds = {"holds": round(worst, 9) <= 0.1} if options.multiples == ["large"] else {}
        publish("rational", {"rows": rows, "worst": worst, **holds}, options.output)


if __name__ == "__main__":
    main()
