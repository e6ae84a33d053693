"""How far honest engines differ on decoded tokens: the default noise of the preset `decode` for a pair of dtypes.

Both bundled models decode in every dtype. Every proof is replayed in every dtype, with the library's plain attention in
place of the fused one and in another batch shape. The residuals of a pair of dtypes are pooled over the models, and the
law is fitted at its 99 % upper bound. Decoding and replaying run other kernels, so honest noise shows on one machine
too; `--proofs` replays honest proofs of these models that another machine made.

    python benchmarks/decode_noise.py -o benchmarks/results/decode_noise.json --install
    python benchmarks/decode_noise.py --device cuda --save proofs/      on another machine, then here with
    python benchmarks/decode_noise.py --proofs proofs/*.jsonl -o benchmarks/results/decode_noise.json --install
"""

import itertools
from pathlib import Path

import numpy as np
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Proof, Round, get_pipeline, prove
from assay.poc._prover import recompute
from assay.poc.verdict import residuals
from assay.poc.verdict._build_noise import fit_noise
from assay.poc.verdict._noise import DEFAULT_LAWS, MARGIN, law_as_dict
from assay.reports import dumps, read_json, write_atomic

MODELS = ("reference:qwen3", "reference:llama")
DTYPES = ("float32", "float16", "bfloat16")
PRESETS = {"decode": 1, "decode-32": 2}  # with the number of nonces over that of --nonces
REPLAYS = ((8, "eager"),)  # rows of a batch, and attention
BLOCK = "noise"


def proofs(options):
    """One proof per preset, model and dtype, and those of other machines."""
    found = [Proof.load(path) for path in options.proofs]
    if found:
        return found
    for reference, dtype, (preset, more) in itertools.product(MODELS, DTYPES, PRESETS.items()):
        model = load_model(reference, dtype=dtype, device=options.device)
        round = Round(block_hash=BLOCK, public_key="default", preset=preset)
        proof = prove(model, round, range(options.nonces * more), batch_size=16)
        note(f"proved {preset} {reference} {dtype} in {proof.footer.seconds} s")
        found.append(proof)
        if options.save:
            name = f"{reference.partition(':')[2]}-{dtype}-{preset}-{model.device.type}.jsonl"
            proof.save(options.save / name, overwrite=True)
    return found


def replays(made, options):
    """Residuals and matching tokens by (preset, pair of dtypes)."""
    errors, matches = {}, {}
    for reference, dtype in itertools.product(MODELS, DTYPES):
        model = load_model(reference, dtype=dtype, device=options.device)
        mine = [proof for proof in made if proof.round.model == reference]
        for proof, (batch_size, kernels) in itertools.product(mine, REPLAYS):
            model.module.set_attn_implementation(kernels)
            engine = HFEngine(model, batch_size=batch_size, seq_len=proof.round.seq_len)
            records = [r for batch in recompute(proof.header, engine, proof.records) for r in batch]
            pair = proof.round.preset, "/".join(sorted((dtype, proof.header.fingerprint.dtype)))
            errors.setdefault(pair, []).append(residuals(proof.records, records))
            matches.setdefault(pair, []).append(np.mean([record.margins == 0 for record in records]))
        note(f"replayed in {dtype}: {reference}")
    return {pair: np.concatenate(parts) for pair, parts in errors.items()}, matches


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=32)
    arguments.add_argument("--device")
    arguments.add_argument("--save", type=Path, help="write the proofs there")
    arguments.add_argument("--proofs", type=Path, nargs="+", default=[], help="replay these, and prove nothing")
    arguments.add_argument("--install", action="store_true", help="write the laws into the package")
    options = arguments.parse_args()
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    errors, matches = replays(proofs(options), options)
    laws, measured = {}, []
    for (preset, pair), values in sorted(errors.items()):
        fit = fit_noise(get_pipeline(preset), values)
        law = law_as_dict(fit.law)
        laws.setdefault(get_pipeline(preset).noise, {})[pair] = law | {"mu": law["mu"] + float(np.log(MARGIN))}
        row = {"preset": preset, "pair": pair, "n": len(values), "matching": float(np.mean(matches[preset, pair]))}
        measured.append(row | {"median_95_max": np.quantile(values, (0.5, 0.95, 1.0)).tolist(), "law": law})
    publish("decode_noise", {"margin": MARGIN, "measured": measured, "laws": laws}, options.output)
    if options.install:
        installed = read_json(DEFAULT_LAWS)
        installed["laws"] |= laws
        write_atomic(DEFAULT_LAWS, dumps(installed) + "\n")


if __name__ == "__main__":
    main()
