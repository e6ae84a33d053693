"""How far bfloat16 gradients are from float32 ones, by the way they are computed.

The truth is the sequential way in float32, with the same weights and the same rounded factors. Measured against it: the
sequential way in bfloat16, and the batched way with and without fused kernels and products by the factors. The kernels
run on a GPU only; here torch does their arithmetic, float32 inside and rounded where they round.

    OMP_NUM_THREADS=1 python benchmarks/vhack_rounding.py -o benchmarks/results/vhack_rounding.json
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from _common import note, parser, publish
from _vhack import load, samples, sequential, worst_error
from torch.nn import functional

from assay.vhack import Factors, per_sample_gradients, weight_svd
from assay.vhack.gradients import _per_sample as _gradients
from assay.vhack.gradients import _replica
from assay.vhack.gradients._replica import Recipe

LENGTHS = (100, 250)


def normalise(x, weight, eps):
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(1) + eps)
    return (wide * scale[:, None]).to(x.dtype) * weight, scale


def normalise_backward(dy, x, weight, scale):
    unit = x.float() * scale[:, None]
    gradient = dy.float() * weight.float()
    return ((gradient - unit * (gradient * unit).mean(1, keepdim=True)) * scale[:, None]).to(x.dtype)


def gate(a, b):
    return functional.silu(a.float()).to(b.dtype) * b


def gate_backward(dy, a, b):
    gradient, x = dy.float(), a.float()
    share = torch.sigmoid(x)
    return (gradient * b.float() * share * (1 + x * (1 - share))).to(a.dtype), (gradient * x * share).to(b.dtype)


def segment_products(left, right, offsets):
    return torch.segment_reduce(left.float() * right.float(), "sum", offsets=offsets, axis=0)


KERNELS = SimpleNamespace(
    normalise=normalise,
    normalise_backward=normalise_backward,
    gate=gate,
    gate_backward=gate_backward,
    segment_products=segment_products,
)


def widened(factors):
    return Factors(factors.left.float(), factors.values, factors.right.float(), 0.0, 0.0)


def compare(reference, options):
    short, tokenizer = load(reference, "cpu", "bfloat16")
    wide, _ = load(reference, "cpu", "float32")
    svd = weight_svd(short, dtype="bfloat16", method="gram")
    chosen = samples(tokenizer, options.samples, LENGTHS)
    truth = sequential(wide, tokenizer, chosen, {name: widened(factors) for name, factors in svd.items()})
    rows = {"sequential": worst_error(sequential(short, tokenizer, chosen, svd), truth)}
    usual = Recipe(packed=True, fused=True, factored=False, late=True, together=True)
    _replica.kernels = lambda *_: KERNELS
    for name, recipe in {
        "batched, not fused": replace(usual, fused=False),
        "batched, fused": usual,
        "batched, fused, factored": replace(usual, factored=True),
    }.items():
        _gradients.recipe_for = lambda _, recipe=recipe: recipe
        rows[name] = worst_error(per_sample_gradients(chosen, short, tokenizer=tokenizer, svd=svd), truth)
    for name, row in rows.items():
        note(f"{reference}, {name}: {row}")
    return rows


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    made.add_argument("--samples", type=int, default=6)
    options = made.parse_args()
    figures = {reference: compare(reference, options) for reference in options.models}
    publish("vhack_rounding", {"samples": options.samples, "models": figures}, options.output)


if __name__ == "__main__":
    main()
