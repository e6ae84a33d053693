"""Pairs by a short name, as on the command line."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from assay.errors import UsageError
from assay.vhack.environment import CHANNELS
from assay.vhack.pairs._environment import environment_pairs
from assay.vhack.pairs._files import authored_pairs, read_pairs
from assay.vhack.pairs._generate import generate_pairs
from assay.vhack.pairs._types import Pair

_MADE = ("generated", "environment", "exploits")


def find_pairs(
    reference: str,
    *,
    modes: Sequence[str] = tuple(CHANNELS),
    families: Sequence[str] | None = None,
) -> list[Pair]:
    """Return the pairs that a reference stands for.

    Args:
        reference: Short name or path: ``authored``; ``generated:N`` or ``generated:N:SEED``, see
            :func:`generate_pairs`; ``environment:N`` and ``exploits:N``, minimal and whole ones of
            :func:`environment_pairs`, with a seed likewise; or the path of a pair file.
        modes: Loopholes of pairs in the form of the environment, as of :func:`environment_pairs`.
        families: Families of their tasks.

    Raises:
        UsageError: What is made by number is not followed by whole numbers, there is no such mode or family, or the
            reference is neither a file nor a name but close to a name.
        DataError: The file cannot be used.
    """
    if reference == "authored":
        return authored_pairs()
    name, colon, numbers = reference.partition(":")
    if not colon or name not in _MADE:
        near = get_close_matches(name.lower(), _MADE if colon else ("authored", *_MADE), n=1)
        if near and not Path(reference).exists():
            meant = near[0] + (colon + numbers if colon else "" if near[0] == "authored" else ":48")
            raise UsageError(
                f"pairs {reference!r:.60}, neither a file nor a name of pairs",
                wanted=f"authored, {', '.join(f'{made}:N' for made in _MADE)}, or a pair file",
                do=f"did you mean {meant:.60}?",
            )
        return read_pairs(reference)
    count, _, seed = numbers.partition(":")
    if not (count.isascii() and count.isdigit() and (seed or "0").isascii() and (seed or "0").isdigit()):
        raise UsageError(f"pairs {reference!r:.60}", wanted=f"{name}:N or {name}:N:SEED", do="use whole numbers")
    if name == "generated":
        return generate_pairs(int(count), seed=int(seed or "0"))
    whole = name == "exploits"
    return environment_pairs(int(count), modes=modes, families=families, seed=int(seed or "0"), whole=whole)
