"""Ledgers for tests: updates from drawn residuals, and files that were changed by hand."""

import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from assay.poc import Noise, bundled_noise
from assay.poc.verdict import Account, Ledger
from assay.poc.verdict.entries import LedgerUpdate
from tests.laws import QWEN3

NOISE = bundled_noise(QWEN3, "vector", "bfloat16", "bfloat16")
OTHER = bundled_noise(QWEN3, "vector", "float16", "float16")


def account(key: str = "node_A") -> Account:
    return Account(public_key=key, digest="d" * 64, build="H100", preset="artifact")


def honest(count: int, seed: int = 0, noise: Noise = NOISE) -> list[float]:
    """Residuals around the honest size, well inside the law."""
    return (noise.size * np.exp(0.5 * np.random.default_rng(seed).standard_normal(count))).tolist()


def update(
    seed: int,
    *,
    key: str = "node_A",
    noise: Noise = NOISE,
    residuals: Sequence[float] | None = None,
    **values,
):
    """An audit of eight nonces in a round of its own."""
    found = honest(8, seed, noise) if residuals is None else residuals
    given = {
        "account": account(key),
        "round": f"round {seed}",
        "block_hash": f"block {seed}",
        "noise": noise,
        "nonces": range(len(found)),
        "residuals": found,
        "sample_seed": seed,
        "proof": f"{seed:064x}",
    }
    return LedgerUpdate(**given | values)


def filled(path: Path, count: int = 9) -> Path:
    """A ledger of three accounts, one of which is a fraud, under two laws."""
    with Ledger(path) as ledger:
        for number in range(count):
            noise = OTHER if number % 4 == 3 else NOISE
            residuals = [1.0] * 64 if number % 3 == 2 else None
            given = update(
                number,
                key=f"node_{number % 3}",
                noise=noise,
                residuals=residuals,
                name=f"audit {number}",
            )
            ledger.append([given])
    return path


@contextmanager
def by_hand(path: Path) -> Iterator[sqlite3.Connection]:
    """The file without its triggers, which are there again afterwards."""
    with closing(sqlite3.connect(path)) as database:
        triggers = database.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        yield database
        for _, text in triggers:
            database.execute(text)
        database.commit()


def forked(work: Callable[[], None]) -> int:
    """Run a function in a copy of this process, which ends without cleaning up; return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of other threads, which the copy does not have
        child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)
