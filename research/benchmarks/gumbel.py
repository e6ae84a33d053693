"""Gumbel numbers for the logits of a batch, beside `torch.rand` of the same shape in one run, on a CPU or a GPU.

Two things are timed for every batch: an array [B, V] of numbers, as `torch.rand` makes one, and the noise of a step of
decoding, from the words of the responses to the sums: a seed for each row, then its numbers added to the logits in
place. Beside them stands what samplers of inference servers draw in a step, `exponential_` on an array that is there.
Backends are those of `get_backend("auto")`, and their bits are compared with another backend's before.

On a CPU, times are those of one core: what the noise takes from the model that decodes there. They are processor times,
to which other programs add little, and the best of several rounds taken in turn. On a GPU, they are medians of CUDA
events, each call queued behind a pause (benchmarks/gpu_normals.py), and times on the host stand beside. With --model
the same core, or GPU, also decodes a token for each row of the first two batches, with 64 tokens before it.

    python benchmarks/gumbel.py --model shape:qwen3-0.6b -o benchmarks/results/gumbel_cpu.json
    python benchmarks/gumbel.py --device cuda -o benchmarks/results/gumbel_cuda.json
"""

import os
import time

import torch
from _common import note, parser, publish

from assay.streams import get_backend, seeds
from assay.streams.backends import as_tensor, digest

VOCAB_SIZE, BATCHES, ROUNDS = 151_936, (1, 8, 64), 15
CONTEXT, DECODED = 64, 2


class Case:
    """The calls that are timed for one batch."""

    def __init__(self, batch, device):
        self.backend = get_backend("auto", device)
        self.batch, self.device = batch, device
        texts = [f"response {i}" for i in range(batch)]
        self.seeds = seeds(texts)
        self.words = as_tensor(seeds(texts, strength=256)).to(device)
        self.steps = torch.arange(batch, device=device)
        self.logits = torch.randn(batch, VOCAB_SIZE, device=device)
        self.drawn = torch.empty_like(self.logits)

    def gumbels(self):
        """An array of Gumbel numbers."""
        self.backend.gumbels(self.seeds, VOCAB_SIZE)

    def torch_rand(self):
        """An array of uniform numbers without seeds."""
        torch.rand(self.batch, VOCAB_SIZE, device=self.device)

    def step(self):
        """The noise of a step of decoding, seeds included."""
        self.backend.add_gumbels(self.logits, self.backend.row_seeds(self.words, self.steps))

    def torch_exponential(self):
        """What a sampler without seeds draws in a step."""
        self.drawn.exponential_()

    def check(self):
        """Compare the bits of the first rows, where the other backend is slow."""
        other = get_backend("torch", self.device)
        few = self.seeds[:2]
        if digest(self.backend.gumbels(few, VOCAB_SIZE)) != digest(other.gumbels(few, VOCAB_SIZE)):
            raise SystemExit(f"{self.backend.name} and torch disagree: nothing to time")


def cpu_times(calls):
    """Best processor time of each call in milliseconds, rounds in turn."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):  # the first compiles and warms up
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {f"{name}_ms": round(min(found[1:]) * 1e3, 3) for name, found in times.items()}


def gpu_times(calls):
    """Median time of each call on the device in milliseconds, and the best until it returns on the host."""
    from gpu_normals import host_milliseconds, milliseconds

    found = {f"{name}_ms": round(milliseconds(call, 200), 4) for name, call in calls.items()}
    return found | {f"{name}_host_ms": round(host_milliseconds(call), 4) for name, call in calls.items()}


def times(calls, device):
    """Times of calls by the rules of a device."""
    return cpu_times(calls) if device == "cpu" else gpu_times(calls)


def decoding(reference, device):
    """Time of a step of decoding of a model with random weights, for the first batches."""
    from transformers import DynamicCache

    from assay.models import load_model

    module = load_model(reference, device=device, dtype="bfloat16").module
    found = []
    for batch in BATCHES[:DECODED]:
        cache, ids = DynamicCache(), torch.arange(batch * CONTEXT, device=device).view(batch, CONTEXT)
        with torch.inference_mode():
            module(input_ids=ids, past_key_values=cache, use_cache=True)

            def decode(cache=cache, ids=ids):
                module(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                cache.crop(-1)

            found.append({"batch": batch, **times({"decode": decode}, device)})
        note(str(found[-1]))
    return {"model": reference, "dtype": "bfloat16", "context": CONTEXT, "batches": found}


def measure(batch, device):
    case = Case(batch, device)
    case.check()
    calls = {name: getattr(case, name) for name in ("gumbels", "torch_rand", "step", "torch_exponential")}
    found = times(calls, device)
    row = {
        "batch": batch,
        **found,
        "over_rand": round(found["torch_rand_ms"] / found["gumbels_ms"], 2),
        "over_exponential": round(found["torch_exponential_ms"] / found["step_ms"], 2),
        "million_per_second": round(batch * VOCAB_SIZE / found["gumbels_ms"] / 1e3, 1),
    }
    note(str(row))
    return row


def main():
    made = parser(__doc__)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--model", help="also time a step of decoding of this model")
    arguments = made.parse_args()
    if arguments.device == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    figures = {
        "backend": get_backend("auto", arguments.device).name,
        "device": arguments.device,
        "vocab_size": VOCAB_SIZE,
        "batches": [measure(batch, arguments.device) for batch in BATCHES],
    }
    if arguments.model:
        figures["decoding"] = decoding(arguments.model, arguments.device)
    publish("gumbel", figures, arguments.output)


if __name__ == "__main__":
    main()
