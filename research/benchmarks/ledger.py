"""The cost of a ledger: audits written a second, bytes of a nonce, and the time of an audit, a merge and a restart.

    python benchmarks/ledger.py --nodes 20 --rounds 100

Every audit has 32 nonces of a round of its own, and is on disk before the next one begins.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from assay.poc.verdict import Account, Ledger, Update, audit_ledger, default_noise, merge_ledgers

CHECKED = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=100)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder) / "ledger.sqlite3", chosen.nodes, chosen.rounds), indent=1))


def measure(path: Path, nodes: int, rounds: int) -> dict[str, float]:
    noise, rng = default_noise("vector", "bfloat16", "bfloat16"), np.random.default_rng(0)
    names = [Account(public_key=f"node {n}", digest="d" * 64, build="b", preset="artifact") for n in range(nodes)]

    def audits(block: int) -> list[Update]:
        values = noise.size * np.exp(0.5 * rng.standard_normal((nodes, CHECKED)))
        shared = {"round": f"{block:064x}", "block_hash": f"block {block}", "noise": noise, "nonces": range(CHECKED)}
        return [Update(account=one, residuals=row, **shared) for one, row in zip(names, values.tolist(), strict=True)]

    count, started = nodes * rounds, time.perf_counter()
    with Ledger(path) as ledger:
        for block in range(rounds):
            for update in audits(block):
                ledger.append([update])
        alone = time.perf_counter() - started
        started = time.perf_counter()
        for block in range(rounds, 2 * rounds):
            ledger.append(audits(block))
        together = time.perf_counter() - started
    steps = {}
    for name, work in (
        ("audit", lambda: audit_ledger(path)),
        ("merge", lambda: merge_ledgers([path])),
        ("first audit after a restart", lambda: _append_one(path, audits(2 * rounds)[0])),
    ):
        started = time.perf_counter()
        work()
        steps[f"{name}, seconds"] = round(time.perf_counter() - started, 3)
    return {
        "nodes": nodes,
        "audits": 2 * count,
        "nonces a life": 2 * rounds * CHECKED,
        "audits a second, one by one": round(count / alone, 1),
        "audits a second, one call a round": round(count / together, 1),
        "bytes a nonce": round(path.stat().st_size / (2 * count * CHECKED), 1),
        **steps,
    }


def _append_one(path: Path, update: Update) -> None:
    with Ledger(path) as ledger:
        ledger.append([update])


if __name__ == "__main__":
    main()
