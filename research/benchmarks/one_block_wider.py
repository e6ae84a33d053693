r"""Do laws of one block hold in other blocks if they are made wider, and what does that cost?

A law that was fitted to the nonces of one block knows neither how far scales of blocks differ nor how light the tails
of other blocks are. Candidates, in the order of preference; each changes what a calibration of one block gives, and
not the test:

- A: ln scale differs between blocks by .10 for distances (now: .03) and by .05 for vectors (now: .02), and vectors
  are given no lighter tail than from 2 sd on (now: 3);
- B: as A, distances have 4 degrees of freedom at most (now: 6), and the sd of vectors is one standard error larger
  than fitted;
- C: as A, distances have 3 degrees of freedom at most, and tails of vectors begin at 1.5 sd at the latest.

They were chosen on residuals of a CPU (16 positions, bfloat16, 32 blocks "one block tuned", both bundled models),
where the worst pair of blocks is accused in 4.8 % under `hardened`, 1.3 % under `artifact` and 3.2 % under `poc-2.0`:
A leaves .5, .5 and 2.5 %. Averaging the null hypothesis over laws with several tails was tried there too, and was
worse than one wider law: under `hardened`, 1.5 % for the worst pair at the cheats of A. Of distances, every law tried
that brought the worst pair below 1 % caught less than a sixth of what the law of today catches of 10 % at 5 times the
noise: it is what their tails look like.

CRITERION, written before any candidate saw the residuals that it is judged on. These are (1) the residuals of an
H200, both bundled models, three presets, bfloat16 and float16, laws of 256 and of 1024 nonces of 6 blocks, and (2)
residuals of a CPU in bfloat16, of other blocks ("one block judged") than the candidates were chosen on. The first
have been looked at: what laws of today accuse on them is published law by law, and
docs/decisions/shares-and-verdicts.md had said that no further rule would be tried on them. So a pass on them alone is
worth little, and a candidate has to pass on both. Distances and vectors are judged apart. A candidate is taken for
one of them if, in every row of model, preset, format and size of the law:

1. 1000 audits of 64 nonces of every pair of blocks: accused <= .001 on average and <= .01 in the worst pair. A pair
   that is accused in .005 or more is measured again with 10 000 other audits, and that share counts.
2. Of nodes that compute 10 or 20 % of their nonces at 5, 10 or 22 times the noise, none falls from .99 or more caught
   within 150 nonces to less, and no kind loses more than .05 (vectors) or .10 (distances).
3. Of nodes that compute 10 % at 5 times the noise at most .01 are called honest in audits of 64, where today's law
   calls no more.
4. The figures of `assay research clusters` are no worse: honest audits, worst pairs, AWQ, simulated cheats.

Honest lives, an audit of 16 nonces in every other block, are measured and published without a condition. If no
candidate passes, the laws stay as they are.

With --from-blocks 4 each law is fitted to as many nonces of four blocks instead of one, and judges the others. This
was added after the rest was measured, to see whether the advice to calibrate over several blocks is sound, and it
decides nothing.

    python benchmarks/one_block_wider.py residuals_h200.npz -o benchmarks/results/one_block_wider_h200.json
    python benchmarks/shares.py --models reference:qwen3 reference:llama --dtypes bfloat16 --seq-len 16 --laws 6 \
        --rounds "one block judged" --residuals residuals_cpu.npz
    python benchmarks/one_block_wider.py residuals_cpu.npz --dtypes bfloat16
    python benchmarks/one_block_wider.py residuals_h200.npz --from-blocks 4 --candidates now
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from _common import note, parser, publish
from one_nonce import AGAIN, SUSPECT, Factors, drawn, lived
from shares import ALPHA, AUDITED, DTYPES, LAW_SIZES, MODELS, PRESETS, WITHIN, name_of, read_residuals

from assay.poc import get_pipeline
from assay.poc.verdict import fit_machines, fit_noise, sequential_test
from assay.poc.verdict._noise import Noise
from assay.stats import LogNoise, _fits

CHEATS = ((0.1, 5.0), (0.1, 10.0), (0.1, 22.0), (0.2, 5.0))
CHEAT_BLOCKS, CHEAT_AUDITS, ASKED_AUDITS = 4, 200, 20


@dataclass(frozen=True)
class Candidate:
    """What a calibration of one block makes of its nonces: spreads of ln scale, lightest tails, errors added to sd."""

    distances: float = 0.03
    vectors: float = 0.02
    dof: float = 6.0
    tail: float = 3.0
    errors: float = 0.0

    def test(self, preset, errors_N):
        """Return the test under the law of these nonces."""
        pipeline = get_pipeline(preset)
        between = self.distances if pipeline.output == "distance" else self.vectors
        fitted = fit_machines({(0, 1): errors_N}, ("", ""), partial(self._fit, pipeline), between_blocks=between)
        return sequential_test(Noise(fitted.law, "one block", fitted.known), alpha=ALPHA)

    def _fit(self, pipeline, errors_N):
        dofs, tails = (tuple(x for x in _fits.DOFS if x <= self.dof), tuple(x for x in _fits.TAILS if x <= self.tail))
        with mock.patch.multiple(_fits, DOFS=dofs, TAILS=tails):
            found = fit_noise(pipeline, errors_N)
        if not isinstance(found.reached, LogNoise):
            return found
        wider = found.reached.sd * math.exp(self.errors / math.sqrt(2 * errors_N.size))
        return replace(found, reached=replace(found.reached, sd=wider))


CANDIDATES = {
    "now": Candidate(),
    "A": Candidate(distances=0.10, vectors=0.05, tail=2.0),
    "B": Candidate(distances=0.10, vectors=0.05, dof=4.0, tail=2.0, errors=1.0),
    "C": Candidate(distances=0.10, vectors=0.05, dof=3.0, tail=1.5),
}


def accused(test, errors_N, rng, audits):
    """Return the share of a block's honest audits that are accused."""
    factors = Factors(test, errors_N)
    share = factors.accused("none", drawn(rng, errors_N.size, audits, AUDITED)).mean()
    if share < SUSPECT:
        return float(share)
    return float(factors.accused("none", drawn(rng, errors_N.size, AGAIN, AUDITED)).mean())


