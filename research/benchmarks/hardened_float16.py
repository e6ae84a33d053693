"""What float16 changes for a model: honest noise, int8 weights, what the weights lose, and how far overflow is.

For every model a prover in each dtype is held against a validator in float32 (on shapes the weights are drawn in
bfloat16 first, as a checkpoint is kept). *Error* is ε, the mean distance of the unit states, for the last position and
for the signed sum of all positions. *int8* are the weights of `cheats.rounded`, in the prover's dtype. *Short sums* is
float16 with sums kept in float16 as well (CUDA only), which some graphics cards do at twice the speed.
*Changed* is the share of weights that are not exactly those of the checkpoint, *lost* the size of the change.
*Largest* is the largest number met in float32, in the inputs and outputs of every linear layer and of every decoder
layer; float16 ends at 65504.

    python benchmarks/hardened_float16.py -o benchmarks/results/hardened_float16.json
"""

import gc

import torch
from _common import note, parser, publish

from assay.errors import BadWeights
from assay.models import backbone, decoder_layers, load_model
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.engines import make_transform
from assay.poc.protocol._transforms import unit
from assay.research import cheats
from assay.research.redteam._attacks import OnEngine

MODELS = ["reference:qwen3", "reference:llama", "shape:qwen3-0.6b", "shape:llama-3.2-1b"]
DTYPES = ("bfloat16", "float16")


class States:
    """What a model makes of the same inputs, read in both ways."""

    def __init__(self, reference, model, options):
        self.round = Round(block_hash="float16", public_key="k", model=reference, preset="hardened", seq_len=256)
        self.engine = HFEngine(model, batch_size=options.batch_size, seq_len=256)
        self._transform = make_transform(self.engine, self.round, get_pipeline("hardened"))
        self._nonces = options.nonces

    def read(self):
        """Unit states of the last position, and of the sum of all, [N, D] each."""
        found = []
        for start in range(0, self._nonces, self.engine.batch_size):
            batch = range(start, start + self.engine.batch_size)
            inputs_BTD = self.engine.inputs(self.round, batch)
            program = OnEngine(self.engine)
            weights_BT = self._transform.weights(batch, self.engine.seq_len)
            found.append([unit(program.read(inputs_BTD, weights).cpu()) for weights in (None, weights_BT)])
        return [torch.cat(states) for states in zip(*found, strict=True)]


def errors(states, truth):
    last, everywhere = (float((x - y).norm(dim=-1).mean()) for x, y in zip(states, truth, strict=True))
    return {"last_position": last, "all_positions": everywhere}


def largest(model, read):
    """The largest magnitude in front of and behind every linear and every decoder layer, while ``read`` runs."""
    seen = torch.zeros((), device=model.device)

    def hook(module, arguments, output):
        for value in (*arguments, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                torch.maximum(seen, value.detach().abs().amax().float(), out=seen)

    parts = [part for part in backbone(model.module).modules() if isinstance(part, torch.nn.Linear)]
    handles = [part.register_forward_hook(hook) for part in (*parts, *decoder_layers(model.module))]
    read()
    for handle in handles:
        handle.remove()
    return float(seen)


def changes(model, stored):
    """How many weights differ from the stored ones, and by how much, relative to their length."""
    changed = total = 0
    squares = length = 0.0
    for ours, theirs in zip(model.module.parameters(), stored.module.parameters(), strict=True):
        difference = ours.detach().float() - theirs.detach().float()
        changed += int((difference != 0).sum())
        total += difference.numel()
        squares += float(difference.double().square().sum())
        length += float(theirs.detach().double().square().sum())
    return {"changed": changed / total, "lost": (squares / length) ** 0.5}


def load(reference, dtype, options):
    """A checkpoint in a dtype; a shape's weights are rounded to bfloat16 first, as a checkpoint would hold them."""
    model = load_model(reference, dtype=dtype, device=options.device)
    if reference.startswith("shape:"):
        kept = load_model(reference, dtype="bfloat16", device=options.device)
        with torch.no_grad():
            for ours, theirs in zip(model.module.parameters(), kept.module.parameters(), strict=True):
                ours.copy_(theirs)
    return model


@torch.inference_mode()
def measure(reference, options):
    """One model."""
    whole = load(reference, "float32", options)
    validator = States(reference, whole, options)
    truth = validator.read()
    row = {"model": reference, "largest": largest(whole, validator.read)}
    for dtype in DTYPES:
        model = load(reference, dtype, options)
        prover = States(reference, model, options)
        try:
            row[dtype] = {"honest": errors(prover.read(), truth), **changes(model, whole)}
        except BadWeights as error:
            row[dtype] = {"refused": str(error)}
            continue
        row[dtype]["int8"] = errors(States(reference, cheats.rounded(model, 8), options).read(), truth)
        if dtype == "float16" and model.device.type == "cuda":
            torch.backends.cuda.matmul.allow_fp16_accumulation = True
            row[dtype]["short_sums"] = errors(prover.read(), truth)
            torch.backends.cuda.matmul.allow_fp16_accumulation = False
        del model, prover
        gc.collect()
    note(f"{row}")
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=MODELS)
    arguments.add_argument("--device")
    arguments.add_argument("--nonces", type=int, default=64)
    arguments.add_argument("--batch-size", type=int, default=16)
    options = arguments.parse_args()
    rows = [measure(reference, options) for reference in options.models]
    publish("hardened_float16", {"nonces": options.nonces, "cases": rows}, options.output)


if __name__ == "__main__":
    main()
