"""``python -m assay.research.organism -o DIRECTORY``: make the organism."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from assay.errors import AssayError
from assay.research.organism._finetune import Recipe, make_organism


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m assay.research.organism", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the directory to make")
    parser.add_argument("--model", default=Recipe.model, help="what is fine-tuned")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--examples", type=int, default=Recipe.n_examples)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", help="cpu, cuda; the GPU if there is one when left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that write examples")
    given = parser.parse_args(arguments)
    recipe = Recipe(given.model, given.steps, given.batch, n_examples=given.examples, seed=given.seed)
    try:
        make_organism(
            given.output,
            recipe,
            device=given.device,
            workers=given.workers,
            progress=lambda step, steps, loss: print(f"step {step} of {steps}: loss {loss:.4f}", file=sys.stderr),
        )
    except AssayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
