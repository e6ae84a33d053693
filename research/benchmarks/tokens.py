"""What `tokens-1` says of a model: dimension of its states, honest tails, valid rates of blocks,
who is caught when.

An honest node in bfloat16 and cheats in bfloat16 are recomputed in float32. The law is that of
`calibrate` on nonces of its own, and others are judged by the sequential test, in 100 random
orders: the figure is the nonce by which 99 of them have convicted. `--presets` puts others beside
it in the same run.

    python research/benchmarks/tokens.py --model DIRECTORY -o research/results/tokens.json

--redteam runs every attack of the red team that fits as well, with maps that are fitted to rounds
of the attacker's own, and models that were trained: on text, and on framed states with a quarter of
the layers dropped.

Legend of shapes: N nonces, K published numbers, D hidden size.
"""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from _common import ROOT, note, parser, publish, round_to
from assay_research.model_cheats import adapted, rounded_fp8
from assay_research.redteam.attacks import ATTACKS, Attack, OnEngine
from assay_research.redteam.field import TRAINING_BLOCK, Field
from assay_research.redteam.run import attacked

from assay.models import load_model
from assay.models.decoder import decoder_layers
from assay.poc import HFEngine, Round, calibrate, cheats, get_pipeline, measure_frame, prove
from assay.poc.measurement import distances_to_target
from assay.poc.protocol.transforms import unit
from assay.poc.verdict.calibration_file import noise_for
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.chord import chord_cdf, chord_mean

ORDERS = 100
MOST_JUDGED = 512
NONE_HERE = (
    "another checkpoint",
    "sliding window of 64",
)  # a reference may have no other; nonces have 64 positions


def without_layers(model, first, count=1):
    """Return the model without some layers."""
    module = copy.deepcopy(model.module)
    layers = decoder_layers(module)
    del layers[first : first + count]
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    module.config.num_hidden_layers = len(layers)
    return replace(model, module=module)


def dimension_of(model, round, nonces):
    """Return the effective dimension of the diagonal of framed unit states, of nonces that no frame
    was made from.
    """
    engine = HFEngine(model, batch_size=8, seq_len=round.seq_len)
    states = [
        engine.states(engine.embeddings(round.inputs(range(start, start + 8))))
        for start in range(0, nonces, 8)
    ]
    first = get_pipeline(round.preset).read.first(round.seq_len)
    seen_ND = torch.cat(states)[:, first:].flatten(0, 1)
    mean, scale = (
        torch.from_numpy(part).to(model.device) for part in (model.frame.mean, model.frame.scale)
    )
    seen_ND = (seen_ND - mean) / scale
    energy_D = (unit(seen_ND).double() ** 2).mean(dim=0)
    return float(1 / (energy_D**2).sum())


def trained(model, loss_of, steps, rate):
    """Return the model, in its number format, after steps of AdamW in float32."""
    module = copy.deepcopy(model.module).float().train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate)
    for step in range(steps):
        loss_of(module, step).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return replace(model, module=module.to(model.dtype).eval())


def finetuned(model, steps):
    """Return the model after steps on pages of the documentation, 128 tokens each, at a rate of
    2e-5.
    """
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
    )
    ids_SBT = torch.tensor(
        model.tokenizer(text).input_ids[: steps * 128], device=model.device
    ).view(steps, 2, 64)
    return trained(
        model, lambda module, step: module(ids_SBT[step], labels=ids_SBT[step]).loss, steps, 2e-5
    )


