"""Random streams: model inputs on a CPU and a GPU, and Gumbel numbers of decoding, each beside its
rivals in one run.

- `inputs` (CPU): the published way makes the inputs of one nonce at a time with eager torch
  operations, emulating 32-bit unsigned arithmetic in int64 with a mask after each step, and torch's
  own `log`, `cos` and `sin`. Ours is the backend that `get_backend("auto")` chooses, all nonces in
  one call. Times are the best of several rounds, in turn.
- `normals` (GPU): batches of model inputs in float16, against `torch.randn`, a plain fill of the
  same tensor and the published loop, which is bound by the host. Times are medians of CUDA events
  over repeated calls, each queued behind a pause: they are what the device is busy for, as in a
  proof, where the model is queued in front. The copy of the seeds is part of the times of assay.
  The time that a call takes on the host stands beside.
- `gumbels` (either): an array [B, V] of Gumbel numbers beside `torch.rand`, and the noise of a step
  of decoding, from the words of the responses to the sums, beside `exponential_` on an array that
  is there, which samplers of inference servers draw. On a CPU, times are processor times of one
  core, the best of several rounds. With --model the same core, or GPU, also decodes a token for
  each row of the first two batches, with 64 tokens before it.

Bits are compared with those of another backend before anything is timed.

    python research/benchmarks/streams.py inputs -o research/results/streams_cpu.json
    python research/benchmarks/streams.py normals --device cuda -o research/results/gpu_normals.json
    python research/benchmarks/streams.py gumbels --model shape:qwen3-0.6b \
      -o research/results/gumbel_cpu.json
    python research/benchmarks/streams.py gumbels --device cuda -o research/results/gumbel_cuda.json
"""

import math
import os
import statistics
import time
from functools import partial

import torch
from _common import note, parser, publish, wall_seconds

from assay.streams import get_backend, seed32, seeds
from assay.streams.arrays import as_tensor, digest, dtype_name

MASK = 0xFFFFFFFF
BATCH = 32
SEQ_LEN = 256
DIMS = (256, 1024)  # of `inputs`
SHAPES = (
    (64, 256, 4096),
    (64, 256, 2048),
    (32, 256, 2048),
    (32, 256, 1024),
)  # of `normals`: batch, positions, width
PAUSE = 200_000  # clock cycles of the device, a tenth of a millisecond
VOCAB_SIZE = 151_936
BATCHES = (1, 8, 64)  # of `gumbels`
CONTEXT = 64
DECODED = 2


def published_hash(seed, n, device="cpu"):
    """The published murmur3 of the numbers 0 to n - 1, in int64."""

    def rotate(x, bits):
        return ((x << bits) | (x >> (32 - bits))) & MASK

    k = torch.arange(n, dtype=torch.int64, device=device)
    k = rotate((k * 0xCC9E2D51) & MASK, 15)
    k = (k * 0x1B873593) & MASK
    h = rotate(seed ^ k, 13)
    h = (h * 5 + 0xE6546B64) & MASK
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def published_normal(seed, n, device="cpu"):
    """The published Box-Muller, for one nonce."""
    pairs = (n + 1) // 2
    uniform = published_hash(seed, 2 * pairs, device).to(torch.float32) / 4294967296.0
    radius = torch.sqrt(-2.0 * torch.log(uniform[:pairs].clamp(min=1e-10)))
    angle = 2.0 * math.pi * uniform[pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:n]


def check_agreement(published, ours):
    """Compare as the format promises: 8 ulp, or 4e-6 where the rounded angle of the published way
    shows.
    """
    difference = (published - ours).abs()
    ulp = torch.nextafter(ours.abs(), torch.tensor(torch.inf)) - ours.abs()
    if (difference - torch.clamp(8 * ulp, min=4e-6)).max().item() > 0:
        raise SystemExit(
            f"the baseline differs by {difference.max().item():.2e}: it is not the same format"
        )
    return difference.max().item()


def check_bits(one, other):
    """Compare two backends' numbers."""
    if digest(one) != digest(other):
        raise SystemExit("two backends disagree: nothing to time")


def inputs(options):
    """Inputs on a CPU, by the published way and ours."""
    backend = get_backend("auto", "cpu")
    cases = []
    texts = [f"block_alpha_node_A_nonce{nonce}" for nonce in range(BATCH)]
    for dim in DIMS:
        n = SEQ_LEN * dim

        def published(dtype, n=n):
            return torch.stack([published_normal(seed32(text), n) for text in texts]).to(dtype)

        def ours(dtype, n=n):
            return as_tensor(backend.normals(seeds(texts), n, dtype_name(dtype))).view(BATCH, n)

        greatest = check_agreement(published(torch.float32), ours(torch.float32))
        for dtype in (torch.float32, torch.bfloat16):
            ours(dtype)
            ways = (published, ours)
            times = [
                [wall_seconds(partial(call, dtype)) for call in ways] for _ in range(options.rounds)
            ]
            theirs, mine = (min(column) for column in zip(*times, strict=True))
            row = {"batch": BATCH, "seq_len": SEQ_LEN, "dim": dim, "dtype": dtype_name(dtype)}
            row |= {"published_ms": round(theirs * 1e3, 3), "ours_ms": round(mine * 1e3, 3)}
            row |= {"ratio": round(theirs / mine, 2), "greatest_difference_float32": greatest}
            cases.append(row)
            note(str(row))
    return {
        "backend": backend.name,
        "cases": cases,
        "smallest_ratio": min(case["ratio"] for case in cases),
    }


