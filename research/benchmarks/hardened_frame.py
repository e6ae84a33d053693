"""Would `hardened` be dearer to cheat if its sum of states were read in a frame? Frames against attackers.

A *frame* is a matrix M: the sum of unit states x is read as M·x/‖M·x‖. Honest noise and what a guess misses have
different covariances N and G, so a frame in which noise is small raises ε over noise; for one position its square is
tr(M G Mᵀ)/tr(M N Mᵀ), and the leading generalised eigenvectors of (G, N) are the best rows there are. Frames are made
from the noise and the misses on nonces of another block than those that are scored. A guess fitted by least squares is
the best linear one in every frame: least squares on M·u gives M times the guess of u. What every party can compute from
the inputs (a mean state, the part linear in the input) changes no difference of two states, and so no ε but by scale.

The attackers are those of `hardened_weights.py`, layers and parts that are skipped or made linear, and a new kind:
*neurons* of the MLPs are left out where their gate lets least through, alone and together with dropped positions; every
one saves a quarter of the work. Guesses are fitted on 64 nonces. Of every frame and profile of position weights, the
attack of the least ε over that of honest bfloat16, with and without the attacks on neurons. Honest provers have
bfloat16, attackers and the validator float32, which is the attacker's gain.

*Readings* are proxies of a frame that need no measured noise, and some that do: by how much each raises the error of a
guessed position over the noise of a position, with the guess fitted anew to what is read.

    OMP_NUM_THREADS=2 python benchmarks/hardened_frame.py -o benchmarks/results/hardened_frame.json
"""

from dataclasses import replace

import numpy as np
import torch
from _common import note, parser, publish
from hardened_weights import AT, MOST, T, program, strategies

from assay.models import backbone, decoder_layers
from assay.poc import Round
from assay.poc.protocol import unit
from assay.research.redteam import ATTACKS, Field, PartialForward, Shortcut

FITTED, SCORED, BATCH, DRAWS = 96, 32, 32, 32
PROFILES = {"equal": np.ones(T), "1 + ½ t/T": 1 + 0.5 * AT, "1 + ¾ t/T": 1 + 0.75 * AT}
NEURONS = ((0.1, 0.1), (0.2, 0.2), (0.1, 0.3), (0.1, 0.5), (0.2, 0.4), (0.2, 0.6), (0.2, 0.8))
PLACES = (0.2, 0.5, 1.0)


