"""Contrastive pairs: files, a bundled set, a generator of minimal pairs, and proof that each does what it claims."""

from assay.vhack.pairs.generate import find_pairs, generate_pairs
from assay.vhack.pairs.pairs import Pair, Sample, match_pairs, read_pairs, write_pairs
from assay.vhack.pairs.verify import PairVerdict, verify_pairs

__all__ = [
    "Pair",
    "PairVerdict",
    "Sample",
    "find_pairs",
    "generate_pairs",
    "match_pairs",
    "read_pairs",
    "verify_pairs",
    "write_pairs",
]
