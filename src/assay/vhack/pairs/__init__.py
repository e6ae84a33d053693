"""Contrastive pairs: files, a bundled set, a generator of minimal pairs, and proof that each does what it claims."""

from assay.vhack.pairs._generate import generate_pairs
from assay.vhack.pairs._match import Matched, match_pairs
from assay.vhack.pairs._pairs import Pair, Sample, authored_pairs, check_pairs, read_pairs, write_pairs
from assay.vhack.pairs._reference import environment_pairs, find_pairs
from assay.vhack.pairs._verify import PairVerdict, read_tests, verify_pairs

__all__ = [
    "Matched",
    "Pair",
    "PairVerdict",
    "Sample",
    "authored_pairs",
    "check_pairs",
    "environment_pairs",
    "find_pairs",
    "generate_pairs",
    "match_pairs",
    "read_pairs",
    "read_tests",
    "verify_pairs",
    "write_pairs",
]
