"""Each speed-up of the δS gradients that is hard to read, left out in turn, beside the usual pass, in one run.

Every round goes through all cases, so a busy machine slows all of them alike; seconds are those of the processor on a
CPU, the least of the rounds, and ``over_usual`` is their ratio to the usual pass of the run: what the speed-up gains.

    OMP_NUM_THREADS=1 python benchmarks/vhack_ways.py -o benchmarks/results/vhack_ways_cpu.json
    python benchmarks/vhack_ways.py --device cuda --dtype bfloat16 -o benchmarks/results/vhack_ways_cuda.json
"""

import copy
import time
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from _common import note, parser, publish
from _vhack import load, samples, timed

from assay.vhack import per_sample_gradients, weight_svd
from assay.vhack.gradients import _packed, _per_sample, _replica, _taps
from assay.vhack.gradients._replica import recipe_for
from assay.vhack.gradients._taps import Tap, Way


def chosen(change):
    """The taps' ways with some of them changed."""
    usual = Tap.way

    def way(tap, inputs, segments):
        return change(tap, usual(tap, inputs, segments))

    return mock.patch.object(Tap, "way", way)


def without_outer(tap, way):
    if way.how != "outer":
        return way
    outputs, inputs = tap.linear.weight.shape
    return Way("left" if outputs < inputs else "right", outputs < inputs, output=False, input=False)


def recipe(**changes):
    return mock.patch.object(_per_sample, "recipe_for", lambda module: replace(recipe_for(module), **changes))


@contextmanager
def nothing():
    yield


CASES = {
    "usual": nothing,
    "torch's attention for every sample, not in blocks": lambda: mock.patch.object(
        _packed, "fits_in_blocks", return_value=False
    ),
    "norms of transformers": lambda: mock.patch.object(_replica, "plain_norm", return_value=False),
    "the last layer for every token": lambda: recipe(late=False),
    "products with the weights only, no factors": lambda: recipe(factored=False),
    "no way inner": lambda: mock.patch.object(_taps, "_CONDITION", 0.0),
    "no way outer": lambda: chosen(without_outer),
    "every tap projects every token": lambda: chosen(lambda _, way: Way("project", way.output, way.output, way.input)),
    "padded, as transformers has it": lambda: recipe(packed=False, late=False, fused=False),
    "a deep copy of the modules": lambda: mock.patch.object(_replica, "_twin", copy.deepcopy),
}


def measured(reference, options):
    """Seconds of every case of one model."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    model, tokenizer = load(reference, options.device, options.dtype)
    svd = weight_svd(model, method="gram")
    texts = samples(tokenizer, options.samples)
    seconds = {name: [] for name in CASES}

    def work():
        return per_sample_gradients(texts, model, tokenizer=tokenizer, svd=svd)

    for turn in range(options.rounds + 1):  # the first one warms up
        for name, case in CASES.items():
            with case():
                _, taken, _ = timed(options.device, work, clock)
            if turn:
                seconds[name].append(taken)
    usual = min(seconds["usual"])
    rows = {name: {"seconds": taken, "over_usual": round(min(taken) / usual, 3)} for name, taken in seconds.items()}
    note(f"{reference}: { {name: row['over_usual'] for name, row in rows.items()} }")
    return rows


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--samples", type=int, default=12)
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args()
    figures = {reference: measured(reference, options) for reference in options.models}
    publish("vhack_ways", {"dtype": options.dtype, "samples": options.samples, "models": figures}, options.output)


if __name__ == "__main__":
    main()
