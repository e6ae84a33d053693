"""Normals on a GPU: ours against `torch.randn` and against the published loop, in one run.

Shapes are batches of model inputs in float16. The published way makes one nonce at a time with eager operations in
int64 (benchmarks/streams_cpu.py has it). Times are medians of CUDA events over repeated calls, seeds on the host
included for ours. Two floors stand beside them: a plain fill of the same tensor, which is bytes written over memory
bandwidth; and the issue floor, instructions of the kernel's loop over what the device can issue, one for each of the
four schedulers of a multiprocessor in each cycle of its highest clock.

    python benchmarks/gpu_normals.py -o benchmarks/results/gpu_normals.json
"""

import re
import subprocess
from collections import Counter

import torch
import triton
from _common import note, parser, publish
from streams_cpu import published_hash

from assay.streams import digest, get_backend, seed32, seeds
from assay.streams._triton_kernels import LANES

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
    """Median time of a call, the queue kept full."""
    return triton.testing.do_bench(function, warmup=25, rep=repeats, return_mode="median")


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

    times = {
        "triton_ms": milliseconds(lambda: ours.normals(seeds_BS, n, "float16"), 200),
        "torch_randn_ms": milliseconds(lambda: torch.randn((batch, n), dtype=DTYPE, device="cuda"), 200),
        "fill_ms": milliseconds(lambda: out.fill_(1.0), 200),
        "torch_backend_ms": milliseconds(lambda: plain.normals(seeds_BS, n, "float16"), 200),
        "published_loop_ms": milliseconds(loop, 500),
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


def main():
    arguments = parser(__doc__).parse_args()
    instructions, kinds = instructions_per_pair()
    figures = {
        "dtype": "float16",
        "instructions_per_pair": instructions,
        "of_which": kinds,
        "shapes": [measure(*shape, instructions) for shape in SHAPES],
    }
    publish("gpu_normals", figures, arguments.output)


if __name__ == "__main__":
    main()
