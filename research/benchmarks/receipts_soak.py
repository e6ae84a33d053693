"""Two hundred kills while receipts are stored, and how many of them a service stores in a second.

Every kill is a SIGKILL of a real service whose clients wait for responses that end when their receipt is on disk; some
of them delete receipts, and the receiver of callbacks misbehaves. The figures that must be zero end the script with
exit code 1 if they are not. The rate is that of `ReceiptSink.store` with so many responses at the same time, in one
process, on the disk of the directory that `--directory` names.

    python benchmarks/receipts_soak.py -o benchmarks/results/receipts_soak.json
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import note, parser, publish

sys.path.insert(0, str(Path(__file__).parents[1]))

from assay.poc.service import Settings
from assay.poc.service.database import Database
from assay.poc.service.metrics import Metrics
from assay.poc.service.outbox import Outbox
from assay.poc.service.receipt_keeper import ReceiptKeeper
from tests.end_to_end.storing import MUST_BE_ZERO, kill_loop
from tests.poc.service.receipts import header, receipt

TOGETHER = (1, 16, 256, 1024)


async def _store(sink, together: int, seconds: float) -> list[float]:
    """Store receipts of 256 tokens for some seconds, so many at the same time; return how long each took."""
    waits: list[float] = []
    until = time.perf_counter() + seconds

    async def respond(client: int) -> None:
        number = 0
        while (started := time.perf_counter()) < until:
            await sink.store(receipt(f"{together}-{client}-{number}", output=tuple(range(256))))
            waits.append(time.perf_counter() - started)
            number += 1

    await asyncio.gather(*(respond(client) for client in range(together)))
    return waits


def rates(directory: Path, seconds: float) -> list[dict[str, float]]:
    """Measure how many receipts are stored in a second, and how long a response waits for its own."""
    found = []
    for together in TOGETHER:
        note(f"{together} responses at the same time")
        data_dir = directory / str(together)
        database = Database(data_dir)
        keeper = ReceiptKeeper(database, Outbox(database), Settings(data_dir=data_dir), Metrics())
        keeper.start()
        started = time.perf_counter()
        waits = asyncio.run(_store(keeper.sink(header()), together, seconds))
        taken = time.perf_counter() - started
        keeper.close()
        assert len(keeper.store.listed(0, len(waits) + 1)) == len(waits)
        database.close()
        size = sum(path.stat().st_size for path in data_dir.iterdir())
        found.append(
            {
                "together": together,
                "receipts": len(waits),
                "per_second": round(len(waits) / taken, 1),
                "median_seconds": round(float(np.median(waits)), 5),
                "p99_seconds": round(float(np.quantile(waits, 0.99)), 5),
                "bytes_on_disk_each": round(size / len(waits)),
            }
        )
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--seed", type=int, default=20)
    options.add_argument("--seconds", type=float, default=10.0, help="time of each measurement of the rate")
    options.add_argument("--directory", type=Path, help="directory on the disk that is measured")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        measured = rates(Path(directory), chosen.seconds)
        note(f"{chosen.kills} kills, a few seconds each")
        outcome = kill_loop(Path(directory), kills=chosen.kills, clients=chosen.clients, seed=chosen.seed).as_dict()
    publish(
        "receipts_soak", {"seed": chosen.seed, "clients": chosen.clients, **outcome, "rates": measured}, chosen.output
    )
    return int(any(outcome[name] for name in MUST_BE_ZERO))


if __name__ == "__main__":
    sys.exit(main())
