"""The red team of the whole surface: attackers of one address while another client asks, and of
every reader of files.

    PYTHONPATH=. python research/benchmarks/redteam_surface.py --seconds 600 \
      -o research/results/redteam_surface.json

Every attacker holds what it can of a validator in a process of its own, from an address that is not
this machine's own (127.0.0.1), while a node sends callbacks. A row is held where at most one of
twelve is refused and ``/health`` is answered within a second. The readers get files that were
changed at random, or wrapped as another kind of file: each is read, or refused by an error of
assay. The published routes of a service are called as their schema allows and forbids.
"""

import argparse
import gzip
import http.client
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from assay.errors import AssayError
from assay.models.checkpoint import list_tensors
from assay.models.frame import Frame
from assay.poc import Calibration, NetworkPins, Proof
from assay.poc.responses import Receipts
from assay.poc.responses.adapters import load_adapter
from assay.poc.responses.requests import read_requests
from assay.poc.service import ServiceSettings
from assay.poc.validator.registry import Registry
from assay.poc.verdict import Ledger
from assay.poc.verdict.ledger_audit import audit_ledger
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.delta_file import read_delta_lengths
from assay.vhack.pairs.pairs import read_pairs
from tests.end_to_end.server import Server
from tests.poc.service.conftest import signed
from tests.poc.service.receipts import header, receipt
from tests.poc.validator.conftest import API, KEYS, proof_of, secret_of
from tests.poc.validator.senders import ValidatorServer, write_network
from tests.poc.verdict.ledgers import filled

KEY = "redteam-" + "k" * 20
HONEST = 12
PAUSE = 0.4  # callbacks while an attacker holds what it holds, and seconds between two
Address = tuple[str, int]
TOKENS = (
    b'NaN|1e999|-1|null|{}|[[[[[[[[[[[[[[[[[[|"\\ud800"|\x00|\xff|99999999999999999999|\r\n\n|true'
).split(b"|")


def own_address() -> str | None:
    """Return an address of this machine under which it counts as another one; None without a
    network.
    """
    for elsewhere in ("192.0.2.1", "198.51.100.1"):  # of documentation; nothing is sent
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((elsewhere, 9))
            return str(probe.getsockname()[0])
    return None


def connect(address: Address, text: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address, timeout=20)
    with suppress(OSError):
        connection.sendall(text)
    return connection


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *lines, "", ""]).encode()


def idle(address: Address, stop: threading.Event) -> list[socket.socket]:
    """1024 connections that ask nothing."""
    return [connect(address) for _ in range(1024)]


def stalled_bodies(address: Address, stop: threading.Event) -> list[socket.socket]:
    """64 bodies of which two bytes are missing."""
    start = head("POST", f"{API}/generated", f"content-length: {2**20}")
    return [connect(address, start + b"x" * (2**20 - 2)) for _ in range(64)]


def small_bodies(address: Address, stop: threading.Event) -> list[socket.socket]:
    """512 bodies of 60 KiB of which two bytes are missing."""
    start = head("POST", f"{API}/generated", "content-length: 61440")
    return [connect(address, start + b"x" * 61438) for _ in range(512)]


def again(stop: threading.Event, pause: float, step: Callable[..., object], *given: object) -> None:
    """Take a step again and again, in a thread."""

    def run() -> None:
        while not stop.wait(pause):
            with suppress(OSError):
                step(*given)

    threading.Thread(target=run, daemon=True).start()


def slow_heads(address: Address, stop: threading.Event) -> list[socket.socket]:
    """256 heads of which a byte comes now and then."""
    connections = [connect(address, b"GET /health HTTP/1.1\r\na: ") for _ in range(256)]

    def drip() -> None:
        for connection in connections:
            with suppress(OSError):
                connection.send(b"b")

    again(stop, 1.0, drip)
    return connections


def pipelined(address: Address, stop: threading.Event) -> list[socket.socket]:
    """Requests one after the other, of which no answer is read."""
    connection = connect(address)
    again(stop, 0.0, connection.sendall, head("GET", "/health") * 1000)
    return [connection]


def streams(address: Address, stop: threading.Event) -> list[socket.socket]:
    """32 event streams of one key, which are not read."""
    return [
        connect(address, head("GET", f"{API}/events", f"authorization: Bearer {KEY}"))
        for _ in range(32)
    ]


def open_and_close(address: Address, stop: threading.Event) -> list[socket.socket]:
    """Some hundred connections a second, closed with a reset as soon as they are open."""

    def open_one() -> None:
        with connect(address, b"GET /hea") as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    again(stop, 0.002, open_one)
    return []


def full_share(address: Address, stop: threading.Event) -> list[socket.socket]:
    """Messages of another node, until its share of the disk is full."""
    body = json.dumps({"public_key": KEYS[1], "fraud_detected": False, "text": "x" * 2**16})
    sent = (signed(secret_of(KEYS[1]), body, f"full_{time.time_ns()}") for _ in range(2**10))
    while ask(address[1], "POST", f"{API}/validated", body, **next(sent))[0] == 200:
        pass
    return []


