"""The chord law on real models: does a distance of poc-2.0 look like that of a random direction?

For each bundled model, every block and key: the mean against √2 (within 0.0005) and the valid rate at 1.416 against
59.05 % (within three standard errors). Beside it, per block: the permutation baseline with trained weights (visibly
off: the published finding) and with weights randomised per block (back on the law).

    python benchmarks/chord_law.py --nonces 4096 --seq-len 64 -o benchmarks/results/chord_law.json
"""

import math

from _common import note, parser, publish

from assay import stats
from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline, prove

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
KEYS = ("node_A", "node_B", "node_C")
MODELS = ("reference:qwen3", "reference:llama")
R_TARGET = 1.416


def measure(model, engine, block, key, preset, nonces):
    round = Round(block_hash=block, public_key=key, seq_len=engine.seq_len, preset=preset, r_target=R_TARGET)
    distances = prove(model, round, range(nonces), engine=engine).distances
    size = get_pipeline(preset).output_size(model.hidden_size, model.vocab_size)
    expected = stats.valid_rate(R_TARGET, size)
    error = stats.rate_standard_error(expected, nonces)
    rate = float((distances < R_TARGET).mean())
    mean_error = stats.chord_std(size) / math.sqrt(nonces)
    note(f"{model.reference} {model.weights} {preset} {block} {key}: mean {distances.mean():.5f}, valid {rate:.2%}")
    return {
        "model": model.reference,
        "weights": model.weights,
        "preset": preset,
        "block": block,
        "key": key,
        "mean": float(distances.mean()),
        "std": float(distances.std()),
        "mean_minus_sqrt2": float(distances.mean() - math.sqrt(2)),
        "mean_off_in_standard_errors": float((distances.mean() - stats.chord_mean(size)) / mean_error),
        "valid_rate": rate,
        "expected_rate": expected,
        "rate_off_in_standard_errors": (rate - expected) / error,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=4096)
    arguments.add_argument("--seq-len", type=int, default=64)
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--device")
    options = arguments.parse_args()
    shape = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    rows, baseline = [], []
    for reference in MODELS:
        model = load_model(reference, device=options.device)
        engine = HFEngine(model, **shape)
        rows += [measure(model, engine, b, k, "poc-2.0", options.nonces) for b in BLOCKS for k in KEYS]
        for block in BLOCKS:
            baseline.append(measure(model, engine, block, KEYS[0], "permutation", options.nonces // 4))
            random = load_model(reference, device=options.device, weights="random-all", block_hash=block)
            baseline.append(
                measure(random, HFEngine(random, **shape), block, KEYS[0], "permutation", options.nonces // 4)
            )
    trained = [abs(row["mean_off_in_standard_errors"]) for row in baseline if row["weights"] == "trained"]
    randomised = [abs(row["mean_off_in_standard_errors"]) for row in baseline if row["weights"] != "trained"]
    figures = {
        **shape,
        "nonces": options.nonces,
        "poc-2.0": rows,
        "permutation": baseline,
        "largest_mean_offset": max(abs(row["mean_minus_sqrt2"]) for row in rows),
        "largest_rate_offset_in_standard_errors": max(abs(row["rate_off_in_standard_errors"]) for row in rows),
        "permutation_trained_least_offset_in_standard_errors": min(trained),
        "permutation_random_largest_offset_in_standard_errors": max(randomised),
    }
    publish("chord_law", figures, options.output)


if __name__ == "__main__":
    main()
