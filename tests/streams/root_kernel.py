# Kernels are written in triton's language, which has no annotations.
# mypy: ignore-errors
"""A kernel that takes the root, as the streams do, of every float32 from one on; it can be imported where triton is."""

import triton
import triton.language as tl

from assay.streams.triton_backend import _root


@triton.jit
def root_kernel(first_bits, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, _root((first_bits + place).to(tl.float32, bitcast=True)))
