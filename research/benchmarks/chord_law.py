"""The chord law on real models: does a distance of poc-2.0 look like that of a random direction, and within a block?

For each bundled model and every block: the mean against √2, the valid rate at 1.416 against 59.05 %, and the width of
the distances against that of the law, each in standard errors of the nonces alone. Beside them the rate and the width
that the block's own law expects, from its head and the states of 128 other nonces. All blocks together are then held
against the chord law with the blocks' own part of the error. The first three blocks have three keys, which share what
their block does.

Beside it, per block: the permutation baseline with trained weights (visibly off: the published finding) and with
weights randomised per block (back on the law).

    python benchmarks/chord_law.py --nonces 1024 --seq-len 64 -o benchmarks/results/chord_law_blocks.json
"""

import math

import numpy as np
from _common import note, parser, publish

from assay import stats
from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline, measure_block_factor, prove

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
KEYS = ("node_A", "node_B", "node_C")
MODELS = ("reference:qwen3", "reference:llama")
R_TARGET = 1.416


def measure(model, engine, block, key, preset, nonces):
    """Return one row, and how wide the block is expected to be where its head is random."""
    round = Round(block_hash=block, public_key=key, seq_len=engine.seq_len, preset=preset, r_target=R_TARGET)
    distances = prove(model, round, range(nonces), engine=engine).distances
    size = get_pipeline(preset).output_size(model.hidden_size, model.vocab_size)
    expected = stats.valid_rate(R_TARGET, size)
    error = stats.rate_standard_error(expected, nonces)
    rate = float((distances < R_TARGET).mean())
    mean_error = stats.chord_std(size) / math.sqrt(nonces)
    width = float(distances.std() / stats.chord_std(size))
    note(f"{model.reference} {model.weights} {preset} {block} {key}: width {width:.3f}, valid {rate:.2%}")
    row = {
        "model": model.reference,
        "weights": model.weights,
        "preset": preset,
        "block": block,
        "key": key,
        "mean": float(distances.mean()),
        "std": float(distances.std()),
        "mean_minus_sqrt2": float(distances.mean() - math.sqrt(2)),
        "mean_off_in_standard_errors": float((distances.mean() - stats.chord_mean(size)) / mean_error),
        "width": width,
        "width_off_in_standard_errors": (width - 1) * math.sqrt(2 * nonces),
        "valid_rate": rate,
        "expected_rate": expected,
        "rate_off_in_standard_errors": (rate - expected) / error,
    }
    if preset == "poc-2.0":
        # Of another key: the factor must not be measured on the nonces that it is held against.
        factor = measure_block_factor(model, Round(block_hash=block, public_key="states", seq_len=engine.seq_len))
        of_block = factor.law.valid_rate(R_TARGET)
        row |= {
            "factor": factor.value,
            "factor_error": factor.error,
            "effective_dimension": factor.effective_dimension,
            "width_off_the_block_in_standard_errors": (width / factor.value - 1)
            / math.hypot(1 / math.sqrt(2 * nonces), factor.error / factor.value),
            "expected_rate_of_block": of_block,
            "rate_off_the_block_in_standard_errors": (rate - of_block) / factor.law.rate_error(R_TARGET, nonces),
        }
    return row


def over_blocks(rows, nonces):
    """Hold all blocks of a model together against the chord law, with the blocks' own part of the error."""
    first = list({row["block"]: row for row in rows}.values())
    widths_M = np.array([row["width"] for row in first])
    effective = float(np.mean([row["effective_dimension"] for row in first]))
    law = stats.BlockLaw(dimension=stats.RANDOM_HEAD_ROWS, freedom=effective)
    error = law.rate_error(R_TARGET, nonces) / math.sqrt(len(first))
    rate = float(np.mean([row["valid_rate"] for row in first]))
    return {
        "blocks": len(first),
        "effective_dimension": effective,
        "sd_of_width": float(widths_M.std(ddof=1)),
        "sd_of_width_expected": math.hypot(law.factor_error, 1 / math.sqrt(2 * nonces)),
        "widths": [float(widths_M.min()), float(widths_M.max())],
        "valid_rate": rate,
        "expected_rate": law.valid_rate(R_TARGET),
        "rate_off_in_standard_errors_with_blocks": (rate - law.valid_rate(R_TARGET)) / error,
    }


def largest(rows, name):
    """Return the largest absolute value of a column."""
    return max(abs(row[name]) for row in rows)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=1024)
    arguments.add_argument("--blocks", type=int, default=24)
    arguments.add_argument("--seq-len", type=int, default=64)
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--device")
    options = arguments.parse_args()
    shape = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    more = tuple(f"block_{number}" for number in range(options.blocks - len(BLOCKS)))
    rounds = [(block, key) for block in BLOCKS for key in KEYS] + [(block, KEYS[0]) for block in more]
    rows, baseline, together = [], [], {}
    for reference in MODELS:
        model = load_model(reference, device=options.device)
        engine = HFEngine(model, **shape)
        found = [measure(model, engine, block, key, "poc-2.0", options.nonces) for block, key in rounds]
        together[reference] = over_blocks(found, options.nonces)
        rows += found
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
        "over_blocks": together,
        "largest_mean_offset": largest(rows, "mean_minus_sqrt2"),
        "largest_rate_offset_in_standard_errors": largest(rows, "rate_off_in_standard_errors"),
        "largest_width_offset_in_standard_errors": largest(rows, "width_off_in_standard_errors"),
        "largest_rate_offset_from_the_block": largest(rows, "rate_off_the_block_in_standard_errors"),
        "largest_width_offset_from_the_block": largest(rows, "width_off_the_block_in_standard_errors"),
        "permutation_trained_least_offset_in_standard_errors": min(trained),
        "permutation_random_largest_offset_in_standard_errors": max(randomised),
    }
    publish("chord_law", figures, options.output)


if __name__ == "__main__":
    main()
