"""What the gates and their logs add to a training step, and what the adapter adds to generation.

A step is forward and backward of a language model loss, the optimiser, and the merge. Steps with and without the
wrapper take turns, so that whatever else the machine does meets both; medians are compared. Generation is that of the
plain model, of the merged adapter, and of hook mode.
"""

import copy
import time
from statistics import median

import torch
from _common import note, parser, publish
from torch.nn import functional

from assay.models import load_model
from assay.vhack import Basis, weight_svd
from assay.vhack.training import DeltaS, Gate, ProjectedOptimizer


def axes_of(svd, k=5):
    generator = torch.Generator().manual_seed(0)
    axes = {
        name: torch.linalg.qr(torch.randn(factors.rank, k, generator=generator))[0].T.contiguous()
        for name, factors in svd.items()
    }
    return Basis(axes, {n: torch.ones(k) for n in axes}, {n: torch.tensor([[1, 0]] * k) for n in axes})


def clock_of(device):
    """A function that gives the seconds of a piece of work, the device waited for."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def clock(work):
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    return clock


def steps(module, adapter, ids, basis, rounds, clock):
    def optimiser():
        return torch.optim.AdamW(adapter.delta, lr=1e-4)

    def step(chosen, log):
        chosen.zero_grad()
        logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        chosen.step()
        if log:
            chosen.measures.as_dict()
        else:
            adapter.refresh()

    plain = optimiser()
    arms = {"plain": plain}
    for name, gate, level in (("gradient", "one_sided", "gradient"), ("update", "no_gate", "update")):
        arms[name] = ProjectedOptimizer(optimiser(), adapter, basis, gate=Gate(gate), level=level)
    seconds = {name: [] for name in arms}
    for index in range(rounds + 2):
        for name, chosen in arms.items():
            taken = clock(lambda chosen=chosen, name=name: step(chosen, name != "plain"))
            if index >= 2:
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def generations(module, svd, ids, rounds, tokens, clock):
    hooked, merged = copy.deepcopy(module), copy.deepcopy(module)
    DeltaS(merged, svd)
    DeltaS(hooked, svd, mode="hook")
    models = {"plain": module, "merged": merged, "hook": hooked}
    seconds = {name: [] for name in models}
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for index in range(rounds + 1):
        for name, model in models.items():
            taken = clock(lambda model=model: model.generate(ids, **settings))
            if index:
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="reference:qwen3")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=256)
    arguments.add_argument("--new-tokens", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=9)
    given = arguments.parse_args()
    model = load_model(given.model, dtype=given.dtype, device=given.device)
    module, clock = model.module, clock_of(given.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (given.batch, given.tokens), generator=generator).to(given.device)
    note("factors")
    svd = weight_svd(module)
    note("generation")
    with torch.no_grad():
        generated = generations(module, svd, ids[:, :32], max(2, given.rounds // 2), given.new_tokens, clock)
    note("steps")
    adapter = DeltaS(module, svd)
    trained = steps(module, adapter, ids, axes_of(svd), given.rounds, clock)
    publish(
        "vhack_training_step",
        {
            "settings": {k: v for k, v in vars(given).items() if k != "output"},
            "step_seconds": trained,
            "step_over_plain": {name: trained[name] / trained["plain"] for name in ("gradient", "update")},
            "generation_seconds": generated,
            "generation_over_plain": {name: generated[name] / generated["plain"] for name in ("merged", "hook")},
        },
        given.output,
    )


if __name__ == "__main__":
    main()
