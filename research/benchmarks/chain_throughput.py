"""Processor time of `prove` and of the service in two commits, which take turns.

Each turn of a commit is two processes that see its assay first on the path: one proves twice, of
which the second counts, and one is `assay poc serve`, which generates a round of vectors for a
receiver, and then computes a job of the chain's client. What counts is the processor time of the
process for each nonce, because the machine may be shared. Ratios are of neighbouring turns, and
their median is given with the middle half of them. All numbers of both commits must be equal.

Pass: the new commit takes at most 2 % more, for each of the three.

    git worktree add .bench/old 0944c8c1
    python research/benchmarks/chain_throughput.py --old .bench/old/src \
      -o research/results/chain_throughput.json
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from _common import ROOT, note, parser, publish, round_to

from tests.end_to_end.receiver import Answering

MODEL = "reference:qwen3"
BATCH = 32
SEQ_LEN = 64
BLOCK = {"block_hash": "block", "block_height": 1, "public_key": "key", "node_id": 0}
BLOCK |= {"node_count": 1, "batch_size": BATCH}
PARAMS = {"model": MODEL, "seq_len": SEQ_LEN, "k_dim": 12}
LIMIT = 1.02


class Receiver(Answering):
    """Takes callbacks, and keeps the vectors of nonces."""

    def __init__(self):
        self.vectors = {}
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Keep what a callback brings."""
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        for artifact in body["artifacts"]:
            self.vectors[artifact["nonce"]] = artifact["vector_b64"]
        self.respond(handler, 200)


def digest(vectors):
    """Return the hash of vectors in the order of their nonces."""
    text = "".join(vectors[nonce] for nonce in sorted(vectors))
    return hashlib.sha256(text.encode()).hexdigest()


def measure_prove(nonces):
    """Prove with the assay that is on the path; return seconds for each nonce, and a hash."""
    import torch

    from assay import load_model
    from assay.poc import HFEngine, Round, prove

    torch.set_num_threads(1)
    loaded = load_model(MODEL, device="cpu")
    round = Round(block_hash="block", public_key="key", preset="artifact", seq_len=SEQ_LEN)
    engine = HFEngine(loaded, batch_size=BATCH, seq_len=SEQ_LEN, compiled=False)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "proof.jsonl"
        for _ in range(2):
            began = time.process_time()
            proof = prove(loaded, round, range(nonces), engine=engine, output=path, overwrite=True)
            seconds = (time.process_time() - began) / nonces
    vectors = b"".join(record.vector.tobytes() for record in proof.records)
    return {"seconds": seconds, "hash": hashlib.sha256(vectors).hexdigest()}


class Served:
    """A service of some commit."""

    def __init__(self, environment, folder):
        # Not above: the older commit has not what it imports.
        from tests.end_to_end.server import free_port

        self._base = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "assay", "poc", "serve", "--model", MODEL]
        command += ["--port", str(port), "--data-dir", folder, "--allow-private-callbacks"]
        settings = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_CALLBACK_INTERVAL": "0.5"}
        self._process = subprocess.Popen(
            command,
            env=environment | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._ready():
            time.sleep(0.2)

    def _ready(self):
        if self._process.poll() is not None:
            raise RuntimeError("the service ended before it was ready")
        try:
            with urllib.request.urlopen(f"{self._base}/ready", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def seconds(self):
        """Return the processor time that the process has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def call(self, path, body=None):
        """Return the reply to a call; without a body it is a GET."""
        request = urllib.request.Request(f"{self._base}/api/v1/pow{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def close(self):
        """End the process."""
        self._process.terminate()
        self._process.wait(60)


def measure_service(environment, nonces):
    """Return processor seconds for each nonce of a round and of a job, and hashes of both."""
    with TemporaryDirectory() as folder, Receiver() as receiver:
        served = Served(environment, folder)
        try:
            warm = BLOCK | {"params": PARAMS, "nonces": list(range(BATCH)), "wait": True}
            served.call("/generate", warm)
            job = warm | {"block_hash": "job", "nonces": list(range(nonces))}
            began = served.seconds()
            reply = served.call("/generate", job)
            of_job = (served.seconds() - began) / nonces
            made = {artifact["nonce"]: artifact["vector_b64"] for artifact in reply["artifacts"]}
            began = served.seconds()
            served.call("/init/generate", BLOCK | {"params": PARAMS, "url": receiver.url})
            while len(receiver.vectors) < nonces:
                time.sleep(0.25)
            served.call("/stop", {})
            time.sleep(1.5)  # what was computed is delivered, and counts
            of_round = (served.seconds() - began) / len(receiver.vectors)
            first = {nonce: receiver.vectors[nonce] for nonce in range(nonces)}
        finally:
            served.close()
    return {
        "job": {"seconds": of_job, "hash": digest(made)},
        "round": {"seconds": of_round, "hash": digest(first)},
    }


def measure(source, nonces):
    """Return the figures of a turn of the assay in a folder."""
    path = os.pathsep.join([str(source.resolve()), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    proved = subprocess.run(
        [sys.executable, __file__, "--prove", str(nonces)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures = measure_service(environment, nonces)
    return {"prove": json.loads(proved.stdout.splitlines()[-1]), **figures}


def main():
    options = parser(__doc__)
    options.add_argument("--old", type=Path, help="src of the older commit")
    options.add_argument("--nonces", type=int, default=192)
    options.add_argument("--turns", type=int, default=6)
    options.add_argument("--prove", type=int, help="what this file starts by itself")
    chosen = options.parse_args()
    if chosen.prove:
        print(json.dumps(measure_prove(chosen.prove)))
        return
    sources = {"old": chosen.old, "new": ROOT / "src"}
    turns = []
    for turn in range(chosen.turns):
        order = sources if turn % 2 == 0 else reversed(sources)
        turns.append({commit: measure(sources[commit], chosen.nonces) for commit in order})
        note(f"{turn + 1} of {chosen.turns}: {turns[-1]}")
    figures = {}
    for task in ("prove", "job", "round"):
        seconds = {
            commit: [round_to(turn[commit][task]["seconds"], 4) for turn in turns]
            for commit in sources
        }
        ratios = [new / old for old, new in zip(*seconds.values(), strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        hashes = {turn[commit][task]["hash"] for turn in turns for commit in sources}
        figures[task] = {
            "processor_seconds_a_nonce": seconds,
            "new_over_old": round_to(statistics.median(ratios), 4),
            "middle_half": [round_to(quarters[0], 4), round_to(quarters[2], 4)],
            "same_numbers": len(hashes) == 1,
        }
    passed = all(
        task["new_over_old"] <= LIMIT and task["same_numbers"] for task in figures.values()
    )
    setting = {"model": MODEL, "seq_len": SEQ_LEN, "batch": BATCH, "nonces": chosen.nonces}
    publish("chain_throughput", {**setting, "tasks": figures, "passed": passed}, chosen.output)


if __name__ == "__main__":
    main()