def resident(pid: int) -> int:
    """Return the resident MiB of a process."""
    return int(psutil.Process(pid).memory_info().rss) >> 20


ATTACKS = (
    idle,
    stalled_bodies,
    small_bodies,
    slow_heads,
    pipelined,
    streams,
    open_and_close,
    full_share,
)


def ask(port: int, method: str, path: str, body: str = "", **headers: str) -> tuple[int, float]:
    """Return status and seconds of a request of this machine; status 0 where none came."""
    began = time.monotonic()
    status = 0
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with suppress(OSError, http.client.HTTPException), closing(client):
        client.request(method, path, body or None, headers)
        status = client.getresponse().status
    return status, time.monotonic() - began


def attack(
    server: Server, hold: Callable[[Address, threading.Event], list[socket.socket]], place: str
) -> dict[str, Any]:
    """Let an attacker hold what it can while a node sends; return what the node and ``/health``
    saw.
    """
    stop = threading.Event()
    refused = 0
    slowest = 0.0
    before = resident(server.pid)
    held_open = hold((place, server.port), stop)
    try:
        for number in range(HONEST):
            body = json.dumps(
                {"public_key": KEYS[0], "fraud_detected": False, "n": number, "of": hold.__name__}
            )
            sent = signed(secret_of(KEYS[0]), body, f"{hold.__name__}_{number}_{time.time_ns()}")
            refused += ask(server.port, "POST", f"{API}/validated", body, **sent)[0] != 200
            slowest = max(slowest, ask(server.port, "GET", "/health")[1])
            time.sleep(PAUSE)
    finally:
        stop.set()
        for connection in held_open:
            connection.close()
    result = {
        "attack": hold.__name__,
        "refused": refused,
        "of": HONEST,
        "slowest_health": round(slowest, 3),
    }
    result |= {"mib_before": before, "mib_after": resident(server.pid)}
    return result | {"held": refused <= 1 and slowest <= 1.0}


@contextmanager
def network(directory: Path, model: Any, checkpoint: Path) -> Iterator[ValidatorServer]:
    """Run a validator of three nodes that others reach."""
    write_network(directory, model, KEYS)
    keys = directory / "keys"
    keys.write_text(KEY)
    (config := directory / "assay.toml").write_text(f"[poc.validator]\nmax_kept = {2**22}\n")
    flags = ("--host", "0.0.0.0", "--api-key-file", str(keys), "--config", str(config))
    server = ValidatorServer(directory, *flags, model=checkpoint)
    server.start()
    try:
        server.wait_for("/health")
        yield server
    finally:
        server.close()


