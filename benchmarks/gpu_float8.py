"""Noise of float8 on one CUDA device: honest engines against each other, and cheaters against the honest.

The bundled models prove 1024 nonces of 256 positions in float8. Each figure is the standard deviation of the difference
of their distances from those of the engine's own kernels in batches of 128, over all nonces.

- honest: eager kernels; batches of 32; the same engine again; the CPU, on 128 nonces;
- bfloat16: what rounding itself does;
- cheaters, in float8: weights that were rounded to four bits before (a scale for every row), weights with one scale for
  a whole matrix, and the last eighth of the layers left out.

    python benchmarks/gpu_float8.py -o benchmarks/results/gpu_float8.json
"""

import copy

import numpy as np
import torch
from _common import note, parser, publish
from torch import nn

from assay.models import backbone, load_model
from assay.models._quantise import quantise
from assay.poc import HFEngine, Round, prove

NONCES, ON_A_CPU = 1024, 128


def in_four_bits(weight):
    """Rows of a weight rounded to whole numbers from -7 to 7."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 7
    return (weight / scale).round() * scale


def by_one_scale(weight):
    """A weight rounded to e4m3 with one scale."""
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def changed(reference, change):
    """The model in float8, with weights that were changed before."""
    model = load_model(reference, dtype="bfloat16", device="cuda")
    for part in backbone(model.module).modules():
        if isinstance(part, nn.Linear):
            part.weight.data = change(part.weight.data.float()).to(torch.bfloat16)
    return in_float8(model)


def shortened(reference):
    """The model in float8 without the last eighth of its layers."""
    model = load_model(reference, dtype="bfloat16", device="cuda")
    module = copy.copy(model.module)
    body = backbone(module)
    body.layers = body.layers[: len(body.layers) * 7 // 8]
    module.config.num_hidden_layers = len(body.layers)
    return in_float8(model)


def in_float8(model):
    """The model with its linear layers rounded."""
    quantise(model.module, "float8")
    return type(model)(model.module, None, model.reference, model.digest, model.weights, "float8")


def measure(reference):
    round = Round(block_hash="noise", public_key="k", model=reference)
    model = load_model(reference, dtype="bfloat16", device="cuda", quantise="float8")
    plain = load_model(reference, dtype="bfloat16", device="cuda")
    cpu = load_model(reference, dtype="bfloat16", device="cpu", quantise="float8")
    own = prove(model, round, range(NONCES), engine=HFEngine(model, batch_size=128, compiled=True)).distances

    def away(engine, nonces=NONCES):
        theirs = prove(engine.model, round, range(nonces), engine=engine).distances
        return float(f"{np.std(theirs - own[:nonces]):.3g}")

    def own_kernels(other, batch_size=128):
        return HFEngine(other, batch_size=batch_size, compiled=True)

    figures = {
        "honest: eager": away(HFEngine(model, batch_size=128)),
        "honest: batches of 32": away(own_kernels(model, 32)),
        "honest: the same again": away(own_kernels(model)),
        "honest: cpu": away(HFEngine(cpu, batch_size=32), ON_A_CPU),
        "bfloat16": away(own_kernels(plain)),
        "cheat: four bits": away(own_kernels(changed(reference, in_four_bits))),
        "cheat: one scale for a matrix": away(own_kernels(changed(reference, by_one_scale))),
        "cheat: last eighth of the layers": away(own_kernels(shortened(reference))),
    }
    note(f"{reference}: {figures}")
    return figures


def main():
    options = parser(__doc__).parse_args()
    figures = {reference: measure(reference) for reference in ("reference:qwen3", "reference:llama")}
    publish("gpu_float8", {"nonces": NONCES, "nonces_on_a_cpu": ON_A_CPU, "models": figures}, options.output)


if __name__ == "__main__":
    main()
