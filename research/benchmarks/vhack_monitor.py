"""What watching costs: a bare training step of δS with the arm ``none``, measured along axes and not held back.

Forward and backward pass, step and merge of the bundled model, in rounds in which all take turns:

- *plain*: the inner optimizer alone;
- *measures*: the same steps in a `ProjectedOptimizer` without a gate, its measures read in every step;
- *sources*: besides, the gradient of each kind of rollouts from the same backward pass, as the log has it.

Seconds are those of the processor and not of the clock on the wall, so that other work on the machine counts little.
Each ratio is the median over rounds of the ratio within a round, with the quartiles beside it.
"""

import time

import numpy as np
import torch
from _common import note, parser, publish
from torch.nn import functional
from vhack_training_step import LR, axes_of, kinds_of

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.delta import DeltaS, Gate, ProjectedOptimizer
from assay.vhack.training._callback import by_source, source_shares


def works_of(model, ids):
    """The three ways to take a step, and the parameters that they train."""
    svd = weight_svd(model)
    adapter, basis = DeltaS(model, svd), axes_of(svd)
    kinds = kinds_of(ids)

    def backward():
        logits = model.module(input_ids=ids, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    def inner():
        return torch.optim.AdamW(adapter.delta, lr=LR)

    alone = inner()
    watching = ProjectedOptimizer(inner(), adapter, basis, gate=Gate("none"))

    def plain():
        alone.zero_grad()
        backward()
        alone.step()
        adapter.refresh()

    def measures():
        watching.zero_grad()
        backward()
        watching.step()
        watching.measures.as_dict()

    def sources():
        watching.zero_grad()
        with adapter.per_sample() as rollouts:
            rollouts.kinds = kinds
            backward()
        by_source(source_shares(rollouts, watching.frames))
        watching.step()
        watching.measures.as_dict()

    return {"plain": plain, "measures": measures, "sources": sources}


def quartiles(ratios):
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="reference:organism")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--tokens", type=int, default=192)
    arguments.add_argument("--rounds", type=int, default=15)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model = load_model(given.model, dtype="float32", device="cpu")
    ids = torch.randint(0, 1000, (given.batch, given.tokens), generator=torch.Generator().manual_seed(1))
    works = works_of(model, ids)
    seconds = {name: [] for name in works}
    for index in range(given.rounds + 2):
        note(f"round {index} of {given.rounds + 1}")
        for name, work in works.items():
            started = time.process_time()
            work()
            if index >= 2:  # the first two warm up
                seconds[name].append(time.process_time() - started)
    of = {name: np.array(values) for name, values in seconds.items()}
    figures = {
        "model": given.model,
        "batch": given.batch,
        "tokens": given.tokens,
        "rounds": given.rounds,
        "threads": 1,
        "processor_seconds": {name: float(np.median(values)) for name, values in of.items()},
        "over_plain": {name: quartiles(of[name] / of["plain"]) for name in ("measures", "sources")},
    }
    publish("vhack_monitor", figures, given.output)


if __name__ == "__main__":
    main()
