"""A whole extraction from nothing: weight SVD, gradients of both sides of the pairs, axes. Time, memory and accuracy.

The pairs are pieces of Python source with sides of 250 to 710 tokens; their content does not matter here. The accuracy
of the factors is measured in float64 on what is kept, for every matrix, with float32 factors.

    python benchmarks/vhack_extract.py --model reference:qwen3 --device cpu
    python benchmarks/vhack_extract.py --model shape:qwen3-4b --device cuda --many 249 -o result.json
"""

import torch
from _common import note, parser, publish
from _vhack import load, pairs, timed

from assay.vhack import extract, pair_gradients, target_modules, weight_svd, weights_digest
from assay.vhack.gradients import svd as _svd


def accuracy(model, svd):
    """The worst ‖U S Vh − W‖/‖W‖, ‖UᵀU − 1‖ and ‖Vh Vhᵀ − 1‖ over all matrices, Frobenius norms."""
    worst = torch.zeros(3, dtype=torch.float64)
    for name, linear in target_modules(model).items():
        left, values, right = (part.double() for part in (svd[name].left, svd[name].values, svd[name].right))
        weight = linear.weight.double()
        one = torch.eye(len(values), dtype=torch.float64, device=weight.device)
        errors = (
            ((left * values) @ right - weight).norm() / weight.norm(),
            (left.T @ left - one).norm(),
            (right @ right.T - one).norm(),
        )
        worst = torch.maximum(worst, torch.stack(errors).cpu())
    return dict(zip(("residual", "left", "right"), worst.tolist(), strict=True))


def with_streams(model, device, count):
    """The SVD of the whole model with so many matrices at once, and its seconds."""
    usual, _svd._STREAMS = _svd._STREAMS, count
    svd, seconds, _ = timed(device, lambda: weight_svd(model))
    _svd._STREAMS = usual
    return svd, seconds


def main():
    made = parser(__doc__)
    made.add_argument("--model", default="reference:qwen3")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", help="of the model; as stored when left out")
    made.add_argument("--few", type=int, default=12)
    made.add_argument("--many", type=int, default=0)
    made.add_argument("--streams", action="store_true", help="also try other numbers of matrices at once")
    options = made.parse_args()
    model, tokenizer = load(options.model, options.device, options.dtype)
    some = pairs(tokenizer, options.few)
    at_once = {}
    # The first use of each library loads and compiles; a real session has long done so.
    svd, at_once[1] = with_streams(model, options.device, 1)
    extract(pairs(tokenizer, 2, (40, 60)), model, tokenizer=tokenizer, svd=svd, n_heldout=0)
    del svd
    note("from nothing")
    basis, seconds, memory = timed(options.device, lambda: extract(some, model, tokenizer=tokenizer, n_heldout=0))
    figures = {
        "model": options.model,
        "dtype": str(model.dtype),
        "modules": len(basis.axes),
        "coordinates": sum(axes.shape[1] for axes in basis.axes.values()),
        "extraction": {"pairs": options.few, "seconds": seconds, "peak_gb": memory},
    }
    note("parts")
    svd, seconds, memory = timed(options.device, lambda: weight_svd(model))
    figures["svd"] = {"factors": str(svd.dtype), "seconds": seconds, "peak_gb": memory}
    _, figures["digest_seconds"], _ = timed(options.device, lambda: weights_digest(model))
    found, seconds, memory = timed(
        options.device, lambda svd=svd: pair_gradients(some, model, tokenizer=tokenizer, svd=svd)
    )
    figures["gradients"] = {"seconds": seconds, "peak_gb": memory}
    _, figures["axes_seconds"], _ = timed(options.device, found.basis)
    if options.many:
        note(f"{options.many} pairs")
        more = pairs(tokenizer, options.many)
        tokens = sum(
            len(tokenizer(text)["input_ids"]) for one in more for text in (one.prompt * 2, one.hack, one.clean)
        )
        found, seconds, memory = timed(
            options.device, lambda svd=svd: pair_gradients(more, model, tokenizer=tokenizer, svd=svd)
        )
        _, axes_seconds, _ = timed(options.device, found.basis)
        figures["many"] = {
            "pairs": options.many,
            "tokens": tokens,
            "gradient_seconds": seconds,
            "axes_seconds": axes_seconds,
            "seconds": seconds + axes_seconds,
            "peak_gb": memory,
        }
    del svd, found
    note("accuracy of float32 factors")
    exact = weight_svd(model, dtype="float32")
    figures["accuracy"] = accuracy(model, exact)
    del exact
    if options.streams:
        note("streams")
        at_once[8] = with_streams(model, options.device, 8)[1]
    figures["svd_seconds_by_matrices_at_once"] = at_once | {_svd._STREAMS: figures["svd"]["seconds"]}
    publish("vhack_extract", figures, options.output)


if __name__ == "__main__":
    main()
