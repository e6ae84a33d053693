"""Would weights that rise with the position make `hardened` dearer to cheat? Profiles of weights against attackers.

`hardened` reads Σ_t s_t u_t with signs s_t of the nonce and unit states u_t. Here it reads Σ_t s_t w(t) u_t, and w² is
the *energy* of a position. For every profile the attacker takes the best of his strategies: stretches of positions
dropped, or left early and stale or not, both ends dropped, early ones that leave while the last are dropped, every
second, third or fourth one; each as long as it must be to save a quarter of the work. What he leaves out he guesses, as
in `assay.research.redteam`. ε is the distance of the unit sums, averaged over nonces and draws of signs; honest
provers have bfloat16, attackers and the validator float32, which is the attacker's gain.

*Bound* is the profile that a linear programme finds for one model from the errors of every position: the largest least
energy that these strategies miss. No profile does better against them, as far as groups of 16 positions go.

The rest is about the noise itself: its share in the noisiest positions and in its strongest direction, and by how much
another linear reading of a state would raise the error of a dropped position over the noise, if the noise of this very
model were measured beforehand (on half of the nonces; the gain is that on the other half).

    OMP_NUM_THREADS=1 python benchmarks/hardened_weights.py -o benchmarks/results/hardened_weights.json
"""

import numpy as np
import torch
from _common import note, parser, publish
from scipy.optimize import linprog

from assay.models import backbone
from assay.poc.protocol import unit
from assay.research.redteam import Field, PartialForward, Shortcut

T, DROPPED, MOST = 256, 67, 0.7505
LAST = f"{T - DROPPED} to {T} dropped"
DRAWS, GROUPS = 64, 16
AT = (np.arange(T) + 0.5) / T
PROFILES = {
    "equal": np.ones(T),
    **{f"1 + {slope} t/T": 1 + slope * AT for slope in (0.25, 0.5, 0.75, 1, 2)},
    "t/T": AT,
    "last half twice": 1.0 + (AT >= 0.5),
    "last quarter one and a half times": 1 + 0.5 * (AT >= 0.75),
    "last quarter twice": 1.0 + (AT >= 0.75),
}


def strategies(field):
    """Name and program of everything the attacker tries."""
    for start in [*range(0, T - DROPPED, 21), T - DROPPED]:
        yield f"{start} to {start + DROPPED} dropped", program(field, [(0, range(start, start + DROPPED))])
    yield f"1 to {DROPPED + 1} dropped", program(field, [(0, range(1, DROPPED + 1))])
    for depth in (1, 2, 4):
        for where in (0, 0.25, 0.5, 0.75, 1):
            for stale in (False, True):
                made, span = fitted(
                    lambda n, w=where: range(int(w * (T - n)), int(w * (T - n)) + n), field, depth, stale
                )
                yield f"{span.start} to {span.stop} leave at {depth}{', stale' * stale}", made
        for last in (12, 24, 36, 48):
            made, span = fitted(range, field, depth, True, last)
            yield f"first {len(span)} leave at {depth}, stale, last {last} dropped", made
        for step in (2, 3):
            made, span = fitted(lambda n, s=step: [*range(1, T, s)][:n], field, depth, True)
            yield f"{len(span)} of every {step}. leave at {depth}, stale", made
    for first in range(8, 64, 8):
        ends = [*range(first), *range(T - (DROPPED - first), T)]
        yield f"first {first} and last {DROPPED - first} dropped", program(field, [(0, ends)])
    yield "every fourth dropped, and some more", program(field, [(0, [*range(2, T, 4), 0, 4, 8])])


def program(field, sets, stale=False):
    """A forward pass in which positions go through some layers only."""
    model = field.validator.model
    depths = [model.num_layers] * T
    for depth, positions in sets:
        for t in positions:
            depths[t] = depth
    return PartialForward(model, Shortcut(tuple(depths), stale=stale), field.scene.guesses)


def fitted(which, field, depth, stale, last=0):
    """As many positions leave as it takes to save a quarter, or as there are; and the positions."""
    gone = (0, range(T - last, T))
    for count in range(4, T - last, 4):
        made = program(field, [(depth, which(count)), gone], stale)
        if made.cost <= MOST:
            break
    return made, which(count)


@torch.inference_mode()
def states_of(field, nonces):
    """The validator's unit states, the honest prover's, and those of every strategy that is cheap enough."""
    batch, model = list(range(nonces)), field.validator.model
    inputs_BTD = field.validator.inputs(field.round("hardened"), batch)
    truth_BTD = PartialForward(model, Shortcut((model.num_layers,) * T)).states(inputs_BTD)
    own_BTD = field.engine.inputs(field.round("hardened"), batch)
    body = backbone(field.prover.module)
    honest_BTD = unit(body(inputs_embeds=own_BTD, use_cache=False).last_hidden_state.float())
    found = {}
    for name, made in strategies(field):
        if made.cost <= MOST:
            found[name] = made.states(inputs_BTD)
    note(f"{len(found)} strategies cost at most {MOST}")
    return truth_BTD, honest_BTD, found


