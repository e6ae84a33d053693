"""The larger organisms of the fourth experiment, made on the spot on a GPU.

    python research/benchmarks/vhack_organisms.py 30m --seconds 120 -o DIR

``30m`` and ``120m`` learn Python source from scratch for so many seconds, as the bundled models did
(research/scripts/train_reference_models.py), and then tasks with loopholes
(assay_research.organism). ``smollm2`` is SmolLM2-135M-Instruct, which learns the tasks alone. What
the clock bounds differs from machine to machine; the losses are printed, and the rates before
training are in step 0 of every run.
"""

import argparse
import sys
from pathlib import Path

import torch
from _common import ROOT, note, parser
from assay_research.organism import Mixture, Recipe, make_organism

from assay.models import load_model

sys.path.insert(0, str(ROOT / "research" / "scripts"))
from train_reference_models import encode, new_model, read_corpus, train

SHAPES = {"30m": (512, 9, 2e-3, 6e-4), "120m": (896, 12, 1e-3, 3e-4)}
MIXTURE = Mixture(difficulty=(1, 4))


def base(name, seconds, folder):
    """Train a model of a shape on Python source, with the tokenizer of the bundled ones."""
    borrowed = load_model("reference:qwen3", device="cpu").tokenizer
    stream, _ = encode(borrowed.backend_tokenizer, read_corpus()[0]["train"], 25)
    hidden, layers, rate, _ = SHAPES[name]
    size = argparse.Namespace(
        hidden=hidden, layers=layers, lr=rate, batch=2**17 // hidden, length=512, seconds=seconds
    )
    size.compile = True
    model = new_model("llama", borrowed.backend_tokenizer, size).to("cuda")
    note(f"{name}: {len(stream)} tokens of source, {train(model, stream.to('cuda'), size)}")
    model.to(torch.bfloat16).save_pretrained(folder)
    borrowed.save_pretrained(folder)
    return str(folder), SHAPES[name][3]


def main():
    """Base, then organism."""
    options = parser(__doc__)
    options.add_argument("size", choices=[*SHAPES, "smollm2"])
    options.add_argument("--seconds", type=float, default=120)
    options.add_argument("--tuning", type=int, default=120, help="steps of tasks")
    chosen = options.parse_args()
    torch.set_float32_matmul_precision("high")
    source = "pretrained:smollm2"
    rate = 2e-4
    if chosen.size in SHAPES:
        source, rate = base(
            chosen.size, chosen.seconds, chosen.output.with_name(chosen.output.name + "-base")
        )
    recipe = Recipe(source, chosen.tuning, 256, rate, 128 * chosen.tuning, mixture=MIXTURE)
    losses = make_organism(chosen.output, recipe, device="cuda")
    note(
        f"{chosen.size}: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"{load_model(Path(chosen.output)).digest}"
    )


if __name__ == "__main__":
    main()
