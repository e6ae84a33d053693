"""Normals on a GPU: ours against `torch.randn` and against the published loop, in one run; and reflections.

Shapes are batches of model inputs in float16. The published way makes one nonce at a time with eager operations in
int64 (benchmarks/streams_cpu.py has it). Times are medians of CUDA events over repeated calls, each queued behind a
pause: they are what the device is busy for, as in a proof, where the model is queued in front. The copy of the seeds
is part of the times of assay. The published loop is bound by the host, which launches forty operations a nonce. The
time that a call takes on the host stands beside.

There are two floors. One is a plain fill of the same tensor: bytes written over memory bandwidth. The other is the
issue floor: instructions of the kernel's loop over what the device can issue, one for each of the four schedulers of
a multiprocessor in each cycle of its highest clock.

The transform of preset poc-2.0 is timed from hidden states to distances, seed texts included, with its reflections in
one kernel and, as every other backend has them, in torch operations. Most of its time on the host makes seeds.

    python benchmarks/gpu_normals.py -o benchmarks/results/gpu_normals.json
"""

import re
import statistics
import subprocess
import time
from collections import Counter

import torch
from _common import note, parser, publish
from streams_cpu import published_hash

from assay.poc import PIPELINES, Round
from assay.poc.protocol.transforms import Transform
from assay.streams import get_backend, seed32, seeds
from assay.streams.backends import digest
from assay.streams.triton_kernels import LANES

PAUSE = 200_000
"""Clock cycles of the device, a tenth of a millisecond."""

TRANSFORMED = ((256, 256), (128, 1024), (64, 4096))
SHAPES = ((64, 256, 4096), (64, 256, 2048), (32, 256, 2048), (32, 256, 1024))
DTYPE = torch.float16


def published_normal(seed, n):
    """The published Box-Muller on the GPU, for one nonce."""
    pairs = (n + 1) // 2
    with torch.device("cuda"):
        uniform = published_hash(seed, 2 * pairs).to(torch.float32) / 4294967296.0
        radius = torch.sqrt(-2.0 * torch.log(uniform[:pairs].clamp(min=1e-10)))
        angle = 2.0 * torch.pi * uniform[pairs:]
        return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:n]


def milliseconds(function, repeats):
    """Median time of a call on the device, which has the pause to let the host get ahead, and an empty cache."""
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


def instructions_per_pair():
    """Instructions of the loop that makes 8 pairs in each thread, and how many of them are of which kind."""
    backend, launched = get_backend("triton", "cuda"), []
    launch = backend._launch
    backend._launch = lambda *arguments, **options: launched.append(launch(*arguments, **options))
    backend.normals([1], 1 << 16, "float16")
    machine = launched[0].asm["sass"]
    label = re.search(r"BRA (LBB\d+);\s+\S+\s+EXIT", machine).group(1)
    body = machine[machine.index(f"{label}:\n") :]
    lines = body[: body.index(f" {label};")].splitlines()[1:]
    kinds = Counter(re.match(r"\S+\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", line).group(1) for line in lines)
    return len(lines) / LANES, {kind: count / LANES for kind, count in kinds.most_common()}


def issue_rate():
    """Instructions of a thread that the device can start in a second."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    megahertz = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    return torch.cuda.get_device_properties(0).multi_processor_count * 4 * 32 * megahertz * 1e6


def measure(batch, seq_len, hidden, instructions):
    n = seq_len * hidden
    texts = [f"block_alpha_node_A_nonce{nonce}" for nonce in range(batch)]
    ours = get_backend("triton", "cuda")
    plain = get_backend("torch", "cuda")
    seeds_BS = seeds(texts)
    if digest(ours.normals(seeds_BS, n, "float16")) != digest(plain.normals(seeds_BS, n, "float16")):
        raise SystemExit("triton and torch disagree: nothing to time")
    out = torch.empty((batch, n), dtype=DTYPE, device="cuda")

    def loop():
        for row, text in enumerate(texts):
            out[row] = published_normal(seed32(text), n).to(DTYPE)

    def fused():
        ours.normals(seeds_BS, n, "float16")

    def randn():
        torch.randn((batch, n), dtype=DTYPE, device="cuda")

    times = {
        "triton_ms": milliseconds(fused, 200),
        "torch_randn_ms": milliseconds(randn, 200),
        "fill_ms": milliseconds(lambda: out.fill_(1.0), 200),
        "torch_backend_ms": milliseconds(lambda: plain.normals(seeds_BS, n, "float16"), 20),
        "published_loop_ms": milliseconds(loop, 15),
        "triton_host_ms": host_milliseconds(fused),
        "torch_randn_host_ms": host_milliseconds(randn),
    }
    row = {
        "batch": batch,
        "seq_len": seq_len,
        "hidden": hidden,
        **{name: round(value, 4) for name, value in times.items()},
        "issue_floor_ms": round(batch * n / 2 * instructions / issue_rate() * 1e3, 4),
        "over_randn": round(times["torch_randn_ms"] / times["triton_ms"], 3),
        "over_published": round(times["published_loop_ms"] / times["triton_ms"], 1),
        "billion_per_second": round(batch * n / times["triton_ms"] / 1e6, 1),
    }
    note(str(row))
    return row


def measure_transform(batch, hidden):
    round = Round(block_hash="block_alpha", public_key="node_A")
    device = torch.device("cuda")
    shape = {"hidden_size": hidden, "vocab_size": hidden, "device": device, "trained_head": torch.nn.Identity()}
    fused, plain = (Transform(round, PIPELINES["poc-2.0"], **shape) for _ in range(2))
    plain._backend._reflected = lambda x_BD, seeds_BR: None
    x_BD = torch.randn(batch, hidden, device=device)
    seeds_BR = seeds(round.texts("reflection", range(batch), count=8)).reshape(batch, 8)
    difference = (fused(x_BD, range(batch)) - plain(x_BD, range(batch))).abs().max().item()
    figures = {
        "reflections_device_ms": milliseconds(lambda: fused._backend.reflected(x_BD, seeds_BR), 100),
        "seeds_host_ms": host_milliseconds(lambda: seeds(round.texts("reflection", range(batch), count=8))),
        "transform_host_ms": host_milliseconds(lambda: fused(x_BD, range(batch))),
        "transform_host_torch_ms": host_milliseconds(lambda: plain(x_BD, range(batch))),
    }
    row = {
        "batch": batch,
        "hidden": hidden,
        **{name: float(f"{value:.4f}") for name, value in figures.items()},
        "greatest_difference": difference,
    }
    note(str(row))
    return row


def main():
    arguments = parser(__doc__).parse_args()
    instructions, kinds = instructions_per_pair()
    figures = {
        "dtype": "float16",
        "instructions_per_pair": instructions,
        "of_which": kinds,
        "shapes": [measure(*shape, instructions) for shape in SHAPES],
        "transforms": [measure_transform(*shape) for shape in TRANSFORMED],
    }
    publish("gpu_normals", figures, arguments.output)


if __name__ == "__main__":
    main()