def samples(directory: Path, model: Any) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """Return a whole file of every kind with what reads it."""
    write_network(directory, model, KEYS)
    proof_of(model, KEYS[0]).save(directory / "proof.jsonl")
    Receipts.build(header(), (receipt("a"), receipt("b")), 1.0).save(directory / "receipts.jsonl")
    (directory / "requests.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": [1, 2], "temperature": 0.5}\n'
    )
    pair = {"prompt": "p", "clean": "c", "hack": "h", "group": "g"}
    (directory / "pairs.jsonl").write_text(
        "".join(json.dumps(pair | {"prompt": str(i)}) + "\n" for i in range(4))
    )
    filled(directory / "ledger.sqlite3")
    with Ledger(directory / "ledger.sqlite3") as ledger:
        ledger.export(directory / "export.jsonl")
    Basis({"q": torch.eye(2, 4)}, {"q": torch.ones(2)}, {"q": torch.tensor([[5, 1]] * 2)}).save(
        directory / "basis"
    )
    ones = np.ones(4, np.float32)
    Frame(
        "0" * 64, "trained", rows=8, left_out=np.array([0], np.int32), mean=0 * ones, scale=ones
    ).save(directory / "frame")
    save_file({"q": torch.ones(4)}, directory / "delta", metadata={"schema": "assay.delta_s/1"})
    factors = {f"base_model.model.a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(factors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "peft_type": "LORA"}')
    save_file({"a": torch.ones(4)}, directory / "model.safetensors")
    paths = readers(directory)
    for name, read in paths.items():
        read(directory / name)  # as it is
    return {name: ((directory / name).read_bytes(), read) for name, read in paths.items()}


def readers(directory: Path) -> dict[str, Callable[[Path], object]]:
    """Return what reads each kind of file of a folder, by its name there."""
    return {
        "proof.jsonl": Proof.load,
        "receipts.jsonl": Receipts.load,
        "pins.toml": NetworkPins.load,
        "nodes.toml": lambda path: Registry.load(directory / "pins.toml", path, ServiceSettings()),
        "calibration.json": Calibration.load,
        "requests.jsonl": read_requests,
        "pairs.jsonl": read_pairs,
        "export.jsonl": audit_ledger,
        "basis": Basis.load,
        "frame": Frame.load,
        "delta": read_delta_lengths,
        "adapter_model.safetensors": lambda path: load_adapter(path.parent),
        "adapter_config.json": lambda path: load_adapter(path.parent),
        "model.safetensors": lambda path: list_tensors(path.parent),
    }


def changed(whole: bytes, chance: random.Random) -> bytes:
    """Return a file that was cut, doubled, flipped or spoiled, or is one of another kind."""
    place = chance.randrange(len(whole))
    kind = chance.randrange(10)
    if kind == 0:
        return whole[:place]
    if kind == 1:
        return whole + whole[place:]
    if kind == 2:
        return whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
    if kind == 3:
        return chance.choice((b"\xef\xbb\xbf", b"\n\n", b"[", b"PK\x03\x04", b"PAR1")) + whole
    if kind == 4:
        return chance.choice(
            (gzip.compress(whole[:1000]), whole[:1000].decode("latin-1").encode("utf-16"))
        )
    end = min(len(whole), place + chance.choice((0, 1, 8, 100)))
    return whole[:place] + chance.choice(TOKENS) + whole[end:]


def read_changed(
    name: str, whole: bytes, read: Callable[[Path], object], seconds: float, seed: int, beside: Path
) -> dict[str, Any]:
    """Read changed files until the time is over; return how many were refused, and the first that
    was neither.
    """
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    counts = [0, 0]
    fault = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if name.startswith("adapter"):  # the two files of an adapter lie beside each other
            for file in beside.glob("adapter*"):
                shutil.copy(file, folder)
        while fault is None and time.monotonic() < until:
            path.write_bytes(changed(whole, chance))
            try:
                read(path)
                counts[0] += 1
            except AssayError:
                counts[1] += 1
            except BaseException as error:
                fault = f"{type(error).__name__}: {error}"[:300]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10
    result = {
        "attack": f"files like {name}",
        "read": counts[0],
        "refused": counts[1],
        "fault": fault,
    }
    return result | {"mib_grown": grown, "held": fault is None}


def follow(directory: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Let atheris find files that reach every line of every reader; what is not run has not
    held.
    """
    if find_spec("atheris") is None:
        yield {
            "attack": "atheris over every reader",
            "says": "not run: atheris is not installed",
            "held": False,
        }
        return
    script = Path(__file__).with_name("atheris_readers.py")
    command = [sys.executable, str(script), str(directory), "--seconds", str(max(1, int(seconds)))]
    finished = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    )
    rows = [
        json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"attack"')
    ]
    for row in rows or [{"attack": "atheris over every reader", "held": False}]:
        yield row | ({} if row["held"] else {"says": finished.stderr[-3000:]})


def call_routes(directory: Path, checkpoint: Path, seconds: float) -> dict[str, Any]:
    """Call every published route of a service, as its schema allows and forbids."""
    keys = directory / "keys"
    keys.write_text(KEY)
    server = Server(directory, "--api-key-file", str(keys), model=checkpoint)
    server.start()
    try:
        server.wait_for("/ready")
        before = resident(server.pid)
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{server.base}/openapi.json",
        ]
        command += [
            "-H",
            f"Authorization: Bearer {KEY}",
            "--checks",
            "not_a_server_error",
            "--no-color",
        ]
        command += ["--max-time", str(int(seconds)), "--exclude-path-regex", "/events$"]
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 300, check=False
        )
        result = {
            "attack": "published routes",
            "says": finished.stdout[-500:],
            "mib_before": before,
        }
        return result | {"mib_after": resident(server.pid), "held": finished.returncode == 0}
    finally:
        server.close()


def run(directory: Path, model: Any, checkpoint: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Run every attacker for a part of the time; yield a row of each."""
    place = own_address() or "127.0.0.1"
    folders = [directory / name for name in ("validator", "files", "service")]
    for folder in folders:
        folder.mkdir()
    with network(folders[0], model, checkpoint) as server:
        began = time.monotonic()
        memory = list[int]()
        while not memory or time.monotonic() - began < seconds:
            yield from (
                attack(server, hold, place) | {"own_address": place != "127.0.0.1"}
                for hold in ATTACKS
            )
            memory.append(resident(server.pid))
        yield {
            "attack": "all of these in turn",
            "mib": memory,
            "held": memory[-1] - memory[0] <= 64,
        }
    for seed, (name, (content, read)) in enumerate(samples(folders[1], model).items()):
        yield read_changed(name, content, read, seconds / 16, seed, folders[1])
    yield from follow(folders[1], seconds / 16)
    yield call_routes(folders[2], checkpoint, seconds)


def main() -> int:
    """Run, say what held, and write the rows to a file; return 1 where one did not hold."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--seconds", type=float, default=600.0, help="of each of the three parts")
    options.add_argument("-o", "--output", type=Path)
    chosen = options.parse_args()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from assay.models import load_model
    from conftest import SMALL

    rows = list[dict[str, Any]]()
    with ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(directory / "small")
        model = load_model(directory / "small", dtype="float32", device="cpu")
        for row in run(directory, model, directory / "small", chosen.seconds):
            print(
                "held    " if row["held"] else "NOT HELD",
                json.dumps(row, ensure_ascii=False)[:300],
                flush=True,
            )
            rows.append(row)
    if chosen.output:
        report = {
            "schema": "assay.redteam/1",
            "seconds": chosen.seconds,
            "cores": os.cpu_count(),
            "rows": rows,
        }
        chosen.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(not all(row["held"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