def judged(blocks, preset, size, candidate, options):
    """Return the figures of one candidate on the residuals of one model, preset and format."""
    rng = np.random.default_rng(options.seed)
    honest, lives, called = [], [], []
    caught = {cheat: [] for cheat in CHEATS}
    for law in range(options.laws):
        mine = range(law * options.from_blocks, (law + 1) * options.from_blocks)
        test = candidate.test(preset, np.concatenate([blocks[block][: size // len(mine)] for block in mine]))
        others = [block for block in range(len(blocks)) if block not in mine]
        honest += [accused(test, blocks[block], rng, options.audits) for block in others]
        lives.append(lived(test, blocks, others, rng, ["none"])["none"])
        for block in rng.permutation(others)[:CHEAT_BLOCKS]:
            errors_N = blocks[block]
            for share, multiple in CHEATS:
                values_N = np.concatenate([errors_N, multiple * errors_N])
                own_RC, larger_RC = (drawn(rng, errors_N.size, CHEAT_AUDITS, WITHIN) for _ in range(2))
                nodes_RC = np.where(rng.random(own_RC.shape) < share, larger_RC + errors_N.size, own_RC)
                caught[share, multiple].append(Factors(test, values_N).accused("none", nodes_RC).mean())
                if (share, multiple) == CHEATS[0]:
                    asked_RC = values_N[nodes_RC[:ASKED_AUDITS, :AUDITED]]
                    called.append(test.simulated(asked_RC, at=[AUDITED])[1].mean())
    return {
        "accused": float(np.mean(honest)),
        "accused_worst_pair": float(np.max(honest)),
        "lives_convicted": float(np.mean(lives)),
        "called_honest": float(np.mean(called)),
        "cheats": [[*cheat, float(np.mean(found))] for cheat, found in caught.items()],
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("residuals", type=Path, help="file that benchmarks/shares.py wrote")
    arguments.add_argument("--models", nargs="+", default=MODELS[:2])
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument("--dtypes", nargs="+", default=DTYPES)
    arguments.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    arguments.add_argument("--blocks", type=int, default=40)
    arguments.add_argument("--laws", type=int, default=6, help="blocks that a law is fitted to")
    arguments.add_argument("--from-blocks", type=int, default=1, help="blocks that share the nonces of a law")
    arguments.add_argument("--audits", type=int, default=1000, help="audits of every pair of blocks")
    arguments.add_argument("--seed", type=int, default=4)
    options = arguments.parse_args()
    kept = read_residuals(options.residuals)
    rows = []
    for model, preset, dtype, size in itertools.product(options.models, options.presets, options.dtypes, LAW_SIZES):
        blocks = [kept[name_of(model, preset, dtype, block)] for block in range(options.blocks)]
        row = {"model": model, "preset": preset, "dtype": dtype, "law_from": size, "candidates": {}}
        note(f"{model} {preset} {dtype}, law from {size}")
        for name in options.candidates:
            row["candidates"][name] = judged(blocks, preset, size, CANDIDATES[name], options)
            note(f"  {name:4}{row['candidates'][name]}")
        rows.append(row)
    settings = {"seed": options.seed, "blocks": options.blocks, "laws": options.laws, "audits": options.audits}
    settings |= {"from_blocks": options.from_blocks}
    publish("one_block_wider", settings | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
