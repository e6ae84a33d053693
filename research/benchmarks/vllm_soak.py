"""Two hundred SIGTERM and two hundred SIGKILL at random moments of a round inside vLLM: what is
lost or doubled.

One round is begun once. The server is signalled again and again, some of the times while it starts,
mostly while nonces run, and started again on the same data; the round must continue by itself. A
fifth of the callbacks goes wrong at the receiver. SIGKILL is sent to the API server alone, and what
lives on then is ended as a supervisor would. At the end every nonce must be on disk once, announced
in one callback, and have the bits of a run that nothing interrupted. The result is written after
every signal. Exit code 1 if a figure that must be zero is not.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python research/benchmarks/vllm_soak.py -o
    research/results/vllm_soak.json
"""

import contextlib
import io
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from _common import note, parser, publish
from _vllm import ForkedServer

from assay.poc.service.outbox import open_outbox
from tests.end_to_end.receiver import FlakyReceiver
from tests.waiting import until

BLOCK = {"key": "node", "seq_len": 16, "batch_size": 8, "r_target": 1.416}
ENVIRONMENT = {
    "ASSAY_SEQ_LEN": str(BLOCK["seq_len"]),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "ASSAY_CALLBACK_INTERVAL": "0.2",
    "ASSAY_CALLBACK_TIMEOUT": "1",
    "ASSAY_CALLBACK_ATTEMPTS": "1000",
    "ASSAY_CALLBACK_BACKOFF": "0.05",
    "ASSAY_CALLBACK_BACKOFF_MAX": "0.5",
}
SMALL = {
    "--kv-cache-memory-bytes": str(2**26),
    "--max-model-len": "128",
    "--max-num-batched-tokens": "256",
    "--max-num-seqs": "16",
}
WHILE_STARTING = 0.25  # part of the signals
LONGEST = 0.4  # seconds from a life's first nonces to its signal, at most
ENDING = 60.0  # seconds in which a server must follow SIGTERM
LOST = 5.0  # seconds after which a server that starts has missed it
SHARED = Path("/dev/shm")
MUST_BE_ZERO = (
    "lost_records",
    "changed_records",
    "records_unlike_uninterrupted",
    "undelivered_nonces",
    "nonces_in_two_callbacks",
    "values_unlike_records",
    "callbacks_that_changed",
    "dead_letters",
    "rounds_that_did_not_continue",
    "terminations_without_exit_code_0",
)


class Soak:
    """A round, its signals, and what was seen of them.

    Args:
        server: Server that runs.
        receiver: Receiver of the round's callbacks.
        scratch: Directory in which the server's processes make their temporary files.
    """

    def __init__(self, server, receiver, scratch, *, seed):
        self.server = server
        self.receiver = receiver
        self.scratch = scratch
        self.random = random.Random(seed)
        self.sent = Counter()
        self.codes = Counter()
        self.processes = Counter()
        self.files = Counter()
        self.bytes = Counter()
        self.seen = {}  # what was on disk after a signal
        self.changed = self.stopped = 0
        self.starts = []
        self.pauses = []
        self.last = ""

    def send(self, kind):
        """Send a signal at a random moment of a life, and look at what is left; then start the next
        life.
        """
        starting = bool(self.sent) and self.random.random() < WHILE_STARTING
        if starting:
            time.sleep(self.random.uniform(0.0, statistics.median(self.starts or [5.0])))
        else:
            self._continue()
            time.sleep(self.random.uniform(0.0, LONGEST))
        when = f"{kind.name} {'while starting' if starting else 'while generating'}"
        self.sent[when] += 1
        self._signal(kind, when)
        self._read()
        self.launched = time.monotonic()
        self.server.launch()

    def _continue(self):
        """Wait until the round has new nonces without a further request."""
        if self.sent:
            self.server.wait_until_ready(pause=0.05)
            self.starts.append(time.monotonic() - self.launched)
            self.stopped += self.server.get("/status").json()["state"] != "GENERATING"
            self.server.wait_for(len(self.seen) + 1)
            self.pauses.append(time.monotonic() - self.launched)

    def _signal(self, kind, when):
        server = self.server
        server.client.close()
        before = self._alive()
        mapped = {path for process in before for path in _mapped(process)}
        server.process.send_signal(kind)
        patience = LOST if "starting" in when else ENDING
        try:
            self.last = f"{when}: {server.process.wait(patience)}"
            psutil.wait_procs(before, timeout=LOST if kind is signal.SIGTERM else 0)
        except subprocess.TimeoutExpired:
            self.last = f"{when}: none in {patience:.0f} s"
        self.codes[self.last] += 1
        alive = self._alive()
        self.processes[when] += len(alive)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)
        for path in mapped | set(self.scratch.rglob("*")):
            with contextlib.suppress(OSError):
                self.bytes[when] += path.stat().st_blocks * 512
                self.files[f"{when}, {path.parent.name}"] += 1
                path.unlink()

    def _alive(self):
        """Return the processes of the server, which work in its directory, however they became
        orphans.
        """
        alive = []
        folder = str(self.server.data_dir)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == folder and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def _read(self):
        """Compare what is on disk with what was there before, and remember it."""
        stored = records(self.server)
        self.changed += sum(stored.get(nonce) != value for nonce, value in self.seen.items())
        self.seen = stored

    def end(self):
        """End the round and deliver what it owes."""
        self._continue()
        self.server.post("/stop").raise_for_status()
        self.receiver.trouble = 0.0
        with open_outbox(self.server.data_dir) as outbox:
            until(lambda: not outbox.counts()["pending"], 120, pause=0.2, said=self.server.tail)
        self.codes[f"at the end: {self.server.stop(grace=ENDING)}"] += 1
        self._read()

    def figures(self):
        """Return what was seen so far. A callback may be on its way until the end."""
        bodies = list(self.receiver.taken.values())
        received = [
            pair for body in bodies for pair in zip(body["nonces"], body["dist"], strict=True)
        ]
        valid = {nonce: distance for nonce, (distance, is_valid) in self.seen.items() if is_valid}
        with contextlib.closing(_database(self.server)) as database:
            states = dict(
                database.execute("SELECT status, count(*) FROM outbox GROUP BY status").fetchall()
            )
            intact = database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            (rounds,) = database.execute("SELECT count(*) FROM rounds").fetchone()
        odd = (
            name for name in self.codes if not name.startswith("SIGKILL") and "starting" not in name
        )
        return {
            "signals": dict(self.sent),
            "exit_codes": dict(self.codes),
            "terminations_without_exit_code_0": sum(
                self.codes[name] for name in odd if not name.endswith(": 0")
            ),
            "start_seconds_median": _median(self.starts),
            "seconds_to_new_nonces_median": _median(self.pauses),
            "rounds": rounds,
            "rounds_that_did_not_continue": self.stopped,
            "database_intact": intact,
            "records": len(self.seen),
            "lost_records": len(set(range(max(self.seen, default=-1) + 1)) - set(self.seen)),
            "changed_records": self.changed,
            "valid": len(valid),
            "callbacks": len(bodies),
            "sent_more_than_once": sum(count > 1 for count in self.receiver.copies.values()),
            "undelivered_nonces": len(set(valid) - {nonce for nonce, _ in received}),
            "nonces_in_two_callbacks": len(received) - len({nonce for nonce, _ in received}),
            "values_unlike_records": sum(
                valid.get(nonce) != distance for nonce, distance in received
            ),
            "callbacks_that_changed": len(self.receiver.changed),
            "dead_letters": states.get("dead", 0),
            "receiver": dict(self.receiver.moods),
            "processes_left": dict(self.processes),
            "files_left": dict(self.files),
            "mib_left": {when: round(count / 2**20, 1) for when, count in self.bytes.items()},
        }


