"""The stream hash run backwards: the seed that gives a chosen hash at a chosen index. Any special
value can be met.
"""

from pathlib import Path

import numpy as np

VECTORS = Path(__file__).parents[1] / "vectors"


def seed_for(hash_, index):
    """Seeds (uint32 array) whose element ``index`` has the hash ``hash_``; both are broadcast
    arrays.
    """
    h = np.atleast_1d(np.asarray(hash_, np.uint32))
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(pow(0xC2B2AE35, -1, 1 << 32))
    h = h ^ (h >> np.uint32(13)) ^ (h >> np.uint32(26))
    h = h * np.uint32(pow(0x85EBCA6B, -1, 1 << 32))
    h = h ^ (h >> np.uint32(16))
    h = (h - np.uint32(0xE6546B64)) * np.uint32(pow(5, -1, 1 << 32))
    h = (h >> np.uint32(13)) | (h << np.uint32(19))
    k = np.atleast_1d(np.asarray(index, np.uint32)) * np.uint32(0xCC9E2D51)
    k = (k << np.uint32(15)) | (k >> np.uint32(17))
    return h ^ (k * np.uint32(0x1B873593))


def special_hashes():
    """Hashes at and around every value where a formula changes branch, exponent or quadrant."""
    edges = [2**e for e in range(33)]
    edges += [round(2**e * 2**0.5) for e in range(32)]
    edges += [q * 2**29 for q in range(9)]
    edges += [0x80000080, 2**32 - 128]
    near = np.arange(-300, 301)
    around = (np.array(edges, dtype=np.int64)[:, None] + near).reshape(-1)
    return np.unique(np.clip(around, 0, 2**32 - 1)).astype(np.uint32)


def gumbel_hashes():
    """Hashes at and around every value where a Gumbel number changes branch or exponent, and where
    it is 0.
    """
    halves = [0.5**0.5 * 2.0**e for e in range(-33, 6)]
    exponentials = np.array(
        [*halves, 1.0]
    )  # where E itself has a new exponent; at 1 the number is 0
    shares = np.concatenate(
        [-np.expm1(-exponentials), halves[:33], 1 - np.array(halves[:33]), [0.5**0.5, 0.5]]
    )
    shares = shares[shares < 1]
    around = np.rint(shares * 2**32).astype(np.int64)[:, None] + np.arange(-300, 301)
    middle = 2**31 + np.arange(-300, 301)
    every = np.concatenate([around.reshape(-1), middle, special_hashes().astype(np.int64)])
    return np.unique(np.clip(every, 0, 2**32 - 1)).astype(np.uint32)


def dense_hashes(count):
    """``count`` hashes spread evenly over all of them, by an odd stride, so that every exponent is
    well covered.
    """
    even = (np.arange(count, dtype=np.uint64) * np.uint64(2**32 // count | 1)).astype(np.uint32)
    small = np.uint32(2**32 - 1) >> (np.arange(count // 4, dtype=np.uint32) % np.uint32(32))
    return np.concatenate([even, small ^ (even[: count // 4] & (small >> np.uint32(1)))])


def distinct_uniforms():
    """One hash for every float32 that a uniform can be, all 83 886 081 of them, in parts of about
    two million.
    """
    whole = [np.arange(2**24, dtype=np.uint32)]
    rounded = [
        np.arange(2**23, 2**24, dtype=np.uint32) << np.uint32(shift) for shift in range(1, 9)
    ]
    for hashes in (*whole, *rounded, np.array([2**32 - 1], np.uint32)):
        yield from np.array_split(hashes, -(-len(hashes) // 2**21))
