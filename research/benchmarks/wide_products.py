"""Time of 16-bit numbers on a CPU with and without products in float32 (assay/models/wide.py).

Ways take turns, so that whatever else the machine does strikes all alike; the best round of each counts. The share of a
batch's states that have other bits, and their distance, are those of honest nodes on two kinds of CPU.

    python benchmarks/wide_products.py -o benchmarks/results/wide_products.json
"""

import time

import torch
from _common import note, parser, publish

from assay.models import load_model, wide
from assay.models.device import processor
from assay.poc import HFEngine, Round
from assay.vhack import pair_gradients, weight_svd
from assay.vhack.pairs import generate_pairs

MODELS = ("reference:qwen3", "reference:llama")
DTYPES = ("bfloat16", "float16")
BATCH, SEQ_LEN = 8, 256
FAST = wide._is_fast


def timed(work, rounds):
    """Return what work gives in each way, and its best seconds."""
    best, given = {"own": float("inf"), "float32": float("inf")}, {}
    for turn in range(rounds + 1):  # the first one warms up
        for way in best:
            wide._is_fast = lambda dtype, way=way: way == "own"
            started = time.perf_counter()
            given[way] = work()
            if turn:
                best[way] = min(best[way], time.perf_counter() - started)
    wide._is_fast = FAST
    return given, best


def forward(reference, dtype, rounds):
    """One batch of noise through a model."""
    engine = HFEngine(load_model(reference, dtype=dtype, device="cpu"), batch_size=BATCH, seq_len=SEQ_LEN)
    inputs = engine.inputs(Round(block_hash="b", public_key="k", seq_len=SEQ_LEN), range(BATCH))
    given, best = timed(lambda: engine.read(inputs), rounds)
    return {
        "seconds": best["own"],
        "seconds_with_float32_products": best["float32"],
        "other_states": (given["own"] != given["float32"]).float().mean().item(),
        "distance": ((given["own"] - given["float32"]).norm() / given["own"].norm()).item(),
    }


def gradients(dtype, rounds):
    """The gradients of four pairs."""
    model, pairs = load_model("reference:organism", dtype=dtype, device="cpu"), generate_pairs(4)
    svd = weight_svd(model, dtype=dtype, method="gram")
    given, best = timed(lambda: pair_gradients(pairs, model, svd=svd).hack, rounds)
    own, other = (torch.cat([rows.flatten() for rows in given[way].values()]) for way in ("own", "float32"))
    return {
        "seconds": best["own"],
        "seconds_with_float32_products": best["float32"],
        "distance": ((own - other).norm() / own.norm()).item(),
    }


def main():
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="rounds of both ways")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    batches = []
    for dtype in DTYPES:
        for reference in MODELS:
            batches.append({"model": reference, "dtype": dtype, **forward(reference, dtype, chosen.rounds)})
            note(str(batches[-1]))
    passes = [{"model": "reference:organism", "dtype": "bfloat16", "pairs": 4, **gradients("bfloat16", chosen.rounds)}]
    note(str(passes[0]))
    shape = {"threads": chosen.threads, "batch_size": BATCH, "seq_len": SEQ_LEN}
    cpu = torch.device("cpu")
    here = {"processor": processor(cpu), "own_are_fast": {dtype: FAST(getattr(torch, dtype)) for dtype in DTYPES}}
    publish("wide_products", here | shape | {"batches": batches, "gradients": passes}, chosen.output)


if __name__ == "__main__":
    main()