def neuron_strategies(field):
    """Shares of neurons that rise from the first to the last layer, with as many positions dropped as still needed."""
    model = field.validator.model
    for first, last in NEURONS:
        shares = tuple(np.linspace(first, last, model.num_layers).tolist())
        for place in PLACES:
            for count in range(T // 4):
                start = int(place * (T - count))
                depths = [0 if start <= t < start + count else model.num_layers for t in range(T)]
                shortcut = Shortcut(tuple(depths), neurons=shares)
                made = PartialForward(model, shortcut, field.scene.guesses if count else None)
                if made.cost <= MOST:
                    break
            yield f"{first:.0%} to {last:.0%} of the neurons, {start} to {start + count} dropped", made
            if not count:
                break


def all_strategies(field):
    """Whatever is known, and whether it is an attack on neurons."""
    for name, made in strategies(field):
        yield name, made, False
    scene = replace(field.scene, model=field.validator.model)
    for attack in ATTACKS:
        if attack.family in ("layers", "parts") and "neurons" not in attack.name:
            yield attack.name, attack.make(scene), False
    for name, made in neuron_strategies(field):
        yield name, made, True


@torch.inference_mode()
def honest_states(field, block, nonces):
    """Inputs and raw final states of validator and honest prover, [N, T, D] each."""
    round = Round(block_hash=block, public_key="node_A", preset="hardened", seq_len=T)
    found = []
    for start in range(0, nonces, BATCH):
        batch = range(start, start + BATCH)
        inputs_BTD = field.validator.inputs(round, batch)
        rows = [inputs_BTD]
        for model, given in ((field.validator.model, inputs_BTD), (field.prover, field.engine.inputs(round, batch))):
            rows.append(backbone(model.module)(inputs_embeds=given, use_cache=False).last_hidden_state.float())
        found.append(rows)
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def covariance(x):
    """Second moments of rows [..., D], in double."""
    x_ND = x.flatten(0, -2).double()
    return x_ND.T @ x_ND / len(x_ND)


def power(p_DD, exponent, shrinkage=1e-3):
    """A power of a covariance with some of its mean eigenvalue added."""
    values, vectors = torch.linalg.eigh(p_DD + shrinkage * p_DD.diagonal().mean() * torch.eye(len(p_DD)))
    return vectors @ torch.diag(values**exponent) @ vectors.T


def quietest(p_DD, count):
    """Rows: the eigenvectors of the smallest eigenvalues."""
    return torch.linalg.eigh(p_DD).eigenvectors[:, :count].T


def eigen_rows(missed_DD, noise_DD, count):
    """Rows: the leading generalised eigenvectors, of noise one each."""
    white_DD = power(noise_DD, -0.5)
    return torch.linalg.eigh(white_DD @ missed_DD @ white_DD).eigenvectors[:, -count:].T @ white_DD


def frames(noise_DD, guess_DD, neurons_DD):
    """Every frame, by name."""
    D = len(noise_DD)
    both_DD = sum(m / torch.trace(m) for m in (guess_DD, neurons_DD))
    return {
        "none": torch.eye(D, dtype=torch.float64),
        "coordinates over their noise": torch.diag(noise_DD.diagonal() ** -0.5),
        "noise made white": power(noise_DD, -0.5),
        "noise made white, shrunk by a third": power(noise_DD, -0.5, 1 / 3),
        "half of the directions, of least noise": quietest(noise_DD, D // 2),
        **{f"{count} eigenvectors": eigen_rows(guess_DD, noise_DD, count) for count in (16, 64, 128)},
        **{f"{count} eigenvectors, neurons as well": eigen_rows(both_DD, noise_DD, count) for count in (16, 32, 64)},
    }


def epsilon(sums_BSD, truth_BSD, frame_KD):
    """Mean distance of the unit sums in a frame."""
    read = [unit(part @ frame_KD.T) for part in (sums_BSD, truth_BSD)]
    return float((read[0] - read[1]).norm(dim=-1).mean())


def scored(frame_KD, sums, about_neurons):
    """Honest noise, and the attack of the least error over it with and without those on neurons."""
    frame_KD = frame_KD.float()
    honest = epsilon(sums["honest"], sums["truth"], frame_KD)
    ratios = {name: epsilon(sums[name], sums["truth"], frame_KD) / honest for name in about_neurons}
    row = {"honest": honest}
    for title, names in (
        ("known", [name for name, neurons in about_neurons.items() if not neurons]),
        ("all", list(ratios)),
    ):
        best = min(names, key=lambda name: ratios[name])
        row[title] = {"attack": best, "ratio": ratios[best]}
    return row


def readings(field, noise_DD, fit, test):
    """The error of a guessed position over the noise of one, for other ways to read a state, as a gain over none."""
    module = field.validator.model.module
    norm_D = backbone(module).norm.weight.detach().double()
    head_VD = module.get_input_embeddings().weight.detach().double()
    written = [layer.mlp.down_proj.weight.detach().double() for layer in decoder_layers(module)]
    written_DD = sum(w @ w.T for w in written)
    mean_D = unit(fit[1].double()).flatten(0, 1).mean(0)
    spread_D = unit(fit[1].double()).flatten(0, 1).square().mean(0).sqrt()
    half = len(mean_D) // 2

    def linear(matrix_KD):
        return lambda x: unit(x) @ matrix_KD.T

    ways = {
        "none": unit,
        "not made unit": lambda x: x,
        "over the weight of the final norm": linear(torch.diag(1 / norm_D)),
        "over the root mean square of a coordinate": linear(torch.diag(1 / spread_D)),
        "less the mean state, unit again": lambda x: unit(unit(x) - mean_D),
        "without the direction of the mean state": lambda x: unit(x - (x @ unit(mean_D))[..., None] * unit(mean_D)),
        "what the MLPs write, made white": linear(power(written_DD, -0.5)),
        "the half that the MLPs write least": linear(quietest(written_DD, half)),
        "the half that the last MLP writes least": linear(quietest(written[-1] @ written[-1].T, half)),
        "logits": linear(head_VD),
        "probabilities": lambda x: torch.softmax(x @ head_VD.T, -1),
        "hyperbolic tangent of 16 u": lambda x: torch.tanh(16 * unit(x)),
        "coordinates over their noise (measured)": linear(torch.diag(noise_DD.diagonal() ** -0.5)),
        "noise made white (measured)": linear(power(noise_DD, -0.5)),
        "made white before the unit (measured)": lambda x: unit(x @ power(noise_DD, -0.5)),
    }
    found = {name: _over_noise(read, fit, test) for name, read in ways.items()}
    return {name: value / found["none"] for name, value in found.items()}


def _over_noise(read, fit, test):
    """Root mean square of what the best linear guess misses of a reading, over that of the honest noise."""
    x_NE, x_ME = (
        torch.nn.functional.pad(unit(part[0].double()).flatten(0, 1), (0, 1), value=1) for part in (fit, test)
    )
    gram_EE = x_NE.T @ x_NE
    map_EK = torch.linalg.solve(gram_EE, x_NE.T @ read(fit[1].double()).flatten(0, 1))
    truth_MK, honest_MK = (read(part.double()).flatten(0, 1) for part in test[1:])
    missed, noise = ((part - truth_MK).square().sum(-1).mean() for part in (x_ME @ map_EK, honest_MK))
    return float((missed / noise).sqrt())


@torch.inference_mode()
def measure(reference):
    """All frames, profiles and readings on one model."""
    field = Field(
        reference=reference,
        dtype="bfloat16",
        device="cpu",
        block_hash="block_alpha",
        seq_len=T,
        batch_size=BATCH,
        honest=BATCH,
    )
    model = field.validator.model
    fit, test = (honest_states(field, *which) for which in (("a block for the frame", FITTED), ("block_alpha", SCORED)))
    found, about_neurons = {}, {}
    for name, made, neurons in all_strategies(field):
        if made.cost <= MOST:
            found[name], about_neurons[name] = made.states(test[0]).float(), neurons
    note(f"{reference}: {len(found)} strategies")
    truth_BTD = unit(fit[1])
    guess_BTD = program(field, [(0, range(T))]).states(fit[0])
    shares = tuple(np.linspace(0.2, 0.6, model.num_layers).tolist())
    fewer_BTD = PartialForward(model, Shortcut((model.num_layers,) * T, neurons=shares)).states(fit[0][:BATCH])
    noise_DD = covariance(unit(fit[2]) - truth_BTD)
    made = frames(noise_DD, covariance(guess_BTD - truth_BTD), covariance(fewer_BTD - truth_BTD[:BATCH]))
    generator = torch.Generator().manual_seed(0)
    signs_BST = torch.randint(0, 2, (SCORED, DRAWS, T), generator=generator) * 2.0 - 1
    states = {"truth": unit(test[1]), "honest": unit(test[2]), **found}
    rows = {name: {} for name in made}
    for profile, energy_T in PROFILES.items():
        weights_BST = signs_BST * torch.tensor(energy_T / energy_T.mean()).sqrt().float()
        sums = {name: weights_BST @ states_BTD for name, states_BTD in states.items()}
        for name, frame_KD in made.items():
            rows[name][profile] = scored(frame_KD, sums, about_neurons)
            note(f"{name}, {profile}: {rows[name][profile]}")
    return {
        "strategies": len(found),
        "on_neurons": sum(about_neurons.values()),
        "frames": rows,
        "readings_gain": readings(field, noise_DD, fit, test),
    }


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    options = made.parse_args()
    figures = {reference: measure(reference) for reference in options.models}
    sizes = {"nonces_fitted": FITTED, "nonces_scored": SCORED, "draws": DRAWS}
    publish("hardened_frame", {**sizes, "models": figures}, options.output)


if __name__ == "__main__":
    main()
