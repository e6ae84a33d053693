"""Two hundred kills of real processes at random moments, while others misbehave: nothing is lost
and nothing doubled.

- `service`: `assay poc serve`, which generates; half of its receiver's answers are errors, resets,
  lost or late.
- `receipts`: a service whose clients wait for responses that end when their receipt is on disk;
  some delete receipts. Before that, how many receipts a service stores in a second, with so many
  responses at the same time, in one process, on the disk of the directory that `--directory` names.
- `validator`: `assay poc validator` and as many of its senders, of a thousand nodes; every
  twentieth node lies.

Every kill is a SIGKILL. The figures that must be zero end the script with exit code 1 if they are
not.

    python research/benchmarks/soak.py service -o research/results/service_soak.json
    python research/benchmarks/soak.py receipts -o research/results/receipts_soak.json
    python research/benchmarks/soak.py validator -o research/results/validator_soak.json
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import note, parser, publish, save_small_checkpoint

from assay.models import load_model
from assay.poc.service import ServiceSettings
from assay.poc.service.database import open_database
from assay.poc.service.outbox import Outbox
from assay.poc.service.receipt_keeper import ReceiptKeeper
from assay.poc.service.service_metrics import Metrics
from tests.end_to_end import killing as service_kills
from tests.end_to_end import storing as receipt_kills
from tests.poc.service.receipts import header, receipt
from tests.poc.validator import killing as validator_kills

TOGETHER = (1, 16, 256, 1024)
SERVICE_ZEROS = (
    "lost_records",
    "repeated_records",
    "undelivered_nonces",
    "nonces_in_two_callbacks",
    "callbacks_that_changed",
    "dead_letters",
)


def service(folder, chosen):
    """Kill a service that generates."""
    checkpoint = folder / "small"
    save_small_checkpoint(checkpoint)
    return service_kills.kill_loop(
        folder, checkpoint, kills=chosen.kills, seed=chosen.seed
    ), SERVICE_ZEROS


def receipts(folder, chosen):
    """Measure how fast receipts are stored, then kill the service that stores them."""
    measured = [stored(folder / str(together), together, chosen.seconds) for together in TOGETHER]
    outcome = receipt_kills.kill_loop(
        folder, kills=chosen.kills, clients=chosen.clients, seed=chosen.seed
    )
    return outcome | {"clients": chosen.clients, "rates": measured}, receipt_kills.MUST_BE_ZERO


def validator(folder, chosen):
    """Kill a validator and its senders."""
    checkpoint = folder / "small"
    save_small_checkpoint(checkpoint)
    model = load_model(checkpoint, dtype="float32", device="cpu")
    kills = {"nodes": chosen.nodes, "kills": chosen.kills, "seed": chosen.seed}
    return validator_kills.kill_loop(
        folder, model, checkpoint, **kills
    ), validator_kills.MUST_BE_ZERO


def stored(folder, together, seconds):
    """Return how many receipts of 256 tokens are stored in a second, and how long a response waits
    for its own.
    """
    note(f"{together} responses at the same time")
    database = open_database(folder)
    waits = []
    keeper = ReceiptKeeper(database, Outbox(database), ServiceSettings(data_dir=folder), Metrics())
    keeper.start()
    sink = keeper.sink(header())
    started = time.perf_counter()
    until = started + seconds

    async def respond(client):
        number = 0
        while (begun := time.perf_counter()) < until:
            await sink.store(receipt(f"{together}-{client}-{number}", output=tuple(range(256))))
            waits.append(time.perf_counter() - begun)
            number += 1

    async def respond_together():
        await asyncio.gather(*(respond(client) for client in range(together)))

    asyncio.run(respond_together())
    taken = time.perf_counter() - started
    keeper.close()
    assert len(keeper.listed(0, len(waits) + 1)) == len(waits)
    database.close()
    return {
        "together": together,
        "receipts": len(waits),
        "per_second": round(len(waits) / taken, 1),
        "median_seconds": round(float(np.median(waits)), 5),
        "p99_seconds": round(float(np.quantile(waits, 0.99)), 5),
        "bytes_on_disk_each": round(
            sum(path.stat().st_size for path in folder.iterdir()) / len(waits)
        ),
    }


PARTS = {"service": service, "receipts": receipts, "validator": validator}


def main():
    options = parser(__doc__)
    options.add_argument("part", choices=PARTS)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=20)
    options.add_argument("--nodes", type=int, default=1000, help="of the validator")
    options.add_argument("--clients", type=int, default=8, help="that wait for receipts")
    options.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="time of each measurement of the rate of receipts",
    )
    options.add_argument("--directory", type=Path, help="directory on the disk that is measured")
    chosen = options.parse_args()
    note(f"{chosen.kills} kills, a few seconds each")
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        outcome, zeros = PARTS[chosen.part](Path(folder), chosen)
    publish(f"{chosen.part}_soak", {"seed": chosen.seed, **outcome}, chosen.output)
    return int(any(outcome[name] for name in zeros))


if __name__ == "__main__":
    sys.exit(main())
