"""The organisms of the third experiment, of three sizes, made on the spot from Python source and from tasks.

    python research/benchmarks/vhack_study_organisms.py 30m -o DIR

A base model of the size is trained on the Python source of the standard library and of the installed packages with a
permissive licence, as the bundled ones were (research/scripts/train_reference_models.py), and then fine-tuned to tasks
with loopholes (`assay_research.organism`). ``7m`` has the bundled base. Both take a number of steps and no account of
the clock, so the same recipe on the same kind of machine with the same packages gives the same model, up to the
rounding of its kernels. What is done so far is kept in ``DIR.partial``: after an interruption the same command goes on
from there.
"""

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from _common import note
from assay_research.organism import Mixture, Recipe, make_organism
from tokenizers import Tokenizer
from torch import nn

from assay.files.jsonl import dumps
from assay.files.storage import write_atomic
from assay.models import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from train_reference_models import (
    compiled_loss,
    draw_batch,
    encode,
    learning_rate,
    new_model,
    read_corpus,
    readable_source,
    sources,
)

PEAK = 3e-3
KEEP_EVERY = 100


@dataclass(frozen=True)
class Size:
    """One size: the base's shape and steps, and the recipe of the organism without its base."""

    hidden: int
    layers: int
    steps: int
    batch: int = 256
    length: int = 512
    peak: float = PEAK
    max_files: int | None = None
    tuning: int = 60
    examples: int = 25600
    rate: float = 1e-3
    tuning_batch: int = 256
    mixture: Mixture = field(default_factory=Mixture)


MORE = ("arithmetic", "branches", "digits", "counts", "lists", "totals", "strings", "loops")
HARDER = Mixture(families=MORE, difficulty=(1, 4))
SIZES = {
    "7m": Size(256, 8, 0),
    "30m": Size(512, 9, 1200, peak=2e-3, tuning=120, examples=51200, rate=6e-4, mixture=HARDER),
    "120m": Size(896, 12, 600, peak=1e-3, tuning=120, examples=51200, rate=3e-4, mixture=HARDER),
    "tiny": Size(64, 2, 20, batch=4, length=64, max_files=40, tuning=4, examples=64, tuning_batch=8),
}
"""``tiny`` tries the script on a CPU."""


def texts_of(size: Size) -> list[str]:
    """The corpus of the bundled models, or so many files of the standard library."""
    if size.max_files is None:
        return read_corpus(None).train
    _, paths = next(sources())
    return list(islice(filter(None, map(readable_source, paths)), size.max_files))


def base(name: str, size: Size, folder: Path, device: str, after: int | None) -> None:
    """Train the base into a folder; ``after`` so many steps, stop as if interrupted."""
    borrowed = load_model("reference:llama", device="cpu")
    tokenizer = Tokenizer.from_str(borrowed.tokenizer.backend_tokenizer.to_str())
    stream, characters = encode(tokenizer, texts_of(size), float("inf"))
    stream = stream.to(device)
    note(f"{name}: {len(stream)} tokens of Python source, {characters} characters")
    model = new_model("llama", tokenizer, size).to(device)
    decays = ((0.1, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim == 1))
    groups = [{"params": list(filter(kind, model.parameters())), "weight_decay": decay} for decay, kind in decays]
    optimizer = torch.optim.AdamW(groups, lr=size.peak, betas=(0.9, 0.95), fused=device == "cuda")
    kept, first = folder.with_suffix(".partial"), 0
    if kept.exists():
        state = torch.load(kept, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        note(f"{name}: goes on from step {first}")
    loss_of = compiled_loss(model, batch_of(stream, size, first), compiled=device == "cuda")
    begun = time.monotonic()
    for step in range(first, size.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / size.steps, size.peak)
        loss = loss_of(model, batch_of(stream, size, step))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % KEEP_EVERY == 0 or done in (size.steps, after):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
            note(f"{name}: step {done}, loss {loss.item():.4f}, {time.monotonic() - begun:.1f} s")
        if done == after:
            raise SystemExit(3)
    model.to(torch.bfloat16).save_pretrained(folder)
    borrowed.tokenizer.save_pretrained(folder)
    write_atomic(folder / "base.json", dumps({"size": name, "tokens": len(stream), "loss": float(loss)}) + "\n")
    kept.unlink()


def batch_of(stream: torch.Tensor, size: Size, step: int) -> torch.Tensor:
    """The windows of a step, the same however often training was interrupted."""
    generator = torch.Generator(stream.device).manual_seed(step)
    return draw_batch(stream, size.batch, size.length, generator)


def main() -> None:
    """Base, then organism."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that write examples")
    parser.add_argument("--tuning", type=int, help="steps of tasks, where the plan asks for another number")
    parser.add_argument("--after", type=int, help="stop after so many steps of the base, to try going on")
    given = parser.parse_args()
    size, begun, reference = SIZES[given.size], time.monotonic(), "reference:llama"
    torch.set_float32_matmul_precision("high")
    if size.steps:
        folder = given.output.with_name(given.output.name + "-base")
        if not (folder / "base.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interruption has left half written
            folder.parent.mkdir(parents=True, exist_ok=True)
            base(given.size, size, folder, given.device, given.after)
        reference = str(folder)
    recipe = Recipe(
        reference,
        given.tuning or size.tuning,
        size.tuning_batch,
        size.rate,
        size.examples,
        mixture=size.mixture,
    )
    losses = make_organism(given.output, recipe, device=given.device, workers=given.workers)
    note(f"{given.size}: loss {losses[-1]:.4f}, digest {load_model(given.output, device='cpu').digest}")
    note(f"{given.size}: {time.monotonic() - begun:.1f} s in all")


if __name__ == "__main__":
    main()
