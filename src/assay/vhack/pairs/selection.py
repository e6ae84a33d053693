"""The selection of pairs and groups, refused without torch where they are too few."""

from collections.abc import Hashable, Iterable, Sequence
from math import ceil, log2

import numpy as np

from assay.errors import DataError, UsageError, check_choice
from assay.vhack.names import METHODS
from assay.vhack.pairs.pairs import Pair, pair_names

# The original proposal holds out 2 of 12 pairs. The checks have power with ten held-out groups, and
# little with five.
_HELD_OUT_SHARE = 6
_SHARE_OF_MANY = 3
_MANY_GROUPS = 30
_FEWEST_SCORED = 2  # groups, without which there is no interval
HELD_OUT_PART = 3  # parts of the groups, of which lda fits two


def check_method(method: str, n: int) -> None:
    """Raise UsageError unless ``method`` exists and ``n`` pairs are enough for it."""
    check_choice("method", method, METHODS)
    if n < (least := 3 if method == "lda" else 1):
        raise UsageError(
            f"{n} pairs for {method}",
            wanted=f"at least {least}",
            do="use more pairs or another method",
        )


def split_pairs(
    pairs: Sequence[Pair],
    *,
    n_heldout: int | None = None,
    heldout_groups: Sequence[str] | None = None,
) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to extract from and the pairs to test with, each in order.

    Args:
        pairs: Pairs in order, with their groups.
        n_heldout: Number of pairs to hold out from the end, as the original proposal does; 0 holds
            out none.
        heldout_groups: Groups to hold out whole. With neither, the last groups are held out: as
            many as it takes for a sixth of the pairs, or with thirty groups or more for a third,
            but never all; pairs of a single group are all used.

    Raises:
        UsageError: Both are given, a group is unknown, or no pair would be left.
    """
    if n_heldout is not None and heldout_groups:
        raise UsageError(
            "both a number and groups to hold out", wanted="one of the two", do="drop --n-heldout"
        )
    if n_heldout is not None:
        if not 0 <= n_heldout < len(pairs):
            raise UsageError(
                f"{n_heldout} of {len(pairs)} pairs to hold out",
                wanted="fewer",
                do="lower --n-heldout, or leave it out",
            )
        cut = len(pairs) - n_heldout
        return list(pairs[:cut]), list(pairs[cut:])
    chosen = set(heldout_groups) if heldout_groups else _last_groups(pairs)
    unknown = chosen - {pair.group for pair in pairs}
    used = [pair for pair in pairs if pair.group not in chosen]
    if unknown or not used:
        seen = f"group {min(unknown)!r} is not there" if unknown else "no pair left to extract from"
        raise UsageError(
            seen,
            wanted="some groups, but not all, of "
            + ", ".join(dict.fromkeys(pair.group for pair in pairs)),
            do="name other groups",
        )
    return used, [pair for pair in pairs if pair.group in chosen]


def _last_groups(pairs: Sequence[Pair]) -> set[str]:
    names = list(dict.fromkeys(pair.group for pair in pairs))
    share = _SHARE_OF_MANY if len(names) >= _MANY_GROUPS else _HELD_OUT_SHARE
    chosen: set[str] = set()
    for name in reversed(names[1:]):
        chosen.add(name)
        if share * sum(pair.group in chosen for pair in pairs) >= len(pairs):
            break
    return chosen


def select_pairs(
    pairs: Sequence[Pair],
    *,
    n_heldout: int | None,
    heldout_groups: Sequence[str] | None,
    method: str,
) -> dict[str, Pair]:
    """Return the pairs to extract from, by their names in errors; refuse too few."""
    names = {pair.key: name for pair, name in zip(pairs, pair_names(pairs), strict=True)}
    used, _ = split_pairs(pairs, n_heldout=n_heldout, heldout_groups=heldout_groups)
    check_method(method, len(used))
    return {names[pair.key]: pair for pair in used}


def split_groups(groups: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[set[str]]:
    """Divide the groups at random into folds of cross-validation; refuse a single group."""
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise UsageError(
            "samples of one group",
            wanted="two groups or more, of which one is held out",
            do="add pairs",
        )
    order = np.random.default_rng(seed).permutation(len(names))
    n_parts = min(n_folds, len(names))
    return [{names[i] for i in order[start::n_parts]} for start in range(n_parts)]


def check_prompts(pairs: Sequence[Pair]) -> None:
    """Refuse a prompt in two groups: it would be held out and fitted to at once."""
    groups: dict[Hashable, tuple[int, str]] = {}
    for index, pair in enumerate(pairs):
        first, group = groups.setdefault(pair.prompt, (index, pair.group))
        if group != pair.group:
            raise DataError(
                f"pairs {first} and {index} have the same prompt, in groups {group} and "
                f"{pair.group}",
                wanted="every prompt in one group, so that it is held out whole",
                do="give them the same group",
            )


def fewest_groups(method: str, alpha: float = 0.05, *, has_basis: bool = False) -> int:
    """Return the fewest groups with which a p-value can reach alpha.

    With ``has_basis`` no group is used up by a fit.
    """
    free = ceil(log2(1 / alpha))
    if has_basis:
        return free
    return free + 1 if method == "svd" else HELD_OUT_PART * (free - 1) + 1


def check_groups(
    groups: Sequence[str],
    method: str,
    seed: int,
    alpha: float,
    seen_by_basis: Iterable[str] | None = None,
) -> str | None:
    """Refuse groups of which none can be scored; pairs of a given basis are not scored.

    ``groups`` are those of all pairs, and ``seen_by_basis`` those that a given basis was made from.

    Returns:
        Why the groups that are left are too few for a verdict, and what to do; None where they are
        enough.

    Raises:
        UsageError: There are too few groups to fit a basis and score another group, or fewer than
            two that a basis has not seen.
    """
    scored = set(groups)
    least = fewest_groups(method, alpha, has_basis=seen_by_basis is not None)
    origin = ""
    alternative = ""
    if seen_by_basis is not None:
        scored -= set(seen_by_basis)
        if len(scored) < _FEWEST_SCORED:
            raise UsageError(
                "every pair belongs to a group the basis was made from"
                + "".join(f", or to group {g}" for g in scored),
                wanted="pairs of two groups or more that it has not seen: numbers from its own "
                "pairs show nothing",
                do="add pairs of other groups (--pairs), hold groups out at extraction, or check "
                "without --basis",
            )
        origin = "that the basis was not made from "
    elif len(scored) < (fewest := 2 if method == "svd" else HELD_OUT_PART + 1):
        raise UsageError(
            f"{len(scored)} group{'s' * (len(scored) != 1)} of pairs to check {method} with",
            wanted=f"at least {fewest}, and {least} for a verdict",
            do="add pairs of other groups (--pairs generated:48 has 30), or check with --method "
            "svd",
        )
    elif method != "svd":
        check_method(
            method,
            sum(group not in split_groups(groups, HELD_OUT_PART, seed)[0] for group in groups),
        )
        alternative = f", or check with --method svd, which needs {fewest_groups('svd', alpha)}"
    if len(scored) >= least:
        return None
    return (
        f"{len(scored)} groups {origin}are too few for a verdict by {method}: it needs {least}. "
        f"Add pairs of other groups (--pairs generated:48 has 30){alternative}"
    )
