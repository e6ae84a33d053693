"""How far honest engines differ on the bundled models: the laws that come with assay, for their
digests alone.

Both bundled models prove the same nonces in every dtype and in two batch shapes. Residuals between
every two engines of a pair of dtypes are pooled, and the law is fitted at its 99 % upper bound.
Engines that agree to the bit (same dtype, same machine) leave the resolution of a distance, so
pairs of one dtype are also measured between two machines: run with `--save` on one and give the
saved records with `--with` on the other. `--kernels` adds the plain attention of the library as
another engine, which shows noise within one dtype on one machine.

Nonces that decode part from each other, so every validator replays them: all number formats, with
both kinds of attention.

    python research/benchmarks/bundled_noise.py --presets chain-decode --nonces 16 --install \
        -o research/results/chain_decode_noise.json
    python research/benchmarks/bundled_noise.py --presets hardened --kernels --nonces 64 \
      --save cuda.npz
    python research/benchmarks/bundled_noise.py --presets hardened --kernels --nonces 64 \
      --with cuda.npz --install \
        -o research/results/hardened_noise.json
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from scipy import special

from assay import stats
from assay.files.jsonl import dumps, read_json
from assay.files.storage import write_atomic
from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline, prove
from assay.poc.prover import compute
from assay.poc.verdict.honest_noise import BUNDLED_LAWS, fit_noise, law_as_dict
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import EFFECT

MODELS = ("reference:qwen3", "reference:llama")
DTYPES = ("float32", "float16", "bfloat16")
SHAPES = (32, 5)
PRESETS = ("poc-2.0", "artifact", "hardened")
AUDITS = 4000
AUDITED = 64
MARGIN = 2.0  # over what was measured, for machines that were not
CONFIDENCE = 0.99


def upper_law(fit, n):
    """Return a law that is at least as large as the true noise, by the standard errors of its size
    and of an sd.
    """
    z, (law, error) = float(special.ndtri(CONFIDENCE)), fit
    law = law.scaled(math.exp(z * error))
    return (
        replace(law, sd=law.sd * math.exp(z / math.sqrt(2 * n)))
        if isinstance(law, stats.LogNoise)
        else law
    )


def records(options):
    """One array per (preset, model, dtype, machine, batch shape and kernels)."""
    by_engine = {}
    nonces = options.nonces
    engines = [(size, "sdpa") for size in SHAPES] + (
        [(SHAPES[0], "eager")] if options.kernels else []
    )
    for reference, dtype in itertools.product(MODELS, DTYPES):
        model = load_model(reference, dtype=dtype, device=options.device)
        for (batch_size, kernels), preset in itertools.product(engines, options.presets):
            model.module.set_attn_implementation(kernels)
            name = f"{model.device.type} {batch_size}" + (
                f" {kernels}" if kernels != "sdpa" else ""
            )
            round = Round(block_hash="noise", public_key="default", preset=preset)
            proof = prove(
                model, round, range(nonces), engine=HFEngine(model, batch_size=batch_size)
            )
            note(f"{preset} {reference} {dtype} {name}")
            vectors = get_pipeline(preset).output == "vector"
            values = np.stack([r.vector for r in proof.records]) if vectors else proof.distances
            by_engine[f"{preset}|{reference}|{dtype}|{name}"] = values.astype(np.float64)
    return by_engine


def pooled(found, preset, one, two):
    """Residuals between every two different engines of this pair of dtypes, over both models."""
    parts = []
    for (a, values), (b, others) in itertools.combinations(found.items(), 2):
        first = a.split("|")
        second = b.split("|")
        if first[:2] == second[:2] and first[0] == preset and {first[2], second[2]} == {one, two}:
            difference = values - others
            parts.append(difference if difference.ndim == 1 else np.linalg.norm(difference, axis=1))
    return np.concatenate(parts)


def replayed(options, preset):
    """Residuals of one preset by pair of dtypes, of proofs and replays in all of them."""
    by_engine = {}
    nonces = range(options.nonces)
    for reference in MODELS:
        models = {
            dtype: load_model(reference, dtype=dtype, device=options.device) for dtype in DTYPES
        }
        round = Round(block_hash="noise", public_key="default", preset=preset)
        for dtype, model in models.items():
            engine = HFEngine(model, batch_size=len(nonces))
            proof = prove(model, round, nonces, engine=engine)
            for (other_dtype, validator), kernels in itertools.product(
                models.items(), ("sdpa", "eager")
            ):
                validator.module.set_attn_implementation(kernels)
                note(f"{preset} {reference} {dtype} by {other_dtype} {kernels}")
                judge = HFEngine(validator, batch_size=len(nonces))
                batches = compute(judge, proof.header.pipeline, round.inputs(nonces), proof.records)
                again = [record for batch in batches for record in batch]
                pair = "/".join(sorted((dtype, other_dtype)))
                by_engine.setdefault(pair, []).append(residuals(proof.records, again))
                validator.module.set_attn_implementation("sdpa")
    return {pair: np.concatenate(parts) for pair, parts in by_engine.items()}


def accused(pipeline, errors, rng):
    """Share of simulated audits of honest nodes that are accused, with a law fitted to the other
    half.
    """
    errors = rng.permutation(errors)
    half = len(errors) // 2
    law = upper_law(fit_noise(pipeline, errors[:half]), half)
    kind = "distance" if pipeline.output == "distance" else "vector"
    test = stats.SequentialTest(law, alpha=1e-3, effect=EFFECT[kind])
    drawn = rng.permuted(np.tile(errors[half:], (AUDITS, 1)), axis=1)[:, :AUDITED]
    return float(test.accusations(drawn)[:, -1].mean())


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=128)
    arguments.add_argument("--device")
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument(
        "--kernels", action="store_true", help="also with the library's plain attention"
    )
    arguments.add_argument("--save", type=Path, help="write the records of this machine and stop")
    arguments.add_argument("--with", type=Path, dest="others", help="records of another machine")
    arguments.add_argument("--install", action="store_true", help="write the laws into the package")
    options = arguments.parse_args()
    presets = options.presets
    options.presets = [preset for preset in presets if not get_pipeline(preset).steps]
    all_records = records(options)
    if options.save:
        np.savez_compressed(options.save, **all_records)
        return
    if options.others:
        with np.load(options.others) as others:
            all_records |= {name: others[name] for name in others.files}
    laws = {}
    measured = []
    for preset in presets:
        errors_by_pair = replayed(options, preset) if get_pipeline(preset).steps else None
        pipeline = get_pipeline(preset)
        for first, two in itertools.combinations_with_replacement(sorted(DTYPES), 2):
            if errors_by_pair is None:
                errors = pooled(all_records, preset, first, two)
            else:
                errors = errors_by_pair[f"{first}/{two}"]
            fit = fit_noise(pipeline, errors)
            law = upper_law(fit, len(errors))
            laws.setdefault(pipeline.noise, {})[f"{first}/{two}"] = law_as_dict(law.scaled(MARGIN))
            quantiles = np.quantile(np.abs(errors), (0.5, 0.95, 1.0)).tolist()
            row = {
                "preset": preset,
                "pair": f"{first}/{two}",
                "n": len(errors),
                "confidence": CONFIDENCE,
            }
            row |= {
                "audits": AUDITS,
                "accused": accused(pipeline, errors, np.random.default_rng(0)),
            }
            measured.append(row | {"median_95_max": quantiles, "law": law_as_dict(law)})
    engines = sorted({name.split("|")[3] for name in all_records})
    publish(
        "default_noise",
        {"engines": engines, "margin": MARGIN, "measured": measured, "laws": laws},
        options.output,
    )
    if options.install:
        installed = read_json(BUNDLED_LAWS)
        installed["laws"] |= laws
        write_atomic(BUNDLED_LAWS, dumps(installed) + "\n")


if __name__ == "__main__":
    main()
