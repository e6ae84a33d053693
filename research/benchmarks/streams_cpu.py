"""Model inputs on the CPU: the published way against ours, in one run.

The published way makes the inputs of one nonce at a time with eager torch operations, emulating 32-bit unsigned
arithmetic in int64 with a mask after each step, and torch's own ``log``, ``cos`` and ``sin``. Ours is the backend that
``get_backend("auto")`` chooses, all nonces in one call. Both times are the best of several rounds, taken in turn.

    python benchmarks/streams_cpu.py -o benchmarks/results/streams_cpu.json
"""

import math
import time

import torch
from _common import parser, publish

from assay.streams import get_backend, seed32, seeds
from assay.streams.backends import as_tensor, dtype_name

BATCH, SEQ_LEN, DIMS, ROUNDS = 32, 256, (256, 1024), 5
MASK = 0xFFFFFFFF


def published_hash(seed, n):
    def rotate(x, bits):
        return ((x << bits) | (x >> (32 - bits))) & MASK

    k = torch.arange(n, dtype=torch.int64)
    k = (k * 0xCC9E2D51) & MASK
    k = rotate(k, 15)
    k = (k * 0x1B873593) & MASK
    h = seed ^ k
    h = rotate(h, 13)
    h = (h * 5 + 0xE6546B64) & MASK
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def published_normal(seed, n):
    pairs = (n + 1) // 2
    uniform = published_hash(seed, 2 * pairs).to(torch.float32) / 4294967296.0
    u1, u2 = uniform[:pairs].clamp(min=1e-10), uniform[pairs:]
    radius = torch.sqrt(-2.0 * torch.log(u1))
    angle = 2.0 * math.pi * u2
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:n]


def published_inputs(texts, dim, dtype):
    """One nonce after the other, as the network does it."""
    rows = [published_normal(seed32(text), SEQ_LEN * dim).view(SEQ_LEN, dim) for text in texts]
    return torch.stack(rows).to(dtype)


def our_inputs(backend, texts, dim, dtype):
    return as_tensor(backend.normals(seeds(texts), SEQ_LEN * dim, dtype_name(dtype))).view(len(texts), SEQ_LEN, dim)


def check_agreement(published, ours):
    """The two agree as the format promises: 8 ulp, or 4e-6 where the rounded angle of the published way shows."""
    difference = (published - ours).abs()
    ulp = torch.nextafter(ours.abs(), torch.tensor(torch.inf)) - ours.abs()
    excess = (difference - torch.clamp(8 * ulp, min=4e-6)).max().item()
    if excess > 0:
        raise SystemExit(
            f"the baseline differs from our streams by {difference.max().item():.2e}: it is not the same format"
        )
    return difference.max().item()


def seconds(make):
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


def measure(backend, dim, dtype):
    texts = [f"block_alpha_node_A_nonce{nonce}" for nonce in range(BATCH)]
    # The first calls compile and warm up; they also show that both make the same inputs.
    greatest = check_agreement(
        published_inputs(texts, dim, torch.float32), our_inputs(backend, texts, dim, torch.float32)
    )
    our_inputs(backend, texts, dim, dtype)
    times = [
        (
            seconds(lambda: published_inputs(texts, dim, dtype)),
            seconds(lambda: our_inputs(backend, texts, dim, dtype)),
        )
        for _ in range(ROUNDS)
    ]
    published, ours = (min(column) for column in zip(*times, strict=True))
    values = BATCH * SEQ_LEN * dim
    return {
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "dim": dim,
        "dtype": dtype_name(dtype),
        "published_ms": round(published * 1e3, 3),
        "ours_ms": round(ours * 1e3, 3),
        "ratio": round(published / ours, 2),
        "ours_million_normals_per_second": round(values / ours / 1e6, 1),
        "greatest_difference_float32": greatest,
    }


def main():
    arguments = parser(__doc__).parse_args()
    backend = get_backend("auto", "cpu")
    cases = [measure(backend, dim, dtype) for dim in DIMS for dtype in (torch.float32, torch.bfloat16)]
    smallest = min(case["ratio"] for case in cases)
    publish("streams_cpu", {"backend": backend.name, "cases": cases, "smallest_ratio": smallest}, arguments.output)


if __name__ == "__main__":
    main()