def distilled(model, steps, seq_len):
    """Drop the middle quarter of the layers, and train the others on framed states of the whole
    model.
    """
    count = max(1, round(model.num_layers / 4))
    shorter = without_layers(model, (model.num_layers - count) // 2, count)
    attacker = Round(
        block_hash=TRAINING_BLOCK, public_key="attacker", seq_len=seq_len, preset="tokens-1"
    )
    teacher = HFEngine(model, batch_size=8, seq_len=seq_len)
    mean, scale = (
        torch.from_numpy(part).to(model.device) for part in (model.frame.mean, model.frame.scale)
    )

    def loss_of(module, step):
        inputs = teacher.embeddings(attacker.inputs(range(8 * step, 8 * step + 8))).clone()
        wanted = unit((teacher.states(inputs).float() - mean) / scale).clone()
        seen = module.model(inputs_embeds=inputs.float(), use_cache=False).last_hidden_state
        return (unit((seen - mean) / scale) - wanted).square().sum(dim=-1).mean()

    return trained(shorter, loss_of, steps, 2e-4)


def on_changed(scene, *, change, cost):
    """Return the program of an attacker that runs a changed model."""
    return OnEngine(scene.engine(change(scene.model)), cost)


def red_team(arguments):
    """Return of every attack its cost, its residual over honest ones, and when the tests convict 99
    %.
    """
    shape = {
        "seq_len": arguments.seq_len,
        "batch_size": arguments.batch_size,
        "honest": arguments.nonces,
    }
    where = {
        "dtype": "bfloat16",
        "device": arguments.device,
        "block_hash": "red team",
        "presets": (("tokens-1",),),
    }
    field = Field(reference=arguments.model, **where, **shape)
    share_left = 1 - max(1, round(field.prover.num_layers / 4)) / field.prover.num_layers
    counts = (20, 200) if field.prover.tokenizer is not None else ()
    models = [
        (f"fine-tuned, {steps} steps", 1.0, partial(finetuned, steps=steps)) for steps in counts
    ]
    if steps := arguments.distilled:
        name = f"middle quarter of the layers dropped, {steps} steps of distillation"
        models.append(
            (name, share_left, partial(distilled, steps=steps, seq_len=arguments.seq_len))
        )
    attacks = [
        Attack(
            name, "layers" if cost < 1 else "weights", partial(on_changed, change=change, cost=cost)
        )
        for name, cost, change in models
    ]
    attacks += [
        one
        for one in ATTACKS
        if one.serves("bfloat16") and one.share == 1 and one.name not in NONE_HERE
    ]
    honest = float(np.median(field.honest_residuals["tokens-1"][1]))
    results = {}
    for attack in (one for one in attacks if any(words in one.name for words in arguments.attacks)):
        note(f"red team: {attack.name}")
        cell = attacked(field, attack, arguments.redteam)
        row = cell["presets"]["tokens-1"]
        figures = {
            "cost": round_to(cell["cost"], 3),
            "times_honest": round_to(row["residual_median"] / honest, 3),
        }
        figures |= {"convicted_by": row["sequential_99"], "best_test": row["best_99"]}
        results[attack.name] = figures | ({"skips": True} if attack.skips else {})
    return results


def published(proof):
    """Return what a proof publishes, [N] or [N, K]."""
    return np.array(
        [r.distance if r.vector is None else r.vector for r in proof.records], np.float64
    )


def convicted_by(law, sizes, seed=0):
    """Return the nonce by which 99 % of the orders have convicted; None where fewer have at the
    end.
    """
    rng = np.random.default_rng(seed)
    counts = []
    for _ in range(ORDERS):
        order = rng.permutation(sizes)
        test = sequential_test(law)
        at = next(
            (
                n
                for n in range(1, len(order) + 1)
                if test.update(order[n - 1 : n]).result.verdict == "fraud"
            ),
            None,
        )
        counts.append(at or np.inf)
    worst = float(np.quantile(counts, 0.99, method="higher"))
    return None if worst == np.inf else int(worst)


def measure(model, halved, preset, arguments):
    """Return the figures of one preset."""
    round = Round(block_hash="tokens", public_key="k", seq_len=arguments.seq_len, preset=preset)
    nonces = range(arguments.nonces)
    size = {"batch_size": arguments.batch_size}
    law = calibrate(
        *(
            prove(prover, replace(round, block_hash="law"), nonces, **size)
            for prover in (model, halved)
        )
    )
    wanted, honest = (prove(prover, round, nonces, **size) for prover in (model, halved))
    noise = noise_for(honest.header, wanted.header.fingerprint, law)
    reference = published(wanted)

    def sizes_of(proof):
        apart = published(proof) - reference[: len(proof.records)]
        return np.abs(apart) if apart.ndim == 1 else np.linalg.norm(apart, axis=1)

    sizes = sizes_of(honest)
    median = float(np.median(sizes))
    figures = {
        "honest_median": round_to(median),
        "q99_over_median": round_to(float(np.quantile(sizes, 0.99)) / median),
    }
    figures |= {
        "max_over_median": round_to(float(sizes.max()) / median),
        "convicted_by": {},
        "times_honest": {},
    }
    middle = model.num_layers // 2
    programs = {
        "int4": lambda: cheats.rounded(halved, 4),
        "int8": lambda: cheats.rounded(halved, 8),
    }
    programs |= {
        "fp8": lambda: rounded_fp8(halved),
        f"without layer {middle}": lambda: without_layers(halved, middle),
    }
    programs |= {
        f"low-rank {size:.1%}": lambda size=size: adapted(halved, size=size)
        for size in (0.02, 0.005)
    }
    for name, make in programs.items():
        note(f"{preset}: {name}")
        found = sizes_of(prove(make(), round, nonces[: arguments.cheated], **size))
        figures["times_honest"][name] = round_to(float(np.median(found)) / median, 3)
        figures["convicted_by"][name] = convicted_by(noise, found)
    rng = np.random.default_rng(1)
    sizes = sizes[:MOST_JUDGED]
    mixed = np.where(rng.random(len(sizes)) < 0.1, 5, 1) * sizes
    figures["convicted_by"]["10 % at 5 times"] = convicted_by(noise, mixed)
    figures["convicted_by"]["honest"] = convicted_by(noise, sizes)
    return figures


def honest_and_presets(arguments):
    """Return what honest nodes show of the model, and the figures of every preset."""
    model = load_model(arguments.model, dtype="float32", device=arguments.device)
    model = model.with_frame(measure_frame(model))
    halved = load_model(arguments.model, dtype="bfloat16", device=arguments.device).with_frame(
        model.frame
    )
    figures = {}
    fresh = Round(block_hash="fresh", public_key="k", seq_len=arguments.seq_len, preset="tokens-1")
    figures["effective_dimension"] = [round_to(dimension_of(model, fresh, 32)), model.hidden_size]
    rates = []
    median = chord_mean(32)
    proof = prove(halved, fresh, range(64), batch_size=arguments.batch_size)
    for block in range(
        40
    ):  # the target of a block is all that differs between blocks of one set of vectors
        distances = distances_to_target(
            published(proof), replace(fresh, block_hash=f"block {block}")
        )
        rates.append(float((distances < median).mean()))
    figures["valid_rates"] = {
        "expected": round_to(float(chord_cdf(median, 32))),
        "of 40 blocks": rates,
    }
    figures["presets"] = {
        preset: measure(model, halved, preset, arguments) for preset in arguments.presets
    }
    return figures


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("--model", default="reference:qwen3")
    options_parser.add_argument("--presets", nargs="*", default=["tokens-1", "poc-2.0"])
    options_parser.add_argument("--device", default="cpu")
    options_parser.add_argument("--seq-len", type=int, default=64)
    options_parser.add_argument("--nonces", type=int, default=512)
    options_parser.add_argument("--cheated", type=int, default=128, help="nonces of every cheat")
    options_parser.add_argument("--batch-size", type=int, default=16)
    options_parser.add_argument(
        "--redteam", type=int, default=0, help="nonces of every attack of the red team; 0 for none"
    )
    options_parser.add_argument(
        "--attacks", nargs="*", default=[""], help="parts of the names of attacks that are run"
    )
    options_parser.add_argument(
        "--distilled", type=int, default=0, help="steps of distillation of an attacker; 0 for none"
    )
    arguments = options_parser.parse_args()
    figures = {"model": arguments.model, "seq_len": arguments.seq_len, "nonces": arguments.nonces}
    if arguments.presets:
        figures |= honest_and_presets(arguments)
    if arguments.redteam:
        figures["red_team"] = red_team(arguments)
    publish("tokens", figures, arguments.output)


if __name__ == "__main__":
    main()
