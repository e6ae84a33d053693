"""Nonces per second on a CPU in every number format: for validators without a GPU.

The bundled models are stored in eight bits on the spot. Formats take turns, so that whatever else the machine does
strikes all alike; the best round of each counts.

    python benchmarks/cpu_eight_bits.py -o benchmarks/results/cpu_eight_bits.json
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import note, parser, publish

from assay.models import checkpoint_directory, load_model
from assay.poc import HFEngine, Round, get_pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.storing import store

MODELS = ("reference:qwen3", "reference:llama")
PLAIN = ("float32", "bfloat16")
STORED = {"float8": "channel", "float8-block": "block", "int8-rows": "int8"}
BATCH, SEQ_LEN = 8, 256


def engines(reference, folder):
    """An engine of every format."""
    made = {dtype: load_model(reference, dtype=dtype, device="cpu") for dtype in PLAIN}
    for name, form in STORED.items():
        path = store(checkpoint_directory(reference), folder / name, form, block=128)
        made[name] = load_model(path, device="cpu")
    return {name: HFEngine(model, batch_size=BATCH, seq_len=SEQ_LEN) for name, model in made.items()}


def seconds(engine, rounds):
    """Time of one batch, inputs and transform included."""
    agreed, pipeline = Round(block_hash="b", public_key="k", seq_len=SEQ_LEN), get_pipeline("poc-2.0")
    started = time.perf_counter()
    for _ in engine.outputs(agreed, pipeline, range(BATCH * rounds)):
        pass
    return (time.perf_counter() - started) / rounds


def main():
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="rounds of all formats")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    results = []
    for reference in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            made = engines(reference, Path(folder))
            best = dict.fromkeys(made, float("inf"))
            for _ in range(chosen.rounds + 1):  # the first one warms up
                for name, engine in made.items():
                    best[name] = min(best[name], seconds(engine, 1))
        rates = {name: round(BATCH / time_, 2) for name, time_ in best.items()}
        note(f"{reference}: {rates}")
        results.append({"model": reference, "nonces_per_second": rates})
    shape = {"threads": chosen.threads, "batch_size": BATCH, "seq_len": SEQ_LEN}
    publish("cpu_eight_bits", shape | {"models": results}, chosen.output)


if __name__ == "__main__":
    main()
