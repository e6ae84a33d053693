"""What the service costs: generation through it against `assay poc prove`, with and without
readers, and its answers.

A real `assay poc serve` with callbacks and `prove` in this process take turns on the same model,
shape and number of nonces; the figure is the median of the ratios of neighbouring turns. Then the
service generates with and without a thousand readers of /status at once, in turn; and one reader
times /health and /status while batches run.

    python research/benchmarks/service_throughput.py -o research/results/service_throughput.json
"""

import http.client
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psutil
import torch
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from tests.end_to_end.readers import read_at_once
from tests.end_to_end.receiver import FlakyReceiver
from tests.end_to_end.server import Server

BATCH = 32
SEQ_LEN = 256
READERS = 1000  # the shape of a round that says nothing else
WINDOW = 2  # the windows with and without readers are so many turns long
BLOCK = {
    "block_hash": "bench",
    "block_height": 1,
    "public_key": "k",
    "r_target": 1.416,
    "node_id": 0,
    "node_count": 1,
}


def answer_times(port: int, path: str, count: int, pause: float) -> list[float]:
    """Ask for a page again and again on one connection; return the seconds of every answer."""
    times = []
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        for _ in range(count):
            started = time.perf_counter()
            connection.request("GET", path)
            connection.getresponse().read()
            times.append(time.perf_counter() - started)
            time.sleep(pause)
    return times


def cpu_seconds(pid=None):
    """Processor time that a process has used, which other work on the machine does not change
    much.
    """
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def through_service(server, nonces, during=lambda: None):
    """Nonces per second from the call that starts the phase until they are on disk, and processor
    seconds per nonce.
    """
    before = server.status()["total_checked"]
    used = cpu_seconds(server.pid)
    started = time.perf_counter()
    server.post("/phase/generate")
    during()
    while (checked := server.status()["total_checked"] - before) < nonces:
        time.sleep(0.25)  # every look costs the service a millisecond
    rate = checked / (time.perf_counter() - started), (cpu_seconds(server.pid) - used) / checked
    server.post("/phase/validate")
    time.sleep(1.0)  # the batch that was running ends, and its callbacks go out
    return rate


def through_prove(model, engine, nonces, path):
    """Nonces per second of `prove` with a proof file, and processor seconds per nonce."""
    round = Round(block_hash="bench", public_key="k", model=model.reference, seq_len=SEQ_LEN)
    started = time.perf_counter()
    used = cpu_seconds()
    prove(model, round, range(nonces), engine=engine, output=path, overwrite=True)
    return nonces / (time.perf_counter() - started), (cpu_seconds() - used) / nonces


def milliseconds(times):
    ordered = sorted(times)
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 2)
        for name, q in at.items()
    }


def compare(first, second, pairs):
    """Rates and processor time of both sides of every pair, and the medians of their ratios."""
    return {
        f"{first}_nonces_per_second": [round(a[0], 2) for a, _ in pairs],
        f"{second}_nonces_per_second": [round(b[0], 2) for _, b in pairs],
        f"{second}_over_{first}": round(statistics.median(b[0] / a[0] for a, b in pairs), 4),
        f"{first}_cpu_ms_per_nonce": [round(1000 * a[1], 2) for a, _ in pairs],
        f"{second}_cpu_ms_per_nonce": [round(1000 * b[1], 2) for _, b in pairs],
    }


def answers_while_generating(server, count=250):
    server.post("/phase/generate")
    pages = {"health": "/health", "status": "/api/v1/pow/status"}
    result = {
        name: milliseconds(answer_times(server.port, path, count, 0.02))
        for name, path in pages.items()
    }
    server.post("/phase/validate")
    return result


def measure(server, receiver, chosen, directory):
    model = load_model(chosen.model, device="cpu")
    engine = HFEngine(model, batch_size=BATCH, seq_len=SEQ_LEN)
    nonces = BATCH * chosen.batches
    server.post(
        "/init/validate",
        BLOCK | {"batch_size": BATCH, "seq_len": SEQ_LEN, "callback_url": receiver.url},
    )
    proof = Path(directory) / "proof.jsonl"
    through_prove(model, engine, BATCH, proof)
    through_service(server, BATCH)
    turns = []
    for turn in range(chosen.rounds):
        turns.append((through_prove(model, engine, nonces, proof), through_service(server, nonces)))
        note(
            f"{turn + 1}/{chosen.rounds}: prove {turns[-1][0][0]:.1f}, service "
            f"{turns[-1][1][0]:.1f} nonces/s"
        )
    answers = []
    pairs = []
    for turn in range(chosen.rounds):
        alone = through_service(server, WINDOW * nonces)
        read = lambda: answers.extend(read_at_once(server.port, "/api/v1/pow/status", READERS))  # noqa: E731
        pairs.append((alone, through_service(server, WINDOW * nonces, during=read)))
        note(
            f"{turn + 1}/{chosen.rounds}: alone {alone[0]:.1f}, read {pairs[-1][1][0]:.1f} nonces/s"
        )
    return {
        "model": model.reference,
        "dtype": engine.dtype,
        "batch_size": BATCH,
        "seq_len": SEQ_LEN,
        "threads": torch.get_num_threads(),
        **compare("prove", "service", turns),
        "readers": READERS,
        "reads": len(answers),
        "failed_reads": sum(status != 200 for status, _ in answers),
        **compare("alone", "read", pairs),
        "seconds_of_a_window": round(
            WINDOW * nonces / statistics.median(a[0] for a, _ in pairs), 1
        ),
        "answers_in_milliseconds": answers_while_generating(server),
        "callbacks_received": len(receiver.taken),
    }


def main():
    options = parser(__doc__)
    options.add_argument("--model", default="reference:qwen3")
    options.add_argument("--batches", type=int, default=20)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--threads", type=int, help="threads of torch on both sides; its own choice when left out"
    )
    chosen = options.parse_args()
    if chosen.threads:
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
        torch.set_num_threads(chosen.threads)
    receiver = FlakyReceiver(trouble=0)
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), model=chosen.model, fork=False)
        try:
            server.start()
            server.wait_for()
            figures = measure(server, receiver, chosen, directory)
        finally:
            server.close()
            receiver.close()
    publish("service_throughput", figures, chosen.output)


if __name__ == "__main__":
    main()
