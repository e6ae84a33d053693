"""Contrastive pairs: files, a bundled set, a generator of minimal pairs, and proof that each does what it claims."""

from assay.vhack.pairs._environment import environment_pairs
from assay.vhack.pairs._files import authored_pairs, check_pairs, read_pairs, write_pairs
from assay.vhack.pairs._generate import generate_pairs
from assay.vhack.pairs._mechanisms import MECHANISMS
from assay.vhack.pairs._reference import find_pairs
from assay.vhack.pairs._tasks import PAIR_FAMILIES
from assay.vhack.pairs._types import Pair, Sample
from assay.vhack.pairs._verify import PairVerdict, SideVerdict, read_tests, verify_pairs

__all__ = [
    "MECHANISMS",
    "PAIR_FAMILIES",
    "Pair",
    "PairVerdict",
    "Sample",
    "SideVerdict",
    "authored_pairs",
    "check_pairs",
    "environment_pairs",
    "find_pairs",
    "generate_pairs",
    "read_pairs",
    "read_tests",
    "verify_pairs",
    "write_pairs",
]
