"""Kernels of tests, and the kernels of Gumbel numbers in triton's interpreter, which needs no GPU.

It prints SHA-256 of what they give:

TRITON_INTERPRET=1 python -m tests.streams.interpreted
"""

# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
import json

import numpy as np
import torch
import triton
import triton.language as tl

from assay.streams import seeds
from assay.streams import triton_kernels as kernels
from assay.streams.arrays import as_tensor, digest

from .inverse import dense_hashes, gumbel_hashes

HASHES = np.concatenate([gumbel_hashes(), dense_hashes(1 << 18)])
ROWS = 4
COLUMNS = 2500
WIDTH = 3000
BLOCK = 1024
NUMBERS = [3, 0]
TEXTS = [f"response_{i}" for i in range(300)]
STEPS = (np.arange(len(TEXTS)) * 14_316_557).astype(np.uint32)


@triton.jit
def gumbel_kernel(hashes_N, out_N, n, BLOCK: tl.constexpr):
    """The Gumbel number of every hash."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(hashes_N + place, mask=place < n).to(tl.uint32, bitcast=True)
    tl.store(out_N + place, kernels.gumbel(h), mask=place < n)


@triton.jit
def root_kernel(first_bits, out, BLOCK: tl.constexpr):
    """The root, as the streams take it, of every float32 from one on."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, kernels.root((first_bits + place).to(tl.float32, bitcast=True)))


def scores():
    """Rows that lie apart, as the slice of a padded vocabulary does."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def results():
    """SHA-256 of the numbers of hashes, of scores with noise in every row and in some, and of seeds
    of steps.
    """
    gumbels = torch.empty(len(HASHES))
    grid = (-(-len(HASHES) // 65_536),)
    gumbel_kernel[grid](as_tensor(HASHES.view(np.int32)), gumbels, len(HASHES), BLOCK=65_536)
    digests = {"gumbels": digest(gumbels)}
    for name, rows in (("every row", None), ("some rows", NUMBERS)):
        changed = scores()
        count = ROWS if rows is None else len(rows)
        words = as_tensor(seeds(TEXTS[:count]).view(np.int32))[:, 0].contiguous()
        numbers = words if rows is None else torch.tensor(rows)
        grid = (len(words) * -(-COLUMNS // BLOCK),)
        arguments = (words, numbers, changed, ROWS, COLUMNS, WIDTH)
        kernels.add_gumbels_kernel[grid](*arguments, HAS_ROWS=rows is not None, BLOCK=BLOCK)
        digests[name] = digest(changed)
    step_seeds = torch.empty(len(TEXTS), dtype=torch.int32)
    words = as_tensor(seeds(TEXTS, strength=256).view(np.int32))
    grid = (-(-len(TEXTS) // 128),)
    kernels.row_seeds_kernel[grid](
        words, as_tensor(STEPS.view(np.int32)), step_seeds, len(TEXTS), WORDS=8, BLOCK=128
    )
    return digests | {"seeds": digest(step_seeds)}


if __name__ == "__main__":
    # The interpreter leaves a constant tuple wrapped, which the compiler does not.
    tl.constexpr.__len__ = lambda self: len(self.value)
    print(json.dumps(results()))