def epsilon(states_BTD, truth_BTD, weights_BST):
    """Mean distance of the unit sums over nonces and draws."""
    sums = [unit(weights_BST @ part) for part in (states_BTD, truth_BTD)]
    return float((sums[0] - sums[1]).norm(dim=-1).mean())


def judged(energy_T, signs_BST, truth_BTD, honest_BTD, found):
    """The best attack on a profile."""
    weights_BST = signs_BST * torch.tensor(energy_T / energy_T.mean()).sqrt().float()
    noise = epsilon(honest_BTD, truth_BTD, weights_BST)
    errors = {name: epsilon(states, truth_BTD, weights_BST) for name, states in found.items()}
    best = min(errors, key=errors.get)
    quarters = (energy_T.reshape(4, -1).sum(1) / energy_T.sum()).round(3).tolist()
    return {"energy": quarters, "honest": noise, "best": best, "error": errors[best], "ratio": errors[best] / noise}


def bound(truth_BTD, found):
    """The energy of every position for which the least energy missed is largest, constant over groups of positions."""
    missed_KT = np.stack([(states - truth_BTD).square().sum(-1).mean(0).numpy() for states in found.values()])
    missed_KG = missed_KT.reshape(len(missed_KT), GROUPS, -1).mean(2)
    K, G = missed_KG.shape
    solved = linprog(
        np.r_[np.zeros(G), -1],
        A_ub=np.c_[-missed_KG, np.ones(K)],
        b_ub=np.zeros(K),
        A_eq=[np.r_[np.ones(G), 0]],
        b_eq=[1],
        bounds=[(0, None)] * (G + 1),
    )
    return solved.x[:G].repeat(T // G)


def noise_of(truth_BTD, honest_BTD):
    """Where the honest noise is."""
    errors_ND = (honest_BTD - truth_BTD).flatten(0, 1).double()
    squares_N = errors_ND.square().sum(1)
    spectrum = torch.linalg.eigvalsh(errors_ND.T @ errors_ND)
    noisiest = squares_N.sort(descending=True).values[: len(squares_N) // 20]
    by_quarter = (honest_BTD - truth_BTD).square().sum(-1).mean(0).reshape(4, -1).mean(1).sqrt()
    return {
        "root_mean_square": float(squares_N.mean().sqrt()),
        "median": float(squares_N.median().sqrt()),
        "by_quarter": by_quarter.tolist(),
        "share_of_the_noisiest_twentieth": float(noisiest.sum() / squares_N.sum()),
        "share_of_the_strongest_direction": float(spectrum[-1] / spectrum.sum()),
    }


def other_readings(truth_BTD, honest_BTD, dropped_BTD):
    """The gain in error over noise of a dropped position where a state is read in other coordinates."""
    half = len(truth_BTD) // 2
    noise_BTD, missed_BTD = (honest_BTD - truth_BTD).double(), (dropped_BTD - truth_BTD)[:, T - DROPPED :].double()
    seen_ND = noise_BTD[:half].flatten(0, 1)
    covariance_DD = seen_ND.T @ seen_ND / len(seen_ND)
    small = 1e-3 * covariance_DD.diagonal().mean()

    def ratio(read):
        noise, missed = (read(part[half:].flatten(0, 1)).square().sum(1).mean() for part in (noise_BTD, missed_BTD))
        return float((missed / noise).sqrt())

    root_DD = torch.linalg.cholesky(covariance_DD + small * torch.eye(len(covariance_DD)))
    plain = ratio(lambda rows: rows)
    return {
        "coordinates_over_their_noise": ratio(lambda rows: rows / covariance_DD.diagonal().sqrt()) / plain,
        "noise_made_white": ratio(lambda rows: torch.linalg.solve_triangular(root_DD, rows.T, upper=False).T) / plain,
    }


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    made.add_argument("--nonces", type=int, default=16)
    options = made.parse_args()
    figures = {}
    for reference in options.models:
        note(reference)
        field = Field(
            reference=reference,
            dtype="bfloat16",
            device="cpu",
            block_hash="block_alpha",
            seq_len=T,
            batch_size=options.nonces,
            honest=options.nonces,
        )
        truth_BTD, honest_BTD, found = states_of(field, options.nonces)
        generator = torch.Generator().manual_seed(0)
        signs_BST = torch.randint(0, 2, (options.nonces, DRAWS, T), generator=generator) * 2.0 - 1
        profiles = PROFILES | {"bound": bound(truth_BTD, found)}
        rows = {}
        for name, energy_T in profiles.items():
            rows[name] = judged(energy_T, signs_BST, truth_BTD, honest_BTD, found)
            note(f"{name}: {rows[name]}")
        figures[reference] = {
            "strategies": len(found),
            "noise": noise_of(truth_BTD, honest_BTD),
            "other_readings_gain": other_readings(truth_BTD, honest_BTD, found[LAST]),
            "profiles": rows,
        }
        note(f"{figures[reference]}")
    publish("hardened_weights", {"nonces": options.nonces, "draws": DRAWS, "models": figures}, options.output)


if __name__ == "__main__":
    main()
