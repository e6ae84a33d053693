"""What a proof of decoding costs its verifier, over what it costs its prover, and which cheats it
catches.

Cost: both sides run the same nonces on the same device in turn, after a batch each that is not
    counted. The figure is
the verifier's time over the prover's, with its quartiles over the turns. Both run transformers with
eager kernels; a prover with a faster decoder, such as vLLM, has a ratio that is worse for the
verifier by as much.

Cheats (`--cheats`): each of :mod:`assay_research.decoding` against an honest proof, judged by the
    default law of the
number format. A row has the median residual over that of the honest proof, and the nonces until the
verdict is fraud.

    python research/benchmarks/decode_proofs.py --cheats -o research/results/decode_proofs_cpu.json
    python research/benchmarks/decode_proofs.py --models shape:llama-3.1-8b --dtypes bfloat16 \
      --device cuda \
        --batch-size 8 16 32 -o research/results/decode_proofs_h200_llama-3.1-8b.json
"""

import statistics

import numpy as np
from _common import note, parser, publish, timed
from assay_research.decoding import drafted, forgetful, recycled, repeated

from assay.models import load_model
from assay.poc import HFEngine, Round, bundled_noise, prove
from assay.poc.cheats import rounded, without_last_layers
from assay.poc.prover import compute
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import sequential_test


def cost(model, round, batch_size, options):
    """Time prover and verifier in turn on nonces of one batch."""
    engine = HFEngine(model, batch_size=batch_size, seq_len=options.seq_len)
    times = {"prover": [], "verifier": []}
    for turn in range(options.turns + 1):
        nonces = range(turn * batch_size, (turn + 1) * batch_size)
        proof_and_time, proof = timed(lambda: prove(model, round, nonces, engine=engine))  # noqa: B023
        checked, _ = timed(
            lambda: list(
                compute(engine, proof.header.pipeline, round.inputs(nonces), proof.records)  # noqa: B023
            )
        )
        note(f"prover {proof_and_time:.2f} s, verifier {checked:.2f} s")
        if turn:
            times["prover"].append(proof_and_time)
            times["verifier"].append(checked)
    ratios = [b / a for a, b in zip(times["prover"], times["verifier"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "prover_seconds_a_nonce": statistics.median(times["prover"]) / batch_size,
        "verifier_seconds_a_nonce": statistics.median(times["verifier"]) / batch_size,
        "verifier_over_prover": middle,
        "quartiles": [low, high],
    }


def cheats(model, round, batch_size, options):
    """One row per cheat."""
    nonces = range(options.nonces)
    honest = prove(model, round, nonces, batch_size=batch_size)
    engine = HFEngine(model, batch_size=batch_size, seq_len=options.seq_len)
    size = {"batch_size": batch_size}
    layers = model.num_layers
    cheating_models = {
        "honest": lambda: honest,
        "draft: 8-bit weights": lambda: drafted(honest, model, rounded(model, 8), **size),
        "draft: 4-bit weights": lambda: drafted(honest, model, rounded(model, 4), **size),
        "draft: without the last layer": lambda: drafted(
            honest, model, without_last_layers(model, 1), **size
        ),
        "draft: half of the layers": lambda: drafted(
            honest, model, without_last_layers(model, layers // 2), **size
        ),
        "4-bit weights": lambda: _as(honest, prove(rounded(model, 4), round, nonces, **size)),
        "half of the prompt left out": lambda: forgetful(honest, model, **size),
        "half of the steps, twice": lambda: repeated(honest),
        "half of the nonces recycled": lambda: recycled(honest),
    }
    rows = []
    base = None
    for name, make in cheating_models.items():
        proof = make()
        inputs = honest.round.inputs([record.nonce for record in proof.records])
        batches = compute(engine, honest.header.pipeline, inputs, proof.records)
        records = [record for batch in batches for record in batch]
        errors = residuals(proof.records, records)
        base = base or float(np.median(errors))
        margins = np.stack([record.margins for record in records])
        row = {
            "cheat": name,
            "errors": errors,
            "tokens_that_match": float(np.mean(margins == 0)),
            "mean_margin": float(np.minimum(margins, 4).mean()),
            "median_residual": float(np.median(errors)),
            "over_honest": float(np.median(errors)) / base if base else None,
        }
        note(str(row))
        rows.append(row)
    return [row | {"nonces_until_fraud": caught(row.pop("errors"), honest.header)} for row in rows]


def caught(errors, header):
    """Return the number of nonces after which the verdict is fraud, or None."""
    dtype = header.fingerprint.dtype
    test = sequential_test(bundled_noise(header.digest, header.pipeline.noise, dtype, dtype))
    for count, error in enumerate(errors, start=1):
        if test.update([error]).result.verdict == "fraud":
            return count
    return None


def _as(honest, proof):
    """Return the records of a proof under the header of an honest one."""
    return type(proof).build(honest.header, proof.records, proof.footer.seconds)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    arguments.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments.add_argument("--preset", default="decode")
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--batch-size", type=int, nargs="+", default=[16])
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--nonces", type=int, default=32, help="of the proofs of cheats")
    arguments.add_argument("--cheats", action="store_true")
    arguments.add_argument("--device")
    options = arguments.parse_args()
    measured = []
    for reference in options.models:
        for dtype in options.dtypes:
            note(f"{reference} {dtype}")
            model = load_model(reference, dtype=dtype, device=options.device)
            round = Round(
                block_hash="bench", public_key="k", preset=options.preset, seq_len=options.seq_len
            )
            for batch_size in options.batch_size:
                row = {
                    "model": reference,
                    "dtype": dtype,
                    "batch_size": batch_size,
                    "preset": options.preset,
                }
                row |= {"seq_len": options.seq_len, "device": str(model.device)}
                if options.turns:
                    row |= cost(model, round, batch_size, options)
                if options.cheats:
                    row["cheats"] = cheats(model, round, batch_size, options)
                measured.append(row)
    publish("decode_proofs", {"measured": measured}, options.output)


if __name__ == "__main__":
    main()
