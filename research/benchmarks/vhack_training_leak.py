"""How much of an update lies along the axes although the gradient was kept off them, and where δS ends up.

A bundled model learns to prefer hack sides to clean ones by plain descent, through δS: a steady pressure along the
axes, with the noise of mini-batches. Each arm starts anew. Per optimiser and gate, after a burn-in, the means over the
steps of cout (of the gradient), of the leak (of the update), both two-sided, and the displacement at the end, + away
from the hack, with that of a random basis beside it.
"""

import random
from statistics import mean

import torch
from _common import note, parser, publish
from torch.nn import functional

from assay.models import load_model
from assay.vhack import Basis, extract, weight_svd
from assay.vhack.delta import DeltaS, Gate, ProjectedOptimizer
from assay.vhack.pairs import generate_pairs

OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=3e-2, momentum=0.9),
}
ARMS = {
    "none": ("none", "gradient"),
    "one_sided_gradient": ("one_sided", "gradient"),
    "two_sided_gradient": ("two_sided", "gradient"),
    "one_sided_update": ("one_sided", "update"),
    "two_sided_update": ("two_sided", "update"),
}


def nll(module, tokenizer, prompts, completions):
    """Mean negative log-likelihood of each completion, summed."""
    start = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    ids = [tokenizer(a)["input_ids"] + tokenizer(b)["input_ids"] for a, b in zip(prompts, completions, strict=True)]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    logits = module(input_ids=padded, use_cache=False).logits
    return sum(
        functional.cross_entropy(logits[i, start[i] - 1 : len(row) - 1].float(), torch.tensor(row[start[i] :]))
        for i, row in enumerate(ids)
    )


def train(module, tokenizer, svd, basis, pairs, arm, optimiser, steps, batch):
    gate, level = ARMS[arm]
    adapter = DeltaS(module, svd)
    wrapped = ProjectedOptimizer(
        OPTIMISERS[optimiser](adapter.delta), adapter, basis, gate=Gate(gate), level=level, max_norm=1.0
    )
    rng, rows = random.Random(0), []
    for _ in range(steps):
        chosen = rng.sample(pairs, batch)
        prompts = [pair.prompt for pair in chosen]
        wrapped.zero_grad()
        hack = nll(module, tokenizer, prompts, [pair.hack for pair in chosen])
        clean = nll(module, tokenizer, prompts, [pair.clean for pair in chosen])
        ((hack - clean) / batch).backward()
        wrapped.step()
        rows.append({**wrapped.measures.as_dict(), "loss": float((hack - clean).detach()) / batch})
    adapter.detach()
    late = rows[len(rows) // 4 :]
    shown = ("cin", "cout_two_sided", "leak", "leak_two_sided")
    return {name: round(mean(row[name] for row in late), 8) for name in shown} | {
        "loss_first": round(rows[0]["loss"], 4),
        "loss_last": round(rows[-1]["loss"], 4),
        "displacement": round(rows[-1]["displacement"], 5),
    }


def random_like(basis, seed=0):
    generator = torch.Generator().manual_seed(seed)
    axes = {
        name: torch.linalg.qr(torch.randn(rows.shape[1], len(rows), generator=generator))[0].T.contiguous()
        for name, rows in basis.axes.items()
    }
    return Basis(axes, basis.singular_values, basis.votes)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="reference:qwen3")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--batch", type=int, default=1)
    given = arguments.parse_args()
    torch.manual_seed(0)
    model = load_model(given.model, dtype="float32", device="cpu")
    module, tokenizer = model.module, model.tokenizer
    module.eval()
    pairs = [pair for pair in generate_pairs(96) if len(pair.prompt) + len(pair.hack) < 700]
    svd = weight_svd(module)
    basis = extract(pairs[:24], model, svd=svd, n_heldout=0).slice(5)
    figures = {}
    runs = [(optimiser, "true", arm) for optimiser in OPTIMISERS for arm in ARMS]
    runs += [("adamw", "random", arm) for arm in ("one_sided_gradient", "two_sided_gradient")]
    axes = {"true": basis, "random": random_like(basis)}
    for optimiser, kind, arm in runs:
        note(f"{optimiser}, {kind} axes, {arm}")
        figures[f"{optimiser}/{kind}/{arm}"] = train(
            module, tokenizer, svd, axes[kind], pairs[24:], arm, optimiser, given.steps, given.batch
        )
    publish(
        "vhack_training_leak",
        {"model": given.model, "steps": given.steps, "batch": given.batch, "arms": figures},
        given.output,
    )


if __name__ == "__main__":
    main()
