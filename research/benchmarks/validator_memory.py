"""Memory of a validator under a steady load: its resident set every ten seconds, and the trend of the last two thirds.

A thousand honest nodes send signed callbacks at a fixed rate, while the validator recomputes, prunes its inbox and
serves its figures. The trend is a straight line through the samples; a leak of a kilobyte per callback would show as
hundreds of mebibytes per hour.

    python benchmarks/validator_memory.py --minutes 60 -o benchmarks/results/validator_memory.json
"""

import http.client
import itertools
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from _common import note, parser, publish
from service_soak import save_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.poc.validator.conftest import API
from tests.poc.validator.killing import write_messages
from tests.poc.validator.sender_process import post
from tests.poc.validator.senders import ValidatorServer, keys_of, write_network

EVERY = 10.0  # seconds between two samples
MOST_PER_HOUR = 32  # mebibytes of the trend; the heap of Python and of torch moves by some


def send(port, messages, rate, done, counts):
    """Send callbacks at a rate until told to stop, each under an id of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    due = time.monotonic()
    for number, message in enumerate(itertools.cycle(messages)):
        if done.is_set():
            return
        status = post(connection, message | {"id": f"steady_{number}"})
        counts[status] = counts.get(status, 0) + 1
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))


def trend(samples):
    """Return the slope in mebibytes per hour of (seconds, bytes), the first third left out."""
    times, sizes = np.array(samples[len(samples) // 3 :]).T
    return float(np.polyfit(times / 3600, sizes / 2**20, 1)[0])


def main():
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--nodes", type=int, default=1000)
    options.add_argument("--rate", type=float, default=100.0, help="callbacks per second")
    options.add_argument("--nonces-per-hour", type=int, default=360_000)
    options.add_argument("--keep", type=float, default=120.0, help="seconds for which messages are kept")
    chosen = options.parse_args()
    from assay.models import load_model

    with tempfile.TemporaryDirectory() as name:
        directory, checkpoint = Path(name), Path(name) / "small"
        save_checkpoint(checkpoint)
        model = load_model(checkpoint, dtype="float32", device="cpu")
        keys = keys_of(chosen.nodes)
        write_network(directory, model, keys)
        write_messages(directory, model, keys, each=4, nonces=20, senders=1)
        messages = [json.loads(line) for line in (directory / "messages_0.jsonl").read_text().splitlines()]
        flags = ("--nonces-per-hour", str(chosen.nonces_per_hour), "--keep", str(chosen.keep), "--epoch", "60")
        server = ValidatorServer(directory, *flags, model=checkpoint, fork=False)
        server.start()
        done, counts, samples = threading.Event(), {}, []
        try:
            server.wait_for()
            server.announce()
            process = psutil.Process(server.pid)
            sender = threading.Thread(target=send, args=(server.port, messages, chosen.rate, done, counts))
            sender.start()
            note(f"{chosen.minutes:g} minutes at {chosen.rate:g} callbacks a second")
            began = time.monotonic()
            while time.monotonic() - began < 60 * chosen.minutes:
                time.sleep(EVERY)
                samples.append((time.monotonic() - began, process.memory_info().rss))
                server.get(f"{API}/nodes?limit=1000")
                server.get("/ready")
            done.set()
            sender.join()
            status = server.get(f"{API}/status")
            open_files, threads = process.num_fds(), process.num_threads()
            sizes = {path.name: path.stat().st_size for path in server.data_dir.iterdir() if path.suffix == ".sqlite3"}
            server.terminate()
        finally:
            done.set()
            server.close()
    sizes_seen = [round(size / 2**20) for _, size in samples]
    figures = {
        "minutes": chosen.minutes,
        "nodes": chosen.nodes,
        "callbacks_per_second": chosen.rate,
        "callbacks": sum(counts.values()),
        "statuses": {str(code): count for code, count in counts.items()},
        "recomputed": status["recomputed"],
        "resident_mebibytes_each_minute": sizes_seen[:: round(60 / EVERY)],
        "resident_mebibytes_last": sizes_seen[-1],
        "trend_mebibytes_per_hour": round(trend(samples), 1),
        "most_mebibytes_per_hour": MOST_PER_HOUR,
        "open_files": open_files,
        "threads": threads,
        "database_mebibytes": {name: round(size / 2**20, 1) for name, size in sorted(sizes.items())},
    }
    publish("validator_memory", figures, chosen.output)
    return int(figures["trend_mebibytes_per_hour"] > MOST_PER_HOUR or set(counts) != {200})


if __name__ == "__main__":
    sys.exit(main())
