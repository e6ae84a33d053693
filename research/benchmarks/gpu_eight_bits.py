"""`prove` on one CUDA device in bfloat16 and in every format of eight bits, and the products they are made of.

One process, one batch shape, random weights of the exact shape; everything takes turns, and figures are medians of the
rounds. Weights of `float8-block` have a scale for every 128 x 128 numbers, those of `float8` and `int8-rows` one for
a row.

- `products`: TFLOP/s of each product of a layer by itself, on inputs that are rounded already. `float8-block` is
  torch's product, `float8-block, own kernel` the kernel that serves the experts of mixtures; `int8-rows` is the
  project's kernel, `int8-rows, torch` torch's product with sums in 32 bits and the pass that scales them.
- `nonces_per_second`: of `prove`, which writes a proof file.
- `checks`: bits in other places of a batch and again, and the distance from eager kernels.

    python benchmarks/gpu_eight_bits.py --model shape:llama-3.2-1b -o result.json
"""

import copy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from _common import note, parser, publish
from gpu_prove import SEQ_LEN, checks, event_seconds, file_of, round_to, take_turns, wall_seconds
from torch.nn import functional

from assay.models import _products as own
from assay.models import backbone, decoder_layers, load_model
from assay.models.eight_bits import CUDA_BLOCK, FLOAT8, INT8, float8_blocks
from assay.models.float8 import Rounded
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf import auto_batch
from assay.poc.engines.hf._lean import layer_shape, layer_weights

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.storing import in_eight_bits, rounded_weight

BLOCKS = float8_blocks(*CUDA_BLOCK)
FORMATS = {by.name: by for by in (FLOAT8, BLOCKS, INT8)}
PROJECTIONS = ("qkv", "o_proj", "gate_up", "down_proj")


def models_of(reference, layers):
    """The model in bfloat16 and in every format, with its first layers only where their number is given."""
    plain = load_model(reference, dtype="bfloat16", device="cuda")
    if layers:
        plain.module.config.num_hidden_layers = layers
        del backbone(plain.module).layers[layers:]
    models = {"bfloat16": plain}
    for name, by in FORMATS.items():
        module = copy.deepcopy(plain.module)
        in_eight_bits(backbone(module), by)
        models[name] = replace(plain, module=module, quantised=name)
    return models


def scaled_by_torch(x, weight):
    """What the int8 kernel computes, by torch."""
    sums = torch._int_mm(x.values, weight.values.t())
    return (sums * x.scales * weight.scales.t()).to(torch.bfloat16)


def ways_of(x, weight):
    """Functions that multiply an input by a weight, or by those of experts, each in another format."""
    given = {name: (by.round(x), rounded_weight(weight, by)) for name, by in FORMATS.items()}
    scales = given[BLOCKS.name][0].scales.t().contiguous().t()  # as the engine's kernels write them
    given[BLOCKS.name] = Rounded(given[BLOCKS.name][0].values, scales), given[BLOCKS.name][1]
    if weight.dim() > 2:
        ends = torch.arange(1, len(weight) + 1, device="cuda", dtype=torch.int32) * (len(x) // len(weight))
        ways = {"bfloat16": lambda: torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)}
        for name, by in FORMATS.items():
            ways[name] = lambda by=by, given=given[name]: by.grouped_product(*given, ends, torch.bfloat16)
        return ways
    ways = {"bfloat16": lambda: functional.linear(x, weight)}
    for name, by in FORMATS.items():
        ways[name] = lambda by=by, given=given[name]: by.product(*given, None, torch.bfloat16)
    ways["float8-block, own kernel"] = lambda: own.product(*given[BLOCKS.name], None, torch.bfloat16)
    compiled = torch.compile(scaled_by_torch, dynamic=False)
    ways["int8-rows, torch"] = lambda: compiled(*given[INT8.name])
    return ways


def products(model, batch, rounds, repeats):
    """TFLOP/s of the products of a layer in every format; every expert of a mixture has as many rows."""
    layer = decoder_layers(model.module)[0]
    weights, chosen = layer_weights(layer), layer_shape(layer).chosen
    figures = {}
    for name in PROJECTIONS:
        weight, _ = getattr(weights, name)
        copies = chosen if weight.dim() > 2 else 1
        x = torch.randn(batch * SEQ_LEN * copies, weight.shape[-1], dtype=torch.bfloat16, device="cuda")
        ways = ways_of(x, weight)
        for way in ways.values():
            way()

        def timed(way):
            return lambda: event_seconds(lambda: [way() for _ in range(repeats)])

        times = take_turns({key: timed(way) for key, way in ways.items()}, rounds)
        operations = 2 * x.numel() * weight.shape[-2] * repeats
        figures[name] = {key: round_to(operations / seconds / 1e12, 4) for key, seconds in times.items()}
        note(f"{name} {list(weight.shape)}: {figures[name]}")
    return figures


def measure(reference, batch_size, seconds, rounds, layers):
    models = models_of(reference, layers)
    batch = batch_size or auto_batch(models["bfloat16"], SEQ_LEN)
    round = Round(block_hash="bench", public_key="k", model=reference, seq_len=SEQ_LEN)
    with torch.inference_mode():
        figures = products(models["bfloat16"], batch, rounds, repeats=5)
    engines = {
        name: HFEngine(model, batch_size=batch, seq_len=SEQ_LEN, compiled=True) for name, model in models.items()
    }
    first = {}
    for name, model in models.items():
        taken = wall_seconds(lambda name=name, model=model: prove(model, round, range(batch), engine=engines[name]))
        first[name] = round_to(taken, 3)
    one = wall_seconds(lambda: prove(models["bfloat16"], round, range(batch), engine=engines["bfloat16"]))
    nonces = range(batch * max(4, int(seconds / one)))
    with tempfile.TemporaryDirectory() as folder:
        path = file_of(folder, "proof")

        def proved(name):
            arguments = {"engine": engines[name], "output": path, "overwrite": True}
            return wall_seconds(lambda: prove(models[name], round, nonces, **arguments))

        times = take_turns({name: lambda name=name: proved(name) for name in models}, rounds)
    rates = {name: round_to(len(nonces) / times[name]) for name in models}
    note(f"{reference}: {rates}")
    return {
        "model": reference,
        "layers": models["bfloat16"].num_layers,
        "batch_size": batch,
        "seq_len": SEQ_LEN,
        "batches": len(nonces) // batch,
        "nonces_per_second": rates,
        "over_bfloat16": {name: round_to(rate / rates["bfloat16"], 4) for name, rate in rates.items()},
        "products_tflops": figures,
        "first_batch_seconds": first,
        "checks": {
            name: {
                "fingerprint": engines[name].fingerprint.as_dict(),
                **checks(models[name], engines[name], replace(round, block_hash="checks"), nonces),
            }
            for name in FORMATS
        },
        "peak_gib": round_to(torch.cuda.max_memory_allocated() / 2**30, 4),
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="shape:llama-3.2-1b")
    arguments.add_argument("--batch-size", type=int, default=0, help="0 takes what prove takes by itself")
    arguments.add_argument("--seconds", type=float, default=1.0, help="of every timing of prove")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=0, help="take that many of the first layers; 0 takes all")
    options = arguments.parse_args()
    figures = measure(options.model, options.batch_size, options.seconds, options.rounds, options.layers)
    publish("gpu_eight_bits", figures, options.output)


if __name__ == "__main__":
    main()
