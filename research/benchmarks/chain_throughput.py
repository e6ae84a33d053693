"""Processor time of `prove` and of the service in two commits, which take turns.

Each commit has two processes that see its assay first on the path: one proves, and one is `assay
poc serve`. In each turn both commits prove as many nonces, compute a job of the chain's client, and
generate a round of vectors for a receiver, each while everything else waits. What counts is the
processor time of the process for each nonce, because the machine may be shared. Turns are short,
so that what else runs is the same for both; ratios are of two turns, one of each order, and their
median is given with its 95 % interval, by ranks. All numbers of both commits must be equal.

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
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from _common import ROOT, median_interval, note, paired_ratios, parser, publish, round_to

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


def prove_slices(nonces):
    """Prove a slice for every line that is read, and write its seconds a nonce and a hash."""
    import torch

    from assay import load_model
    from assay.poc import HFEngine, Round, prove

    torch.set_num_threads(1)
    loaded = load_model(MODEL, device="cpu")
    engine = HFEngine(loaded, batch_size=BATCH, seq_len=SEQ_LEN, compiled=False)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "proof.jsonl"
        for line in sys.stdin:
            block = line.strip()
            round = Round(block_hash=block, public_key="key", preset="artifact", seq_len=SEQ_LEN)
            began = time.process_time()
            proof = prove(loaded, round, range(nonces), engine=engine, output=path, overwrite=True)
            seconds = (time.process_time() - began) / nonces
            vectors = b"".join(record.vector.tobytes() for record in proof.records)
            print(json.dumps([seconds, hashlib.sha256(vectors).hexdigest()]), flush=True)


class Commit:
    """A commit at work: a process that proves, a service, and a receiver of its callbacks."""

    def __init__(self, source, nonces, folder):
        # Not above: the older commit has not what it imports.
        from tests.end_to_end.server import free_port

        path = os.pathsep.join([str(source.resolve()), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        settings = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_CALLBACK_INTERVAL": "0.5"}
        port = free_port()
        self._nonces = nonces
        self._receiver = Receiver()
        self._base = f"http://127.0.0.1:{port}"
        self._prover = subprocess.Popen(
            [sys.executable, __file__, "--prove", str(nonces)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        serve = [sys.executable, "-m", "assay", "poc", "serve", "--model", MODEL]
        serve += ["--port", str(port), "--data-dir", folder, "--allow-private-callbacks"]
        with Path(folder, "log").open("wb") as log:
            self._service = subprocess.Popen(
                serve, env=environment | settings, stdout=log, stderr=log
            )
        while not self._ready():
            time.sleep(0.2)

    def _ready(self):
        if self._service.poll() is not None:
            raise RuntimeError("the service ended before it was ready")
        try:
            with urllib.request.urlopen(f"{self._base}/ready", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _seconds(self):
        """Return the processor time that the service has used."""
        times = psutil.Process(self._service.pid).cpu_times()
        return times.user + times.system

    def _call(self, path, body):
        """Return the reply to a call."""
        request = urllib.request.Request(f"{self._base}/api/v1/pow{path}")
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def prove(self, block):
        """Return the processor seconds of each nonce that is proved, and their hash."""
        self._prover.stdin.write(f"{block}\n")
        self._prover.stdin.flush()
        return json.loads(self._prover.stdout.readline())

    def job(self, block):
        """Return the same of a job that is waited for."""
        job = BLOCK | {"block_hash": block, "params": PARAMS, "nonces": list(range(self._nonces))}
        began = self._seconds()
        reply = self._call("/generate", job | {"wait": True})
        seconds = (self._seconds() - began) / self._nonces
        made = {artifact["nonce"]: artifact["vector_b64"] for artifact in reply["artifacts"]}
        return [seconds, digest(made)]

    def round(self, block):
        """Return the same of a round that is generated for the receiver."""
        vectors = self._receiver.vectors = {}
        began = self._seconds()
        start = BLOCK | {"block_hash": block, "params": PARAMS, "url": self._receiver.url}
        self._call("/init/generate", start)
        while len(vectors) < self._nonces:
            time.sleep(0.1)
        self._call("/stop", {})
        time.sleep(1.5)  # what was computed is delivered, and counts
        seconds = (self._seconds() - began) / len(vectors)
        return [seconds, digest({nonce: vectors[nonce] for nonce in range(self._nonces)})]

    def close(self):
        """End the processes."""
        for process in (self._prover, self._service):
            process.terminate()
            process.wait(60)
        self._receiver.close()


def main():
    options = parser(__doc__)
    options.add_argument("--old", type=Path, help="src of the older commit")
    options.add_argument("--nonces", type=int, default=256)
    options.add_argument("--turns", type=int, default=40)
    options.add_argument("--prove", type=int, help="what this file starts by itself")
    chosen = options.parse_args()
    if chosen.prove:
        prove_slices(chosen.prove)
        return
    sources = {"old": chosen.old, "new": ROOT / "src"}
    figures = {}
    with ExitStack() as stack:
        commits = {}
        for name, source in sources.items():
            folder = stack.enter_context(TemporaryDirectory())
            commits[name] = Commit(source, chosen.nonces, folder)
            stack.callback(commits[name].close)
        for turn in range(-1, chosen.turns):  # the first one warms up
            for task in ("prove", "job", "round"):
                seen = {
                    name: getattr(commits[name], task)(f"{task} {turn}")
                    for name in sorted(commits, reverse=turn % 2 == 0)
                }
                if turn >= 0:
                    figures.setdefault(task, []).append(seen)
            note(f"{turn + 1} of {chosen.turns}")
    tasks = {
        task: {
            "processor_seconds_a_nonce": {
                name: round_to(statistics.median(seen[name][0] for seen in turns), 4)
                for name in sources
            },
            "new_over_old": median_interval(
                paired_ratios(*([seen[name][0] for seen in turns] for name in sources))
            ),
            "same_numbers": all(seen["new"][1] == seen["old"][1] for seen in turns),
        }
        for task, turns in figures.items()
    }
    passed = all(
        task["new_over_old"][0] <= LIMIT and task["same_numbers"] for task in tasks.values()
    )
    setting = {"model": MODEL, "seq_len": SEQ_LEN, "batch": BATCH}
    setting |= {"nonces": chosen.nonces, "turns": chosen.turns}
    publish("chain_throughput", {**setting, "tasks": tasks, "passed": passed}, chosen.output)


if __name__ == "__main__":
    main()