def milliseconds(function, repeats):
    """Median time of a call on the device, which has the pause to let the host get ahead, and an
    empty cache.
    """
    function()
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(PAUSE)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def host_milliseconds(function, repeats=30):
    """Best time until a call returns, the device idle at its start."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def normals(options):
    """Normals on a GPU."""
    ours = get_backend("triton", "cuda")
    plain = get_backend("torch", "cuda")
    rows = []
    for batch, seq_len, hidden in SHAPES:
        n = seq_len * hidden
        texts = [f"block_alpha_node_A_nonce{nonce}" for nonce in range(batch)]
        seeds_BS = seeds(texts)
        check_bits(ours.normals(seeds_BS, n, "float16"), plain.normals(seeds_BS, n, "float16"))
        out = torch.empty((batch, n), dtype=torch.float16, device="cuda")

        def loop(out=out, texts=texts, n=n):
            for row, text in enumerate(texts):
                out[row] = published_normal(seed32(text), n, "cuda").to(out.dtype)

        calls = {  # and how often each is timed
            "triton": (lambda s=seeds_BS, n=n: ours.normals(s, n, "float16"), 200),
            "torch_randn": (
                lambda out=out: torch.randn(out.shape, dtype=out.dtype, device="cuda"),
                200,
            ),
            "fill": (lambda out=out: out.fill_(1.0), 200),
            "torch_backend": (lambda s=seeds_BS, n=n: plain.normals(s, n, "float16"), 20),
            "published_loop": (loop, 15),
        }
        times = {f"{name}_ms": round(milliseconds(*timed), 4) for name, timed in calls.items()}
        times |= {
            f"{name}_host_ms": round(host_milliseconds(calls[name][0]), 4)
            for name in ("triton", "torch_randn")
        }
        row = {"batch": batch, "seq_len": seq_len, "hidden": hidden, **times}
        row["over_randn"] = round(times["torch_randn_ms"] / times["triton_ms"], 3)
        row["over_published"] = round(times["published_loop_ms"] / times["triton_ms"], 1)
        row["billion_per_second"] = round(batch * n / times["triton_ms"] / 1e6, 1)
        rows.append(row)
        note(str(row))
    return {"dtype": "float16", "shapes": rows}


def times_of(calls, options):
    """Times of calls in milliseconds by the rules of a device."""
    if options.device != "cpu":
        milliseconds_of = {
            f"{name}_ms": round(milliseconds(call, 200), 4) for name, call in calls.items()
        }
        return milliseconds_of | {
            f"{name}_host_ms": round(host_milliseconds(call), 4) for name, call in calls.items()
        }
    times = {name: [] for name in calls}
    for _ in range(options.rounds + 1):  # the first compiles and warms up
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {
        f"{name}_ms": round(min(milliseconds_of[1:]) * 1e3, 3)
        for name, milliseconds_of in times.items()
    }


def gumbels(options):
    """Gumbel numbers of a batch of logits."""
    if options.device == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    backend = get_backend("auto", options.device)
    rows = []
    for batch in BATCHES:
        texts = [f"response {i}" for i in range(batch)]
        numbers = seeds(texts)
        words = as_tensor(seeds(texts, strength=256)).to(options.device)
        steps = torch.arange(batch, device=options.device)
        logits = torch.randn(batch, VOCAB_SIZE, device=options.device)
        torch_backend = get_backend("torch", options.device)
        check_bits(
            backend.gumbels(numbers[:2], VOCAB_SIZE), torch_backend.gumbels(numbers[:2], VOCAB_SIZE)
        )
        calls = {
            "gumbels": lambda numbers=numbers: backend.gumbels(numbers, VOCAB_SIZE),
            "torch_rand": lambda batch=batch: torch.rand(batch, VOCAB_SIZE, device=options.device),
            "step": lambda w=words, s=steps, x=logits: backend.add_gumbels(
                x, backend.row_seeds(w, s)
            ),
            "torch_exponential": torch.empty_like(logits).exponential_,
        }
        found = times_of(calls, options)
        row = {
            "batch": batch,
            **found,
            "over_rand": round(found["torch_rand_ms"] / found["gumbels_ms"], 2),
        }
        row["over_exponential"] = round(found["torch_exponential_ms"] / found["step_ms"], 2)
        row["million_per_second"] = round(batch * VOCAB_SIZE / found["gumbels_ms"] / 1e3, 1)
        rows.append(row)
        note(str(row))
    figures = {
        "backend": backend.name,
        "device": options.device,
        "vocab_size": VOCAB_SIZE,
        "batches": rows,
    }
    return figures | ({"decoding": decoding(options)} if options.model else {})


def decoding(options):
    """Time of a step of decoding of a model with random weights, for the first batches."""
    from transformers import DynamicCache

    from assay.models import load_model

    module = load_model(options.model, device=options.device, dtype="bfloat16").module
    rows = []
    for batch in BATCHES[:DECODED]:
        ids = torch.arange(batch * CONTEXT, device=options.device).view(batch, CONTEXT)
        cache = DynamicCache()
        with torch.inference_mode():
            module(input_ids=ids, past_key_values=cache, use_cache=True)

            def decode(cache=cache, ids=ids):
                module(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                cache.crop(-1)

            rows.append({"batch": batch, **times_of({"decode": decode}, options)})
        note(str(rows[-1]))
    return {"model": options.model, "dtype": "bfloat16", "context": CONTEXT, "batches": rows}


PARTS = {"inputs": inputs, "normals": normals, "gumbels": gumbels}


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("part", choices=PARTS)
    options_parser.add_argument("--device", default="cpu", help="cpu or cuda, for gumbels")
    options_parser.add_argument(
        "--model", help="also time a step of decoding of this model, for gumbels"
    )
    options_parser.add_argument("--rounds", type=int, default=15, help="on a CPU")
    options = options_parser.parse_args()
    publish(f"streams_{options.part}", PARTS[options.part](options), options.output)


if __name__ == "__main__":
    main()
