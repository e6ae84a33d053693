"""The kill loop of receipts: a service dies again and again while responses end, and what must hold
afterwards.
"""

import hashlib
import http.client
import json
import multiprocessing as mp
import random
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.poc.responses import Receipts
from tests.end_to_end.receiver import FlakyReceiver
from tests.end_to_end.server import PRELOAD, Server, write_to
from tests.waiting import until

RECEIPTS = "/api/v1/receipts"
MUST_BE_ZERO = (
    "lost_receipts",
    "changed_receipts",
    "undeleted_receipts",
    "traces_of_deleted",
    "unannounced_receipts",
)


class StoringServer(Server):
    """A service whose route ``/respond`` answers as a response does: when its receipt is on
    disk.
    """

    def __init__(self, directory: Path, url: str) -> None:
        super().__init__(directory, model="none")
        self._url = url

    def start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(
            [*PRELOAD, "tests.end_to_end.storing", "tests.poc.service.receipts"]
        )
        arguments = (str(self.data_dir), self.port, self._url, str(self.log))
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()


def _serve(data_dir: str, port: int, url: str, log: str) -> None:
    write_to(log)
    from fastapi import Request

    from assay.poc.net.server import listen, run_app
    from assay.poc.service import ServiceSettings, create_app
    from assay.poc.service.service_controller import Controller
    from tests.poc.service.conftest import Rig
    from tests.poc.service.receipts import header, receipt

    quick = {"callback_interval": 0.05, "callback_timeout": 0.5, "callback_attempts": 1000}
    quick |= {"callback_backoff": 0.02, "callback_backoff_max": 0.2, "receipt_callback_url": url}
    settings = ServiceSettings(data_dir=Path(data_dir), allow_private_callbacks=True, **quick)
    controller = Controller(Rig().deployment, settings)
    app = create_app(controller)
    sink = controller.receipts.sink(header())

    @app.post("/respond/{request_id}")
    async def respond(request_id: str, request: Request) -> dict[str, str]:
        tokens = int(request.query_params["tokens"])
        made = receipt(request_id, output=tuple(range(tokens)))
        sink.check()
        await sink.store(made)
        return {"sha256": hashlib.sha256(made.without_prompt().line().encode()).hexdigest()}

    with listen("127.0.0.1", port) as listener:
        run_app(app, settings, listener, runtime=controller)


@dataclass
class Client:
    """Asks for responses in a thread of its own, and notes those that it received whole."""

    name: str
    port: int
    seed: int
    whole: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    interrupted: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.ended.set()
        self._thread.join(60)
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            self._ask()
        except Exception as error:
            self.failure = error

    def _ask(self) -> None:
        rng = random.Random(self.seed)
        number = 0
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self.ended.is_set():
            try:
                if connection.sock is None:
                    connection.connect()
                if self.whole and rng.random() < 0.1:
                    # One that is not answered may have happened or not: the receipt counts for
                    # nothing from now on.
                    target = rng.choice(sorted(self.whole))
                    del self.whole[target]
                    assert _answer(connection, "DELETE", f"{RECEIPTS}/{target}") == {"deleted": 1}
                    self.deleted.add(target)
                else:
                    request_id = f"secret-{self.name}-{number}-{rng.getrandbits(64):016x}"
                    number = number + 1
                    answer = _answer(
                        connection, "POST", f"/respond/{request_id}?tokens={rng.randrange(1, 600)}"
                    )
                    self.whole[request_id] = answer["sha256"]
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                self.interrupted += not isinstance(error, ConnectionRefusedError)
                connection.close()
                time.sleep(0.02)
        connection.close()


def _answer(connection: http.client.HTTPConnection, method: str, path: str) -> Any:
    connection.request(method, path)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise AssertionError(f"{method} {path}: {response.status} {content[:300]!r}")
    return json.loads(content)


def kill_loop(
    directory: Path, *, kills: int, clients: int, seed: int, longest: float = 1.0
) -> dict[str, Any]:
    """Kill a service ``kills`` times while responses end, start it once more, and count."""
    rng = random.Random(seed)
    began = time.monotonic()
    receiver = FlakyReceiver(trouble=0.3, patience=0.5, seed=seed)
    server = StoringServer(directory, receiver.url)
    asking = [Client(str(i), server.port, seed * 1000 + i) for i in range(clients)]
    try:
        server.start()
        server.wait_for()
        for client in asking:
            client.start()
        for _ in range(kills):
            before = sum(len(client.whole) + len(client.deleted) for client in asking)
            until(
                lambda before=before: sum(len(c.whole) + len(c.deleted) for c in asking) != before,
                60,
            )
            time.sleep(rng.uniform(0.0, longest))
            server.kill()
            server.start()
            server.wait_for("/health")
        for client in asking:
            client.stop()
        receiver.trouble = 0.1
        server.wait_for()
        until(lambda: server.get("/api/v1/pow/snapshot")["callbacks"]["pending"] == 0, 120)
        kept = _kept(server)
        assert server.terminate() == 0, server.log.read_text()[-2000:]
    finally:
        for client in asking:
            client.ended.set()
        server.close()
        receiver.close()
    return _count(server.data_dir, asking, kept, receiver, kills, time.monotonic() - began)


def _kept(server: Server) -> dict[str, str]:
    """Fetch every receipt in files, each of which must be complete; return their hashes."""
    kept: dict[str, str] = {}
    after = 0
    more = True
    while more:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", f"{RECEIPTS}.jsonl?after={after}&limit=500")
        response = connection.getresponse()
        content = response.read()
        more = response.headers["receipts-more"] == "true"
        after = int(response.headers["receipts-last"])
        connection.close()
        if response.status == 200:
            for receipt in Receipts.parse("export", content).receipts:
                assert receipt.request_id not in kept
                kept[receipt.request_id] = hashlib.sha256(receipt.line().encode()).hexdigest()
    return kept


def _count(
    data_dir: Path,
    asking: list[Client],
    kept: dict[str, str],
    receiver: FlakyReceiver,
    kills: int,
    seconds: float,
) -> dict[str, Any]:
    whole = {name: digest for client in asking for name, digest in client.whole.items()}
    deleted = {name for client in asking for name in client.deleted}
    with sqlite3.connect(data_dir / "service.sqlite3") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    content = b"".join(path.read_bytes() for path in data_dir.glob("service.sqlite3*"))
    told = {
        (each["request_id"], each["sha256"])
        for body in list(receiver.taken.values())
        for each in body["receipts"]
    }
    return {
        "kills": kills,
        "seconds": round(seconds, 1),
        "responses": len(whole) + len(deleted),
        "interrupted": sum(client.interrupted for client in asking),
        "receipts": len(kept),
        "lost_receipts": len(whole.keys() - kept.keys()),
        "changed_receipts": sum(kept.get(name, digest) != digest for name, digest in whole.items()),
        "deleted": len(deleted),
        "undeleted_receipts": len(deleted & kept.keys()),
        "traces_of_deleted": sum(name.encode() in content for name in deleted),
        "callbacks": len(receiver.taken),
        "sent_more_than_once": sum(count > 1 for count in receiver.copies.values()),
        "unannounced_receipts": len(kept.items() - told),
    }
