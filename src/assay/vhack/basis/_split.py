"""Which pairs to extract from and which to keep for tests."""

from collections.abc import Sequence

from assay.errors import DataError, UsageError
from assay.vhack.pairs import Pair

# The original proposal holds out 2 of 12 pairs. The checks have power with ten held-out groups, and little with five.
_HELD_OUT_SHARE = 6
_SHARE_OF_MANY, _MANY_GROUPS = 3, 30


def split_pairs(
    pairs: Sequence[Pair], *, n_heldout: int | None = None, heldout_groups: Sequence[str] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to extract from and the pairs to test with, each in order.

    Args:
        pairs: Pairs in order, with their groups.
        n_heldout: Number of pairs to hold out from the end, as the original proposal does; 0 holds out none.
        heldout_groups: Groups to hold out whole. With neither, the last groups are held out: as many as it takes for a
            sixth of the pairs, or with thirty groups or more for a third, but never all; pairs of a single group are
            all used.

    Raises:
        UsageError: Both are given, a group is unknown, or no pair would be left.
    """
    if n_heldout is not None and heldout_groups:
        raise UsageError("both a number and groups to hold out", wanted="one of the two", do="drop one of them")
    if n_heldout is not None:
        if not 0 <= n_heldout < len(pairs):
            raise UsageError(f"{n_heldout} of {len(pairs)} pairs to hold out", wanted="fewer", do="hold out fewer")
        cut = len(pairs) - n_heldout
        return list(pairs[:cut]), list(pairs[cut:])
    chosen = set(heldout_groups) if heldout_groups else _last_groups(pairs)
    unknown = chosen - {pair.group for pair in pairs}
    kept = [pair for pair in pairs if pair.group not in chosen]
    if unknown or not kept:
        raise UsageError(
            f"group {min(unknown)!r} is not there" if unknown else "no pair left to extract from",
            wanted="some groups, but not all, of " + ", ".join(dict.fromkeys(pair.group for pair in pairs)),
            do="name other groups",
        )
    return kept, [pair for pair in pairs if pair.group in chosen]


def _last_groups(pairs: Sequence[Pair]) -> set[str]:
    names = list(dict.fromkeys(pair.group for pair in pairs))
    share = _SHARE_OF_MANY if len(names) >= _MANY_GROUPS else _HELD_OUT_SHARE
    chosen: set[str] = set()
    for name in reversed(names[1:]):
        chosen.add(name)
        if share * sum(pair.group in chosen for pair in pairs) >= len(pairs):
            break
    return chosen


def pair_names(pairs: Sequence[Pair]) -> list[str]:
    """Return the name of each pair in error messages."""
    return [f"pair {index} (group {pair.group!r})" for index, pair in enumerate(pairs)]


def check_duplicates(pairs: Sequence[Pair], names: Sequence[str]) -> None:
    """Raise DataError, naming both, where a pair occurs twice."""
    seen: dict[str, str] = {}
    for pair, name in zip(pairs, names, strict=True):
        if pair.key in seen:
            raise DataError(f"{name} is the same as {seen[pair.key]}", wanted="each pair once", do="remove one of them")
        seen[pair.key] = name
