"""Long answers by margins alone: when 4-bit weights are caught, and whether honest nodes are accused.

The red team's prover and verifier (bfloat16 for float32, answers of 256 tokens) give twice 64 honest responses and 32
of 4-bit weights. The law is fitted to one half of the honest responses of a set, and the other half is audited, in four
turns; an audit draws whole responses with replacement and is looked at after every 32 tokens.

    python responses_margins.py --models qwen3 --save qwen3.npz
    python responses_margins.py --models qwen3 --load qwen3.npz -o results/responses_margins_qwen3.json
"""

from pathlib import Path

import numpy as np
from _common import note, parser, publish

from assay import stats
from assay.poc.responses import Replayed, Sampling, fit_response_noise
from assay.research.responses._audits import Looks, caught_after, crossings, share_by
from assay.research.responses._cheats import CHEATS, Scene, honest
from assay.research.responses._check import check
from assay.research.responses._field import Field
from assay.research.responses._provers import Requests

MODES = {"sampled": Sampling(top_p=0.95), "greedy": Sampling(temperature=0.0)}
SETS = ("honest", "honest-2")
CHEAT = "int4 weights"
HONEST, CHEATING, PROMPT, TOKENS, LOOK = 64, 32, 32, 256, 32
AUDITS, CAUGHT = 2000, 400
ALPHA, BETA = 1e-3, 1e-2


def answered(model, mode):
    """Return the profiles and the residuals of all responses of a model, by who answered."""
    options = {"dtype": "bfloat16", "device": None, "prompt_tokens": PROMPT, "steps": TOKENS, "sampling": MODES[mode]}
    field = Field(reference=f"reference:{model}", honest=HONEST, responses=CHEATING, **options)
    found = {}

    def keep(name, serve, requests: Requests, scene: Scene):
        checked = check(requests, serve(scene, requests), scene.model, field.verifier)
        found[f"{mode}|{name}|profiles"] = np.stack([one.replayed.profiles for one in checked]).astype(np.float16)
        found[f"{mode}|{name}|margins"] = np.stack([one.replayed.margins for one in checked])
        found[f"{mode}|{name}|residuals"] = np.stack([one.replayed.residuals for one in checked])
        note(f"{model} {mode} {name}: {np.mean(found[f'{mode}|{name}|margins'] == 0):.2%} match")

    for name in SETS:
        keep(name, honest, field.requests(HONEST, name), field.scene)
    keep(CHEAT, next(one for one in CHEATS if one.name == CHEAT).serve, field.asked, field.scene)
    return found


def replayed(found, mode, name):
    """Return the replays of one prover, rebuilt from the arrays."""
    arrays = [found[f"{mode}|{name}|{part}"] for part in ("margins", "profiles", "residuals")]
    return [Replayed(name, m, p.astype(np.float64), r) for m, p, r in zip(*arrays, strict=True)]


def looks(test, replays):
    """Return what each response adds to the test of tokens, look by look."""
    ends = range(LOOK, TOKENS + 1, LOOK)
    return [Looks(test.paths(one.profiles, ends), np.array(ends), TOKENS) for one in replays]


def turn(found, mode, name, first):
    """Return the figures of one half of a set that calibrates, and the other one that is audited."""
    replays = replayed(found, mode, name)
    halves = replays[: HONEST // 2], replays[HONEST // 2 :]
    calibrating, audited = halves if first else halves[::-1]
    noise = fit_response_noise([calibrating], "benchmark").tokens
    test = noise.test(alpha=ALPHA, beta=BETA)
    own = looks(test, audited)
    accused = crossings(own, test.log_e, AUDITS, np.random.default_rng(1))
    when = crossings(looks(test, replayed(found, mode, CHEAT)), test.log_e, CAUGHT, np.random.default_rng(1))
    assert isinstance(noise.law, stats.TokenNoise)
    figures = {
        "mode": mode,
        "set": name,
        "calibrating": "first half" if first else "second half",
        "difference_of_logits": noise.law.size,
        "between": noise.between,
        "accused": float(np.isfinite(accused).mean()),
        "largest_log_e_of_a_response": max(float(test.log_e(one.paths).max()) for one in own),
        "int4_median": float(np.median(when)) if np.isfinite(np.median(when)) else None,
        "int4_99%": caught_after(share_by(when)),
    }
    note(str(figures))
    return figures


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["qwen3", "llama"], choices=("qwen3", "llama"))
    made.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    made.add_argument("--save", type=Path, help="answer, and write the replays of one model there")
    made.add_argument("--load", type=Path, nargs="+", help="replays that were saved, one file for each model")
    arguments = made.parse_args()
    if arguments.save:
        (model,) = arguments.models
        parts = [answered(model, mode) for mode in arguments.modes]
        np.savez_compressed(arguments.save, **{name: part[name] for part in parts for name in part})
    if arguments.load:
        rows = []
        for model, path in zip(arguments.models, arguments.load, strict=True):
            found = np.load(path)
            turns = [(mode, name, first) for mode in arguments.modes for name in SETS for first in (True, False)]
            rows += [{"model": model} | turn(found, *one) for one in turns]
        publish("responses_margins", {"audits": AUDITS, "tokens": TOKENS, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
