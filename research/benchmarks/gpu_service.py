"""A real `assay poc serve` against `prove` in this process, in one run; and how it starts.

Both run one model in bfloat16 with the kernels that they choose by themselves, and take turns; the figure is the
median of the ratios of neighbouring turns. Before that, the first batch of a service: the time from the call that
starts a round until its first nonces are on disk, kernels being compiled, and how long /health takes meanwhile. Then
again after a restart, when compiled kernels are read from the folder where they are kept. At the end, distances of the
service are held against those of `prove`, bit by bit, and the vectors of an artifact job.

    python research/benchmarks/gpu_service.py -o research/results/gpu_service.json
"""

import base64
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf.fused import worth_compiling
from tests.end_to_end.readers import answer_times
from tests.end_to_end.server import Server

SEQ_LEN = 256  # of a round that says nothing else
BLOCK = {"block_hash": "bench", "block_height": 1, "public_key": "k", "r_target": 1.416, "node_id": 0, "node_count": 1}
SIZES = (32, 128)
"""Nonces of a batch: the default of a request, and what `prove --batch-size auto` takes on such a device."""


def cpu_seconds(pid=None):
    """Processor time that a process has used, which other work on the machine does not change much."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def through_service(server, nonces, during=lambda: None):
    """Nonces per second from the call that starts the phase until they are on disk, and processor seconds per nonce."""
    before, used = server.status()["total_checked"], cpu_seconds(server.pid)
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
    started, used = time.perf_counter(), cpu_seconds()
    prove(model, round, range(nonces), engine=engine, output=path, overwrite=True)
    return nonces / (time.perf_counter() - started), (cpu_seconds() - used) / nonces


def compare(first, second, pairs):
    """Rates and processor time of both sides of every pair, and the medians of their ratios."""
    return {
        f"{first}_nonces_per_second": [round(a[0], 2) for a, _ in pairs],
        f"{second}_nonces_per_second": [round(b[0], 2) for _, b in pairs],
        f"{second}_over_{first}": round(statistics.median(b[0] / a[0] for a, b in pairs), 4),
        f"{first}_cpu_ms_per_nonce": [round(1000 * a[1], 2) for a, _ in pairs],
        f"{second}_cpu_ms_per_nonce": [round(1000 * b[1], 2) for _, b in pairs],
    }


def begun(server, size):
    """Begin or continue the round of a batch size; return how its next nonces came, and stop it."""
    server.post("/init", body_of(size))
    before, answers = server.status()["total_checked"], []
    started = time.perf_counter()
    server.post("/phase/generate")
    while server.status()["total_checked"] == before:
        answers += answer_times(server.port, "/health", 5, 0.01)
    seconds = time.perf_counter() - started
    server.post("/phase/validate")
    time.sleep(1.0)  # the batch that was running ends
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    quantiles = {name: round(1000 * float(np.quantile(answers, q)), 2) for name, q in at.items()}
    return {"first_nonces_seconds": round(seconds, 2), "health_meanwhile_ms": quantiles}


def body_of(size):
    return BLOCK | {"block_hash": f"bench {size}", "r_target": 2.0, "batch_size": size, "seq_len": SEQ_LEN}


def start(server):
    """Start a service; return the seconds until its model is loaded."""
    started = time.perf_counter()
    server.start()
    server.wait_for(timeout=180)
    return round(time.perf_counter() - started, 2)


def turns_of(server, model, engine, path, chosen):
    nonces = engine.batch_size * max(1, chosen.nonces // engine.batch_size)
    server.post("/init", body_of(engine.batch_size))
    through_prove(model, engine, nonces, path)
    through_service(server, engine.batch_size)
    pairs = []
    for turn in range(chosen.rounds):
        pairs.append((through_prove(model, engine, nonces, path), through_service(server, nonces)))
        note(f"{engine.batch_size}, {turn + 1}/{chosen.rounds}: {pairs[-1][0][0]:.0f}, {pairs[-1][1][0]:.0f} nonces/s")
    return compare("prove", "service", pairs)


def same_distances(server, model, engine, count=512):
    """Whether the service's first distances of a round are those of `prove`."""
    found = server.get(f"/api/v1/pow/status?after=-1&limit={count}")
    round = Round(block_hash=body_of(engine.batch_size)["block_hash"], public_key="k", seq_len=SEQ_LEN)
    proof = prove(model, round, range(count), engine=engine)
    return found["valid_nonces"] == list(range(count)) and found["valid_distances"] == proof.distances.tolist()


def same_vectors(server, model, engine, count=100):
    """Whether an artifact job gives the vectors of `prove`."""
    server.post("/stop")
    params = {"model": model.reference, "seq_len": SEQ_LEN, "k_dim": 12}
    block = {name: BLOCK[name] for name in ("block_hash", "block_height", "public_key", "node_id", "node_count")}
    body = block | {"nonces": list(range(count)), "params": params, "batch_size": engine.batch_size, "wait": True}
    job = server.post("/generate", body)
    round = Round(block_hash=BLOCK["block_hash"], public_key=BLOCK["public_key"], preset="artifact", seq_len=SEQ_LEN)
    wanted = [record.vector.tobytes() for record in prove(model, round, range(count), engine=engine).records]
    return [base64.b64decode(row["vector_b64"]) for row in job["artifacts"]] == wanted


def measure(server, chosen, folder):
    loading = [start(server)]
    first = {str(size): begun(server, size) for size in SIZES}
    note(f"first batches: {first}")
    server.terminate(60)
    loading.append(start(server))
    again = {str(size): begun(server, size) for size in SIZES}
    note(f"after a restart: {again}")
    model = load_model(chosen.model, dtype="bfloat16", device=chosen.device)
    rates, same = {}, []
    for size in SIZES:
        engine = HFEngine(model, batch_size=size, seq_len=SEQ_LEN, compiled=worth_compiling(model))
        rates[str(size)] = turns_of(server, model, engine, folder / "proof.jsonl", chosen)
        same.append(same_distances(server, model, engine))
    return {
        "model": model.reference,
        "seq_len": SEQ_LEN,
        "fingerprint": engine.fingerprint.as_dict(),
        "seconds_until_loaded": loading,
        "first_batch": first,
        "first_batch_after_restart": again,
        "by_batch_size": rates,
        "same_distances": all(same),
        "same_vectors": same_vectors(server, model, engine),
    }


def main():
    options = parser(__doc__)
    options.add_argument("--model", default="shape:qwen3-0.6b")
    options.add_argument("--nonces", type=int, default=8192, help="of a turn")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--device", default="cuda")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), "--dtype", "bfloat16", "--device", chosen.device, model=chosen.model, fork=False)
        try:
            figures = measure(server, chosen, Path(folder))
        except BaseException:
            note(server.log.read_text()[-3000:] if server.log.exists() else "no log")
            raise
        finally:
            server.close()
    publish("gpu_service", figures, chosen.output)


if __name__ == "__main__":
    main()