def _mapped(process):
    """Return the files of shared memory that a process has mapped."""
    with contextlib.suppress(psutil.Error, OSError):
        return [
            Path(area.path) for area in process.memory_maps() if area.path.startswith(str(SHARED))
        ]
    return []


def _median(seconds):
    return round(statistics.median(seconds), 2) if seconds else None


def _database(server):
    return sqlite3.connect(server.data_dir / "service.sqlite3")


def records(server):
    """Return distance and validity of every nonce that is on disk."""
    with contextlib.closing(_database(server)) as database:
        rows = database.execute("SELECT nonce, distance, valid FROM records").fetchall()
    return {nonce: (distance, valid) for nonce, distance, valid in rows}


def uninterrupted(folder, count):
    """Return the first ``count`` records of the same round on a server that nothing interrupts."""
    with ForkedServer(folder, options=SMALL, environment=ENVIRONMENT) as server:
        server.begin("soak", **BLOCK)
        server.wait_for(count, timeout=3600.0)
        server.post("/stop").raise_for_status()
        server.stop(grace=ENDING)
        return {nonce: value for nonce, value in records(server).items() if nonce < count}


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("--signals", type=int, default=200, help="signals of each kind")
    options_parser.add_argument("--seed", type=int, default=20)
    options_parser.add_argument(
        "--minutes", type=float, default=1e9, help="send no more signals after so long"
    )
    chosen = options_parser.parse_args()
    kinds = [signal.SIGTERM, signal.SIGKILL] * chosen.signals
    random.Random(chosen.seed).shuffle(kinds)
    began = time.monotonic()
    receiver = FlakyReceiver(trouble=0.2, patience=1.0, seed=chosen.seed)

    def say(soak, **more):
        figures = {
            "seed": chosen.seed,
            "complete": bool(more),
            "seconds": round(time.monotonic() - began, 1),
        }
        figures |= soak.figures() | more
        with contextlib.redirect_stdout(sys.stdout if more else io.StringIO()):
            publish("vllm_soak", figures, chosen.output)
        return figures

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        environment = ENVIRONMENT | {"TMPDIR": str(scratch)}
        with ForkedServer(Path(folder, "data"), options=SMALL, environment=environment) as server:
            soak = Soak(server, receiver, scratch, seed=chosen.seed)
            server.begin("soak", url=receiver.url, **BLOCK)
            server.wait_for(1)
            for number, kind in enumerate(kinds, 1):
                if time.monotonic() - began > 60 * chosen.minutes:
                    break
                soak.send(kind)
                say(soak)
                note(f"{number} of {len(kinds)}: {soak.last}, {len(soak.seen)} records")
            soak.end()
            alone = uninterrupted(Path(folder, "alone"), len(soak.seen))
            unlike = sum(alone.get(nonce) != value for nonce, value in soak.seen.items())
            figures = say(soak, records_unlike_uninterrupted=unlike)
            receiver.close()
    return int(any(figures[name] for name in MUST_BE_ZERO))


if __name__ == "__main__":
    sys.exit(main())
