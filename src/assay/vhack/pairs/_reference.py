"""Pairs by a short name, as on the command line."""

from assay.errors import UsageError
from assay.vhack._types import Pair
from assay.vhack.pairs._files import authored_pairs, read_pairs
from assay.vhack.pairs._generate import generate_pairs

__all__ = ["find_pairs"]

_GENERATED = "generated:"


def find_pairs(reference: str) -> list[Pair]:
    """The pairs that a reference stands for.

    Args:
        reference: ``authored``, ``generated:N`` or ``generated:N:SEED``, or the path of a pair file.

    Raises:
        UsageError: ``generated:`` is not followed by whole numbers.
        DataError: the file cannot be used.
    """
    if reference == "authored":
        return authored_pairs()
    if not reference.startswith(_GENERATED):
        return read_pairs(reference)
    count, _, seed = reference.removeprefix(_GENERATED).partition(":")
    if not (count.isascii() and count.isdigit() and (seed or "0").isascii() and (seed or "0").isdigit()):
        raise UsageError(f"pairs {reference!r:.60}", wanted="generated:N or generated:N:SEED", do="use whole numbers")
    return generate_pairs(int(count), seed=int(seed or "0"))
