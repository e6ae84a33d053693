"""Gradient-space hack directions: extract them from pairs, and prove that they are real."""

from assay.vhack._types import Pair, Sample

__all__ = ["Pair", "Sample"]
